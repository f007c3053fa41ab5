"""A model in one file, as model sites have them, in the place of a model's folder."""

import json
import shutil

import numpy as np
import pytest
from ldm_names import original_tensors
from safetensors.numpy import load_file, save_file

from tav_jax import tune
from tav_jax.errors import UserError
from tav_jax.pretrained.hub import find_folder
from tav_jax.pretrained.model import load_model
from tav_jax.pretrained.single_file import converted_folder

torch = pytest.importorskip("torch")

CONFIGS = "models--stable-diffusion-v1-5--stable-diffusion-v1-5"  # where diffusers looks for SD 1


@pytest.fixture(scope="module")
def original(material, tmp_path_factory):
    """The small model's tensors with their original names."""
    unet = json.loads((material.model / "unet/config.json").read_text())
    vae = json.loads((material.model / "vae/config.json").read_text())
    return original_tensors(
        material.model,
        layers=unet["layers_per_block"],
        attention=["CrossAttn" in kind for kind in unet["up_block_types"]],
        levels=len(vae["block_out_channels"]),
    )


@pytest.fixture
def hub_cache(material, monkeypatch, tmp_path):
    """A Hub's cache with the configs of SD 1.5, and an empty cache of our own."""
    from huggingface_hub import constants

    snapshot = tmp_path / "hub" / CONFIGS / "snapshots/0"
    shutil.copytree(material.model, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    classes = {
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.11.1"} | classes
    (snapshot / "model_index.json").write_text(json.dumps(index))
    refs = tmp_path / "hub" / CONFIGS / "refs"
    refs.mkdir()
    (refs / "main").write_text("0")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/tav_jax/models"


def test_it_is_converted_once_and_is_the_model_of_its_folder(
    original, material, hub_cache, tmp_path, capsys
):
    path = tmp_path / "small.safetensors"
    save_file(original, path)
    model, folders = load_model(path), load_model(material.model)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(model, part).params, getattr(folders, part).params
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value)
    assert capsys.readouterr().out.count("converting") == 1
    written = {each: each.stat().st_mtime_ns for each in hub_cache.rglob("*") if each.is_file()}
    assert find_folder(path) == converted_folder(path)
    now = {each: each.stat().st_mtime_ns for each in hub_cache.rglob("*") if each.is_file()}
    assert now == written
    assert not capsys.readouterr().out


def test_it_tunes_and_samples_as_its_folder_does(original, cli, write_config, hub_cache, tmp_path):
    torch.save(
        {"state_dict": {k: torch.from_numpy(v) for k, v in original.items()}}, tmp_path / "x.ckpt"
    )
    made = []
    for name, change in {
        "one": {"pretrained_model_path": str(tmp_path / "x.ckpt")},
        "folder": {},
    }.items():
        change |= {"output_dir": str(tmp_path / name), "max_train_steps": 2, "validation_steps": 2}
        done = cli(tune, "--config", write_config(**change))
        assert done.status == 0, done.err
        videos = (tmp_path / name / "samples/sample-2").glob("*.mp4")
        made.append({video.name: video.read_bytes() for video in videos})
    assert made[0] == made[1]
    assert made[0]


def test_float16_stays_float16(original, hub_cache, tmp_path):
    path = tmp_path / "half.safetensors"
    save_file({name: tensor.astype(np.float16) for name, tensor in original.items()}, path)
    stored = load_file(converted_folder(path) / "unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "first_stage" not in k}, "without its VAE"),
        (
            lambda t: {k: v for k, v in t.items() if "decoder.conv_in.bias" not in k},
            "the file is incomplete",
        ),
        (lambda t: t | {"conditioner.embedders.0.x": t[next(iter(t))]}, "SDXL"),
        (
            lambda t: {k: v for k, v in t.items() if "middle_block" not in k},
            "the file is incomplete",
        ),
    ],
)
def test_what_is_no_whole_model_is_refused(original, hub_cache, tmp_path, change, message):
    path = tmp_path / "x.safetensors"
    save_file(change(original), path)
    with pytest.raises(UserError, match=message) as error:
        find_folder(path)
    assert str(path) in str(error.value)
    assert not list(hub_cache.glob("*/*"))


def test_without_the_configs_it_is_said_what_is_missing(original, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "small.safetensors"
    save_file(original, path)
    with pytest.raises(UserError, match="stable-diffusion-v1-5"):
        find_folder(path)
    assert not list((tmp_path / "cache/tav_jax/models").glob("small*"))
