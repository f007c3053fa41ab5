"""Flash attention for TPUs, in Pallas: attention whose scores never reach the chip's main memory.

Inside, arrays lie `b heads k n`, tokens along the 128 lanes of a register, and scores are keys by
queries, S^T = K Q^T. XLA lays narrow heads out that way by itself, so getting there moves nothing,
where rows of 40 numbers would first be copied and padded to 128. A query's maximum, sum and lse are
then one row of lanes each, found without moving numbers between lanes and stored without padding.
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
HIDDEN = -1e9  # the score of a key that is not there; exp gives 0, and bfloat16 has it

# Tiles of scores are 1024 x 1024 for bfloat16, 512 x 512 for float32: with heads up to 160 wide the
# largest that fit into the 16 MiB of VMEM a kernel gets by default. In the compiler's schedules for
# a v5e tiles of 512 take 13 to 21 % longer for bfloat16 of width 40, before the cost of more steps.
BLOCK_BYTES = 2048

# Steps along the last axis of a grid add to one block of the output.
_GRID = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))


def flash_attention(
    query: Float[Array, "b heads q k"],
    key: Float[Array, "b heads m k"],
    value: Float[Array, "b heads m k"],
    *,
    block: int | None = None,
) -> tuple[Float[Array, "b heads q k"], Float[Array, "b heads q"]]:
    """Returns O = softmax(S) V, S = Q K^T / sqrt(k), and lse_i = log sum_j exp(S_ij) in float32.

    Dao et al. 2022 (arXiv:2205.14135) and Dao 2023 (arXiv:2307.08691), algorithms 1 and 2. The
    gradient of lse counts too, so attention over several groups g of keys may be merged by theirs:
    O = sum_g exp(lse_g - lse) O_g, where lse = log sum_g exp(lse_g).

    Args:
        block: the most queries and keys in a tile of scores, a power of two from 128. Heads wider
            than 160 may need one below the default.
    """
    scale, queries = query.shape[3] ** -0.5, query.shape[2]
    query, key, value = (x.swapaxes(2, 3) for x in (query, key, value))
    if lacking := -key.shape[3] % LANES:
        # One more number a token: 1 with queries, and with keys 0, or what hides them.
        query = _padded(query, (0, 1), (0, 0), 1.0)
        key = _padded(_padded(key, (0, 1), (0, 0), 0.0), (0, 0), (0, lacking), 0.0)
        key = key.at[:, :, -1, -lacking:].set(HIDDEN / scale)
        value = _padded(value, (0, 1), (0, lacking), 0.0)
    query = _padded(query, (0, 0), (0, -queries % LANES), 0.0)
    mixed, lse = _attend(query, key, value, block or BLOCK_BYTES // query.dtype.itemsize, scale)
    width = mixed.shape[2] - (lacking > 0)
    return mixed[:, :, :width, :queries].swapaxes(2, 3), lse[:, :, 0, :queries]


def _padded(x: Array, rows: tuple[int, int], tokens: tuple[int, int], value: float) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), rows, tokens), constant_values=value)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(
    query: Float[Array, "b heads k q"],
    key: Float[Array, "b heads k m"],
    value: Float[Array, "b heads k m"],
    block: int,
    scale: float,
) -> tuple[Float[Array, "b heads k q"], Float[Array, "b heads 1 q"]]:
    """Returns O^T and lse, of lengths that are multiples of `LANES`."""
    batch, heads, width, queries = query.shape
    query_block, key_block = math.gcd(queries, block), math.gcd(key.shape[3], block)
    of_queries, of_keys = _part(width, query_block, axis=2), _part(width, key_block, axis=3)
    return pl.pallas_call(
        partial(_attend_kernel, scale),
        out_shape=(
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32),
        ),
        grid=(batch, heads, queries // query_block, key.shape[3] // key_block),
        in_specs=[of_queries, of_keys, of_keys],
        out_specs=(of_queries, _part(1, query_block, axis=2)),
        scratch_shapes=[pltpu.VMEM((rows, query_block), jnp.float32) for rows in (1, 1, width)],
        compiler_params=_GRID,
        name="flash_attention",
    )(query, key, value)


def _einsum(axes: str, left: Array, right: Array) -> Array:
    # Mosaic refuses jax_default_matmul_precision="highest" for bfloat16, whose products are exact.
    precision = jax.lax.Precision.DEFAULT if left.dtype == jnp.bfloat16 else None
    return jnp.einsum(axes, left, right, precision=precision, preferred_element_type=jnp.float32)


def _part(rows: int, block: int, axis: int) -> pl.BlockSpec:
    """Returns the tokens of an array `b heads rows n` that a step at a place on `axis` sees."""
    return pl.BlockSpec((None, None, rows, block), lambda *step: (*step[:2], 0, step[axis]))


def _attend_kernel(scale, query, key, value, mixed, lse, maximum, total, weighted):
    """Takes one block of keys into the running maximum, sum of exp and weighted sum of values."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        maximum[...] = jnp.full(maximum.shape, -jnp.inf)
        total[...] = jnp.zeros(total.shape)
        weighted[...] = jnp.zeros(weighted.shape)

    scores = _einsum("km,kq->mq", key[...], query[...])
    former = maximum[...]
    maximum[...] = jnp.maximum(former, scores.max(axis=0, keepdims=True))
    weights = jnp.exp(scale * (scores - maximum[...]))
    shrink = jnp.exp(scale * (former - maximum[...]))
    total[...] = shrink * total[...] + weights.sum(axis=0, keepdims=True)
    weights = weights.astype(value.dtype)
    weighted[...] = shrink * weighted[...] + _einsum("km,mq->kq", value[...], weights)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        mixed[...] = (weighted[...] / total[...]).astype(mixed.dtype)
        lse[...] = scale * maximum[...] + jnp.log(total[...])


