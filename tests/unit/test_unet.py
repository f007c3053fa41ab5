import math
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tav_jax.models.attention.frame_attention import FRAME_ATTENTION
from tav_jax.models.compute import ComputeOptions
from tav_jax.models.layers import Downsample, GroupNorm, LayerNorm, ResnetBlock
from tav_jax.models.network import parameter_shapes
from tav_jax.models.transformer import Attention, BasicTransformerBlock, Transformer3D
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.pretrained.weights import inflate

SCOPES = pytest.mark.parametrize("scope", sorted(FRAME_ATTENTION))

# Relative norm of the difference of two float32 computations that differ in the order of sums:
# each of some fifty operations in a row rounds by 6e-8 of what it sums.
ROUNDING = 1e-5


def relative_error(ours, expected):
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def inputs():
    """Two clips of three frames at 4x4, a timestep and five text states each."""
    draw = np.random.default_rng(0).standard_normal
    latents, context = draw((2, 3, 4, 4, 4)), draw((2, 5, 8))
    return (
        jnp.asarray(latents, jnp.float32),
        jnp.array([21, 981]),
        jnp.asarray(context, jnp.float32),
    )


# One frame, and frames that are all the same


def with_temporal_params(unet, change):
    """Replace each parameter of the temporal modules by change(name, value)."""
    temporal = {
        name: change(name, value)
        for name, value in unet.params.items()
        if "attn_temp" in name or "norm_temp" in name
    }
    assert temporal
    return unet.with_params(unet.params | temporal)


def test_with_a_zero_temporal_output_no_temporal_parameter_matters(tiny_unet, call, inputs):
    start = with_temporal_params(
        tiny_unet, lambda name, value: 0 * value if ".to_out." in name else value
    )
    other = with_temporal_params(
        start, lambda name, value: value if ".to_out." in name else 1 - 2 * value
    )
    expected = call(start, *inputs)
    np.testing.assert_array_equal(call(other, *inputs), expected)
    assert relative_error(call(tiny_unet, *inputs), expected) > 0.1


def test_one_frame_gives_what_the_image_unet_gives(tiny_unet, call, inputs, key):
    # The image U-Net has no temporal modules; inflation adds them so that they change nothing yet.
    latents, *rest = inputs
    image_unet = tiny_unet.with_config(temporal_attention=False, attention_scope="spatial")
    names = parameter_shapes(UNet3DConditionModel, image_unet.config)
    assert not [name for name in names if "_temp" in name]
    image_unet = image_unet.with_params({name: tiny_unet.params[name] for name in names})
    shapes = parameter_shapes(UNet3DConditionModel, tiny_unet.config)
    inflated = inflate(image_unet.params, shapes, key)
    ours = call(tiny_unet.with_params(inflated), latents[:, :1], *rest)
    assert relative_error(ours, call(image_unet, latents[:, :1], *rest)) < ROUNDING


@SCOPES
def test_one_frame_is_the_same_under_every_scope(tiny_unet, call, inputs, scope):
    latents, *rest = inputs
    one_frame = latents[:, :1], *rest
    ours = call(tiny_unet.with_config(attention_scope=scope), *one_frame)
    expected = call(tiny_unet.with_config(attention_scope="spatial"), *one_frame)
    assert relative_error(ours, expected) < ROUNDING


@SCOPES
def test_equal_frames_each_equal_the_single_frame(tiny_unet, call, inputs, scope):
    # Joint statistics of equal frames are those of one, and attention over equal frames gives
    # back what it gives for one, temporal attention included.
    latents, *rest = inputs
    unet = tiny_unet.with_config(attention_scope=scope)
    single = call(unet, latents[:, :1], *rest)
    ours = call(unet, jnp.repeat(latents[:, :1], 3, axis=1), *rest)
    assert relative_error(ours, np.repeat(single, 3, axis=1)) < ROUNDING


# Which frames and points meet in a transformer block

# What changes, of four frames, when frame 0, 1, 2 or 3 moves.
MOVES = {
    "sparse_causal": [{0, 1, 2, 3}, {1, 2}, {2, 3}, {3}],
    "spatial": [{0}, {1}, {2}, {3}],
    "first_frame": [{0, 1, 2, 3}, {1}, {2}, {3}],
    "full": [{0, 1, 2, 3}] * 4,
}


