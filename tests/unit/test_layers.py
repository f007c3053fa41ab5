import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tav_jax.models.clip import gelu, quick_gelu
from tav_jax.models.layers import (
    Conv,
    Downsample,
    GroupNorm,
    LayerNorm,
    Linear,
    ResnetBlock,
    convolution,
    fan_in_uniform,
    group_norm,
    layer_norm,
    upsample_nearest,
)
from tav_jax.models.transformer import GEGLU
from tav_jax.models.unet import timestep_embedding

ROUNDING = 1e-5  # float32 against float64, for values around 1


def normalised(x, axes, eps):
    """Return x with zero mean and unit variance over the axes, in float64."""
    x = np.asarray(x, np.float64)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


@jax.jit
def run(layer, *inputs):
    """Run a layer as one program, which compiles faster than its operations one by one."""
    return layer(*(jnp.asarray(x, jnp.float32) for x in inputs))


jit_group_norm = jax.jit(group_norm, static_argnames=("num_groups", "eps", "joint_frames"))


def silu(x):
    return x / (1 + np.exp(-x))


def exact_gelu(x):
    return np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))(np.float64(x))


# Norms


def test_group_norm_of_a_video_is_joint_over_its_frames():
    # One clip of one channel: frame 0 is all 0, frame 1 all 2. Mean 1 and variance 1 together;
    # frame by frame nothing would be left.
    video = np.zeros((1, 2, 2, 2, 1), np.float32)
    video[:, 1] = 2
    scale, bias = np.ones(1, np.float32), np.zeros(1, np.float32)
    together = jit_group_norm(video, scale, bias, num_groups=1, eps=0.0, joint_frames=True)
    np.testing.assert_array_equal(together, video - 1)
    frame_by_frame = jit_group_norm(
        video[0], scale, bias, num_groups=1, eps=1e-6, joint_frames=False
    )
    np.testing.assert_array_equal(frame_by_frame, np.zeros((2, 2, 2, 1)))


@pytest.mark.parametrize(
    ("shape", "joint_frames"),
    [
        pytest.param((2, 3, 4, 5, 6), True, id="videos"),
        pytest.param((2, 4, 5, 6), False, id="images"),
    ],
)
def test_group_norm_normalises_neighbouring_channels_then_scales(key, shape, joint_frames):
    x = 3 + 2 * np.asarray(jax.random.normal(key, shape))
    scale, bias = np.arange(1, 7, dtype=np.float32), np.arange(6, dtype=np.float32)
    ours = jit_group_norm(x, scale, bias, num_groups=2, eps=1e-5, joint_frames=joint_frames)
    all_but_the_first = tuple(range(1, len(shape)))
    groups = [normalised(group, all_but_the_first, 1e-5) for group in np.split(x, 2, axis=-1)]
    expected = np.concatenate(groups, axis=-1) * scale + bias
    np.testing.assert_allclose(ours, expected, atol=10 * ROUNDING)


def test_layer_norm_normalises_each_token_by_itself(key):
    x = 3 + 2 * np.asarray(jax.random.normal(key, (2, 3, 6)))
    scale, bias = np.arange(1, 7, dtype=np.float32), np.arange(6, dtype=np.float32)
    ours = jax.jit(partial(layer_norm, eps=1e-5))(x, scale, bias)
    expected = normalised(x, (-1,), 1e-5) * scale + bias
    np.testing.assert_allclose(ours, expected, atol=10 * ROUNDING)


@pytest.mark.parametrize(
    ("make", "eps"),
    [
        pytest.param(
            lambda: GroupNorm(1, 2, eps=1e-6, joint_frames=False),
            1e-6,
            id="group norm of a transformer",
        ),
        pytest.param(
            lambda: GroupNorm(1, 2, eps=1e-5, joint_frames=True),
            1e-5,
            id="group norm of a residual block",
        ),
        pytest.param(lambda: LayerNorm(2), 1e-5, id="layer norm"),
    ],
)
def test_eps_is_added_to_the_variance(make, eps):
    # Variance 1e-6, no larger than eps: 1e-3 / sqrt(1e-6 + eps) is 0.71 or 0.30.
    x = 1e-3 * np.array([[1, -1], [-1, 1]])
    np.testing.assert_allclose(run(make(), x), x / np.sqrt(1e-6 + eps), rtol=1e-5)


