"""`python -m tav_jax.tune`, from its config file to the files it leaves."""

import shutil
import signal
import time

import jax
import numpy as np
import optax
import pytest
import yaml
from PIL import Image
from run_lines import read_lines, read_metrics
from safetensors.numpy import load_file, save_file

from tav_jax import tune
from tav_jax.runs.run import Run
from tav_jax.training.checkpoints import restore_state
from tav_jax.training.optimizer import label_params, make_optimizer, select
from tav_jax.training.train_step import init_state
from tav_jax.video.read import read_clip, read_frames

# Where it does not matter what trains: the gradient goes through the last blocks only, and a step
# compiles in half the time.
FEW = [
    f"up_blocks.1.attentions.1.transformer_blocks.0.{name}" for name in ("attn2.to_q", "attn_temp")
]

PROMPTS = ["a ball is moving", "a square is moving, cartoon style", "a cat"]


def snapshot(folder):
    """Every file below a folder with its time of writing."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def without_seconds(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def restored_arrays(folder, step):
    """What trains, the optimiser's state, step and key of a run's checkpoint."""
    run = Run.open(folder)
    config, model = run.config, run.load_base()
    labels = label_params(model.unet.params, config.trainable_modules)
    # Checkpoints hold the state of a schedule too, so that a number would not fit.
    optimizer = make_optimizer(labels, optax.constant_schedule(config.learning_rate))
    names = list(select(model.unet.params, labels, "train"))
    empty = init_state(model.unet, optimizer, jax.random.key(0))
    state = restore_state(run.checkpoint(step), empty, names)
    trained = {name: state.unet.params[name] for name in names}
    key = jax.random.key_data(state.key)
    return jax.tree.map(np.asarray, (trained, state.opt_state, state.step, key))


def assert_same_checkpoint(ours, theirs, step):
    ours, theirs = restored_arrays(ours, step), restored_arrays(theirs, step)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def read_all(path):
    return read_frames(path, n_sample_frames=4, width=32, height=32)


# What a run leaves.


def test_a_run_has_the_files_of_the_contract(finished_run):
    folder = finished_run.folder
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "inputs.json",
        "metrics.jsonl",
        "report.html",
        "checkpoints",
        "inv_latents",
        "samples",
    }
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"3", "6"}
    assert {path.name for path in (folder / "inv_latents").iterdir()} == {
        "ddim_latent-4.npy",
        "ddim_latent-6.npy",
    }
    for step in (4, 6):
        assert {path.name for path in (folder / f"samples/sample-{step}").iterdir()} == {
            "contact-sheet.png",
            "side-by-side.gif",
            "side-by-side.mp4",
            *(f"{prompt}.{suffix}" for prompt in PROMPTS for suffix in ("mp4", "json")),
        }
    for path in (folder / "checkpoints/6", folder / f"samples/sample-6/{PROMPTS[0]}.mp4"):
        assert f"wrote {path}" in finished_run.out


def test_a_step_has_a_line_of_metrics(finished_run):
    lines = read_metrics(finished_run.folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert list(line) == ["step", "loss", "grad_norm", "lr", "seconds"]
        assert line["lr"] == pytest.approx(3e-3)
        assert line["loss"] > 0
        assert line["grad_norm"] > 0
        assert line["seconds"] >= 0


def test_a_run_says_where_its_time_and_memory_went(finished_run):
    lines = [line for line in read_lines(finished_run.folder) if "stage" in line]
    for line in lines:
        planned = ["planned_bytes"] if line["stage"] == "compile" else []
        assert list(line) == ["step", "stage", "seconds", "peak_bytes", *planned]
        assert all(0 < line[name] < 2**40 for name in ("peak_bytes", *planned))
    assert [line["peak_bytes"] for line in lines] == sorted(line["peak_bytes"] for line in lines)
    stages = {(line["step"], line["stage"]): line["seconds"] for line in lines}
    assert len(stages) == len(lines)
    # Written where the loop pauses: the check of movement and a checkpoint at 3, samples at 4,
    # both at 6.
    samples = {"invert", "sample", "decode", "write"}
    assert set(stages) == (
        {(3, name) for name in ("read", "load", "encode", "compile", "tune", "checkpoint")}
        | {(4, name) for name in samples | {"tune"}}
        | {(6, name) for name in samples | {"tune", "checkpoint"}}
    )
    steps = sum(line["seconds"] for line in read_metrics(finished_run.folder))
    tuning = sum(seconds for (_, name), seconds in stages.items() if name == "tune")
    assert tuning == pytest.approx(steps, rel=0.05, abs=0.01)


def test_a_clip_too_large_for_memory_is_refused_before_a_step_with_what_would_fit(
    write_config, cli, tmp_path
):
    limits = "memory_limit_gb=0.0001", "gradient_checkpointing=full"
    ran = cli(tune, "--config", write_config(), *limits)
    assert ran.status == 1
    assert "memory: 4 frames of 32x32 with gradient_checkpointing=full need 0.0 GB" in ran.err
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_under_another_preset_and_another_attention(write_config, cli, tmp_path):
    assert cli(tune, "--config", write_config(max_train_steps=3)).status == 0
    changes = {"gradient_checkpointing": "full", "attention": "chunked", "memory_limit_gb": 8}
    path = write_config(max_train_steps=3, **changes)
    ran = cli(tune, "--config", path)
    assert ran.status == 0
    assert "done, 3 of 3 steps" in ran.out


def test_the_inverted_clip_is_float32_noise_of_the_clips_shape(finished_run):
    for step in (4, 6):
        latents = np.load(finished_run.folder / f"inv_latents/ddim_latent-{step}.npy")
        assert latents.dtype == np.float32
        assert latents.shape == (1, 4, 8, 8, 4)
        assert np.isfinite(latents).all()
        assert latents.std() > 0


def test_videos_are_readable_with_as_many_frames_as_asked(finished_run):
    folder = finished_run.folder / "samples/sample-6"
    videos = [read_all(folder / f"{prompt}.mp4") for prompt in PROMPTS]
    for video in videos:
        assert video.std() > 1, "an image, not a plain colour"
        with pytest.raises(ValueError, match="of 4 on there are 4"):
            read_frames(folder / f"{PROMPTS[0]}.mp4", n_sample_frames=5, width=32, height=32)
    assert not np.array_equal(videos[0], videos[2]), "prompts make a difference"


def test_videos_are_as_fast_as_the_clip(finished_run):
    recorded = yaml.safe_load((finished_run.folder / "config.yaml").read_text())
    assert recorded["validation_data"]["fps"] == 4.0, "every second frame of a clip at 8"
    for name in (f"{PROMPTS[0]}.mp4", "side-by-side.mp4", "side-by-side.gif"):
        video = finished_run.folder / "samples/sample-6" / name
        assert read_clip(video, n_sample_frames=4, width=32, height=32).fps == 4.0


def test_a_run_goes_on_with_the_rate_that_it_began_with(finished_run, cli, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run.folder, folder)
    record = folder / "config.yaml"
    record.write_text(record.read_text().replace("fps: 4.0", "fps: 8.0"))  # as runs once had
    again = cli(tune, "--config", finished_run.config, f"output_dir={folder}")
    assert (again.status, "done, 6 of 6 steps" in again.out) == (0, True)
    assert yaml.safe_load(record.read_text())["validation_data"]["fps"] == 8.0
    other = cli(
        tune, "--config", finished_run.config, f"output_dir={folder}", "validation_data.fps=5"
    )
    assert other.status == 1
    assert "validation_data.fps: 8.0 there, 5.0 here" in other.err


def test_the_overviews_show_the_clip_and_all_edits(finished_run):
    folder = finished_run.folder / "samples/sample-6"
    beside = read_frames(
        folder / "side-by-side.mp4", n_sample_frames=4, width=4 * 32, height=32
    ).astype(int)
    source = Run.open(finished_run.folder).clip()
    # Video compression leaves a few levels of error, and mixes colours across edges.
    for index, video in enumerate([source, *(read_all(folder / f"{p}.mp4") for p in PROMPTS)]):
        tile = beside[:, :, 32 * index : 32 * (index + 1)]
        assert np.abs(tile - video).mean() < 12
    with Image.open(folder / "contact-sheet.png") as image:
        sheet = np.asarray(image)
    # Four rows of four frames, each enlarged to 96 pixels.
    assert sheet.shape[1] >= 4 * 96
    assert sheet.shape[0] >= 4 * 96
    assert sheet.std() > 1


def test_the_same_command_again_does_nothing_and_says_so(finished_run, cli, compiled):
    record = finished_run.folder / "config.yaml"
    before, settings = snapshot(finished_run.folder), record.read_bytes()
    again = cli(tune, "--config", finished_run.config)
    # The run's own record of its settings is a config file like any other.
    recorded = cli(tune, "--config", finished_run.folder / "config.yaml")
    for outcome in (again, recorded):
        assert outcome.status == 0
        assert "done, 6 of 6 steps" in outcome.out
        assert "wrote" not in outcome.out
    # The record may be written again, if it says the same.
    after = snapshot(finished_run.folder) | {record: before[record]}
    assert (after, record.read_bytes()) == (before, settings)
    assert "jit(train_step)" not in compiled


def test_the_recorded_config_repeats_the_run_elsewhere(finished_run, cli, tmp_path):
    outcome = cli(
        tune, "--config", finished_run.folder / "config.yaml", f"output_dir={tmp_path / 'again'}"
    )
    assert outcome.status == 0
    ours, theirs = read_metrics(tmp_path / "again"), read_metrics(finished_run.folder)
    assert without_seconds(ours) == without_seconds(theirs)
    assert_same_checkpoint(tmp_path / "again", finished_run.folder, 6)


# Runs that are stopped.


def wait_for(condition, process, *, seconds=600):
    """Waits until a condition holds of a process at work."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended too early: {process.communicate(timeout=600)}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def lines_of(path):
    return path.read_text().count("\n") if path.is_file() else 0