@pytest.fixture(scope="module")
def changes(jit):
    """Tell which frames and points a block's output changes at when one point moves."""
    x, context = jax.random.normal(jax.random.key(0), (2, 1, 4, 3, 8))

    run = jit(lambda block, x: block(x, block.attn2.keys_values(context[:, :1])))

    def change(scope, frame, point, *, temporal):
        block = BasicTransformerBlock(8, 2, context_dim=8, attention_scope=scope, rngs=nnx.Rngs(0))
        block.attn_temp.to_out[0].kernel[...] *= temporal
        # One channel: a shift of all of them alike is what LayerNorm takes away.
        moved = x.at[:, frame, point, 0].add(1.0)
        return np.asarray(run(block, moved) != run(block, x)).any((0, 3))

    return change


@pytest.mark.parametrize("frame", range(4))
@SCOPES
def test_moving_a_frame_changes_only_the_frames_that_look_at_it(changes, scope, frame):
    changed = changes(scope, frame, 0, temporal=0).any(1)
    assert set(np.flatnonzero(changed)) == MOVES[scope][frame]


@SCOPES
def test_temporal_attention_lets_every_frame_see_every_other(changes, scope):
    for frame in range(4):
        assert changes(scope, frame, 0, temporal=1).any(1).all()


def test_temporal_attention_stays_at_its_point(changes):
    # Under "first_frame" nobody looks at frame 2 but through time.
    changed = changes("first_frame", 2, 0, temporal=1)
    np.testing.assert_array_equal(changed, [[True, False, False]] * 4)


def test_frames_share_statistics_in_residual_blocks_and_not_in_transformers(jit):
    resnet = ResnetBlock(8, 8, num_groups=4, eps=1e-5, joint_frames=True, rngs=nnx.Rngs(0))
    transformer = Transformer3D(
        8,
        2,
        context_dim=8,
        num_groups=4,
        use_linear_projection=False,
        attention_scope="spatial",
        temporal_attention=False,
        compute=ComputeOptions(),
        rngs=nnx.Rngs(0),
    )
    for module in (resnet, transformer):  # which have constants as NumPy arrays
        nnx.update(module, jax.tree.map(jnp.asarray, nnx.state(module)))
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 2, 8)).astype(np.float32)
    louder = x.copy()
    louder[:, 1] *= 2

    def frames_that_change(run):
        return set(np.flatnonzero(np.any(run(x) != run(louder), axis=(0, 2, 3, 4))))

    assert frames_that_change(jit(resnet)) == {0, 1, 2}
    text = transformer.keys_values(jnp.ones((1, 5, 8)))
    assert frames_that_change(jit(lambda x: transformer(x, text))) == {1}


# Variants of the shape


def modules_of(config, kind):
    """Return the modules of a kind by their path, without creating parameters."""
    unet = nnx.eval_shape(lambda: UNet3DConditionModel(config, ComputeOptions(), rngs=nnx.Rngs(0)))
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(unet)
        if isinstance(module, kind)
    }


def level_of(path):
    """Return the level of a module of a two-level network. 0 is the finest."""
    part, index = path.split(".")[:2]
    return {"down_blocks": int(index == "1"), "up_blocks": int(index == "0"), "mid_block": 1}[part]


def transposed(video):
    return jnp.swapaxes(video, -2, -3)


def test_height_and_width_are_alike_on_an_odd_grid(tiny_unet, call, inputs):
    # The transposed network sees the transposed video. 5x3 goes down to 3x2 and back.
    latents, *rest = inputs
    tall = jnp.concatenate([latents, latents], axis=2)[:, :, :5, :3]
    kernels = {
        name: value.swapaxes(0, 1) if value.ndim == 4 else value
        for name, value in tiny_unet.params.items()
    }
    ours = call(tiny_unet, tall, *rest)
    assert ours.shape == tall.shape
    wide = call(tiny_unet.with_params(kernels), transposed(tall), *rest)
    assert relative_error(transposed(wide), ours) < ROUNDING


