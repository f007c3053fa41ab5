from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl

from tav_jax.models.attention import chunked
from tav_jax.models.attention.dispatch import choose_implementation, group_attention
from tav_jax.models.attention.einsum import attention, attention_weights
from tav_jax.models.attention.frame_attention import FRAME_ATTENTION, sparse_causal_attention
from tav_jax.models.transformer import Attention

# The frames whose tokens each of four frames looks at. Sparse-causal frame 1 sees frame 0 as the
# first and as the previous one, which doubles its keys and changes nothing.
LOOKS_AT = {
    "sparse_causal": [[0, 0], [0, 0], [0, 1], [0, 2]],
    "spatial": [[0], [1], [2], [3]],
    "first_frame": [[0], [0], [0], [0]],
    "full": [[0, 1, 2, 3]] * 4,
}
SCOPES = pytest.mark.parametrize("scope", sorted(LOOKS_AT))

ROUNDING = 1e-5  # float32 against float64, for values around 1
BFLOAT16_STEP = 2**-7  # spacing of bfloat16 above 1; a result is rounded two or three times

ATTEND = {scope: jax.jit(attend) for scope, attend in FRAME_ATTENTION.items()}
attend_within = jax.jit(attention)


def squares(attend):
    return jax.jit(
        jax.grad(lambda *inputs: jnp.sum(jnp.square(attend(*inputs))), argnums=(0, 1, 2))
    )


@pytest.fixture
def heads(key):
    """Query, key and value of 2 clips, 4 frames, 3 tokens and 2 heads of width 4."""
    return np.array(jax.random.normal(key, (3, 2, 4, 3, 2, 4)))


def attend_one(query, keys, values):
    """Return one query's attention in one head: softmax(q . k_j / sqrt(k)) . v_j, in float64."""
    scores = keys @ query / np.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


def attend_by_definition(query, key, value, looks_at):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.empty_like(query)
    for item, frame, token, head in np.ndindex(query.shape[:-1]):
        keys = np.concatenate([key[item, seen, :, head] for seen in looks_at[frame]])
        values = np.concatenate([value[item, seen, :, head] for seen in looks_at[frame]])
        out[item, frame, token, head] = attend_one(query[item, frame, token, head], keys, values)
    return out


def test_every_scope_has_a_definition():
    assert set(FRAME_ATTENTION) == set(LOOKS_AT)


@SCOPES
def test_attention_between_frames_follows_its_definition(heads, scope):
    expected = attend_by_definition(*heads, LOOKS_AT[scope])
    np.testing.assert_allclose(ATTEND[scope](*heads), expected, atol=ROUNDING)


@pytest.mark.parametrize("scope", ["sparse_causal", "spatial", "first_frame"])
def test_first_frame_attends_only_to_itself(heads, scope):
    ours = ATTEND[scope](*heads)
    alone = attend_by_definition(*heads[:, :, :1], looks_at=[[0]])
    np.testing.assert_allclose(ours[:, :1], alone, atol=ROUNDING)
    heads[:, :, 1:] += 1
    np.testing.assert_array_equal(ours[:, 0], ATTEND[scope](*heads)[:, 0])


@SCOPES
def test_one_frame_attends_to_itself_under_every_scope(heads, scope):
    one = heads[:, :, :1]
    expected = attend_by_definition(*one, looks_at=[[0]])
    np.testing.assert_allclose(ATTEND[scope](*one), expected, atol=ROUNDING)


@pytest.mark.parametrize("scope", ["sparse_causal", "spatial", "full"])
def test_large_grids_are_attended_to_by_the_same_definition(key, scope):
    # A CPU takes large scores head by head; enough tokens here for every scope to do so.
    heads = np.array(jax.random.normal(key, (3, 1, 4, 64, 2, 4)))
    expected = attend_by_definition(*heads, LOOKS_AT[scope])
    np.testing.assert_allclose(ATTEND[scope](*heads), expected, atol=ROUNDING)


# Three frames of 6 tokens, keys of 6 or 10: blocks of scores do not have the shape of frames.
GROUPS = {
    "own": [(3, 10)],
    "shared": [(1, 10)],
    "shared and own": [(1, 6), (3, 6)],
    "three groups": [(3, 6), (1, 10), (3, 10)],
}


@pytest.fixture(params=GROUPS.values(), ids=GROUPS.keys())
def groups(request, key):
    """Query, groups of keys and groups of values."""
    query, *rest = jax.random.normal(key, (7, 2, 3, 10, 2, 4))
    cut = [x[:, :g, :m] for x, (g, m) in zip(rest, request.param + request.param, strict=False)]
    return query[:, :, :6], tuple(cut[: len(request.param)]), tuple(cut[len(request.param) :])