def test_a_run_killed_twice_ends_as_one_that_was_not(
    write_config, finished_run, start, cli, tmp_path
):
    config, run = write_config(), tmp_path / "run"
    command = ("-m", "tav_jax.tune", "--config", config)
    metrics = run / "metrics.jsonl"

    # Killed after step 4, which no checkpoint holds, while it samples.
    process = start(*command)
    wait_for(lambda: lines_of(metrics) >= 4, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"3"}

    # Killed after the last step, between the first sample and the last.
    process = start(*command)
    folder = run / "samples/sample-6"
    wait_for(lambda: (folder / f"{PROMPTS[0]}.mp4").exists(), process)
    process.send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL, err
    assert f"going on from {run / 'checkpoints/3'}" in out
    assert not (folder / f"{PROMPTS[-1]}.mp4").exists()
    written = (folder / f"{PROMPTS[0]}.mp4").stat().st_mtime_ns

    last = cli(tune, "--config", config)
    assert last.status == 0
    assert "done, 6 of 6 steps" in last.out
    assert (folder / f"{PROMPTS[0]}.mp4").stat().st_mtime_ns == written, "not sampled again"

    assert without_seconds(read_metrics(run)) == without_seconds(read_metrics(finished_run.folder))
    assert_same_checkpoint(run, finished_run.folder, 6)
    for step in (4, 6):
        theirs = finished_run.folder / f"samples/sample-{step}"
        names = {path.name for path in theirs.iterdir()}
        ours = {path.name for path in (run / f"samples/sample-{step}").iterdir()}
        # A file being written when the process was killed has a name that starts with a dot.
        assert {name for name in ours if not name.startswith(".")} == names
        for prompt in PROMPTS:
            np.testing.assert_array_equal(
                read_all(run / f"samples/sample-{step}/{prompt}.mp4"),
                read_all(theirs / f"{prompt}.mp4"),
            )