@pytest.mark.parametrize(
    "normalise",
    [
        pytest.param(
            partial(group_norm, num_groups=1, eps=1e-5, joint_frames=False), id="group_norm"
        ),
        pytest.param(partial(layer_norm, eps=1e-5), id="layer_norm"),
    ],
)
def test_statistics_of_bfloat16_are_taken_in_float32(normalise):
    # 64 and 64.5 are bfloat16 numbers, and so are their distances from the mean 64.015625, but
    # the mean itself is not: rounded to 64, most of the result would be 0.
    x = np.full((1, 32), 64.0)
    x[0, 0] = 64.5
    scale, bias = np.ones(32, np.float32), np.zeros(32, np.float32)
    ours = jax.jit(normalise)(x.astype(jnp.bfloat16), scale, bias)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours, np.float64), normalised(x, (-1,), 1e-5), rtol=2**-8)


# Convolutions and resampling


def conv_by_definition(x, kernel, *, stride, padding):
    """Return the cross-correlation of an image `h w i`, padded with zeros, with `kh kw i o`."""
    size = kernel.shape[0]
    x = np.pad(np.asarray(x, np.float64), (padding, padding, (0, 0)))
    h, w = ((side - size) // stride + 1 for side in x.shape[:2])
    out = np.zeros((h, w, kernel.shape[-1]))
    for row, column in np.ndindex(h, w):
        window = x[row * stride : row * stride + size, column * stride : column * stride + size]
        out[row, column] = np.einsum("hwi,hwio->o", window, kernel)
    return out


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_conv_of_a_video_is_that_of_each_frame(key, kernel_size):
    conv = Conv(3, 2, kernel_size, rngs=nnx.Rngs(0))
    bias = np.array([1, -2], np.float32)
    conv.bias[...] = jnp.asarray(bias)
    video = np.asarray(jax.random.normal(key, (2, 3, 4, 5, 3)))
    ours = run(conv, video)
    assert ours.shape == (2, 3, 4, 5, 2)
    same = (kernel_size // 2, kernel_size // 2)
    for item, frame in np.ndindex(2, 3):
        expected = conv_by_definition(video[item, frame], conv.kernel[...], stride=1, padding=same)
        np.testing.assert_allclose(ours[item, frame], expected + bias, atol=ROUNDING)


@pytest.mark.parametrize(
    ("padding", "seen_by"),
    [
        # Output i looks at input rows 2i - 1, 2i and 2i + 1.
        pytest.param((1, 1), {0: [(0, 1)], 1: [(0, 2), (1, 0)], 3: [(1, 2)]}, id="unet"),
        # Output i looks at input rows 2i, 2i + 1 and 2i + 2.
        pytest.param((0, 1), {0: [(0, 0)], 1: [(0, 1)], 2: [(0, 2), (1, 0)]}, id="vae"),
    ],
)
def test_an_impulse_comes_out_of_downsample_where_its_padding_says(padding, seen_by):
    downsample = Downsample(1, padding=padding, rngs=nnx.Rngs(0))
    kernel = np.arange(1.0, 10.0).reshape(3, 3)
    downsample.conv.kernel[...] = jnp.asarray(kernel, jnp.float32)[..., None, None]
    for row, rows_out in seen_by.items():
        for column, columns_out in seen_by.items():
            impulse, expected = np.zeros((1, 1, 4, 4, 1)), np.zeros((2, 2))
            impulse[0, 0, row, column, 0] = 1
            for row_out, kernel_row in rows_out:
                for column_out, kernel_column in columns_out:
                    expected[row_out, column_out] = kernel[kernel_row, kernel_column]
            np.testing.assert_array_equal(run(downsample, impulse)[0, 0, ..., 0], expected)


@pytest.mark.parametrize("padding", [(1, 1), (0, 1)])
def test_downsample_of_an_odd_grid_follows_its_definition(key, padding):
    downsample = Downsample(2, padding=padding, rngs=nnx.Rngs(0))
    x = jax.random.normal(key, (5, 7, 2))
    expected = conv_by_definition(x, downsample.conv.kernel[...], stride=2, padding=padding)
    np.testing.assert_allclose(run(downsample, x), expected, atol=ROUNDING)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=["even grid", "odd grid"])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding"),
    [
        pytest.param(1, 1, (0, 0), id="pointwise"),
        pytest.param(3, 1, (1, 1), id="3x3"),
        pytest.param(3, 2, (1, 1), id="unet's down-sampling"),
        pytest.param(3, 2, (0, 1), id="vae's down-sampling"),
    ],
)
def test_gradients_of_a_convolution_are_its_adjoints(size, kernel_size, stride, padding):
    # A convolution is linear in the image and in the kernel: <y, A x> = <A^T y, x>, whatever x.
    @jax.jit
    def run(x, kernel, other_x, other_kernel, y):
        def convolve(x, kernel):
            return convolution(x, kernel, stride, padding)

        by_x, by_kernel = jax.vjp(convolve, x, kernel)[1](y)
        return convolve(other_x, kernel), convolve(x, other_kernel), by_x, by_kernel

    shape_out = [(side + sum(padding) - kernel_size) // stride + 1 for side in size]
    draw = np.random.default_rng(0).standard_normal
    x, other_x = draw((2, 2, *size, 3)).astype(np.float32)
    kernel, other_kernel = draw((2, kernel_size, kernel_size, 3, 4)).astype(np.float32)
    y = draw((2, *shape_out, 4)).astype(np.float32)
    of_other_x, of_other_kernel, by_x, by_kernel = run(x, kernel, other_x, other_kernel, y)
    small = ROUNDING * np.linalg.norm(y) * np.linalg.norm(of_other_x)
    assert abs(np.vdot(by_x, other_x) - np.vdot(y, of_other_x)) < small
    assert abs(np.vdot(by_kernel, other_kernel) - np.vdot(y, of_other_kernel)) < small


@pytest.mark.parametrize(
    ("size", "new_size"),
    [
        pytest.param((2, 3), (4, 6), id="double"),
        pytest.param((3, 4), (5, 7), id="odd"),
        pytest.param((3, 2), (6, 3), id="double in one direction only"),
        pytest.param((5, 1), (9, 2), id="one column"),
        pytest.param((2, 2), (7, 5), id="beyond double"),
    ],
)
def test_upsample_copies_the_point_at_floor_of_i_h_over_h2(size, new_size):
    x = np.arange(math.prod(size)).reshape(size)
    expected = [
        [x[i * size[0] // new_size[0], j * size[1] // new_size[1]] for j in range(new_size[1])]
        for i in range(new_size[0])
    ]
    frames = np.stack([x, 100 + x])[..., None].astype(np.float32)
    ours = jax.jit(upsample_nearest, static_argnums=1)(frames, new_size)
    np.testing.assert_array_equal(ours[0, ..., 0], expected)
    np.testing.assert_array_equal(ours[1, ..., 0], 100 + np.array(expected))


# Dense layers and their non-linearities


def test_linear_is_x_times_kernel_plus_bias():
    linear = Linear(2, 3, rngs=nnx.Rngs(0))
    linear.kernel[...] = jnp.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    linear.bias[...] = jnp.array([0.5, 0.25, 0.125])
    ours = run(linear, np.array([[1, 1], [2, 0]]))
    np.testing.assert_array_equal(ours, [[11.5, 22.25, 33.125], [2.5, 4.25, 6.125]])


def test_fresh_kernels_fill_the_range_of_one_over_the_root_of_the_fan_in(key):
    kernel = np.asarray(fan_in_uniform(key, (3, 3, 4, 50)))
    bound = 1 / math.sqrt(3 * 3 * 4)
    assert 0.99 * bound < np.abs(kernel).max() <= bound
    assert abs(kernel.mean()) < 0.05 * bound
    assert kernel.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_geglu_is_the_first_half_times_exact_gelu_of_the_second():
    geglu = GEGLU(2, 2, rngs=nnx.Rngs(0))
    # The projection gives (x0, x1, 10 x0, 10 x1) / 10: values first, gates second.
    geglu.proj.kernel[...] = jnp.array([[0.1, 0, 1, 0], [0, 0.1, 0, 1]])
    gates = np.linspace(-4, 4, 34).reshape(17, 2)
    np.testing.assert_allclose(run(geglu, gates), 0.1 * gates * exact_gelu(gates), atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        pytest.param(gelu, exact_gelu, id="gelu"),
        pytest.param(quick_gelu, lambda x: x / (1 + np.exp(-1.702 * x)), id="quick_gelu"),
    ],
)
def test_activations_of_the_text_encoder_follow_their_formulas(activation, expected):
    # The two differ by up to 0.02, the tanh approximation of gelu by up to 5e-4.
    x = np.linspace(-4, 4, 33)
    np.testing.assert_allclose(jax.jit(activation)(x.astype(np.float32)), expected(x), atol=1e-6)


def test_residual_block_adds_the_timestep_to_every_point_and_keeps_its_input(key):
    block = ResnetBlock(
        4, 4, time_embed_dim=3, num_groups=1, eps=1e-5, joint_frames=True, rngs=nnx.Rngs(0)
    )
    x = np.asarray(jax.random.normal(key, (2, 3, 4, 4, 4)))
    time_emb = np.array([[1, 2, 3], [-1, 0, 1]])
    # With the last convolution silenced only the input is left.
    last = block.conv2.kernel[...]
    block.conv2.kernel[...] = 0 * last
    np.testing.assert_array_equal(run(block, x, time_emb), x)
    # With the first one silenced, norm2 sees the projected timestep alone, the same at each point.
    block.conv1.kernel[...] = 0 * last
    block.conv2.kernel[...] = (0 * last).at[1, 1].set(np.eye(4))
    shift = silu(time_emb) @ np.asarray(block.time_emb_proj.kernel[...])
    expected = x + silu(normalised(shift, (-1,), 1e-5))[:, None, None, None]
    np.testing.assert_allclose(run(block, x, time_emb), expected, atol=10 * ROUNDING)


# Timesteps


@pytest.mark.parametrize("flip_sin_to_cos", [True, False])
@pytest.mark.parametrize("freq_shift", [0.0, 1.0])
def test_timestep_embedding_is_sines_and_cosines_of_geometric_frequencies(
    flip_sin_to_cos, freq_shift
):
    timesteps = np.array([0, 1, 500, 981, 999])
    half = 4
    frequencies = [10000 ** (-i / (half - freq_shift)) for i in range(half)]
    angles = timesteps[:, None] * np.array(frequencies)
    waves = (
        [np.cos(angles), np.sin(angles)] if flip_sin_to_cos else [np.sin(angles), np.cos(angles)]
    )
    ours = timestep_embedding(
        jnp.asarray(timesteps), 2 * half, flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift
    )
    assert ours.dtype == jnp.float32
    # An angle of 1000 is known to float32 within 6e-5, and its frequency within two roundings.
    np.testing.assert_allclose(ours, np.concatenate(waves, -1), atol=2e-4)


def test_timestep_981_is_exact_at_the_highest_frequency():
    # Frequency 1: nothing is rounded before the sine, and 980 would be a radian away.
    ours = timestep_embedding(jnp.array([981]), 320, flip_sin_to_cos=True, freq_shift=0.0)
    np.testing.assert_allclose(ours[0, [0, 160]], [math.cos(981), math.sin(981)], atol=1e-6)
