"""Keys by groups: those that all frames share, and those that each frame has for its own."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jaxtyping import Float

Heads: TypeAlias = Float[Array, "b f n heads k"]
Groups: TypeAlias = tuple[Float[Array, "b _ _ heads k"], ...]
"""Keys, or values, by group: of each frame its own, or of one frame for all."""

Rows: TypeAlias = Float[Array, "b heads q k"]
KeyRows: TypeAlias = Float[Array, "b heads m k"]
LogSums: TypeAlias = Float[Array, "b heads q"]


def joined(query: Heads, keys: Groups, values: Groups) -> tuple[Array, Array, Array]:
    """Returns queries, keys and values `b n heads k`, where a batch item's rows see all its keys.

    Frames go to the rows if they share all keys; else to the batch, each with its own copy.
    """
    if len(keys) == 1 and keys[0].shape[1] == 1:
        return rearrange(query, "b f q heads k -> b (f q) heads k"), keys[0][:, 0], values[0][:, 0]

    def of_each_frame(groups: Groups) -> Array:
        own = [jnp.broadcast_to(x, (*query.shape[:2], *x.shape[2:])) for x in groups]
        return rearrange(jnp.concatenate(own, axis=2), "b f m heads k -> (b f) m heads k")

    rows = rearrange(query, "b f q heads k -> (b f) q heads k")
    return rows, of_each_frame(keys), of_each_frame(values)


def merged_attention(
    query: Heads,
    keys: Groups,
    values: Groups,
    *,
    attend: Callable[[Rows, KeyRows, KeyRows], tuple[Rows, LogSums]],
) -> Heads:
    """Returns `group_attention` put together from what `attend` finds in each group.

    With O_i and L_i a group's result and log of its sum of exponentials, the whole is
    sum_i exp(L_i - L) O_i, L = logsumexp_i L_i. So keys that all frames share are never copied:
    there the queries of all frames are rows of one matrix.
    """
    whole: list[tuple[Array, Array]] = []
    for key, value in zip(keys, values, strict=True):
        shared = key.shape[1] == 1
        rows = "b heads (f n) k" if shared else "(b f) heads n k"
        frames = {"f": query.shape[1]}
        mixed, log_sums = attend(
            rearrange(query, f"b f n heads k -> {rows}"),
            *(rearrange(x, f"b f n heads k -> {rows}", f=x.shape[1]) for x in (key, value)),
        )
        whole.append(
            (
                rearrange(mixed, f"{rows} -> b f n heads k", **frames),
                rearrange(log_sums[..., None], f"{rows} -> b f n heads k", **frames),
            )
        )
    if len(whole) == 1:
        return whole[0][0].astype(query.dtype)
    shares = jax.nn.softmax(jnp.stack([log_sums for _, log_sums in whole]), axis=0)
    mixed = sum(share * part for share, (part, _) in zip(shares, whole, strict=True))
    return jnp.asarray(mixed, query.dtype)
