"""Flash attention for TPUs, in Pallas: the scores are never written to the chip's main memory.

The kernels use the layout `b heads k n`, with tokens along the 128 lanes of a register. Scores are
keys by queries, S^T = K Q^T. XLA uses that layout for narrow heads too, so no data is moved to
enter a kernel. With tokens as rows, rows of 40 numbers would be copied and padded to 128. In this
layout the maximum, sum and lse of a block of queries are one row of lanes each. They are computed
without moving numbers between lanes, and stored without padding.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

LANES = 128
MASKED_SCORE = -1e9  # of padded keys: its exp is 0, and bfloat16 can represent it

# Tiles of scores are 1024 x 1024 for bfloat16 and 512 x 512 for float32. With heads up to 160 wide
# these are the largest that fit in the 16 MiB of VMEM that a kernel gets by default. With tiles of
# 512, bfloat16 and width 40, the compiler's schedules for a v5e are 13 to 21 % longer, not counting
# the cost of more steps.
BLOCK_BYTES = 2048

# The steps along a grid's last axis accumulate into the same block of the output.
_GRID = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))


def flash_attention(
    query: Float[Array, "b heads q k"],
    key: Float[Array, "b heads m k"],
    value: Float[Array, "b heads m k"],
    *,
    block: int | None = None,
) -> tuple[Float[Array, "b heads q k"], Float[Array, "b heads q"]]:
    """Return O = softmax(S) V, S = Q K^T / sqrt(k), and lse_i = log sum_j exp(S_ij) in float32.

    Dao et al. 2022 (arXiv:2205.14135) and Dao 2023 (arXiv:2307.08691), algorithms 1 and 2. Both
    results are differentiable, so `merged_attention` can merge several groups of keys by their lse.

    Args:
        query: Queries Q.
        key: Keys K.
        value: Values V.
        block: The most queries and the most keys in a tile of scores: a power of two, at least
            128. Heads wider than 160 may need a smaller one than the default.
    """
    scale, queries = query.shape[3] ** -0.5, query.shape[2]
    query, key, value = (x.swapaxes(2, 3) for x in (query, key, value))
    if padding := -key.shape[3] % LANES:
        # Widen each token by one number: 1 for a query, 0 for a key, and for a padded key the
        # number that gives it MASKED_SCORE.
        query = _pad(query, (0, 1), (0, 0), 1.0)
        key = _pad(_pad(key, (0, 1), (0, 0), 0.0), (0, 0), (0, padding), 0.0)
        key = key.at[:, :, -1, -padding:].set(MASKED_SCORE / scale)
        value = _pad(value, (0, 1), (0, padding), 0.0)
    query = _pad(query, (0, 0), (0, -queries % LANES), 0.0)
    out, lse = _attend(query, key, value, block or BLOCK_BYTES // query.dtype.itemsize, scale)
    width = out.shape[2] - (padding > 0)
    return out[:, :, :width, :queries].swapaxes(2, 3), lse[:, :, 0, :queries]


def _pad(x: Array, rows: tuple[int, int], tokens: tuple[int, int], value: float) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), rows, tokens), constant_values=value)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(
    query: Float[Array, "b heads k q"],
    key: Float[Array, "b heads k m"],
    value: Float[Array, "b heads k m"],
    block: int,
    scale: float,
) -> tuple[Float[Array, "b heads k q"], Float[Array, "b heads 1 q"]]:
    """Return O^T and lse. All lengths are multiples of `LANES`."""
    batch, heads, width, queries = query.shape
    query_block, key_block = math.gcd(queries, block), math.gcd(key.shape[3], block)
    query_spec = _block_spec(width, query_block, axis=2)
    key_spec = _block_spec(width, key_block, axis=3)
    return pl.pallas_call(
        partial(_attend_kernel, scale),
        out_shape=(
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32),
        ),
        grid=(batch, heads, queries // query_block, key.shape[3] // key_block),
        in_specs=[query_spec, key_spec, key_spec],
        out_specs=(query_spec, _block_spec(1, query_block, axis=2)),
        scratch_shapes=[pltpu.VMEM((rows, query_block), jnp.float32) for rows in (1, 1, width)],
        compiler_params=_GRID,
        name="flash_attention",
    )(query, key, value)


def _einsum(axes: str, left: Array, right: Array) -> Array:
    # Products of bfloat16 are exact in float32 anyway, and for them Mosaic, the kernel compiler,
    # refuses jax_default_matmul_precision="highest".
    precision = jax.lax.Precision.DEFAULT if left.dtype == jnp.bfloat16 else None
    return jnp.einsum(axes, left, right, precision=precision, preferred_element_type=jnp.float32)


def _block_spec(rows: int, block: int, axis: int) -> pl.BlockSpec:
    """Return the spec that cuts an array `b heads rows n` into blocks of tokens.

    Args:
        rows: Length of the third axis, which is not cut.
        block: Tokens in a block.
        axis: The grid's axis that runs over these blocks.
    """
    return pl.BlockSpec((None, None, rows, block), lambda *step: (*step[:2], 0, step[axis]))


def _attend_kernel(scale, query, key, value, out, lse, row_max, row_sum, weighted):
    """Update the running maximum, sum of exp and weighted sum of values by one block of keys."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        row_max[...] = jnp.full(row_max.shape, -jnp.inf)
        row_sum[...] = jnp.zeros(row_sum.shape)
        weighted[...] = jnp.zeros(weighted.shape)

    scores = _einsum("km,kq->mq", key[...], query[...])
    previous_max = row_max[...]
    row_max[...] = jnp.maximum(previous_max, scores.max(axis=0, keepdims=True))
    weights = jnp.exp(scale * (scores - row_max[...]))
    shrink = jnp.exp(scale * (previous_max - row_max[...]))
    row_sum[...] = shrink * row_sum[...] + weights.sum(axis=0, keepdims=True)
    weights = weights.astype(value.dtype)
    weighted[...] = shrink * weighted[...] + _einsum("km,mq->kq", value[...], weights)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        out[...] = (weighted[...] / row_sum[...]).astype(out.dtype)
        lse[...] = scale * row_max[...] + jnp.log(row_sum[...])


