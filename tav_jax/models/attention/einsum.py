"""Attention with all scores in memory at once: the definition that the others must match."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from tav_jax.models import backend
from tav_jax.models.attention.key_groups import Groups, Heads, join_groups


def attention_weights(
    scores: Float[Array, "*axes q m"], width: int, dtype: jnp.dtype
) -> Float[Array, "*axes q m"]:
    """Return softmax(scores / sqrt(width)) over the keys, computed in float32, as `dtype`."""
    return jax.nn.softmax(scores.astype(jnp.float32) * width**-0.5, axis=-1).astype(dtype)


def attention(
    query: Float[Array, "*axes q heads k"],
    key: Float[Array, "*axes m heads k"],
    value: Float[Array, "*axes m heads k"],
    mask: Bool[Array, "q m"] | None = None,
) -> Float[Array, "*axes q heads k"]:
    """Return softmax(Q K^T / sqrt(k)) V for each head.

    Vaswani et al. 2017 (arXiv:1706.03762), eq. 1.

    Args:
        query: Queries Q.
        key: Keys K.
        value: Values V.
        mask: True where a query may attend to a key. None: it may attend to all.
    """
    scores = jnp.einsum("...qhk,...mhk->...hqm", query, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(jnp.broadcast_to(mask, scores.shape), scores, -jnp.inf)
    weights = attention_weights(scores, query.shape[-1], value.dtype)
    return jnp.einsum("...hqm,...mhk->...qhk", weights, value)


def einsum_attention(query: Heads, keys: Groups, values: Groups) -> Heads:
    """Return `group_attention`, computed with all scores in memory together."""
    if backend.platform() == "gpu":  # keys are small beside scores, and are joined at less cost
        return attention(*join_groups(query, keys, values)).reshape(query.shape)
    scores = jnp.concatenate([scores_of_group(query, key) for key in keys], axis=-1)
    weights = attention_weights(scores, query.shape[-1], values[0].dtype)
    ends = [sum(key.shape[2] for key in keys[: i + 1]) for i in range(len(keys) - 1)]
    parts = zip(jnp.split(weights, ends, axis=-1), values, strict=True)
    out = sum(weighted_sum_of_group(part, value) for part, value in parts)
    return jnp.asarray(out, query.dtype)


def scores_of_group(
    query: Heads, key: Float[Array, "b g m heads k"]
) -> Float[Array, "b f heads q m"]:
    """Return Q K^T for one group of keys, float32."""
    if key.shape[1] == 1:  # one frame's keys, which all frames share
        shared = key[:, 0]
        return jnp.einsum("bfqhk,bmhk->bfhqm", query, shared, preferred_element_type=jnp.float32)
    return jnp.einsum("bfqhk,bfmhk->bfhqm", query, key, preferred_element_type=jnp.float32)


def weighted_sum_of_group(
    weights: Float[Array, "b f heads q m"], value: Float[Array, "b g m heads k"]
) -> Heads:
    """Return the sum of one group's values, weighted for each query, float32."""
    if value.shape[1] == 1:  # one frame's values, which all frames share
        shared = value[:, 0]
        return jnp.einsum("bfhqm,bmhk->bfqhk", weights, shared, preferred_element_type=jnp.float32)
    return jnp.einsum("bfhqm,bfmhk->bfqhk", weights, value, preferred_element_type=jnp.float32)
