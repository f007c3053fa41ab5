"""What a GPU computes in another way than other devices gives the same values and gradients.

All of it is plain JAX, so it runs here. The references are the definitions, differentiated by JAX
in float64.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tav_jax.models.attention.dispatch import MAX_FRAMES_ELEMENTWISE, attends_elementwise
from tav_jax.models.attention.einsum import attention, einsum_attention
from tav_jax.models.attention.over_frames import attention_over_frames
from tav_jax.models.frame_collectives import FRAME_AXES
from tav_jax.models.group_norm import NormOptions, one_pass_group_norm
from tav_jax.models.layers import convolution
from tav_jax.models.transformer import gated, gated_keeping_input
from tav_jax.parallel.sharding import denoiser, make_mesh, on_mesh

ROUNDING = 2e-5  # float32 against float64, for values around 1
BFLOAT16 = 2**-7  # bfloat16 against float64: a value is rounded twice
EPS = 1e-5


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr("tav_jax.models.backend.platform", lambda: "gpu")


def value_and_gradients(function, inputs, weights, dtype):
    """Return a function's value, and the gradients of its weighted sum, computed in a type."""
    with jax.enable_x64(dtype == "float64"):
        cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), inputs)

        def weighted_sum(inputs):
            out = function(*inputs)
            return jnp.sum(out.astype(dtype) * jnp.asarray(weights, dtype)), out

        step = jax.jit(jax.value_and_grad(weighted_sum, has_aux=True))
        (_, out), gradients = step(cast)
        return jax.tree.map(lambda x: np.asarray(x, np.float64), (out, gradients))


def assert_same(ours, expected, tolerance):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.abs(one - other).max() <= tolerance * max(np.abs(other).max(), 1)


def rounded(inputs, dtype):
    """Return float64 numbers that the type has, so that only the computation is compared."""
    return jax.tree.map(lambda x: np.asarray(jnp.asarray(x, dtype), np.float64), inputs)


# Group norm


def norm_by_definition(parts, scale, bias, shift, *, groups, silu):
    x = jnp.concatenate(parts, axis=-1)
    x = x + shift.reshape(len(shift), *(1,) * (x.ndim - 2), -1)
    grouped = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean, variance = (f((1, 3), keepdims=True) for f in (grouped.mean, grouped.var))
    normed = ((grouped - mean) / jnp.sqrt(variance + EPS)).reshape(x.shape)
    scale, bias = (v.reshape(*(1,) * (x.ndim - 1), -1) for v in (scale, bias))
    y = normed * scale + bias
    return y * jax.nn.sigmoid(y) if silu else y


def norm_inputs(key, axes, widths, offset=0.0):
    keys = iter(jax.random.split(key, 8))
    parts = tuple(
        offset + np.asarray(jax.random.normal(next(keys), (2, *axes, width)), np.float64)
        for width in widths
    )
    width = sum(widths)
    scale, bias = (np.asarray(jax.random.normal(next(keys), (width,))) for _ in range(2))
    shift = np.asarray(jax.random.normal(next(keys), (2, width)))
    return (parts, scale, bias, shift), np.asarray(jax.random.normal(next(keys), (2, *axes, width)))


