"""The base model's training, from nothing to a folder, with very few of everything.

The networks are of a few narrow layers. `test_base_model.py` has those that ship.
"""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tav_jax.models.network import init_network
from tav_jax.models.vae import AutoencoderKL
from tav_jax.pretrained.model import load_model, tokenize
from tav_jax.worlds import pretrain
from tav_jax.worlds.autoencoder import LATENT_DEVIATIONS, normalise_latents
from tav_jax.worlds.decoder import refine_decoder
from tav_jax.worlds.networks import unet_config, vae_config
from tav_jax.worlds.text_to_image import draw
from tav_jax.worlds.tiny_scenes.scenes import SIZE, WORDS
from tav_jax.worlds.training_set import make_training_set
from tav_jax.worlds.worlds import WORLDS

FEW = (
    *("scenes=24", "vae_steps=4", "vae_batch=4", "decoder_steps=4", "steps=4", "batch=8"),
    *("group_share=1", "probe=3", "checkpointing_steps=2"),
)


# A program of these compiles in seconds.
SMALL = {
    name: replace(
        world,
        vae=vae_config((8,) * len(world.vae.block_out_channels)),
        unet=unet_config((16,), world.unet.sample_size),
    )
    for name, world in WORLDS.items()
}
TINY_SCENES, FIGURES = SMALL["tiny-scenes"], SMALL["figures"]


