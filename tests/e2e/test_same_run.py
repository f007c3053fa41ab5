"""A run goes on with what it began with: its clip, its model, one process, its finished steps."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from run_lines import losses
from safetensors.numpy import load_file, save_file

from tav_jax import batch, sample, tune
from tav_jax.runs.lock import lock_run
from tav_jax.video.read import read_frames
from tav_jax.video.write import write_video

NO_SAMPLES = {"validation_data": {"prompts": []}}
SHORT = NO_SAMPLES | {"max_train_steps": 2, "checkpointing_steps": 1}


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("[!.]*") if path.is_file()}


def error_of(outcome):
    """The one line of a command that has refused."""
    assert outcome.status == 1
    [error] = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert error == outcome.err.splitlines()[-1]
    assert len(error) < 500
    assert "delete" not in error
    return error


@pytest.fixture
def model(material, tmp_path):
    """A copy of the model."""
    return Path(shutil.copytree(material.model, tmp_path / "model"))


@pytest.fixture
def clip(material, tmp_path):
    """A copy of the clip."""
    return Path(shutil.copy(material.clip, tmp_path / "input.mp4"))


@pytest.fixture
def moved(run_copy, model, clip):
    """The finished run, of which a copy of the model and the clip are said to be its inputs."""
    config = yaml.safe_load((run_copy / "config.yaml").read_text())
    config["pretrained_model_path"] = str(model)
    config["train_data"]["video_path"] = str(clip)
    config["output_dir"] = str(run_copy)
    (run_copy / "config.yaml").write_text(yaml.safe_dump(config))
    return run_copy


def change_unet(model):
    path = model / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1
    save_file(tensors, path)


def replace_clip(clip):
    video = read_frames(clip, n_sample_frames=12, width=64, height=64)
    write_video(clip, 255 - video)


# Its clip and its model.


def test_a_killed_run_does_not_go_on_on_a_clip_that_was_put_in_the_place_of_its_own(
    start, write_config, cli, clip, tmp_path
):
    # At the same path and under the same name, as scripts with an input.mp4 do it.
    data = {"train_data": {"video_path": str(clip)}}
    config = write_config(**NO_SAMPLES, **data, max_train_steps=3000, checkpointing_steps=2)
    process = start("-m", "tav_jax.tune", "--config", config)
    deadline = time.monotonic() + 600
    while not (tmp_path / "run/checkpoints/2").is_dir():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=600)
    replace_clip(clip)
    before = contents(tmp_path / "run")
    error = error_of(cli(tune, "--config", config))
    assert f"{tmp_path / 'run'} was tuned on other frames than {clip} has now" in error
    assert contents(tmp_path / "run") == before


def test_a_run_is_not_sampled_with_another_clip_but_without_one(moved, cli, clip, tmp_path):
    kept = clip.read_bytes()
    replace_clip(clip)
    before = contents(moved)
    (tmp_path / "plan.yaml").write_text(f"runs: [{moved}]\nprompts: [a dog]\n")
    for command in ((sample, "--run", moved, "--prompt", "a dog"), (batch, tmp_path / "plan.yaml")):
        assert "was tuned on other frames" in error_of(cli(*command))
        assert contents(moved) == before
    clip.unlink()
    assert cli(sample, "--run", moved, "--prompt", "a dog").status == 0
    clip.write_bytes(kept)
    assert cli(sample, "--run", moved, "--prompt", "a bird").status == 0


def test_a_model_that_has_moved_is_named_to_each_command(moved, cli, model, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(model, elsewhere)
    shutil.rmtree(model)
    (tmp_path / "plan.yaml").write_text(f"runs: [{moved}]\nprompts: [a bird]\n")
    of_sample = sample, "--run", moved, "--prompt", "a dog"
    of_batch = batch, tmp_path / "plan.yaml"
    for command in (of_sample, of_batch):
        error = error_of(cli(*command))
        assert f"no folder '{model}'" in error
        assert "give --model DIR" in error
        assert cli(*command, "--model", elsewhere).status == 0
    again = cli(tune, "--config", moved / "config.yaml", f"pretrained_model_path={elsewhere}")
    assert "done, 6 of 6 steps" in again.out
    recorded = yaml.safe_load((moved / "config.yaml").read_text())
    assert recorded["pretrained_model_path"] == str(elsewhere)


def test_another_model_is_refused_by_each_command(moved, cli, model, tmp_path):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    change_unet(other)
    config = moved / "config.yaml"
    before = contents(moved)
    (tmp_path / "plan.yaml").write_text(f"runs: [{moved}]\nprompts: [a bird]\n")
    for command in (
        (sample, "--run", moved, "--prompt", "a dog", "--model", other),
        (batch, tmp_path / "plan.yaml", "--model", other),
        (tune, "--config", config, f"pretrained_model_path={other}"),
    ):
        error = error_of(cli(*command))
        assert f"than {other} is: unet/diffusion_pytorch_model.safetensors differs" in error
        assert contents(moved) == before
    change_unet(model)
    assert "unet/" in error_of(cli(sample, "--run", moved, "--prompt", "a dog"))


def test_a_run_without_digests_is_opened_as_before_and_gets_them(moved, cli, model):
    (moved / "inputs.json").unlink()
    assert cli(sample, "--run", moved, "--prompt", "a dog").status == 0
    ended = cli(sample, "--run", moved, "--prompt", "a bird", "--model", model)
    assert ended.status == 0
    assert f"warning: {moved} has no digests of its model's files" in ended.err
    assert not (moved / "inputs.json").exists()
    assert cli(tune, "--config", moved / "config.yaml").status == 0
    record = json.loads((moved / "inputs.json").read_text())
    assert record["clip"]["shape"] == [4, 32, 32, 3]
    assert "unet/config.json" in record["model"]


# Finished runs.


def test_a_finished_run_goes_on_as_one_that_was_to_have_all_the_steps(cli, write_config, tmp_path):
    whole = {"max_train_steps": 4, "checkpointing_steps": 2} | NO_SAMPLES
    assert cli(tune, "--config", write_config(**whole, output_dir=str(tmp_path / "a"))).status == 0
    config = write_config(**whole | {"max_train_steps": 2}, output_dir=str(tmp_path / "b"))
    assert cli(tune, "--config", config).status == 0
    again = cli(tune, "--config", config, "max_train_steps=4")
    assert again.status == 0, again.err
    assert "steps 3 to 4" in again.out
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert yaml.safe_load((tmp_path / "b/config.yaml").read_text())["max_train_steps"] == 4
    fewer = error_of(cli(tune, "--config", config, "max_train_steps=3"))
    assert "4 steps are done already, 3 here" in fewer


def test_a_finished_run_samples_new_prompts_and_keeps_its_videos(run_copy, finished_run, cli):
    made = contents(run_copy / "samples")
    arguments = ["--config", finished_run.config, f"output_dir={run_copy}"]
    again = cli(tune, *arguments, "validation_data.prompts=[a dog, a cat]")
    assert again.status == 0, again.err
    assert f"wrote {run_copy / 'samples/sample-6/a dog.mp4'}" in again.out
    now = contents(run_copy / "samples")
    videos = [path for path in made if path.parent.name == "sample-6" and path.suffix == ".json"]
    assert all(now[path] == made[path] for path in videos)
    assert all(now[p.with_suffix(".mp4")] == made[p.with_suffix(".mp4")] for p in videos)
    recorded = yaml.safe_load((run_copy / "config.yaml").read_text())
    assert recorded["validation_data"]["prompts"] == ["a dog", "a cat"]


def test_videos_of_other_settings_are_kept_and_the_way_on_is_said(run_copy, finished_run, cli):
    before = contents(run_copy)
    arguments = ["--config", finished_run.config, f"output_dir={run_copy}"]
    ended = cli(tune, *arguments, "validation_data.guidance_scale=3")
    assert "was made with other settings (guidance_scale 12.5 there, 3.0 here)" in ended.err
    assert "`python -m tav_jax.sample` makes one with these" in error_of(ended)
    assert contents(run_copy) == before


# One process.


def test_of_two_commands_at_once_one_is_refused_in_a_line(start, write_config, tmp_path):
    config = write_config(**SHORT)
    both = [start("-m", "tav_jax.tune", "--config", config) for _ in range(2)]
    said = [process.communicate(timeout=600) for process in both]
    for process, (_, err) in zip(both, said, strict=True):
        if process.returncode:
            assert process.returncode == 1
            assert f"error: output_dir: {tmp_path / 'run'} is in use by another process" in err
            assert "Traceback" not in err
    # On a busy machine the second may come when the first has ended, and then finds all done.
    assert 0 in [process.returncode for process in both]
    assert (tmp_path / "run/checkpoints/2").is_dir()
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_a_run_in_use_is_not_tuned_but_sampled(moved, cli, tmp_path):
    with lock_run(moved):
        before = contents(moved)
        error = error_of(cli(tune, "--config", moved / "config.yaml"))
        assert f"{moved} is in use by another process" in error
        assert contents(moved) == before
        assert cli(sample, "--run", moved, "--prompt", "a dog").status == 0
        (tmp_path / "plan.yaml").write_text(f"runs: [{moved}]\nprompts: [a bird]\n")
        assert cli(batch, tmp_path / "plan.yaml").status == 0


def test_of_several_clips_none_begins_if_the_run_of_one_is_in_use(cli, write_config, tmp_path):
    clips = tmp_path / "clips.yaml"
    runs = [tmp_path / "runs" / name for name in ("a", "b")]
    clips.write_text(yaml.safe_dump([{"output_dir": str(run)} for run in runs]))
    with lock_run(runs[1]):
        error = error_of(cli(tune, "--config", write_config(**SHORT), "--clips", clips))
    assert f"{runs[1]} is in use" in error
    assert not (tmp_path / "runs").exists()