def test_a_run_stopped_before_its_overview_still_gets_it(finished_run, cli, tmp_path):
    # As a kill leaves it between the last video and the contact sheet.
    run = shutil.copytree(finished_run.folder, tmp_path / "run")
    sheet = run / "samples/sample-6/contact-sheet.png"
    sheet.unlink()
    settings = yaml.safe_load((run / "config.yaml").read_text()) | {"output_dir": str(run)}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert cli(tune, "--config", run / "config.yaml").status == 0
    assert sheet.is_file()


def test_a_run_goes_on_in_another_place(finished_run, cli, tmp_path):
    # Renamed, or on a disk that is mounted elsewhere.
    run = shutil.copytree(finished_run.folder, tmp_path / "renamed")
    outcome = cli(tune, "--config", run / "config.yaml", f"output_dir={run}")
    assert outcome.status == 0, outcome.err
    assert "done, 6 of 6 steps" in outcome.out


def test_a_run_without_a_seed_draws_one_and_keeps_it(write_config, cli, tmp_path):
    config = write_config(validation_data={"prompts": []}, max_train_steps=1, checkpointing_steps=1)
    first = cli(tune, "--config", config, "seed=null")
    assert first.status == 0, first.err
    seed = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["seed"]
    assert f"note: seed: null: the run has the seed {seed}\n" in first.out
    again = cli(tune, "--config", config, "seed=null")
    assert again.status == 0, again.err
    assert f"the run has the seed {seed}\n" in again.out
    assert "done, 1 of 1 steps" in again.out