def _attend_forward(query: Array, key: Array, value: Array, block: int, scale: float):
    mixed, lse = _attend(query, key, value, block, scale)
    return (mixed, lse), (query, key, value, mixed, lse)


def _attend_backward(
    block: int, scale: float, residuals: tuple[Array, ...], gradients: tuple[Array, Array]
):
    """Returns dQ = dS K, dK = dS^T Q and dV = P^T dO, each transposed.

    P = exp(S - lse) and dS = P (dO V^T - rowsum(dO O) + dlse), since dlse_i / dS_ij = P_ij; the
    rest is Dao et al. 2022, appendix B.2. P and dS are made twice, for a sum over keys and for sums
    over queries: one kernel would have to keep one of the sums in main memory.
    """
    query, key, value, mixed, lse = residuals
    on_mixed, on_lse = gradients
    offset = jnp.sum(on_mixed.astype(jnp.float32) * mixed, axis=2, keepdims=True) - on_lse

    batch, heads, width, queries = query.shape
    query_block, key_block = math.gcd(queries, block), math.gcd(key.shape[3], block)
    query_steps, key_steps = queries // query_block, key.shape[3] // key_block

    def parts(query_axis: int, key_axis: int) -> list[pl.BlockSpec]:
        of_queries = _part(width, query_block, query_axis)
        of_keys = _part(width, key_block, key_axis)
        of_lse = _part(1, query_block, query_axis)
        return [of_queries, of_keys, of_keys, of_queries, of_lse, of_lse]

    on_query = pl.pallas_call(
        partial(_on_query_kernel, scale),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        grid=(batch, heads, query_steps, key_steps),
        in_specs=parts(query_axis=2, key_axis=3),
        out_specs=_part(width, query_block, axis=2),
        scratch_shapes=[pltpu.VMEM((width, query_block), jnp.float32)],
        compiler_params=_GRID,
        name="flash_attention_on_query",
    )(query, key, value, on_mixed, lse, offset)
    on_key, on_value = pl.pallas_call(
        partial(_on_key_and_value_kernel, scale),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
        grid=(batch, heads, key_steps, query_steps),
        in_specs=parts(query_axis=3, key_axis=2),
        out_specs=[_part(width, key_block, axis=2)] * 2,
        scratch_shapes=[pltpu.VMEM((width, key_block), jnp.float32)] * 2,
        compiler_params=_GRID,
        name="flash_attention_on_key_and_value",
    )(query, key, value, on_mixed, lse, offset)
    return on_query, on_key, on_value


_attend.defvjp(_attend_forward, _attend_backward)


def _weights_and_on_scores(scale, query, key, value, on_mixed, lse, offset):
    """Returns P^T and dS^T of one tile."""
    scores = _einsum("km,kq->mq", key[...], query[...])
    weights = jnp.exp(scale * scores - lse[...])
    on_weights = _einsum("km,kq->mq", value[...], on_mixed[...])
    return weights, weights * (on_weights - offset[...])


def _on_query_kernel(scale, query, key, value, on_mixed, lse, offset, on_query, total):
    """Takes one block of keys into the running sum dS K."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        total[...] = jnp.zeros(total.shape)

    _, on_scores = _weights_and_on_scores(scale, query, key, value, on_mixed, lse, offset)
    total[...] += _einsum("km,mq->kq", key[...], on_scores.astype(key.dtype))

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        on_query[...] = (scale * total[...]).astype(on_query.dtype)


def _on_key_and_value_kernel(
    scale, query, key, value, on_mixed, lse, offset, on_key, on_value, total_key, total_value
):
    """Takes one block of queries into the running sums dS^T Q and P^T dO."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        total_key[...] = jnp.zeros(total_key.shape)
        total_value[...] = jnp.zeros(total_value.shape)

    weights, on_scores = _weights_and_on_scores(scale, query, key, value, on_mixed, lse, offset)
    total_value[...] += _einsum("mq,kq->km", weights.astype(on_mixed.dtype), on_mixed[...])
    total_key[...] += _einsum("mq,kq->km", on_scores.astype(query.dtype), query[...])

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        on_key[...] = (scale * total_key[...]).astype(on_key.dtype)
        on_value[...] = total_value[...].astype(on_value.dtype)
