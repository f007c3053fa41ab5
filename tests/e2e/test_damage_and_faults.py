"""Runs whose files are damaged, and disks that are full, by the commands."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tav_jax import check, sample, tune
from tav_jax.runs.run import Run


def largest(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def test_a_whole_run_is_found_whole_and_not_changed(finished_run, cli):
    before = {path: path.stat().st_mtime_ns for path in finished_run.folder.rglob("*")}
    outcome = cli(check, finished_run.folder)
    assert (outcome.status, outcome.err) == (0, "")
    assert "2 checkpoints, 2 inverted clips, 10 videos: all whole" in outcome.out
    assert before == {path: path.stat().st_mtime_ns for path in finished_run.folder.rglob("*")}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("config.yaml", lambda path: path.write_text("seed: [")),
        ("inputs.json", cut),
        ("metrics.jsonl", lambda path: path.write_text("{}\n")),
        ("metrics.jsonl", lambda path: path.write_text("5\n")),
        ("checkpoints/3", lambda path: flip_a_bit(largest(path))),
        ("checkpoints/6", lambda path: shutil.rmtree(path / "progress")),
        ("inv_latents/ddim_latent-4.npy", flip_a_bit),
        ("samples/sample-6/a cat.json", lambda path: path.write_text("[1]")),
        ("samples/sample-6/a cat.mp4", cut),
        ("samples/sample-6/contact-sheet.png", cut),
    ],
)
def test_check_lists_what_is_damaged(name, harm, run_copy, cli):
    harm(run_copy / name)
    outcome = cli(check, run_copy)
    assert outcome.status == 1
    assert "error: " in outcome.err
    assert f"{name}: " in outcome.err
    assert "Traceback" not in outcome.err


def test_check_lists_what_an_earlier_version_wrote(run_copy, cli):
    (run_copy / "checkpoints/3/digests.json").unlink()
    latents = run_copy / "inv_latents/ddim_latent-4.npy"
    np.save(latents, np.load(latents))
    outcome = cli(check, run_copy)
    assert (outcome.status, outcome.err) == (0, "")
    for path in (run_copy / "checkpoints/3", latents):
        assert f"unverified: {path}: " in outcome.out


def test_check_needs_a_run(tmp_path, cli):
    outcome = cli(check, tmp_path)
    assert outcome.status == 1
    assert "is not a run of tav_jax.tune" in outcome.err


def test_sample_falls_back_and_refuses_a_damaged_step(run_copy, cli, tmp_path):
    flip_a_bit(largest(run_copy / "checkpoints/6/trained"))
    asked = ("--run", run_copy, "--prompt", "a cat", "--random-noise", "--num-inference-steps", 1)
    output = ("--output-dir", tmp_path / "videos")
    refused = cli(sample, *asked, *output, "--step", 6)
    assert refused.status == 1
    assert refused.err.count("\n") == 1
    assert "checkpoints/6 is damaged: trained/" in refused.err
    fallen_back = cli(sample, *asked, *output)
    assert fallen_back.status == 0, fallen_back.err
    assert "checkpoints/6 is damaged (trained/" in fallen_back.out
    assert "sampling from 3" in fallen_back.out
    assert {path.name for path in (run_copy / "checkpoints").iterdir()} == {"3", "6"}


def test_with_all_checkpoints_damaged_nothing_is_changed(run_copy, cli):
    for step in (3, 6):
        largest(run_copy / f"checkpoints/{step}/trained").write_bytes(b"")
    before = {path: path.stat().st_mtime_ns for path in (run_copy / "checkpoints").rglob("*")}
    config = ("--config", run_copy / "config.yaml", f"output_dir={run_copy}")
    for outcome in (cli(tune, *config), cli(sample, "--run", run_copy, "--prompt", "a cat")):
        assert outcome.status == 1
        assert outcome.err.count("\n") == 1
        assert "every checkpoint is damaged: 6 (trained/" in outcome.err
        assert "; 3 (trained/" in outcome.err
    assert before == {
        path: path.stat().st_mtime_ns for path in (run_copy / "checkpoints").rglob("*")
    }


@pytest.mark.parametrize("harm", ["flipped", "not finite", "another shape"])
def test_damaged_latents_are_kept_aside_and_made_again(harm, run_copy, capsys):
    run = Run.open(run_copy)
    path = run.inverted_file(6)
    expected = np.load(path)
    if harm == "flipped":
        flip_a_bit(path)
    else:  # as an earlier version may have left it, without a digest
        np.save(path, expected * np.nan if harm == "not finite" else expected[:, :2])
    damaged = path.read_bytes()
    latents = run.inverted_latents(run.load_model(6), 6, 3)
    np.testing.assert_allclose(np.asarray(latents), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.load(path), np.asarray(latents))
    assert path.with_name(f"{path.name}.damaged").read_bytes() == damaged
    assert "inverting again" in capsys.readouterr().out


def test_a_limit_on_files_is_one_line_and_leaves_no_half_checkpoint(write_config, tmp_path):
    # RLIMIT_FSIZE stands for quotas and full disks; tests/campaign/faults.py mounts real ones.
    config, run = write_config(validation_data={"prompts": []}), tmp_path / "run"
    code = (
        "import resource, sys; from tav_jax import tune; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY)); "
        f"sys.exit(tune.main(['--config', {str(config)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"{run}/checkpoints/3: cannot be written: File too large" in errors[0]
    assert list((run / "checkpoints").iterdir()) == []


def rename(run):
    run.rename(run.with_name("renamed"))


def replace_by_empty(run):
    rename(run)
    run.mkdir()


def replace_by_file(run):
    rename(run)
    run.write_text("a file")


@pytest.mark.parametrize("harm", [shutil.rmtree, rename, replace_by_empty, replace_by_file])
def test_a_run_whose_folder_is_removed_ends_with_status_1(harm, start, write_config, tmp_path):
    run = tmp_path / "run"
    config = write_config(
        validation_data={"prompts": []}, max_train_steps=5000, checkpointing_steps=5000
    )
    process = start("-m", "tav_jax.tune", "--config", config)
    try:
        deadline = time.monotonic() + 600
        while process.poll() is None and not (
            (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size
        ):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        harm(run)
        _, err = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == 1, err
    assert f"error: {run / 'config.yaml'} is gone: the run's folder was removed" in err
    assert "Traceback" not in err
    if harm == replace_by_file:
        assert run.read_text() == "a file"
    elif harm == replace_by_empty:
        assert list(run.iterdir()) == []
    else:
        assert not run.exists()