@pytest.fixture(scope="module", autouse=True)
def _small_worlds():
    """Lets few images judge an autoencoder, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "NUM_RECONSTRUCTED", 16)
        for name, world in SMALL.items():
            patch.setitem(WORLDS, name, world)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain") / "out"
    assert pretrain.main(["--output-dir", str(folder), *FEW]) == 0
    return folder


def weights(folder):
    files = sorted((folder / "tiny-scenes").rglob("*.safetensors"))
    return {f"{file.parent.name} {k}": v for file in files for k, v in load_file(file).items()}


def test_every_stage_leaves_its_curve_and_its_figure(trained):
    for stage in ("autoencoder", "decoder", "diffusion"):
        assert (trained / stage / "metrics.jsonl").read_text().count('"step": 4') == 1
    assert (trained / "diffusion/pictures.png").is_file()


def test_the_decoder_learns_alone(tmp_path):
    recipe = replace(TINY_SCENES.recipe, scenes=6, vae_batch=4, decoder_steps=2)
    vae = init_network(AutoencoderKL, TINY_SCENES.vae, jax.random.key(0))
    training_set = make_training_set(TINY_SCENES, recipe)
    evaluation = pretrain.reconstruction_evaluation(TINY_SCENES, recipe)
    arguments = (training_set, evaluation, tmp_path, jax.random.key(1))
    refined = refine_decoder(TINY_SCENES, recipe, vae, *arguments)
    changed = {k for k, v in refined.params.items() if not np.array_equal(v, vae.params[k])}
    assert changed == {k for k in vae.params if k.startswith(("decoder.", "post_quant_conv."))}
    unchanged = refine_decoder(TINY_SCENES, replace(recipe, decoder_steps=0), vae, *arguments)
    assert unchanged is vae


def test_the_folder_is_a_model_that_draws(trained):
    model = load_model(trained / "tiny-scenes")
    image = draw(TINY_SCENES, model, ["a red circle on grass"], 3.0, seed=0)
    assert image.shape == (1, SIZE, SIZE, 3)
    assert image.std() > 1
    assert all(value.dtype == np.float16 for value in weights(trained).values())


def test_a_word_of_the_world_is_one_token_and_any_other_text_is_read(trained):
    model = load_model(trained / "tiny-scenes")
    tokenizer = model.tokenizer
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == 3, word
    for text in ("zap 9 ü 滑 🐼", "", "a " * 11):
        assert tokenize(model, [text]).shape == (1, 24)
        decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
        assert decoded.strip() == text.lower().strip()


def test_a_training_that_was_stopped_ends_as_if_it_had_not_been(trained, tmp_path):
    stopped = tmp_path / "stopped"
    shutil.copytree(trained, stopped)
    shutil.rmtree(stopped / "tiny-scenes")
    for stage in ("autoencoder", "diffusion"):
        shutil.rmtree(stopped / stage / "checkpoints/4")
    assert pretrain.main(["--output-dir", str(stopped), *FEW]) == 0
    ours, theirs = weights(stopped), weights(trained)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["steps=5"], "another recipe", id="another recipe"),
        pytest.param(["stepps=5"], "stepps: unknown key; did you mean steps?", id="misspelt"),
        pytest.param(["steps=many", "batch=1.5"], "batch: ", id="two wrong values"),
        pytest.param(["world=figures"], "world: --world figures chooses", id="another world"),
        pytest.param(["steps"], "expected key=value", id="no value"),
    ],
)
def test_wrong_arguments_end_in_a_line(trained, capsys, arguments, message):
    assert pretrain.main(["--output-dir", str(trained), *FEW, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_other_world_makes_its_own_model(tmp_path, capsys):
    few = [
        "scenes=8",
        "vae_steps=2",
        "vae_batch=2",
        "decoder_steps=2",
        "steps=2",
        "batch=4",
        "probe=2",
    ]
    assert pretrain.main(["--world", "figures", "--output-dir", str(tmp_path), *few]) == 0
    assert "verb " in capsys.readouterr().out
    model = load_model(tmp_path / FIGURES.model)
    image = draw(FIGURES, model, ["a panda is skiing on the moon, cartoon style"], 3.0, seed=0)
    assert image.shape == (1, FIGURES.size, FIGURES.size, 3)
    for word in FIGURES.words:
        assert len(model.tokenizer(word).input_ids) == 3, word
    assert pretrain.main(["--output-dir", str(tmp_path), *few]) == 1
    assert "another recipe" in capsys.readouterr().err


def test_a_training_can_start_from_a_model(trained, tmp_path, capsys):
    """Only its text encoder and U-Net change; a model of the other world is refused."""
    start = trained / "tiny-scenes"
    more = [*FEW, f"start_from={start}", "steps=2"]
    assert pretrain.main(["--output-dir", str(tmp_path / "more"), *more]) == 0
    before, after = weights(trained), weights(tmp_path / "more")
    assert before.keys() == after.keys()
    changed = {name.split()[0] for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"text_encoder", "unet"}
    files = (trained, tmp_path / "more")
    one, other = ((each / "tiny-scenes/tokenizer/tokenizer.json").read_bytes() for each in files)
    assert one == other
    assert not (tmp_path / "more/autoencoder").exists()
    # The average has moved by two small steps only, so it is still the trained model.
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, atol=0.02, err_msg=name)
    other = ["--world", "figures", "--output-dir", str(tmp_path / "other"), f"start_from={start}"]
    assert pretrain.main(other) == 1
    assert f"start_from: {start} has not the networks of tiny-figures" in capsys.readouterr().err


def test_normalising_changes_latents_and_no_image():
    vae = init_network(AutoencoderKL, TINY_SCENES.vae, jax.random.key(0))
    bias = jax.random.normal(jax.random.key(1), (8,))
    vae = vae.with_params(vae.params | {"quant_conv.bias": bias})
    images = jax.random.normal(jax.random.key(2), (4, 1, SIZE, SIZE, 3))
    moments = vae.bind().encode(images)
    after = vae.with_params(normalise_latents(vae.params, moments))
    mean, logvar = jax.numpy.split(after.bind().encode(images), 2, axis=-1)
    np.testing.assert_allclose(mean.mean((0, 1, 2, 3)), 0, atol=1e-5)
    variance = mean.var((0, 1, 2, 3)) + jax.numpy.exp(logvar).mean((0, 1, 2, 3))
    np.testing.assert_allclose(variance**0.5, LATENT_DEVIATIONS, rtol=1e-4)
    old = vae.bind().decode(moments[..., :4])
    np.testing.assert_allclose(after.bind().decode(mean), old, atol=1e-4)
