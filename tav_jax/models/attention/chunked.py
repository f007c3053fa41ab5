"""Attention in bounded memory: blocks of scores, one after another, forward and backward."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jaxtyping import Float

from tav_jax.models.attention.key_groups import KeyRows, LogSums, Rows

# Scores of a block, of all heads together: in float32 64 MB, and some two of those at a time.
BLOCK_SCORES = 2**24


def block_length(length: int, at_most: int) -> int:
    """Returns the longest block that divides a length; grids always have divisors, their sides."""
    return max(n for n in range(1, min(length, at_most) + 1) if length % n == 0)


def _blocks(query: Rows, key: KeyRows) -> tuple[int, int]:
    side = math.isqrt(BLOCK_SCORES // math.prod(query.shape[:2]))
    return block_length(query.shape[2], side), block_length(key.shape[2], side)


def _cut(x: Float[Array, "b heads n ..."], block: int) -> Float[Array, "blocks b heads n2 ..."]:
    return rearrange(x, "b heads (blocks n) ... -> blocks b heads n ...", n=block)


def _sewn(x: Float[Array, "blocks b heads n2 ..."]) -> Float[Array, "b heads n ..."]:
    return rearrange(x, "blocks b heads n ... -> b heads (blocks n) ...")


_scores = partial(jnp.einsum, "bhqk,bhmk->bhqm", preferred_element_type=jnp.float32)
_of_queries = partial(jnp.einsum, "bhqm,bhmk->bhqk", preferred_element_type=jnp.float32)
_of_keys = partial(jnp.einsum, "bhqm,bhqk->bhmk", preferred_element_type=jnp.float32)


@jax.custom_vjp
def chunked_attention(query: Rows, key: KeyRows, value: KeyRows) -> tuple[Rows, LogSums]:
    """Returns softmax(Q K^T / sqrt(k)) V, float32, and the log of each row's sum of exponentials.

    Blocks of queries one after another, each with a running softmax over blocks of keys (Milakov
    & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682).
    """
    return _chunked_forward(query, key, value)[0]


def _chunked_forward(query: Rows, key: KeyRows, value: KeyRows):
    scale = query.shape[-1] ** -0.5
    rows, columns = _blocks(query, key)
    groups = _cut(key, columns), _cut(value, columns)

    def of_rows(query: Rows) -> tuple[Rows, LogSums]:
        def add_block(carry: tuple[Array, Array, Array], block: tuple[KeyRows, KeyRows]):
            mixed, total, highest = carry
            key, value = block
            scores = scale * _scores(query, key)
            higher = jnp.maximum(highest, scores.max(-1))
            shrink = jnp.exp(highest - higher)
            weights = jnp.exp(scores - higher[..., None])
            added = _of_queries(weights.astype(value.dtype), value)
            mixed = shrink[..., None] * mixed + added
            return (mixed, shrink * total + weights.sum(-1), higher), None

        nothing = jnp.zeros(query.shape, jnp.float32)
        start = nothing, nothing[..., 0], jnp.full(query.shape[:-1], -jnp.inf)
        (mixed, total, highest), _ = jax.lax.scan(add_block, start, groups)
        return mixed / total[..., None], highest + jnp.log(total)

    mixed, log_sums = jax.lax.map(of_rows, _cut(query, rows))
    result = _sewn(mixed), _sewn(log_sums)
    return result, (query, key, value, *result)


def _chunked_backward(residuals: tuple[Array, ...], gradients: tuple[Array, Array]):
    """Returns the gradients of `_attention_of_head_backward`, block by block.

    The log of the sum grows with its scores by their weights, which adds its gradient to
    dS = P (dO V^T - rowsum(dO O) + dL).
    """
    query, key, value, mixed, log_sums = residuals
    on_mixed, on_log_sums = gradients
    scale = query.shape[-1] ** -0.5
    rows, columns = _blocks(query, key)
    offsets = on_log_sums - jnp.sum(on_mixed * mixed, axis=-1)
    groups = _cut(key, columns), _cut(value, columns)

    def add_rows(carry: tuple[Array, Array], block: tuple[Array, ...]):
        query, on_mixed, log_sums, offsets = block
        on_mixed = on_mixed.astype(value.dtype)

        def add_block(on_query: Array, block: tuple[KeyRows, KeyRows]):
            key, value = block
            weights = jnp.exp(scale * _scores(query, key) - log_sums[..., None])
            on_scores = scale * weights * (_scores(on_mixed, value) + offsets[..., None])
            on_scores = on_scores.astype(key.dtype)
            on_group = _of_keys(on_scores, query), _of_keys(weights.astype(value.dtype), on_mixed)
            return on_query + _of_queries(on_scores, key), on_group

        on_query, on_groups = jax.lax.scan(add_block, jnp.zeros(query.shape, jnp.float32), groups)
        return jax.tree.map(jnp.add, carry, on_groups), on_query

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), groups)
    (on_key, on_value), on_query = jax.lax.scan(
        add_rows, nothing, tuple(_cut(x, rows) for x in (query, on_mixed, log_sums, offsets))
    )
    return tuple(
        _sewn(gradient).astype(x.dtype)
        for gradient, x in ((on_query, query), (on_key, key), (on_value, value))
    )


chunked_attention.defvjp(_chunked_forward, _chunked_backward)
