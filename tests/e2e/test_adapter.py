"""Adapters: what a run has trained in one file, and a run made from it with the base model."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from tav_jax import check, convert, sample
from tav_jax.errors import UserError
from tav_jax.pretrained.model import load_model, load_unet
from tav_jax.runs.adapters import read_adapter, write_adapter
from tav_jax.runs.config import load_config
from tav_jax.runs.pipelines import write_pipeline
from tav_jax.runs.run import Run


@pytest.fixture(scope="module")
def adapter(finished_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "square.safetensors"
    write_adapter(Run.open(finished_run.folder), path)
    return path


def metadata_of(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata()


def test_the_header_says_what_it_is(adapter, finished_run):
    metadata = metadata_of(adapter)
    required = ("sai_model_spec", "architecture", "implementation", "title")
    assert all(metadata[f"modelspec.{key}"] for key in required)
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.hash_sha256"].startswith("0x")
    assert metadata["tav.caption"] == "a square is moving"
    assert metadata["tav.step"] == "6"
    assert str(finished_run.folder.parent) not in json.dumps(metadata), "no path of this machine"
    with adapter.open("rb") as file:
        assert int.from_bytes(file.read(8), "little") < 1e6


def test_it_has_the_trained_parameters_and_no_other(adapter, finished_run):
    run = Run.open(finished_run.folder)
    trained, read = run.trained_parameters(6), read_adapter(adapter)
    assert read.trained.keys() == trained.keys()
    for name, value in trained.items():
        np.testing.assert_array_equal(read.trained[name], value)
    assert all(any(m in name for m in run.config.trainable_modules) for name in read.trained)
    np.testing.assert_array_equal(read.inverted, np.load(run.inverted_file(6)))


def test_another_process_samples_from_it_as_from_the_run(adapter, run_copy, start, tmp_path):
    """With the base model only: neither the run nor the clip is needed."""
    moved = tmp_path / "elsewhere/square.safetensors"
    moved.parent.mkdir()
    shutil.copy(adapter, moved)
    base = Run.open(run_copy).config.pretrained_model_path
    made = tmp_path / "outputs/square"
    sources = {
        tmp_path / "of the run": ("--run", run_copy, "--output-dir", tmp_path / "of the run"),
        made / "samples/sample-6": ("--adapter", moved, "--model", base),
    }
    # By two processes, since the tests' own compiles in another way.
    for folder, arguments in sources.items():
        process = start("-m", "tav_jax.sample", *arguments, "--prompt", "a bird")
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert "wrote" in out
        assert (folder / "a bird.mp4").is_file()
    ours, theirs = ((folder / "a bird.mp4").read_bytes() for folder in sources)
    assert ours == theirs
    assert check.main([str(made)]) == 1, "progress is not in it, so it cannot be tuned on"


def test_the_same_adapter_samples_more_prompts_later(adapter, finished_run, cli, tmp_path):
    base = Run.open(finished_run.folder).config.pretrained_model_path
    arguments = ("--adapter", adapter, "--model", base, "--run", tmp_path / "run")
    assert cli(sample, *arguments, "--prompt", "a cat").status == 0
    done = cli(sample, *arguments, "--prompt", "a cat", "--prompt", "a ball")
    assert done.status == 0
    assert "1 of 2 videos are there already" in done.out
    other = tmp_path / "other.safetensors"
    write_adapter(Run.open(finished_run.folder), other, step=3)
    done = cli(sample, "--adapter", other, *arguments[2:], "--prompt", "a cat")
    assert done.status == 1
    assert "holds something else than this adapter's videos" in done.err


def test_another_base_model_is_refused(adapter, finished_run, cli, tmp_path):
    base = Run.open(finished_run.folder).config.pretrained_model_path
    other = shutil.copytree(base, tmp_path / "base")
    file = other / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, file, {"format": "pt"})
    arguments = ("--adapter", adapter, "--run", tmp_path / "run", "--prompt", "a cat")
    done = cli(sample, *arguments, "--model", other)
    assert done.status == 1
    assert "vae/diffusion_pytorch_model.safetensors" in done.err
    assert not list((tmp_path / "run/samples").rglob("*.mp4"))


def test_bfloat16_takes_half_of_the_space(adapter, finished_run, cli, tmp_path):
    path = tmp_path / "half.safetensors"
    options = ("--dtype", "bfloat16", "--no-latents")
    done = cli(convert, finished_run.folder, "--to", "adapter", path, *options)
    assert done.status == 0
    assert f"wrote {path}: " in done.out
    half, whole = read_adapter(path), read_adapter(adapter)
    assert half.inverted is None
    for name, value in whole.trained.items():
        assert half.trained[name].dtype == jnp.float32
        np.testing.assert_array_equal(half.trained[name], value.astype(jnp.bfloat16))
    done = cli(convert, finished_run.folder, "--to", "adapter", path)
    assert done.err == f"error: OUT: {path} is there already; --overwrite replaces it\n"


def test_the_unet_of_a_run_is_a_folder_that_loads(finished_run, cli, tmp_path):
    done = cli(convert, finished_run.folder, "--to", "unet", tmp_path / "unet", "--step", 3)
    assert done.status == 0
    written = load_unet(tmp_path / "unet").params
    tuned = Run.open(finished_run.folder).load_model(3).unet.params
    assert written.keys() == tuned.keys()
    for name, value in tuned.items():
        np.testing.assert_array_equal(written[name], value)


@pytest.fixture(scope="module")
def published(finished_run, tmp_path_factory):
    """The run as a whole folder in the layout of the published code."""
    folder = tmp_path_factory.mktemp("published") / "model"
    write_pipeline(Run.open(finished_run.folder), folder, 6)
    return folder


def test_a_whole_folder_is_that_of_the_published_code_and_loads(published, finished_run):
    # Facts of the published library: https://huggingface.co/Tune-A-Video-library
    index = json.loads((published / "model_index.json").read_text())
    assert index["_class_name"] == "TuneAVideoPipeline"
    assert index["unet"] == ["models", "UNet3DConditionModel"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert (published / "model_index.json").stat().st_size == 373
    scheduler = json.loads((published / "scheduler/scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "DDIMScheduler"
    unet = json.loads((published / "unet/config.json").read_text())
    assert unet["_class_name"] == "UNet3DConditionModel"
    loaded, tuned = load_model(published), Run.open(finished_run.folder).load_model(6)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(loaded, part).params, getattr(tuned, part).params
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value)
    settings = load_config(published / "config.yaml")[0]
    assert settings.train_data.prompt == "a square is moving"


def test_a_published_folder_becomes_an_adapter(published, adapter, finished_run, cli, tmp_path):
    path, base = tmp_path / "back.safetensors", Run.open(finished_run.folder).config
    arguments = (published, "--to", "adapter", path, "--model", base.pretrained_model_path)
    done = cli(convert, *arguments)
    assert done.status == 0, done.err
    back, first = read_adapter(path), read_adapter(adapter)
    assert back.step == first.step
    assert back.inputs.model == first.inputs.model
    assert back.inputs.clip is None
    assert back.trained.keys() == first.trained.keys()
    for name, value in first.trained.items():
        np.testing.assert_array_equal(back.trained[name], value)
    done = cli(
        *(sample, "--adapter", path, "--model", base.pretrained_model_path, "--prompt", "a cat"),
        *("--run", tmp_path / "run", "--num-inv-steps", 0)[:2],
    )
    assert done.status == 1, "the clip is not there, and its inversion is not in the file"
    assert "moving square.mp4" in done.err


def test_a_folder_that_was_tuned_otherwise_is_no_adapter(published, finished_run, cli, tmp_path):
    other = shutil.copytree(published, tmp_path / "model")
    file = other / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"conv_in.bias": tensors["conv_in.bias"] + 1}, file, {"format": "pt"})
    base = Run.open(finished_run.folder).config.pretrained_model_path
    path = tmp_path / "x.safetensors"
    done = cli(convert, other, "--to", "adapter", path, "--model", base)
    assert done.status == 1
    assert "conv_in.bias differ, too" in done.err
    done = cli(convert, other, "--to", "adapter", path)
    assert "--model DIR says where the base model is" in done.err
    (other / "config.yaml").unlink()
    done = cli(convert, other, "--to", "adapter", path, "--model", base)
    assert "no config.yaml, which names the caption" in done.err
    assert not path.exists()


def test_an_adapter_becomes_a_folder(adapter, published, finished_run, cli, tmp_path):
    base = Run.open(finished_run.folder).config.pretrained_model_path
    done = cli(convert, adapter, "--to", "pipeline", tmp_path / "model", "--model", base)
    assert done.status == 0, done.err
    for file in ("unet/diffusion_pytorch_model.safetensors", "unet/config.json", "config.yaml"):
        assert (tmp_path / "model" / file).read_bytes() == (published / file).read_bytes()
    (tmp_path / "model/mine.txt").write_text("notes")
    done = cli(convert, adapter, "--to", "unet", tmp_path / "model", "--model", base)
    assert done.status == 1
    assert (tmp_path / "model/mine.txt").exists()


def test_a_model_in_one_file_is_named_if_it_is_none(cli, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"x")
    done = cli(convert, tmp_path / "x.pt", "--to", "diffusers", tmp_path / "out")
    assert "a model in one file ends in .safetensors or .ckpt" in done.err
    done = cli(convert, tmp_path / "none.ckpt", "--to", "diffusers", tmp_path / "out")
    assert "none.ckpt" in done.err
    assert not (tmp_path / "out").exists()


def damaged(metadata, tensors, **changes):
    return {k: v for k, v in (metadata | changes).items() if v is not None}, tensors


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda m, t: ({}, t), "not an adapter of tav_jax"),
        (lambda m, t: damaged(m, t, **{"tav.format": "2"}), "a later version"),
        (lambda m, t: damaged(m, t, **{"tav.step": "many"}), r"tav\.step is no number"),
        (lambda m, t: damaged(m, t, **{"tav.config": None}), r"it has no tav\.config"),
        (lambda m, t: damaged(m, t, **{"tav.config": "{"}), r"tav\.config"),
        (lambda m, t: damaged(m, t, **{"tav.config": '{"seed": "x"}'}), "seed"),
        (lambda m, t: damaged(m, t, **{"tav.inputs": "[]"}), r"tav\.inputs"),
        (lambda m, t: (m, {k: v * np.nan for k, v in t.items()}), "not all values are finite"),
    ],
)
def test_other_files_are_refused(adapter, tmp_path, harm, message):
    path = tmp_path / "x.safetensors"
    metadata, tensors = harm(metadata_of(adapter), load_file(adapter))
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=message) as error:
        read_adapter(path)
    assert str(path) in str(error.value)


def test_what_is_missing_or_misnamed_is_one_line(adapter, finished_run, cli, tmp_path):
    done = cli(sample, "--prompt", "a cat")
    assert done.err == "error: nothing to sample from: give --run RUN_DIR or --adapter FILE\n"
    done = cli(sample, "--adapter", tmp_path / "none.safetensors", "--prompt", "a cat")
    assert done.err == f"error: --adapter: {tmp_path / 'none.safetensors'}: no such file\n"
    (tmp_path / "half.safetensors").write_bytes(adapter.read_bytes()[:5000])
    done = cli(sample, "--adapter", tmp_path / "half.safetensors", "--prompt", "a cat")
    assert "damaged or cut off" in done.err
    done = cli(convert, finished_run.folder, "--to", "adapter", tmp_path / "x.bin")
    assert "name a file that ends in .safetensors" in done.err
    assert cli(convert, tmp_path, "--to", "unet", tmp_path / "u").status == 1
