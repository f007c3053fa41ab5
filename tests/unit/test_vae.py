import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tav_jax.models.compute import ComputeOptions
from tav_jax.models.layers import Downsample, GroupNorm
from tav_jax.models.vae import AutoencoderKL, sample_posterior

ROUNDING = 1e-5  # float32, two orders of the same sums, for values around 1


@pytest.fixture(scope="module")
def encode(jit):
    return jit(lambda vae, pixel_values: vae.bind().encode(pixel_values))


@pytest.fixture(scope="module")
def decode(jit):
    return jit(lambda vae, latents: vae.bind().decode(latents))


@pytest.fixture(scope="module")
def pixel_values():
    """One clip of three frames, 8x6."""
    noise = np.random.default_rng(0).standard_normal((1, 3, 8, 6, 3))
    return jnp.asarray(np.tanh(noise), jnp.float32)


@pytest.fixture(scope="module")
def latents():
    noise = np.random.default_rng(1).standard_normal((1, 3, 4, 3, 4))
    return jnp.asarray(noise, jnp.float32)


@pytest.fixture
def run(request, encode, decode, pixel_values, latents):
    """Encoding or decoding, with a clip for it."""
    return {"encode": (encode, pixel_values), "decode": (decode, latents)}[request.param]


BOTH_WAYS = pytest.mark.parametrize("run", ["encode", "decode"], indirect=True)


def test_latents_and_pixels_have_each_other_s_grid(tiny_vae, encode, decode, pixel_values, latents):
    assert tiny_vae.config.downsampling == 2
    assert encode(tiny_vae, pixel_values).shape == (1, 3, 4, 3, 2 * 4)
    assert decode(tiny_vae, latents).shape == pixel_values.shape


@BOTH_WAYS
@pytest.mark.parametrize("frames_per_chunk", [2, 3])
def test_frames_never_mix(tiny_vae, run, frames_per_chunk):
    function, clip = run
    vae = tiny_vae.with_config(frames_per_chunk=frames_per_chunk)
    expected = function(vae, clip)
    for frame in range(3):
        changed = function(vae, clip.at[:, frame].add(0.5)) != expected
        assert set(np.flatnonzero(changed.any((0, 2, 3, 4)))) == {frame}


@BOTH_WAYS
@pytest.mark.parametrize(
    "frames_per_chunk",
    [
        pytest.param(1, id="one by one"),
        pytest.param(3, id="all in one chunk"),
        pytest.param(8, id="chunk larger than the clip"),
    ],
)
def test_size_of_chunks_does_not_change_the_result(tiny_vae, run, frames_per_chunk):
    function, clip = run
    in_two_and_a_remainder = function(tiny_vae, clip)
    ours = function(tiny_vae.with_config(frames_per_chunk=frames_per_chunk), clip)
    np.testing.assert_allclose(ours, in_two_and_a_remainder, atol=ROUNDING)


def test_clips_of_a_batch_come_out_in_their_order(tiny_vae, encode, pixel_values):
    other = pixel_values[:, ::-1] / 2
    together = encode(tiny_vae, jnp.concatenate([pixel_values, other]))
    alone = [encode(tiny_vae, clip)[0] for clip in (pixel_values, other)]
    np.testing.assert_allclose(together, alone, atol=ROUNDING)


def test_decode_divides_the_scaling_factor_out(tiny_vae, decode, latents):
    factor = tiny_vae.config.scaling_factor
    assert factor != 1
    unscaled = decode(tiny_vae.with_config(scaling_factor=1.0), latents / factor)
    np.testing.assert_allclose(decode(tiny_vae, latents), unscaled, atol=ROUNDING)


@pytest.mark.parametrize(
    ("shift", "limit"), [pytest.param(100, 20, id="above"), pytest.param(-100, -30, id="below")]
)
def test_log_variances_are_cut_and_means_are_not(tiny_vae, encode, pixel_values, shift, limit):
    before = encode(tiny_vae, pixel_values)
    assert -30 < before.min() < before.max() < 20
    bias = tiny_vae.params["quant_conv.bias"] + shift
    moments = encode(
        tiny_vae.with_params(tiny_vae.params | {"quant_conv.bias": bias}), pixel_values
    )
    mean, logvar = jnp.split(moments, 2, axis=-1)
    # Values near 100 are known to float32 within 4e-6.
    np.testing.assert_allclose(mean, before[..., :4] + shift, atol=10 * ROUNDING)
    np.testing.assert_array_equal(logvar, np.full(mean.shape, limit, np.float32))


def test_bfloat16_is_near_float32_and_returns_float32(tiny_vae, decode, latents):
    ours = decode(tiny_vae.with_compute(dtype="bfloat16"), latents)
    assert ours.dtype == jnp.float32
    expected = decode(tiny_vae, latents)
    # Some twenty roundings of up to 2^-9 in a row; less than one would mean no bfloat16 at all.
    assert 2**-9 < np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 0.03


def test_norms_and_paddings_are_the_published_autoencoder_s(vae_config):
    vae = nnx.eval_shape(lambda: AutoencoderKL(vae_config, ComputeOptions(), rngs=nnx.Rngs(0)))
    modules = [module for _, module in nnx.iter_modules(vae)]
    norms = [module for module in modules if isinstance(module, GroupNorm)]
    assert {(norm.eps, norm.joint_frames) for norm in norms} == {(1e-6, False)}
    assert {m.conv.padding for m in modules if isinstance(m, Downsample)} == {(0, 1)}


# The posterior


def test_a_sample_is_mean_plus_deviation_times_noise_scaled():
    # Means 1, 2; deviations 3, 1/2; noise 10, -4; factor 1/4.
    moments = jnp.array([1, 2, 2 * np.log(3), -2 * np.log(2)], jnp.float32).reshape(1, 1, 1, 1, 4)
    noise = jnp.array([10.0, -4.0]).reshape(1, 1, 1, 1, 2)
    sample = sample_posterior(moments, noise, 0.25)
    np.testing.assert_allclose(sample.ravel(), [(1 + 30) / 4, (2 - 2) / 4], atol=1e-6)


def test_samples_have_the_mean_and_deviation_of_the_posterior(key):
    count = 40_000
    mean, logvar = -2.0, np.log(9.0)
    moments = jnp.broadcast_to(
        jnp.array([mean, logvar], jnp.float32).reshape(1, 1, 1, 1, 2), (count, 1, 1, 1, 2)
    )
    samples = np.asarray(
        sample_posterior(moments, jax.random.normal(key, (count, 1, 1, 1, 1)), 2.0)
    )
    # Standard errors 6 / sqrt(count) = 0.03 and 6 / sqrt(2 count) = 0.021; five of each.
    assert samples.mean() == pytest.approx(2 * mean, abs=0.15)
    assert samples.std() == pytest.approx(2 * 3, abs=0.11)
