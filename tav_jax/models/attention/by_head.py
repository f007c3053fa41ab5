"""Attention one head of one frame at a time, for CPUs."""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jaxtyping import Float

from tav_jax.models.attention.key_groups import Groups, Heads, join_groups


def attention_by_head(query: Heads, keys: Groups, values: Groups) -> Heads:
    """Return `group_attention`, computed one head of one frame at a time.

    The backward pass computes the scores again in the same way. One head's scores fit in a
    processor's cache. Those of a whole layer do not, and moving them to and from memory would take
    most of the time.
    """
    query_key_value = join_groups(query, keys, values)
    each_head = tuple(rearrange(x, "b n heads k -> (b heads) n k") for x in query_key_value)
    out = rearrange(
        jax.lax.map(lambda head: attention_of_head(*head), each_head),
        "(b heads) n k -> b n heads k",
        heads=query.shape[-2],
    )
    return out.reshape(query.shape)


@jax.custom_vjp
def attention_of_head(
    query: Float[Array, "q k"], key: Float[Array, "m k"], value: Float[Array, "m k"]
) -> Float[Array, "q k"]:
    """Return softmax(Q K^T / sqrt(k)) V.

    These are plain matrix products: XLA takes six times as long for an einsum over an axis of one
    head. Rows are divided by their sums after the product with V, which is narrower than the
    scores.
    """
    return _attention_of_head_forward(query, key, value)[0]


_matmul = partial(jnp.matmul, preferred_element_type=jnp.float32)


def _attention_of_head_forward(query: Array, key: Array, value: Array):
    scale = query.shape[-1] ** -0.5
    scores = _matmul(query, key.T)
    row_max = scores.max(axis=1, keepdims=True)
    weights = jnp.exp((scores - row_max) * scale)
    row_sum = weights.sum(axis=1, keepdims=True)
    out = (_matmul(weights.astype(value.dtype), value) / row_sum).astype(query.dtype)
    lse = (scale * row_max + jnp.log(row_sum))[:, 0]
    return out, (query, key, value, out, lse)


def _attention_of_head_backward(residuals: tuple[Array, ...], do: Array):
    """Return dQ = dS K, dK = dS^T Q and dV = P^T dO.

    P are the weights, and dS = P (dO V^T - delta) with delta = rowsum(dO O). Dao et al. 2022
    (arXiv:2205.14135), appendix B.2. P and dS are computed twice, the second time transposed: on
    the CPU, XLA takes four times as long to transpose a matrix as to compute it.
    """
    query, key, value, out, lse = residuals
    scale = query.shape[-1] ** -0.5
    delta = jnp.sum(do.astype(jnp.float32) * out, axis=-1)
    weights = jnp.exp(_matmul(query, key.T) * scale - lse[:, None])
    ds = weights * (_matmul(do, value.T) - delta[:, None]) * scale
    dq = _matmul(ds.astype(key.dtype), key)
    weights = jnp.exp(_matmul(key, query.T) * scale - lse[None, :])
    ds = weights * (_matmul(value, do.T) - delta[None, :]) * scale
    dk = _matmul(ds.astype(query.dtype), query)
    dv = _matmul(weights.astype(do.dtype), do)
    return dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype)


attention_of_head.defvjp(_attention_of_head_forward, _attention_of_head_backward)
