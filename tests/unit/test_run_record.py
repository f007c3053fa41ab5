"""A run's folder is opened only with its own complete settings, clip and model."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file, save_file
from small_configs import RUN as SMALLEST

from tav_jax.errors import UserError
from tav_jax.runs.config import dump_config, load_config, parse_config
from tav_jax.runs.inputs import OtherInputError
from tav_jax.runs.record import read_record
from tav_jax.runs.run import Run
from tav_jax.training.checkpoints import save_items
from tav_jax.video.write import write_video

MODEL = Path(__file__).parents[1] / "golden/base"

# What the first version wrote, which knew no samplers, attentions and meshes.
FIRST_FORMAT = """\
pretrained_model_path: model
output_dir: run
train_data:
  video_path: clip.mp4
  prompt: a man is skiing
  n_sample_frames: 8
  width: 512
  height: 512
  sample_start_idx: 0
  sample_frame_rate: 1
  sampling: rate
  fit: stretch
validation_data:
  prompts: []
  negative_prompt: ''
  video_length: null
  width: null
  height: null
  num_inference_steps: 50
  guidance_scale: 12.5
  eta: 0.0
  use_inv_latent: true
  num_inv_steps: 50
  video_format: mp4
  fps: 8
validation_steps: 100
trainable_modules:
- attn1.to_q
- attn2.to_q
- attn_temp
train_batch_size: 1
max_train_steps: 500
learning_rate: 3.0e-05
scale_lr: false
lr_scheduler: constant
lr_warmup_steps: 0
adam_beta1: 0.9
adam_beta2: 0.999
adam_weight_decay: 0.01
adam_epsilon: 1.0e-08
max_grad_norm: 1.0
gradient_accumulation_steps: 1
gradient_checkpointing: true
checkpointing_steps: 500
resume_from_checkpoint: null
mixed_precision: 'no'
seed: 33
attention_scope: sparse_causal
revision: null
variant: null
"""


# Its settings.


@pytest.mark.parametrize("text", [dump_config(parse_config(SMALLEST)), FIRST_FORMAT])
def test_settings_that_are_cut_off_anywhere_are_refused_in_one_line(text, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    read_record(file)
    (tmp_path / "checkpoints").mkdir()
    # Without the newline after the mark of its end a file is complete.
    for length in range(len(text) - (2 if text.startswith("#") else 1), -1, -1):
        file.write_text(text[:length])
        with pytest.raises(UserError) as refused:
            Run.open(tmp_path)
        message = str(refused.value)
        assert str(file) in message
        assert "\n" not in message
        assert len(message) < 500
        assert "delete" not in message


def test_a_run_of_the_first_version_opens_with_defaults_for_what_it_did_not_know(tmp_path):
    (tmp_path / "config.yaml").write_text(FIRST_FORMAT)
    config = Run.open(tmp_path).config
    assert config.validation_data.sampler == "ddim"
    assert (config.seed, config.gradient_checkpointing) == (33, "blocks")


def test_settings_that_another_program_has_written_again_open_if_they_are_complete(tmp_path):
    config = parse_config(SMALLEST | {"seed": 7})
    tree = yaml.safe_load(dump_config(config))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert Run.open(tmp_path).config == config
    del tree["seed"], tree["validation_data"]["guidance_scale"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"it lacks validation_data\.guidance_scale, seed;"):
        Run.open(tmp_path)


def test_a_cut_off_record_repeats_no_run_either(tmp_path):
    text = dump_config(parse_config(SMALLEST))
    (tmp_path / "copy.yaml").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="cut off or damaged"):
        load_config(tmp_path / "copy.yaml")


# What may change between two starts.


@pytest.fixture
def recorded(tmp_path):
    """A run of six steps, with checkpoints and samples, as far as its settings are concerned."""
    folder = tmp_path / "run"
    config = parse_config(
        SMALLEST | {"output_dir": str(folder), "max_train_steps": 6, "lr_warmup_steps": 2}
    )

    def record(**changes):
        changed = replace(config, **changes)
        folder.mkdir()
        (folder / "config.yaml").write_text(dump_config(changed))
        (folder / "samples/sample-6").mkdir(parents=True)
        (folder / "samples/sample-6/a cat.json").touch()
        for step in (3, 6):
            save_items(folder / "checkpoints", step, trained={"a": np.zeros(1, np.float32)})
        return changed

    return record


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup"])
@pytest.mark.parametrize("steps", [6, 8, 600])
def test_a_run_whose_rates_do_not_depend_on_its_length_goes_on_with_more_steps(
    schedule, steps, recorded
):
    config = recorded(lr_scheduler=schedule)
    assert Run.create(replace(config, max_train_steps=steps)).config.max_train_steps == steps


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_a_run_whose_rates_depend_on_its_length_names_its_checkpoint_as_the_way_on(
    schedule, recorded
):
    config = recorded(lr_scheduler=schedule)
    with pytest.raises(UserError) as refused:
        Run.create(replace(config, max_train_steps=8))
    way = f"resume_from_checkpoint={config.output_dir}/checkpoints/6"
    assert way in str(refused.value)
    assert f"lr_scheduler {schedule}" in str(refused.value)


def test_fewer_steps_than_are_done_are_refused_in_one_line(recorded):
    config = recorded()
    with pytest.raises(UserError, match="6 steps are done already, 4 here") as refused:
        Run.create(replace(config, max_train_steps=4))
    assert f"tav_jax.sample --run {config.output_dir} --step N" in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": ("a dog",)},
        {"guidance_scale": 3.0, "negative_prompt": "dark"},
        {"num_inference_steps": 20, "sampler": "dpm_solver"},
        {"use_inv_latent": False, "eta": 0.5},
    ],
)
def test_sampling_may_be_changed(change, recorded):
    config = recorded()
    changed = replace(config, validation_data=replace(config.validation_data, **change))
    assert Run.create(changed).config == changed


def test_when_something_is_written_may_be_changed(recorded):
    changed = replace(recorded(), validation_steps=2, checkpointing_steps=2)
    assert Run.create(changed).config == changed


def test_other_steps_of_inversion_are_for_the_sample_command(recorded):
    config = recorded()
    changed = replace(config.validation_data, num_inv_steps=20)
    with pytest.raises(UserError, match="num_inv_steps: 50 there, 20 here") as refused:
        Run.create(replace(config, validation_data=changed))
    assert f"--run {config.output_dir} --num-inv-steps 20" in str(refused.value)


@pytest.mark.parametrize("change", [{"fps": 5.0}, {"video_format": "gif"}, {"width": 512}])
def test_what_no_videos_record_has_is_not_mixed_in_one_run(change, recorded):
    config = recorded(validation_data=replace(parse_config(SMALLEST).validation_data, fps=8.0))
    changed = replace(config.validation_data, **change)
    with pytest.raises(UserError, match=f"{next(iter(change))}: .* the run has videos"):
        Run.create(replace(config, validation_data=changed))


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"learning_rate": 1e-4}, {"attention_scope": "full"}]
)
def test_what_trains_is_not_changed(change, recorded):
    config = recorded()
    with pytest.raises(UserError, match="is a run of other settings; name another output_dir"):
        Run.create(replace(config, **change))


# Its clip and its model.


def frames(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


def write_images(folder, video):
    folder.mkdir(exist_ok=True)
    for index, image in enumerate(video):
        Image.fromarray(image).save(folder / f"{index}.png")


@pytest.fixture
def config(tmp_path):
    """Settings of a run on a clip and a model, which a test may damage."""
    shutil.copytree(MODEL, tmp_path / "model")
    write_images(tmp_path / "clip", frames(6))
    data = {"video_path": str(tmp_path / "clip"), "prompt": "noise"}
    data |= {"n_sample_frames": 4, "width": 32, "height": 32, "sample_start_idx": 1}
    return parse_config(
        {
            "pretrained_model_path": str(tmp_path / "model"),
            "output_dir": str(tmp_path / "run"),
            "train_data": data,
        }
    )


@pytest.fixture
def run(config):
    """A run that has recorded them."""
    made = Run.create(config)
    made.record_config()
    return made


def with_clip(config, path):
    return replace(config, train_data=replace(config.train_data, video_path=str(path)))


def one_image_replaced(clip):
    Image.fromarray(frames(1, seed=1)[0]).save(clip / "3.png")


def one_image_removed(clip):
    (clip / "2.png").unlink()


def an_image_added_in_between(clip):
    shutil.copy(clip / "0.png", clip / "1-again.png")


def one_colour_changed(clip):
    image = np.array(Image.open(clip / "4.png"))
    image[5, 5, 1] ^= 1
    Image.fromarray(image).save(clip / "4.png")


def a_video_in_its_place(clip):
    shutil.rmtree(clip)
    write_video(clip.with_suffix(".mp4"), frames(6))
    clip.with_suffix(".mp4").rename(clip)


CHANGES = [
    one_image_replaced,
    one_image_removed,
    an_image_added_in_between,
    one_colour_changed,
    a_video_in_its_place,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_not_gone_on_with_on_another_clip(change, run, config, tmp_path):
    change(tmp_path / "clip")
    for again in (Run.create(config), Run.open(run.folder)):
        with pytest.raises(OtherInputError) as refused:
            again.clip()
        assert str(run.folder) in str(refused.value)
        assert str(tmp_path / "clip") in str(refused.value)
        assert "another output_dir" in str(refused.value)
        with pytest.raises(OtherInputError):
            again.check_clip()


def test_frames_that_are_not_chosen_may_change(run, config, tmp_path):
    Image.fromarray(frames(1, seed=1)[0]).save(tmp_path / "clip/0.png")
    (tmp_path / "clip/5.png").unlink()
    np.testing.assert_array_equal(Run.create(config).clip(), run.clip())


def test_a_clip_may_move(run, config, tmp_path):
    (tmp_path / "clip").rename(tmp_path / "moved")
    moved = with_clip(config, tmp_path / "moved")
    again = Run.create(moved)
    again.record_config()
    assert Run.open(run.folder).config.train_data.video_path == str(tmp_path / "moved")
    Run.create(config).check_clip()  # It is gone there, which is no other clip.


def test_other_frames_of_the_same_clip_are_other_settings(run, config):
    data = replace(config.train_data, sample_start_idx=0)
    with pytest.raises(UserError, match="sample_start_idx: 1 there, 0 here"):
        Run.create(replace(config, train_data=data))


def test_another_version_of_the_decoder_may_give_slightly_other_frames(run, config, tmp_path):
    record = json.loads((run.folder / "inputs.json").read_text())
    record["clip"]["decoder"] = "Pillow 1.0, m68k"
    (run.folder / "inputs.json").write_text(json.dumps(record))
    Run.create(config).clip()  # It need not.
    one_colour_changed(tmp_path / "clip")
    with pytest.warns(UserWarning, match="Pillow 1.0, m68k decoded, and now Pillow"):
        Run.create(config).clip()
    a_video_in_its_place(tmp_path / "clip")
    with pytest.raises(OtherInputError):
        Run.create(config).clip()


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_unet(model):
    path = model / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1
    save_file(tensors, path)


MODEL_CHANGES = {
    "unet/diffusion_pytorch_model.safetensors": change_unet,
    "tokenizer/merges.txt": lambda model: (model / "tokenizer/merges.txt").write_bytes(
        (model / "tokenizer/merges.txt").read_bytes().rstrip().rsplit(b"\n", 1)[0]
    ),
    "scheduler/scheduler_config.json": lambda model: change_json(
        model / "scheduler/scheduler_config.json", beta_end=0.013
    ),
    "tokenizer/added_tokens.json": lambda model: (model / "tokenizer/added_tokens.json").write_text(
        "{}"
    ),
    "text_encoder/config.json": lambda model: change_json(
        model / "text_encoder/config.json", hidden_act="gelu"
    ),
}


@pytest.mark.parametrize("name", MODEL_CHANGES)
def test_a_run_is_not_gone_on_with_on_another_model(name, run, config, tmp_path):
    MODEL_CHANGES[name](tmp_path / "model")
    with pytest.raises(OtherInputError) as refused:
        Run.create(config).load_base()
    message = str(refused.value)
    assert f"{run.folder} was tuned with another model" in message
    assert name in message
    assert message.count(".json") + message.count(".safetensors") + message.count(".txt") == 1
    assert len(message) < 500


def test_a_model_may_be_copied_and_its_files_be_touched(run, config, tmp_path):
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, (1, 1))
    (tmp_path / "copy/README.md").write_text("a copy")
    (tmp_path / "copy/tokenizer/notes.txt").write_text("mine")
    moved = Run.create(replace(config, pretrained_model_path=str(tmp_path / "copy")))
    moved.load_base()
    moved.record_config()
    assert Run.open(run.folder).config.pretrained_model_path == str(tmp_path / "copy")
    assert json.loads((run.folder / "inputs.json").read_text())["model"]["unet/config.json"][
        "mtime_ns"
    ] == int(1e9)


def test_files_that_are_as_recorded_are_not_read(run, config, tmp_path):
    # As git does it: a file of that size and time is that file. Else a start would read gigabytes.
    path = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    written = path.stat()
    path.write_bytes(path.read_bytes()[:-4] + bytes(4))
    os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))
    Run.create(config).load_base()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"clip": {"sha256": 3}, "model": {}}'])
def test_a_damaged_record_is_named(text, run, config):
    (run.folder / "inputs.json").write_text(text)
    with pytest.raises(UserError, match=r"inputs\.json.* rename it"):
        Run.create(config)


def test_a_run_without_digests_goes_on_and_gets_them(run, config, tmp_path):
    (run.folder / "inputs.json").unlink()
    one_image_replaced(tmp_path / "clip")
    with pytest.raises(UserError, match="is a run of other settings"):
        Run.create(with_clip(config, tmp_path / "elsewhere"))
    again = Run.create(config)
    again.clip()
    again.record_config()
    Run.create(config).clip()
    write_images(tmp_path / "clip", frames(6))
    with pytest.raises(OtherInputError):
        Run.create(config).clip()
