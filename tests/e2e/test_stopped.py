"""Commands that a signal stops, files of those that were killed, and output that nobody reads."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from run_lines import read_metrics

from tav_jax import batch, sample, tune
from tav_jax.files import atomic_write

PATIENCE = 600  # seconds, for cores that do much else


@pytest.fixture(autouse=True)
def hangups_arrive():
    """Tests may run under `nohup`, whose processes would pass on that SIGHUP is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def wait_for(condition, process):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate(timeout=PATIENCE)
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ended(process):
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def steps_of(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def has_more_steps(run, than):
    return (run / "metrics.jsonl").is_file() and len(read_metrics(run)) > than


def hidden(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_a_run_that_is_asked_to_stop_saves_its_last_step_and_goes_on_from_it(
    start, write_config, tmp_path
):
    config = write_config(
        validation_data={"prompts": []}, max_train_steps=100_000, checkpointing_steps=100_000
    )
    run, command = tmp_path / "run", ("-m", "tav_jax.tune", "--config", config)
    stopped_at = [0]
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        process = start(*command)
        wait_for(partial(has_more_steps, run, stopped_at[-1]), process)
        process.send_signal(number)
        status, out, err = ended(process)
        (step,) = set(steps_of(run)) - set(stopped_at)
        saved = f"saved {run / 'checkpoints'}/{step}"
        assert err == f"{number.name}: {saved}; the same command goes on from there\n"
        assert status == 128 + number
        assert [line["step"] for line in read_metrics(run)] == list(range(1, step + 1))
        assert not hidden(run)
        goes_on = f"going on from {run / 'checkpoints'}/{stopped_at[-1]}\n" in out
        assert goes_on == (stopped_at[-1] > 0)
        stopped_at.append(step)


def test_what_is_trained_is_saved_while_the_run_samples(start, write_config, tmp_path):
    config = write_config(validation_data={"num_inference_steps": 999})
    run = tmp_path / "run"
    process = start("-m", "tav_jax.tune", "--config", config)
    # After step 4, which is no checkpoint's, three times 999 steps are to be sampled.
    wait_for((run / "inv_latents/ddim_latent-4.npy").exists, process)
    process.send_signal(signal.SIGTERM)
    status, _, err = ended(process)
    saved = run / "checkpoints/4"
    assert err == f"SIGTERM: saved {saved}; the same command goes on from there\n"
    assert status == 143
    assert steps_of(run) == [3, 4]
    assert not hidden(run)


@pytest.mark.parametrize("line", ["compiling the step", "tuning "])
def test_an_interrupt_before_the_first_step_ends_a_run(start, write_config, tmp_path, line):
    config = write_config(validation_data={"prompts": []}, max_train_steps=100_000)
    process = start("-m", "tav_jax.tune", "--config", config)
    for said in process.stdout:
        if said.startswith(line):
            break
    process.send_signal(signal.SIGINT)
    status, _, err = ended(process)
    assert status == 130
    assert err.startswith("SIGINT: ")
    assert err.endswith(("; the same command goes on\n", "; the same command goes on from there\n"))
    assert err.count("\n") == 1


def test_an_interrupt_among_the_imports_shows_no_traceback(start):
    process = start(
        "-m", "tav_jax.tune", "--config", "none", environment={"PYTHONPROFILEIMPORTTIME": "1"}
    )
    for line in process.stderr:
        if line.rstrip().endswith(" numpy"):  # and JAX is still to come
            break
    process.send_signal(signal.SIGINT)
    status, _, err = ended(process)
    assert status in (-signal.SIGINT, 130)
    assert "Traceback" not in err


def dead_partial(folder, suffix=".mp4"):
    folder.mkdir(exist_ok=True)
    path = folder / f".partial-0123456789abcdef-01234567{suffix}"
    path.write_text("half")
    return path


def test_what_killed_processes_left_goes_at_the_next_start(run_copy, cli, tmp_path):
    own = [run_copy, run_copy / "inv_latents", run_copy / "samples/sample-6"]
    edits = tmp_path / "edits"
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"runs: [{run_copy}]\nprompts: [a cat]\n")
    commands = [
        ((tune, "--config", run_copy / "config.yaml", f"output_dir={run_copy}"), own),
        ((sample, "--run", run_copy, "--prompt", "a cat"), own),
        ((sample, "--run", run_copy, "--prompt", "a cat", "--output-dir", edits), [edits]),
        ((batch, plan), own),
    ]
    with atomic_write(run_copy / "samples/sample-6/another's.mp4") as living:
        living.write_text("half")
        for command, folders in commands:
            dead = [dead_partial(folder) for folder in folders]
            outcome = cli(*command)
            assert outcome.status == 0, outcome.err
            assert not [path for path in dead if path.exists()], command
            assert living.exists()
        assert hidden(run_copy) == [living]


def test_a_video_is_made_although_its_writer_was_killed(start, cli, finished_run, tmp_path):
    folder = tmp_path / "edits"
    seeds = "--seeds=" + ",".join(map(str, range(30)))
    command = ["--run", finished_run.folder, "--prompt", "a", "--random-noise", seeds]
    command += ["--num-inference-steps", 1, "--output-dir", folder]
    process = start("-m", "tav_jax.sample", *command)
    wait_for(lambda: list(folder.glob(".partial-*")), process)
    process.kill()
    process.wait(timeout=PATIENCE)
    assert cli(sample, *command).status == 0
    assert not hidden(folder)
    assert len(list(folder.glob("a-*.mp4"))) == 30


def run_in_shell(command, redirection):
    done = subprocess.run(
        [
            "bash",
            "-c",
            f"{sys.executable} -m tav_jax.{command} {redirection}; exit ${{PIPESTATUS[0]}}",
        ],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_commands_finish_when_nobody_reads_what_they_print(write_config, finished_run, tmp_path):
    run_in_shell(f"tune --config {write_config(validation_data={'prompts': []})}", "2>&1 | head -1")
    assert steps_of(tmp_path / "run") == [3, 6]
    edits = tmp_path / "edits"
    prompts = f"--prompt a --prompt b --output-dir {edits}"
    run_in_shell(f"sample --run {finished_run.folder} {prompts}", "| head -1")
    assert {path.stem for path in edits.glob("*.json")} == {"a", "b"}


@pytest.mark.parametrize("redirection", ["| head -1", "| true", ">&-"])
def test_help_that_nobody_reads_is_no_error(redirection):
    run_in_shell("bench --help", redirection)
