"""Attention of each position over few frames, without transposing a video to matrices."""

import jax
import jax.numpy as jnp

from tav_jax.models.attention.key_groups import Heads


def attention_over_frames(query: Heads, key: Heads, value: Heads) -> Heads:
    """Return each position's attention over all frames, products and sums element by element.

    For each position and head, frame f attends to every frame g:

        weights[f, g] = softmax over g of sum_k Q[f, k] K[g, k] / sqrt(k)
        out[f, k] = sum_g weights[f, g] V[g, k]

    With few frames there is little to compute. As matrix products the same sums would need all
    three arrays with the frames next to the heads' width, and the result transposed back.
    """
    query, wide_key, wide_value = (x.astype(jnp.float32) for x in (query, key, value))
    scores = jnp.sum(query[:, :, None] * wide_key[:, None], axis=-1)  # b f g n heads
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=2).astype(value.dtype)
    weighted = weights.astype(jnp.float32)[..., None] * wide_value[:, None]
    return jnp.sum(weighted, axis=2).astype(value.dtype)
