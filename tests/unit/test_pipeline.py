"""The method on one Model: what is handed from one stage to the next."""

import io
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

import tav_jax as tav
from tav_jax.models.unet import UNet3DConditionModel


@pytest.fixture(scope="module")
def model(golden):
    return tav.load_model(golden / "base")


def test_the_posterior_s_mean_is_what_is_inverted(model):
    mean, logvar = jnp.full((1, 2, 3, 3, 4), 2.0), jnp.full((1, 2, 3, 3, 4), 5.0)
    latents = tav.posterior_mean_latents(model, jnp.concatenate([mean, logvar], axis=-1))
    np.testing.assert_allclose(latents, 2.0 * 0.18215, rtol=1e-6)


def test_frames_that_the_autoencoder_does_not_divide_are_refused(model):
    with pytest.raises(ValueError, match="30x32; this model takes sides that are multiples of 4"):
        tav.encode_frames(model, np.zeros((2, 32, 30, 3), np.uint8))


def test_random_latents_depend_on_their_seed_alone(model):
    both = tav.random_latents(model, [3, 4], 2, 16, 24)
    assert both.shape == (2, 2, 4, 6, 4)
    np.testing.assert_array_equal(both[1], tav.random_latents(model, [4], 2, 16, 24)[0])
    assert abs(float(both.std()) - 1) < 0.1


def test_noise_without_seeds_is_refused(model):
    with pytest.raises(ValueError, match="give seeds, one for each prompt"):
        tav.sample_latents(model, jnp.zeros((1, 2, 4, 4, 4)), ["a", "b"], eta=0.5, seeds=[1])


# Loops, whole and in parts


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A terminal, to which bars show every move."""
    terminal = Terminal()
    monkeypatch.setattr("tav_jax.progress.tqdm", partial(tqdm, file=terminal, mininterval=0))
    # Not the real one, which pytest puts back before the test begins.
    monkeypatch.setattr("tav_jax.progress.sys", SimpleNamespace(stderr=terminal))
    return terminal


@pytest.fixture
def texts_read(monkeypatch):
    """The shapes of all texts of which keys and values have been made."""
    read = []
    original = UNet3DConditionModel.text_keys_values

    def text_keys_values(self, context):
        read.append(context.shape)
        return original(self, context)

    monkeypatch.setattr(UNet3DConditionModel, "text_keys_values", text_keys_values)
    return read


@pytest.mark.parametrize(
    ("run", "texts"),
    [
        pytest.param(partial(tav.invert_latents, num_inv_steps=12), 1, id="inversion"),
        pytest.param(
            partial(tav.sample_latents, prompts=["a"], num_inference_steps=12, eta=0.5, seeds=[3]),
            2,
            id="ddim, guided, with noise",
        ),
        pytest.param(
            partial(
                tav.sample_latents, prompts=["a"], num_inference_steps=12, sampler="dpm_solver"
            ),
            2,
            id="dpm_solver, guided",
        ),
    ],
)
def test_a_loop_with_a_bar_is_the_same_program_with_the_same_result(
    run, texts, model, texts_read, terminal
):
    latents = tav.random_latents(model, [5], 2, 16, 8)
    given = np.array(latents)
    whole = run(model, latents)
    assert len(texts_read) == texts  # once a prompt, and not once a timestep
    assert terminal.getvalue() == ""
    with jax.no_tracing():
        in_parts = run(model, latents, progress=True)
    np.testing.assert_array_equal(in_parts, whole)
    shown = {int(done) for done in re.findall(r"(\d+)/12", terminal.getvalue())}
    assert shown == {0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12}
    np.testing.assert_array_equal(latents, given)  # still the caller's


@pytest.mark.usefixtures("terminal")
def test_a_network_that_has_been_put_on_a_device_needs_no_second_program(model, caplog):
    there = model.with_unet(jax.device_put(model.unet, jax.devices()[0]))
    latents = tav.random_latents(model, [5], 2, 16, 8)
    with jax.log_compiles():
        tav.invert_latents(there, latents, num_inv_steps=3, progress=True)
    assert caplog.text.count("Compiling jit(ddim_invert)") == 1


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("num_steps", [-1, 0, 1000])
def test_a_number_of_steps_that_does_not_fit_is_refused_with_a_bar_too(model, num_steps):
    latents = jnp.zeros((1, 2, 4, 4, 4))
    with pytest.raises(ValueError, match=f"DDIM steps: expected 1 to 999, got {num_steps}"):
        tav.invert_latents(model, latents, num_inv_steps=num_steps, progress=True)