def _attend_forward(query: Array, key: Array, value: Array, block: int, scale: float):
    out, lse = _attend(query, key, value, block, scale)
    return (out, lse), (query, key, value, out, lse)


def _attend_backward(
    block: int, scale: float, residuals: tuple[Array, ...], gradients: tuple[Array, Array]
):
    """Return dQ = dS K, dK = dS^T Q and dV = P^T dO, each transposed.

    P = exp(S - lse) and dS = P (dO V^T - rowsum(dO O) + dlse), as in Dao et al. 2022, appendix B.2.
    The term dlse is added because the derivative of lse_i by S_ij is P_ij. Two kernels compute P
    and dS, one for the sum over keys and one for the sums over queries. A single kernel would have
    to keep one of the sums in main memory.
    """
    query, key, value, out, lse = residuals
    do, dlse = gradients
    offset = jnp.sum(do.astype(jnp.float32) * out, axis=2, keepdims=True) - dlse

    batch, heads, width, queries = query.shape
    query_block, key_block = math.gcd(queries, block), math.gcd(key.shape[3], block)
    query_steps, key_steps = queries // query_block, key.shape[3] // key_block

    def input_specs(query_axis: int, key_axis: int) -> list[pl.BlockSpec]:
        query_spec = _block_spec(width, query_block, query_axis)
        key_spec = _block_spec(width, key_block, key_axis)
        lse_spec = _block_spec(1, query_block, query_axis)
        return [query_spec, key_spec, key_spec, query_spec, lse_spec, lse_spec]

    dq = pl.pallas_call(
        partial(_dq_kernel, scale),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        grid=(batch, heads, query_steps, key_steps),
        in_specs=input_specs(query_axis=2, key_axis=3),
        out_specs=_block_spec(width, query_block, axis=2),
        scratch_shapes=[pltpu.VMEM((width, query_block), jnp.float32)],
        compiler_params=_GRID,
        name="flash_attention_dq",
    )(query, key, value, do, lse, offset)
    dk, dv = pl.pallas_call(
        partial(_dk_dv_kernel, scale),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
        grid=(batch, heads, key_steps, query_steps),
        in_specs=input_specs(query_axis=3, key_axis=2),
        out_specs=[_block_spec(width, key_block, axis=2)] * 2,
        scratch_shapes=[pltpu.VMEM((width, key_block), jnp.float32)] * 2,
        compiler_params=_GRID,
        name="flash_attention_dk_dv",
    )(query, key, value, do, lse, offset)
    return dq, dk, dv


_attend.defvjp(_attend_forward, _attend_backward)


def _weights_and_ds(scale, query, key, value, do, lse, offset):
    """Return P^T and dS^T of one tile."""
    scores = _einsum("km,kq->mq", key[...], query[...])
    weights = jnp.exp(scale * scores - lse[...])
    dp = _einsum("km,kq->mq", value[...], do[...])
    return weights, weights * (dp - offset[...])


def _dq_kernel(scale, query, key, value, do, lse, offset, dq, total):
    """Add one block of keys to the running sum dS K."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        total[...] = jnp.zeros(total.shape)

    _, ds = _weights_and_ds(scale, query, key, value, do, lse, offset)
    total[...] += _einsum("km,mq->kq", key[...], ds.astype(key.dtype))

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        dq[...] = (scale * total[...]).astype(dq.dtype)


def _dk_dv_kernel(scale, query, key, value, do, lse, offset, dk, dv, total_key, total_value):
    """Add one block of queries to the running sums dS^T Q and P^T dO."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        total_key[...] = jnp.zeros(total_key.shape)
        total_value[...] = jnp.zeros(total_value.shape)

    weights, ds = _weights_and_ds(scale, query, key, value, do, lse, offset)
    total_value[...] += _einsum("mq,kq->km", weights.astype(do.dtype), do[...])
    total_key[...] += _einsum("mq,kq->km", ds.astype(query.dtype), query[...])

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        dk[...] = (scale * total_key[...]).astype(dk.dtype)
        dv[...] = total_value[...].astype(dv.dtype)