@pytest.mark.parametrize(
    ("down_attention", "up_attention", "transformers"),
    [
        pytest.param(
            (True, False),
            (False, True),
            {"down_blocks.0": 2, "mid_block": 1, "up_blocks.1": 3},
            id="not at the coarsest",
        ),
        pytest.param(
            (False, True),
            (True, False),
            {"down_blocks.1": 2, "mid_block": 1, "up_blocks.0": 3},
            id="not at the finest",
        ),
        pytest.param((False, False), (False, False), {"mid_block": 1}, id="in the middle only"),
    ],
)
def test_levels_without_attention_have_no_transformers(
    random_network, unet_config, inputs, down_attention, up_attention, transformers
):
    config = replace(
        unet_config, down_attention=down_attention, up_attention=up_attention, layers_per_block=2
    )
    paths = modules_of(config, Transformer3D)
    assert Counter(path.split(".attentions")[0] for path in paths) == transformers
    unet = random_network(UNet3DConditionModel, config)
    assert jax.eval_shape(unet, *inputs).shape == inputs[0].shape


@pytest.mark.parametrize("heads", [(2, 4), (4, 1)])
def test_a_head_list_counts_from_the_finest_level(unet_config, heads):
    everywhere = {"down_attention": (True, True), "up_attention": (True, True)}
    config = replace(unet_config, num_attention_heads=heads, **everywhere)
    found = {
        path: module.num_attention_heads for path, module in modules_of(config, Attention).items()
    }
    assert found == {path: heads[level_of(path)] for path in found}
    assert len(found) == 3 * (2 + 1 + 4)  # transformers on the way down, in the middle and up


def test_norms_have_the_epsilons_and_statistics_of_the_published_network(unet_config):
    config = replace(unet_config, norm_eps=2e-5)
    for path, norm in modules_of(config, GroupNorm).items():
        in_a_transformer = path.split(".")[-3:-2] == ["attentions"]
        assert norm.eps == (1e-6 if in_a_transformer else 2e-5), path
        assert norm.joint_frames == (not in_a_transformer), path
    assert {norm.eps for norm in modules_of(config, LayerNorm).values()} == {1e-5}


def test_down_sampling_pads_all_round(unet_config):
    paddings = [module.conv.padding for module in modules_of(unet_config, Downsample).values()]
    assert paddings == [(1, 1)]


def test_linear_projection_equals_a_convolution_of_one_pixel(tiny_unet, call, inputs):
    params = {
        name: value[0, 0] if ".proj_" in name and value.ndim == 4 else value
        for name, value in tiny_unet.params.items()
    }
    linear = tiny_unet.with_params(params).with_config(use_linear_projection=True)
    assert relative_error(call(linear, *inputs), call(tiny_unet, *inputs)) < ROUNDING


# Batches, types and memory


def test_clips_of_a_batch_never_mix(tiny_unet, call, inputs):
    latents, timesteps, context = inputs
    expected = call(tiny_unet, *inputs)
    other = call(
        tiny_unet, latents.at[1].add(1.0), timesteps.at[1].set(500), context.at[1].add(1.0)
    )
    np.testing.assert_array_equal(other[0], expected[0])
    assert relative_error(other[1], expected[1]) > 0.1
    swapped = call(tiny_unet, *(x[::-1] for x in inputs))
    assert relative_error(swapped[::-1], expected) < ROUNDING


def test_bfloat16_is_near_float32_and_returns_float32(tiny_unet, call, inputs):
    ours = call(tiny_unet.with_compute(dtype="bfloat16"), *inputs)
    assert ours.dtype == jnp.float32
    # Each of some fifty operations in a row rounds by up to 2^-9, sqrt(50) 2^-9 = 1.4 % together.
    # Less than a single rounding would mean that the type is not heeded.
    assert 2**-9 < relative_error(ours, call(tiny_unet, *inputs)) < 0.03


