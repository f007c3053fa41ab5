"""Attention over groups of keys. All frames share a group, or each frame has its own part of it."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jaxtyping import Float

Heads: TypeAlias = Float[Array, "b f n heads k"]
Groups: TypeAlias = tuple[Float[Array, "b _ _ heads k"], ...]
"""Keys, or values, by group: `b f m heads k` of each frame, or `b 1 m heads k` shared by all."""

Rows: TypeAlias = Float[Array, "b heads q k"]
KeyRows: TypeAlias = Float[Array, "b heads m k"]
LogSumExp: TypeAlias = Float[Array, "b heads q"]
"""The log of each query's sum of exp(score) over the keys."""

AttendFunction: TypeAlias = Callable[[Rows, KeyRows, KeyRows], tuple[Rows, LogSumExp]]
"""Attention over one group: from queries, keys and values to outputs and their lse."""


def join_groups(query: Heads, keys: Groups, values: Groups) -> tuple[Array, Array, Array]:
    """Return query, key and value as `b n heads k`, for attention within each batch item.

    If all frames share all keys, the frames become rows of one batch item. Otherwise each frame
    becomes a batch item with its own copy of the shared keys.
    """
    if len(keys) == 1 and keys[0].shape[1] == 1:
        return rearrange(query, "b f q heads k -> b (f q) heads k"), keys[0][:, 0], values[0][:, 0]

    def concatenate(groups: Groups) -> Array:
        copied = [jnp.broadcast_to(x, (*query.shape[:2], *x.shape[2:])) for x in groups]
        return rearrange(jnp.concatenate(copied, axis=2), "b f m heads k -> (b f) m heads k")

    rows = rearrange(query, "b f q heads k -> (b f) q heads k")
    return rows, concatenate(keys), concatenate(values)


def merged_attention(
    query: Heads, keys: Groups, values: Groups, *, attend: AttendFunction
) -> Heads:
    """Return `group_attention`, merged from attention over each group alone.

    With O_i and lse_i the output and log-sum-exp of group i, the result is
    sum_i exp(lse_i - lse) O_i, where lse = log sum_i exp(lse_i). So shared keys are never copied.

    Args:
        query: Queries of each frame.
        keys: Keys of each group.
        values: Values of each group.
        attend: Computes attention over one group.
    """
    parts = [
        attend_to_shared(query, key, value, attend)
        if key.shape[1] == 1
        else attend_per_frame(query, key, value, attend)
        for key, value in zip(keys, values, strict=True)
    ]
    if len(parts) == 1:
        return parts[0][0].astype(query.dtype)
    shares = jax.nn.softmax(jnp.stack([lse for _, lse in parts]), axis=0)
    out = sum(share * part for share, (part, _) in zip(shares, parts, strict=True))
    return jnp.asarray(out, query.dtype)


def attend_to_shared(
    query: Heads,
    key: Float[Array, "b 1 m heads k"],
    value: Float[Array, "b 1 m heads k"],
    attend: AttendFunction,
) -> tuple[Heads, Float[Array, "b f n heads 1"]]:
    """Return output and lse for keys that all frames share: all queries are rows of one matrix."""
    frames = query.shape[1]
    out, lse = attend(
        rearrange(query, "b f q heads k -> b heads (f q) k"),
        rearrange(key, "b 1 m heads k -> b heads m k"),
        rearrange(value, "b 1 m heads k -> b heads m k"),
    )
    return (
        rearrange(out, "b heads (f q) k -> b f q heads k", f=frames),
        rearrange(lse, "b heads (f q) -> b f q heads 1", f=frames),
    )


def attend_per_frame(
    query: Heads,
    key: Float[Array, "b f m heads k"],
    value: Float[Array, "b f m heads k"],
    attend: AttendFunction,
) -> tuple[Heads, Float[Array, "b f n heads 1"]]:
    """Return output and lse where each frame has its own keys: each frame is a batch item."""
    frames = query.shape[1]
    out, lse = attend(
        rearrange(query, "b f q heads k -> (b f) heads q k"),
        rearrange(key, "b f m heads k -> (b f) heads m k"),
        rearrange(value, "b f m heads k -> (b f) heads m k"),
    )
    return (
        rearrange(out, "(b f) heads q k -> b f q heads k", f=frames),
        rearrange(lse, "(b f) heads q -> b f q heads 1", f=frames),
    )