@pytest.mark.parametrize("line", ['{"step": 2', "5", "[1]", '{"stop": 2}'])
def test_a_run_goes_on_although_its_metrics_are_damaged(line, finished_run, cli, tmp_path):
    run = shutil.copytree(finished_run.folder, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/6")
    shutil.rmtree(run / "samples/sample-6")
    metrics = run / "metrics.jsonl"
    metrics.write_text(f"{line}\n{metrics.read_text()}")
    arguments = [f"output_dir={run}", "validation_data.prompts=[]"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["validation_data"]["prompts"] = []  # else the videos take longest
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    outcome = cli(tune, "--config", run / "config.yaml", *arguments)
    assert outcome.status == 0, outcome.err
    assert "warning: " in outcome.err
    assert "1 damaged lines were moved to metrics.jsonl.damaged" in outcome.err
    assert (run / "metrics.jsonl.damaged").read_text() == f"{line}\n"
    steps = [row["step"] for row in read_metrics(run)]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_an_interrupted_run_says_so(start, write_config, tmp_path):
    config = write_config(validation_data={"prompts": []}, max_train_steps=3000)
    process = start("-m", "tav_jax.tune", "--config", config)
    wait_for(lambda: lines_of(tmp_path / "run/metrics.jsonl") > 4, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    newest = max(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    saved = tmp_path / f"run/checkpoints/{newest}"
    assert err == f"SIGINT: saved {saved}; the same command goes on from there\n"


def test_another_runs_checkpoint_can_be_gone_on_from(
    finished_run, write_config, cli, tmp_path, compiled
):
    outcome = cli(
        tune,
        "--config",
        write_config(resume_from_checkpoint=str(finished_run.folder / "checkpoints/3")),
    )
    assert outcome.status == 0
    assert f"going on from {finished_run.folder / 'checkpoints/3'}" in outcome.out
    # Restored arrays must be of the kind that a step returns, or each kind compiles a program.
    for program in ("jit(train_step)", "jit(ddim_sample)", "jit(fingerprints)"):
        assert compiled.count(program) <= 1
    lines = read_metrics(tmp_path / "run")
    assert without_seconds(lines) == without_seconds(read_metrics(finished_run.folder))[3:]
    assert_same_checkpoint(tmp_path / "run", finished_run.folder, 6)

    # Once it has checkpoints of its own, it goes on from those.
    again = cli(tune, "--config", tmp_path / "run/config.yaml")
    assert f"going on from {tmp_path / 'run/checkpoints/6'}" in again.out
    assert "done, 6 of 6 steps" in again.out


def test_a_run_from_anothers_last_step_can_be_sampled_from(
    finished_run, write_config, cli, tmp_path
):
    # There is nothing left to tune, and yet what ends well must have left a model.
    path = str(finished_run.folder / "checkpoints/6")
    outcome = cli(tune, "--config", write_config(resume_from_checkpoint=path))
    if outcome.status == 0:
        assert (tmp_path / "run/checkpoints/6").is_dir()
    else:
        assert "max_train_steps" in outcome.err


# Settings that change what is run.


def test_a_file_of_the_original_release_runs_unchanged(material, cli, tmp_path):
    config = tmp_path / "original.yaml"
    config.write_text(
        f"""
pretrained_model_path: "{material.model}"
output_dir: "{tmp_path / "run"}"
train_data:
  video_path: "{material.clip}"
  prompt: "a square is moving"
  n_sample_frames: 4
  width: 32
  height: 32
  sample_start_idx: 0
  sample_frame_rate: 2
validation_data:
  prompts:
    - "a ball is moving"
  video_length: 4
  width: 32
  height: 32
  num_inference_steps: 3
  guidance_scale: 12.5
  use_inv_latent: True
  num_inv_steps: 3
learning_rate: 3e-5
train_batch_size: 1
max_train_steps: 3
checkpointing_steps: 1000
validation_steps: 3
trainable_modules:
  - "attn1.to_q"
  - "attn2.to_q"
  - "attn_temp"
seed: 33
mixed_precision: fp16
use_8bit_adam: False
gradient_checkpointing: True
enable_xformers_memory_efficient_attention: True
"""
    )
    outcome = cli(tune, "--config", config)
    assert outcome.status == 0
    assert "note: enable_xformers_memory_efficient_attention: has no effect here" in outcome.out
    assert "note: mixed_precision: fp16 is computed as bf16" in outcome.out
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]
    assert read_all(tmp_path / "run/samples/sample-3/a ball is moving.mp4").std() > 1
    assert np.load(tmp_path / "run/inv_latents/ddim_latent-3.npy").dtype == np.float32
    # What trains is kept, and stored, in float32.
    trained, *_ = restored_arrays(tmp_path / "run", 3)
    assert {str(value.dtype) for value in trained.values()} == {"float32"}
    frozen = Run.open(tmp_path / "run").load_base().unet.params["conv_in.kernel"]
    assert frozen.dtype == "bfloat16"


def test_warm_up_accumulation_and_batches_are_honoured(write_config, cli, tmp_path):
    outcome = cli(
        tune,
        "--config",
        write_config(
            validation_data={"prompts": []},
            trainable_modules=FEW,
            lr_scheduler="constant_with_warmup",
            lr_warmup_steps=2,
            scale_lr=True,
            gradient_accumulation_steps=2,
            train_batch_size=2,
            max_train_steps=4,
        ),
    )
    assert outcome.status == 0
    lines = read_metrics(tmp_path / "run")
    # scale_lr: times the four draws of an update.
    assert [line["lr"] for line in lines] == pytest.approx([0, 6e-3, 12e-3, 12e-3])
    assert not (tmp_path / "run/samples").exists(), "no prompts, no samples"


@pytest.mark.parametrize("scope", ["spatial", "first_frame", "full"])
def test_every_attention_scope_runs_and_is_its_own(
    scope, write_config, cli, tmp_path, finished_run
):
    outcome = cli(
        tune,
        "--config",
        write_config(
            validation_data={"prompts": []},
            trainable_modules=FEW,
            attention_scope=scope,
            max_train_steps=1,
        ),
    )
    assert outcome.status == 0
    [line] = read_metrics(tmp_path / "run")
    ours, published = line["loss"], read_metrics(finished_run.folder)[0]["loss"]
    # The same draw under another attention: near, and not the same but for rounding.
    assert ours == pytest.approx(published, rel=0.5)
    assert ours != pytest.approx(published, rel=1e-4)


def test_without_the_inverted_clip_noise_is_drawn_from_the_seed(write_config, cli, tmp_path):
    config = write_config(
        validation_data={
            "prompts": ["a cat"],
            "use_inv_latent": False,
            "video_length": 4,
            "video_format": "gif",
        },
        max_train_steps=1,
    )
    videos = []
    for seed in (33, 34):
        assert cli(tune, "--config", config, f"seed={seed}").status == 0
        run = tmp_path / "run"
        assert not (run / "inv_latents").exists()
        folder = run / "samples/sample-1"
        assert {path.name for path in folder.iterdir()} == {
            "a cat.gif",
            "a cat.json",
            "contact-sheet.png",
            "side-by-side.gif",
        }
        videos.append(read_all(folder / "a cat.gif"))
        shutil.rmtree(run)
    assert not np.array_equal(*videos)


# Runs that learn nothing.


def test_a_run_that_learns_nothing_stops_and_says_so(write_config, cli, tmp_path):
    # A weight of float32 stays the same if so little is added.
    config = write_config(learning_rate=1e-12, adam_weight_decay=0, trainable_modules=FEW[:1])
    outcome = cli(tune, "--config", config)
    assert outcome.status == 1
    [error] = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert f"nothing has moved in {FEW[0]}" in error
    assert "learning_rate" in error
    # The check comes before the first checkpoint and sample.
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "inputs.json", "metrics.jsonl"}


def test_a_loss_that_is_no_number_stops_the_run_in_one_line(material, write_config, cli, tmp_path):
    model = shutil.copytree(material.model, tmp_path / "model")
    weights = model / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"][0] = 3e38  # finite, but its square is not
    save_file(tensors, weights)
    outcome = cli(tune, "--config", write_config(pretrained_model_path=str(model)))
    assert outcome.status == 1
    [error] = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert "step 1: loss inf" in error
    [line] = read_metrics(tmp_path / "run")
    assert line["loss"] is None, "JSON has no NaN"
    assert not (tmp_path / "run/checkpoints").exists()


# Input that cannot work.


WEIGHTS = {
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
}

WRONG_INPUT = [
    pytest.param(["train_data.video_path=no/clip.mp4"], ["no/clip.mp4: no such video"], id="video"),
    pytest.param(
        ["train_data.video_path={tmp}/notes.mp4"],
        ["notes.mp4: no video can be read from it"],
        id="not a video",
    ),
    pytest.param(
        ["train_data.video_path={tmp}/empty"], ["empty: no images in this folder"], id="no images"
    ),
    pytest.param(
        ["train_data.n_sample_frames=40"],
        ["n_sample_frames is 40", "of 12", "use n_sample_frames <= 6"],
        id="fewer frames than asked",
    ),
    pytest.param(
        ["train_data.sample_start_idx=12"], ["sample_start_idx is 12"], id="start after the end"
    ),
    pytest.param(
        ["train_data.width=36", "train_data.height=44"],
        ["train_data.width", "train_data.height", "multiple of 8", "36", "44"],
        id="sides that eight does not divide",
    ),
    pytest.param(
        ["max_train_step=3", "train_data.promt=a"],
        ["max_train_step: unknown key; did you mean max_train_steps?", "train_data.prompt?"],
        id="misspelt keys",
    ),
    pytest.param(
        ["pretrained_model_path=./no/model"],
        ["pretrained_model_path: no folder './no/model'"],
        id="model",
    ),
    pytest.param(
        ["pretrained_model_path={tmp}/empty"],
        ["not a Stable Diffusion folder", "text_encoder", "vae", "unet", "scheduler", "tokenizer"],
        id="a folder that is no model",
    ),
    pytest.param(
        ["trainable_modules=[attn3.to_q, attn_temp, to_z]"],
        ["'attn3.to_q' matches no parameter", "attn1.to_q, attn2.to_q", "'to_z' matches no"],
        id="modules",
    ),
    pytest.param(
        ["seed=34", "output_dir={finished}"], ["a run of other settings", "output_dir"], id="run"
    ),
    pytest.param(
        ["output_dir={tmp}/used"], ["used exists and is not a run of tav_jax.tune"], id="folder"
    ),
    pytest.param(
        ["output_dir={tmp}/notes.mp4"], ["notes.mp4 exists and is not a run"], id="a file"
    ),
    pytest.param(
        ["output_dir={tmp}/notes.mp4/run"],
        ["is not writable", "notes.mp4"],
        id="a file on the way",
    ),
    pytest.param(
        ["resume_from_checkpoint={tmp}/used"],
        ["used: no checkpoint of ours; expected a folder checkpoints/<step>"],
        id="checkpoint",
    ),
]


@pytest.mark.parametrize(("overrides", "expected"), WRONG_INPUT)
def test_wrong_input_ends_in_a_clear_line_and_leaves_nothing(
    overrides, expected, write_config, cli, tmp_path, finished_run, compiled
):
    (tmp_path / "notes.mp4").write_text("remember the milk")
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used/thesis.tex").write_text("")
    config = write_config()
    overrides = [o.format(tmp=tmp_path, finished=finished_run.folder) for o in overrides]
    before = snapshot(tmp_path) | snapshot(finished_run.folder)

    outcome = cli(tune, "--config", config, *overrides)
    assert outcome.status == 1
    assert outcome.err.startswith("error: ")
    for part in expected:
        assert part in outcome.err
    assert "wrote" not in outcome.out
    assert snapshot(tmp_path) | snapshot(finished_run.folder) == before
    assert "jit(train_step)" not in compiled


def test_a_run_of_other_settings_is_refused_with_all_that_differs(finished_run, cli, tmp_path):
    before = snapshot(finished_run.folder)
    outcome = cli(
        tune,
        "--config",
        finished_run.config,
        "learning_rate=1e-4",
        "train_data.prompt=a dog",
    )
    assert outcome.status == 1
    assert "learning_rate: 0.003 there, 0.0001 here" in outcome.err
    assert "train_data.prompt" in outcome.err
    assert len(outcome.err.splitlines()) == 3
    assert snapshot(finished_run.folder) == before


def test_a_model_with_other_tensors_is_refused_with_all_of_them(
    material, write_config, cli, tmp_path, compiled
):
    for part, stem in WEIGHTS.items():
        model = shutil.copytree(material.model, tmp_path / f"model without {part}")
        path = model / part / f"{stem}.safetensors"
        tensors = load_file(path)
        missing, reshaped, renamed = sorted(tensors)[:3]
        shape = list(tensors[missing].shape)
        del tensors[missing]
        tensors[reshaped] = np.zeros((3, *tensors[reshaped].shape), np.float32)
        # With the start that all names of this network have.
        extra = "text_model.extra.weight" if part == "text_encoder" else "extra.weight"
        tensors[extra] = tensors.pop(renamed)
        save_file(tensors, path)
        outcome = cli(tune, "--config", write_config(pretrained_model_path=str(model)))
        assert outcome.status == 1
        first, *lines = outcome.err.splitlines()
        assert f"{model / part}: not the network of its config" in first
        assert len(lines) == 4
        assert f"  missing: {missing} {shape}" in lines
        assert any(line.startswith(f"  missing: {renamed} ") for line in lines)
        assert any(line.startswith(f"  left over: {extra} ") for line in lines)
        assert any(line.startswith(f"  wrong shape: {reshaped} [3, ") for line in lines)
        assert not (tmp_path / "run").exists()
    assert "jit(train_step)" not in compiled


def test_a_config_that_is_not_there_is_named(cli, tmp_path):
    outcome = cli(tune, "--config", tmp_path / "man-sking.yaml")
    assert outcome.status == 1
    assert outcome.err == f"error: --config: no such file {tmp_path / 'man-sking.yaml'}\n"


def test_an_override_that_is_no_yaml_is_refused_in_a_line(cli, write_config):
    outcome = cli(tune, "--config", write_config(), "trainable_modules=[attn_temp")
    assert outcome.status == 1
    assert "trainable_modules" in outcome.err


def test_a_prompt_that_is_too_long_is_quoted_where_it_is_cut(write_config, cli):
    # Something else is wrong too, so that the warning is all there is to wait for.
    prompt = "a square " * 40 + "is moving to the very end"
    outcome = cli(
        tune,
        "--config",
        write_config(train_data={"prompt": prompt}, resume_from_checkpoint="/no/checkpoints/3"),
    )
    [warning] = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert "77 are read" in warning
    assert "is moving to the very end" in warning


def test_a_wrong_input_ends_a_process_with_status_1_and_no_traceback(start, write_config, tmp_path):
    config = write_config(train_data={"video_path": "no-clip.mp4"})
    process = start("-m", "tav_jax.tune", "--config", config)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert err.startswith("error: ")
    assert "no-clip.mp4: no such video file" in err
    assert len(err.splitlines()) == 1
    assert out == ""
    assert not (tmp_path / "run").exists()


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        tune.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "python -m tav_jax.tune --config configs/man-skiing.yaml" in said
    assert "key=value" in said
