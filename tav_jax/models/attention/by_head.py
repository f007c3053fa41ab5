"""Attention one head of one frame at a time, for CPUs."""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jaxtyping import Float

from tav_jax.models.attention.key_groups import Groups, Heads, joined


def attention_by_head(query: Heads, keys: Groups, values: Groups) -> Heads:
    """Returns `group_attention`, made one head of one frame at a time, and again for the gradient.

    One head's scores fit in a processor's cache; those of a whole layer would spend most of the
    time on their way to memory and back.
    """
    each = tuple(rearrange(x, "b n heads k -> (b heads) n k") for x in joined(query, keys, values))
    mixed = rearrange(
        jax.lax.map(lambda head: attention_of_head(*head), each),
        "(b heads) n k -> b n heads k",
        heads=query.shape[-2],
    )
    return mixed.reshape(query.shape)


@jax.custom_vjp
def attention_of_head(
    query: Float[Array, "q k"], key: Float[Array, "m k"], value: Float[Array, "m k"]
) -> Float[Array, "q k"]:
    """Returns softmax(Q K^T / sqrt(k)) V.

    Plain matrix products: as an einsum over an axis of one head XLA takes six times as long. Rows
    are divided by their sums after the product with V, which is narrower than the scores.
    """
    return _attention_of_head_forward(query, key, value)[0]


_matmul = partial(jnp.matmul, preferred_element_type=jnp.float32)


def _attention_of_head_forward(query: Array, key: Array, value: Array):
    scale = query.shape[-1] ** -0.5
    scores = _matmul(query, key.T)
    highest = scores.max(axis=1, keepdims=True)
    weights = jnp.exp((scores - highest) * scale)
    sums = weights.sum(axis=1, keepdims=True)
    mixed = (_matmul(weights.astype(value.dtype), value) / sums).astype(query.dtype)
    return mixed, (query, key, value, mixed, (scale * highest + jnp.log(sums))[:, 0])


def _attention_of_head_backward(residuals: tuple[Array, ...], gradient: Array):
    """Returns dQ = dS K, dK = dS^T Q, dV = P^T dO; P the weights, dS = P (dO V^T - rowsum(dO O)).

    Dao et al. 2022 (arXiv:2205.14135), appendix B.2. P and dS are made twice, once transposed:
    XLA transposes a matrix on the CPU in four times the time that it takes to make it.
    """
    query, key, value, mixed, log_sums = residuals
    scale = query.shape[-1] ** -0.5
    rows = jnp.sum(gradient.astype(jnp.float32) * mixed, axis=-1)
    weights = jnp.exp(_matmul(query, key.T) * scale - log_sums[:, None])
    on_scores = weights * (_matmul(gradient, value.T) - rows[:, None]) * scale
    on_query = _matmul(on_scores.astype(key.dtype), key)
    weights = jnp.exp(_matmul(key, query.T) * scale - log_sums[None, :])
    on_scores = weights * (_matmul(value, gradient.T) - rows[None, :]) * scale
    on_key = _matmul(on_scores.astype(query.dtype), query)
    on_value = _matmul(weights.astype(gradient.dtype), gradient)
    return on_query.astype(query.dtype), on_key.astype(key.dtype), on_value.astype(value.dtype)


attention_of_head.defvjp(_attention_of_head_forward, _attention_of_head_backward)