@pytest.fixture
def small_blocks(monkeypatch):
    """Make `chunked` use blocks of 3 queries and at most 3 keys for this test's inputs."""
    monkeypatch.setattr(chunked, "BLOCK_SCORES", 12 * 9)


def every_key_copied(query, keys, values):
    """Return each frame's attention over the concatenation of its keys: the definition."""
    frames = query.shape[1]

    def of_each_frame(xs):
        return jnp.concatenate([jnp.repeat(x, frames // x.shape[1], axis=1) for x in xs], axis=2)

    return attention(query, of_each_frame(keys), of_each_frame(values))


@pytest.mark.parametrize("name", ["einsum", "by_head", "chunked"])
def test_implementations_agree_in_value_and_gradient(groups, small_blocks, name):
    attend = partial(group_attention, implementation=name)
    expected = jax.jit(every_key_copied)(*groups)
    np.testing.assert_allclose(jax.jit(attend)(*groups), expected, atol=ROUNDING)
    ours, expected = squares(attend)(*groups), squares(every_key_copied)(*groups)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=ROUNDING)


@pytest.mark.parametrize("name", ["einsum", "by_head", "chunked"])
def test_implementations_keep_the_type_and_take_the_softmax_in_float32(groups, small_blocks, name):
    query, keys, values = jax.tree.map(lambda x: x.astype(jnp.bfloat16), groups)
    # A common 300 in every score, which bfloat16 would round to even numbers.
    query = query.at[..., 0].set(300)
    keys = tuple(key.at[..., 0].set(1) for key in keys)
    ours = group_attention(query, keys, values, name)
    assert ours.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (query, keys, values))
    np.testing.assert_allclose(
        np.asarray(ours, np.float32), every_key_copied(*wide), atol=4 * BFLOAT16_STEP
    )


def test_the_kernel_for_tpus_agrees_over_groups_of_keys(key, monkeypatch):
    # The kernel's own tests have its gradients; here, how groups are merged around it.
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr("tav_jax.models.backend.platform", lambda: "tpu")
    heads = jax.random.normal(key, (3, 1, 3, 128, 2, 8))
    expected = jax.jit(sparse_causal_attention, static_argnums=3)(*heads, "einsum")
    ours = jax.jit(sparse_causal_attention, static_argnums=3)(*heads, "fused")
    np.testing.assert_allclose(ours, expected, atol=ROUNDING)


@pytest.mark.usefixtures("optimized")
def test_scores_of_chunked_attention_never_exist_together():
    # 4,096 queries against 8,192 keys, of 8 heads, forward and back.
    query, key = (jax.ShapeDtypeStruct((1, 1, n, 8, 40), jnp.bfloat16) for n in (4096, 8192))
    attend = partial(group_attention, implementation="chunked")
    program = jax.jit(squares(attend)).lower(query, (key,), (key,)).compile()
    matrix = 4 * 8 * 4096 * 8192
    assert program.memory_analysis().temp_size_in_bytes < matrix / 2


def test_a_block_is_the_longest_divisor_that_is_allowed():
    assert [chunked.block_length(n, 512) for n in (4096, 77, 960, 61 * 67)] == [512, 77, 480, 67]


V1_4_WIDTHS = [40, 80, 160, 160]


@pytest.mark.parametrize(
    ("platform", "dtype", "chosen"),
    [
        pytest.param("cpu", "float32", ["by_head"] * 4, id="cpu"),
        pytest.param("gpu", "bfloat16", ["fused", "fused", "einsum", "einsum"], id="gpu"),
        pytest.param(
            "gpu", "float32", ["chunked", "chunked", "einsum", "einsum"], id="gpu-float32"
        ),
        pytest.param("tpu", "bfloat16", ["fused", "fused", "einsum", "einsum"], id="tpu"),
        pytest.param("tpu", "float32", ["fused", "fused", "einsum", "einsum"], id="tpu-float32"),
    ],
)
def test_auto_chooses_by_level_of_v1_4(platform, dtype, chosen):
    # 8 frames of 512x512: grids of 64, 32, 16 and 8.
    ours = [
        choose_implementation(platform, dtype, (1, 8, side**2, 8, width), [side**2, side**2])
        for side, width in zip((64, 32, 16, 8), V1_4_WIDTHS, strict=True)
    ]
    assert ours == chosen


@pytest.mark.parametrize(
    ("platform", "dtype", "tokens", "width"),
    [
        pytest.param("tpu", "bfloat16", 8192, 512, id="a width beyond the kernel's blocks"),
        pytest.param("gpu", "bfloat16", 4096, 160, id="a width that only Hopper takes"),
        pytest.param("gpu", "bfloat16", 4096, 42, id="a width that 8 does not divide"),
        pytest.param("cpu", "float32", 16384, 40, id="scores beyond a processor's memory"),
    ],
)
def test_auto_bounds_memory_where_no_kernel_serves(platform, dtype, tokens, width):
    chosen = choose_implementation(platform, dtype, (1, 8, tokens, 8, width), [tokens, tokens])
    assert chosen == "chunked"


def test_fused_is_refused_where_there_is_no_kernel(groups):
    with pytest.raises(ValueError, match=r"attention: fused: .*cpu; use auto"):
        group_attention(*groups, "fused")


def test_auto_takes_the_platform_of_the_backend(groups, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "tav_jax.models.attention.dispatch.choose_implementation",
        lambda platform, *_: asked.append(platform) or "einsum",
    )
    group_attention(*groups)
    assert asked == ["cpu"]


def test_mask_hides_keys_completely(heads):
    causal = np.tril(np.ones((4, 4), bool))
    query, keys, values = heads[:, 0, :, 0]  # the frames serve as four tokens
    ours = attend_within(query, keys, values, causal)
    for token, head in np.ndindex(4, 2):
        seen = slice(token + 1)
        expected = attend_one(query[token, head], keys[seen, head], values[seen, head])
        np.testing.assert_allclose(ours[token, head], expected, atol=ROUNDING)
    keys[3], values[3] = 1e3, 1e3
    np.testing.assert_array_equal(ours[:3], attend_within(query, keys, values, causal)[:3])


def test_scores_are_divided_by_the_root_of_the_head_width():
    # One query of 16 ones; scores of 0 and 4 log(3), so weights of 1/4 and 3/4.
    keys = np.zeros((2, 1, 16), np.float32)
    keys[1] = np.log(3) / 4
    values = np.zeros((2, 1, 16), np.float32)
    values[1] = 1
    ours = attend_within(np.ones((1, 1, 16), np.float32), keys, values)
    np.testing.assert_allclose(ours, 0.75, rtol=1e-6)


def test_weights_sum_to_one_over_the_keys(heads):
    weights = attention_weights(jnp.asarray(10 * heads), 4, jnp.dtype("float32"))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


@SCOPES
def test_softmax_of_bfloat16_inputs_is_float32(heads, scope):
    # A common 300 in every score, where bfloat16 is spaced by 2: rounding the scores there, before
    # they are divided by sqrt(4), would change weights by factors around e.
    heads[0, ..., 0], heads[1, ..., 0] = 300, 1
    rounded = heads.astype(jnp.bfloat16)
    ours = ATTEND[scope](*rounded)
    assert ours.dtype == jnp.bfloat16
    expected = attend_by_definition(*rounded, LOOKS_AT[scope])
    largest = np.abs(heads[2]).max()
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected, atol=BFLOAT16_STEP * largest)