def one_pass(groups, *, silu=False, joint_frames=True):
    options = NormOptions(groups, EPS, joint_frames, silu)
    return lambda *inputs: one_pass_group_norm(*inputs, options)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("axes", "widths", "groups"),
    [
        pytest.param((3, 4, 5), (8,), 2, id="video"),
        pytest.param((16, 8), (6,), 3, id="two pieces"),
        pytest.param((2, 3, 3), (6, 10), 4, id="a group with channels of both parts"),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", ROUNDING), ("bfloat16", BFLOAT16)])
def test_group_norm_in_one_pass(key, axes, widths, groups, silu, dtype, tolerance):
    inputs, weights = rounded(norm_inputs(key, axes, widths), dtype)
    definition = partial(norm_by_definition, groups=groups, silu=silu)
    expected = value_and_gradients(definition, inputs, weights, "float64")
    ours = value_and_gradients(one_pass(groups, silu=silu), inputs, weights, dtype)
    assert_same(ours, expected, tolerance)


def test_a_mean_of_a_thousand_deviations_costs_no_accuracy(key):
    # float32 numbers around 1000 are 6e-5 apart. Without the distances from the first value, the
    # variance would be wrong by several per cent.
    inputs, weights = rounded(norm_inputs(key, (16, 16), (4,), offset=1000.0), "float32")
    definition = partial(norm_by_definition, groups=2, silu=False)
    expected = value_and_gradients(definition, inputs, weights, "float64")
    ours = value_and_gradients(one_pass(2), inputs, weights, "float32")
    assert_same(ours, expected, 3e-4)


@pytest.mark.parametrize("joint_frames", [True, False])
def test_group_norm_in_one_pass_of_sharded_frames(key, joint_frames):
    inputs, weights = norm_inputs(key, (4, 3, 3), (8,))
    inputs, weights = jax.tree.map(np.float32, (inputs, weights))
    # Frames of their own mean, so that each device's statistics differ.
    inputs[0][0][...] += 3 * np.arange(4, dtype=np.float32)[:, None, None, None]
    norm = one_pass(2, silu=True, joint_frames=joint_frames)
    mesh = make_mesh({"data": 1, "frames": 4, "fsdp": 1}, frames=4)
    with on_mesh(mesh):
        video, whole = PartitionSpec(None, FRAME_AXES), PartitionSpec()
        sharded = jax.shard_map(
            norm, in_specs=((video,), whole, whole, whole), out_specs=video, check_vma=False
        )
        ours = value_and_gradients(sharded, inputs, weights, "float32")
    if joint_frames:
        expected = value_and_gradients(norm, inputs, weights, "float32")
    else:

        def each_frame(parts, *vectors):
            frames = [norm((parts[0][:, i : i + 1],), *vectors) for i in range(4)]
            return jnp.concatenate(frames, axis=1)

        expected = value_and_gradients(each_frame, inputs, weights, "float32")
    assert_same(ours, expected, ROUNDING)


# Other layers


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", ROUNDING), ("bfloat16", BFLOAT16)])
def test_gated_keeping_its_input(key, dtype, tolerance):
    x, weights = (3 * np.asarray(jax.random.normal(k, (5, 8))) for k in jax.random.split(key))
    x, weights = rounded((x, weights[:, :4]), dtype)
    expected = value_and_gradients(gated, (x,), weights, "float64")
    assert_same(value_and_gradients(gated_keeping_input, (x,), weights, dtype), expected, tolerance)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", ROUNDING), ("bfloat16", BFLOAT16)])
def test_attention_over_frames(key, frames, dtype, tolerance):
    heads = np.asarray(jax.random.normal(key, (4, 2, frames, 5, 2, 4)))
    *inputs, weights = rounded(list(heads), dtype)

    def definition(*heads):
        out = attention(*(x.swapaxes(1, 2) for x in heads))
        return out.swapaxes(1, 2)

    # The definition takes its softmax in float32.
    expected = value_and_gradients(definition, inputs, weights, "float64")
    ours = value_and_gradients(attention_over_frames, inputs, weights, dtype)
    assert_same(ours, expected, tolerance)


def test_only_auto_on_a_gpu_attends_to_few_frames_element_by_element(on_gpu, monkeypatch):
    assert attends_elementwise("auto", frames=MAX_FRAMES_ELEMENTWISE)
    assert not attends_elementwise("auto", frames=MAX_FRAMES_ELEMENTWISE + 1)
    assert not attends_elementwise("einsum", frames=8)
    monkeypatch.setattr("tav_jax.models.backend.platform", lambda: "tpu")
    assert not attends_elementwise("auto", frames=8)


def test_joined_keys_of_two_groups(key, monkeypatch):
    query, shared, own = np.asarray(jax.random.normal(key, (3, 2, 3, 5, 2, 4)), np.float32)
    groups = (shared[:, :1], own)
    inputs = query, groups, (groups[0] + 1, groups[1] - 1)
    expected = value_and_gradients(einsum_attention, inputs, query, "float32")
    monkeypatch.setattr("tav_jax.models.backend.platform", lambda: "gpu")
    ours = value_and_gradients(lambda *heads: einsum_attention(*heads), inputs, query, "float32")
    assert_same(ours, expected, ROUNDING)


@pytest.mark.parametrize(("stride", "padding"), [(1, (1, 1)), (2, (1, 1)), (2, (0, 1))])
def test_gradients_of_a_convolution(key, on_gpu, stride, padding):
    x, kernel = jax.random.normal(key, (2, 6, 7, 3)), jax.random.normal(key, (3, 3, 3, 4))

    def convolve(x, kernel):
        return convolution(x, kernel, stride, padding)

    def by_definition(x, kernel):
        return jax.lax.conv_general_dilated(
            *(x, kernel, (stride, stride), (padding, padding)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    weights = np.asarray(jax.random.normal(key, jax.eval_shape(convolve, x, kernel).shape))
    expected = value_and_gradients(by_definition, (x, kernel), weights, "float64")
    assert_same(value_and_gradients(convolve, (x, kernel), weights, "float32"), expected, ROUNDING)


# The whole network


def test_the_network_on_a_gpu(key, tiny_unet, monkeypatch):
    keys = jax.random.split(key, 3)
    inputs = tiny_unet.params, jax.random.normal(keys[0], (2, 4, 8, 8, 4))
    context, weights = (
        jax.random.normal(keys[1], (2, 6, 8)),
        jax.random.normal(keys[2], (2, 4, 8, 8, 4)),
    )

    def call(preset="none"):
        unet = tiny_unet.with_compute(gradient_checkpointing=preset)

        def network(params, latents):
            return denoiser(unet.with_params(params))(latents, jnp.array([500, 20]), context)

        return value_and_gradients(network, inputs, weights, "float32")

    expected = call()
    monkeypatch.setattr("tav_jax.models.backend.platform", lambda: "gpu")
    assert_same(call(), expected, 10 * ROUNDING)
    with on_mesh(make_mesh({"data": 1, "frames": 4, "fsdp": 1}, frames=4)):
        assert_same(call("blocks"), expected, 10 * ROUNDING)


def test_kernels_cast_once_give_the_same_prediction(key, tiny_unet):
    unet = tiny_unet.with_compute(dtype="bfloat16")
    cast = unet.with_kernels_cast()
    assert {x.dtype for name, x in cast.params.items() if name.endswith("kernel")} == {
        jnp.dtype("bfloat16")
    }
    assert cast.params["conv_in.bias"].dtype == unet.params["conv_in.bias"].dtype
    inputs = jax.random.normal(key, (1, 2, 8, 8, 4)), jnp.array([7]), jnp.ones((1, 6, 8))
    call = jax.jit(lambda unet, *inputs: unet(*inputs))
    np.testing.assert_array_equal(call(cast, *inputs), call(unet, *inputs))
