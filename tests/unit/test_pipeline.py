"""The method on one Model: what is handed from one stage to the next."""

import jax.numpy as jnp
import numpy as np
import pytest

import tav_jax as tav


@pytest.fixture(scope="module")
def model(golden):
    return tav.load_model(golden / "base")


def test_the_posterior_s_mean_is_what_is_inverted(model):
    mean, logvar = jnp.full((1, 2, 3, 3, 4), 2.0), jnp.full((1, 2, 3, 3, 4), 5.0)
    latents = tav.clean_latents(model, jnp.concatenate([mean, logvar], axis=-1))
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
