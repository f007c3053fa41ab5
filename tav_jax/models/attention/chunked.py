"""Attention in bounded memory: block after block of scores, forward and backward."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jaxtyping import Float

from tav_jax.models.attention.key_groups import KeyRows, LogSumExp, Rows

# Scores of one block, over all heads: 64 MB in float32. About two such arrays exist at a time.
BLOCK_SCORES = 2**24


def block_length(length: int, at_most: int) -> int:
    """Return the longest block that divides a length, and is no longer than `at_most`.

    A grid's number of tokens always has divisors: its sides.
    """
    return max(n for n in range(1, min(length, at_most) + 1) if length % n == 0)


def _block_lengths(query: Rows, key: KeyRows) -> tuple[int, int]:
    """Return how many queries and how many keys are in a block of scores."""
    side = math.isqrt(BLOCK_SCORES // math.prod(query.shape[:2]))
    return block_length(query.shape[2], side), block_length(key.shape[2], side)


def _split(x: Float[Array, "b heads n ..."], block: int) -> Float[Array, "blocks b heads n2 ..."]:
    return rearrange(x, "b heads (blocks n) ... -> blocks b heads n ...", n=block)


def _join(x: Float[Array, "blocks b heads n2 ..."]) -> Float[Array, "b heads n ..."]:
    return rearrange(x, "blocks b heads n ... -> b heads (blocks n) ...")


_scores = partial(jnp.einsum, "bhqk,bhmk->bhqm", preferred_element_type=jnp.float32)
_sum_over_keys = partial(jnp.einsum, "bhqm,bhmk->bhqk", preferred_element_type=jnp.float32)
_sum_over_queries = partial(jnp.einsum, "bhqm,bhqk->bhmk", preferred_element_type=jnp.float32)


@jax.custom_vjp
def chunked_attention(query: Rows, key: KeyRows, value: KeyRows) -> tuple[Rows, LogSumExp]:
    """Return softmax(Q K^T / sqrt(k)) V and each row's log-sum-exp of the scores, in float32.

    Blocks of queries are computed one after another. Each keeps a running softmax over blocks of
    keys (Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682).
    """
    return _chunked_forward(query, key, value)[0]


def _chunked_forward(query: Rows, key: KeyRows, value: KeyRows):
    scale = query.shape[-1] ** -0.5
    query_block, key_block = _block_lengths(query, key)
    keys_values = _split(key, key_block), _split(value, key_block)

    def attend(query: Rows) -> tuple[Rows, LogSumExp]:
        def add_block(carry: tuple[Array, Array, Array], block: tuple[KeyRows, KeyRows]):
            out, row_sum, previous_max = carry
            key, value = block
            scores = scale * _scores(query, key)
            row_max = jnp.maximum(previous_max, scores.max(-1))
            shrink = jnp.exp(previous_max - row_max)
            weights = jnp.exp(scores - row_max[..., None])
            added = _sum_over_keys(weights.astype(value.dtype), value)
            out = shrink[..., None] * out + added
            return (out, shrink * row_sum + weights.sum(-1), row_max), None

        zeros = jnp.zeros(query.shape, jnp.float32)
        start = zeros, zeros[..., 0], jnp.full(query.shape[:-1], -jnp.inf)
        (out, row_sum, row_max), _ = jax.lax.scan(add_block, start, keys_values)
        return out / row_sum[..., None], row_max + jnp.log(row_sum)

    out, lse = jax.lax.map(attend, _split(query, query_block))
    result = _join(out), _join(lse)
    return result, (query, key, value, *result)


def _chunked_backward(residuals: tuple[Array, ...], gradients: tuple[Array, Array]):
    """Return dQ, dK and dV as `_attention_of_head_backward` does, block by block.

    The gradient of the log-sum-exp by its scores is P. So with dL as the gradient of the loss by
    the log-sum-exp, dS = P (dO V^T - rowsum(dO O) + dL).
    """
    query, key, value, out, lse = residuals
    do, dlse = gradients
    scale = query.shape[-1] ** -0.5
    query_block, key_block = _block_lengths(query, key)
    offset = dlse - jnp.sum(do * out, axis=-1)
    keys_values = _split(key, key_block), _split(value, key_block)

    def add_query_block(carry: tuple[Array, Array], block: tuple[Array, ...]):
        query, do, lse, offset = block
        do = do.astype(value.dtype)

        def add_key_block(dq: Array, block: tuple[KeyRows, KeyRows]):
            key, value = block
            weights = jnp.exp(scale * _scores(query, key) - lse[..., None])
            ds = scale * weights * (_scores(do, value) + offset[..., None])
            ds = ds.astype(key.dtype)
            dk = _sum_over_queries(ds, query)
            dv = _sum_over_queries(weights.astype(value.dtype), do)
            return dq + _sum_over_keys(ds, key), (dk, dv)

        dq, dk_dv = jax.lax.scan(add_key_block, jnp.zeros(query.shape, jnp.float32), keys_values)
        return jax.tree.map(jnp.add, carry, dk_dv), dq

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), keys_values)
    (dk, dv), dq = jax.lax.scan(
        add_query_block, zeros, tuple(_split(x, query_block) for x in (query, do, lse, offset))
    )
    return tuple(
        _join(gradient).astype(x.dtype) for gradient, x in ((dq, query), (dk, key), (dv, value))
    )


chunked_attention.defvjp(_chunked_forward, _chunked_backward)
