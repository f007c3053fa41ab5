"""Attention with all scores in memory at once: the definition the other implementations follow."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from tav_jax.models.attention.key_groups import Groups, Heads


def attention_weights(
    scores: Float[Array, "*axes q m"], width: int, dtype: jnp.dtype
) -> Float[Array, "*axes q m"]:
    """Returns softmax(scores / sqrt(width)) over the keys, taken in float32, given in `dtype`."""
    return jax.nn.softmax(scores.astype(jnp.float32) * width**-0.5, axis=-1).astype(dtype)


def attention(
    query: Float[Array, "*axes q heads k"],
    key: Float[Array, "*axes m heads k"],
    value: Float[Array, "*axes m heads k"],
    mask: Bool[Array, "q m"] | None = None,
) -> Float[Array, "*axes q heads k"]:
    """Returns softmax(Q K^T / sqrt(k)) V for each head; `mask` is true where a query may look.

    Vaswani et al. 2017 (arXiv:1706.03762), eq. 1.
    """
    scores = jnp.einsum("...qhk,...mhk->...hqm", query, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(jnp.broadcast_to(mask, scores.shape), scores, -jnp.inf)
    weights = attention_weights(scores, query.shape[-1], value.dtype)
    return jnp.einsum("...hqm,...mhk->...qhk", weights, value)


def einsum_attention(query: Heads, keys: Groups, values: Groups) -> Heads:
    """Returns `group_attention`, all scores in memory together."""

    def each(equation: str, x: Array, group: Array) -> Array:
        shared = group.shape[1] == 1
        return jnp.einsum(
            equation.replace("g", "" if shared else "f"),
            x,
            group[:, 0] if shared else group,
            preferred_element_type=jnp.float32,
        )

    scores = jnp.concatenate([each("bfqhk,bgmhk->bfhqm", query, key) for key in keys], axis=-1)
    weights = attention_weights(scores, query.shape[-1], values[0].dtype)
    ends = [sum(key.shape[2] for key in keys[: i + 1]) for i in range(len(keys) - 1)]
    parts = zip(jnp.split(weights, ends, axis=-1), values, strict=True)
    mixed = sum(each("bfhqm,bgmhk->bfqhk", part, value) for part, value in parts)
    return jnp.asarray(mixed, query.dtype)