@SCOPES
def test_large_logits_neither_overflow_nor_spoil_gradients(heads, scope):
    # exp overflows float32 at 89; these scores reach tens of thousands.
    heads[:2] *= 100
    expected = attend_by_definition(*heads, LOOKS_AT[scope])
    np.testing.assert_allclose(ATTEND[scope](*heads), expected, atol=10 * ROUNDING)
    for gradient in squares(FRAME_ATTENTION[scope])(*heads):
        assert np.isfinite(gradient).all()


def test_gradients_through_a_mask_are_finite_and_zero_where_hidden(heads):
    causal = jnp.tril(jnp.ones((4, 4), bool))

    def first_three(query, key, value):
        return attention(query, key, value, causal)[:3]

    for gradient in squares(first_three)(*heads[:, 0, :, 0]):
        assert np.isfinite(gradient).all()
        assert np.any(gradient[:3] != 0)
        assert np.all(gradient[3] == 0)


def test_heads_are_neighbouring_slices_of_the_width(key):
    # Cross-attention: 3 queries of width 6 in 2 heads, 4 context tokens of width 5.
    module = Attention(6, 2, context_dim=5, rngs=nnx.Rngs(0))
    nnx.update(module, jax.tree.map(jnp.asarray, nnx.state(module)))
    module.to_out[0].bias[...] = jnp.arange(6.0)
    draws = jax.random.normal(key, (2, 4, 6))
    x, context = draws[:, :3], draws[..., :5]
    query, keys, values = (
        np.asarray(y) @ np.asarray(layer.kernel[...])
        for y, layer in ((x, module.to_q), (context, module.to_k), (context, module.to_v))
    )
    mixed = np.empty((2, 3, 6))
    for item, token, head in np.ndindex(2, 3, 2):
        width = slice(3 * head, 3 * head + 3)
        mixed[item, token, width] = attend_one(
            query[item, token, width], keys[item, :, width], values[item, :, width]
        )
    expected = mixed @ np.asarray(module.to_out[0].kernel[...]) + np.arange(6)
    np.testing.assert_allclose(
        module(x[:, None], module.keys_values(context[:, None]))[:, 0], expected, atol=ROUNDING
    )