def equations(jaxpr):
    """Yield the equations of a program and of all programs within."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            within = getattr(value, "jaxpr", value)
            if hasattr(within, "eqns"):
                yield from equations(within)


def test_under_bfloat16_every_convolution_takes_bfloat16(tiny_unet, inputs):
    program = jax.make_jaxpr(tiny_unet.with_compute(dtype="bfloat16"))(*inputs)
    operands = [
        [operand.aval.dtype.name for operand in equation.invars]
        for equation in equations(program.jaxpr)
        if equation.primitive.name == "conv_general_dilated"
    ]
    kernels = [value for value in tiny_unet.params.values() if value.ndim == 4]
    assert operands == [["bfloat16", "bfloat16"]] * len(kernels)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neighbouring_timesteps_stay_apart(tiny_unet, call, inputs, dtype):
    # As bfloat16 numbers 981 is 980.
    latents, _, context = (jnp.stack([x[0], x[0]]) for x in inputs)
    first, second = call(
        tiny_unet.with_compute(dtype=dtype), latents, jnp.array([980, 981]), context
    )
    assert relative_error(second, first) > 2**-7


@pytest.fixture(scope="module")
def gradients_of(jit, random_network, unet_config, inputs):
    """Value and gradients of a loss of a network with modules of each kind and one transformer."""
    none = {"down_attention": (False, False), "up_attention": (False, False)}
    unet = random_network(UNet3DConditionModel, replace(unet_config, **none))
    run = jit(jax.value_and_grad(lambda unet: jnp.sum(jnp.square(unet(*inputs)))))

    def gradients_of(**changes):
        loss, gradients = run(unet.with_compute(**changes))
        return loss, gradients.params

    return gradients_of


def test_every_parameter_takes_part(gradients_of):
    _, gradients = gradients_of()
    assert [name for name, gradient in gradients.items() if not np.any(gradient)] == []


@pytest.mark.parametrize("preset", ["blocks", "full"])
def test_gradient_checkpointing_changes_neither_values_nor_gradients(gradients_of, preset):
    loss, gradients = gradients_of()
    loss_again, gradients_again = gradients_of(gradient_checkpointing=preset)
    assert relative_error(loss_again, loss) < ROUNDING
    largest = max(np.linalg.norm(gradient) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert np.linalg.norm(gradients_again[name] - gradient) < ROUNDING * largest, name


@pytest.mark.parametrize("preset", ["none", "blocks", "full"])
def test_gradient_checkpointing_wraps_what_it_names(tiny_unet, inputs, preset):
    def wrapped(jaxpr):
        """Count checkpoints by how many others they are nested in."""
        depths = Counter()
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("checkpoint", "remat2"):
                depths[0] += 1
                inside = wrapped(equation.params["jaxpr"])
                depths += Counter({depth + 1: count for depth, count in inside.items()})
        return depths

    unet = tiny_unet.with_compute(gradient_checkpointing=preset)
    blocks = len(modules_of(unet.config, (ResnetBlock, Transformer3D)))
    parts = 4 * len(modules_of(unet.config, BasicTransformerBlock))
    expected = {"none": {}, "blocks": {0: blocks}, "full": {0: blocks, 1: parts}}
    assert wrapped(jax.make_jaxpr(unet)(*inputs).jaxpr) == expected[preset]


def test_a_text_may_be_given_as_its_keys_and_values(tiny_unet, call, inputs, jit):
    latents, timesteps, context = inputs
    text = jit(lambda unet, context: unet.bind().text_keys_values(context))(tiny_unet, context)
    ours = call(tiny_unet, latents, timesteps, text)
    assert relative_error(ours, call(tiny_unet, *inputs)) < ROUNDING


def test_the_keys_and_values_of_a_text_are_made_once_for_all_frames(tiny_unet, inputs):
    # Every product with a text state (5 tokens of width 8) has one row a token, not one a frame.
    def products(jaxpr):
        for equation in equations(jaxpr):
            if equation.primitive.name == "dot_general":
                shape = equation.invars[0].aval.shape
                if shape[-2:] == (5, 8):
                    yield math.prod(shape[:-2])

    counts = list(products(jax.make_jaxpr(tiny_unet)(*inputs).jaxpr))
    transformers = len(modules_of(tiny_unet.config, Transformer3D))
    assert counts == [2] * 2 * transformers  # two clips; keys and values
