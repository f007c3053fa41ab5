"""Attention between frames, within a frame, over time and to text.

Parameter names follow diffusers' CrossAttention and Tune-A-Video's BasicTransformerBlock.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from tav_jax.models.layers import LayerNorm, Linear

AttentionScope = Literal["sparse_causal", "spatial", "first_frame", "full"]
Heads: TypeAlias = Float[Array, "b f n heads k"]

# Scores of one head, 64 x 64, from which a loop over heads pays on a CPU.
SCORES_WORTH_A_LOOP = 4096


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

    Vaswani et al. 2017 (arXiv:1706.03762), eq. 1. On a CPU large heads come one after another,
    see `attention_by_head`.
    """
    if mask is None and query.shape[-3] * key.shape[-3] >= SCORES_WORTH_A_LOOP:
        return jax.lax.platform_dependent(
            query, key, value, cpu=attention_by_head, default=attention_at_once
        )
    return attention_at_once(query, key, value, mask)


def attention_at_once(
    query: Float[Array, "*axes q heads k"],
    key: Float[Array, "*axes m heads k"],
    value: Float[Array, "*axes m heads k"],
    mask: Bool[Array, "q m"] | None = None,
) -> Float[Array, "*axes q heads k"]:
    """Returns `attention`, all scores in memory together."""
    scores = jnp.einsum("...qhk,...mhk->...hqm", query, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(jnp.broadcast_to(mask, scores.shape), scores, -jnp.inf)
    weights = attention_weights(scores, query.shape[-1], value.dtype)
    return jnp.einsum("...hqm,...mhk->...qhk", weights, value)


def attention_by_head(
    query: Float[Array, "*axes q heads k"],
    key: Float[Array, "*axes m heads k"],
    value: Float[Array, "*axes m heads k"],
) -> Float[Array, "*axes q heads k"]:
    """Returns `attention`, made one head of one frame at a time and made again for the gradient.

    One head's scores fit in a processor's cache; those of a whole layer would spend most of the
    time on their way to memory and back.
    """
    each = tuple(
        rearrange(x, "axes n heads k -> (axes heads) n k")
        for x in (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    )
    mixed = rearrange(
        jax.lax.map(lambda head: attention_of_head(*head), each),
        "(axes heads) n k -> axes n heads k",
        heads=query.shape[-2],
    )
    return mixed.reshape(query.shape)


@jax.custom_vjp
def attention_of_head(
    query: Float[Array, "q k"], key: Float[Array, "m k"], value: Float[Array, "m k"]
) -> Float[Array, "q k"]:
    """Returns `attention` of one head.

    Plain matrix products: as an einsum over an axis of one head XLA takes six times as long.
    """
    return attention_weights(_matmul(query, key.T), query.shape[-1], value.dtype) @ value


_matmul = partial(jnp.matmul, preferred_element_type=jnp.float32)


def _attention_of_head_forward(query: Array, key: Array, value: Array):
    mixed = attention_of_head(query, key, value)
    return mixed, (query, key, value, mixed)


def _attention_of_head_backward(residuals: tuple[Array, ...], gradient: Array):
    """Returns dQ = dS K, dK = dS^T Q, dV = P^T dO; P the weights, dS = P (dO V^T - rowsum(dO O)).

    Dao et al. 2022 (arXiv:2205.14135), appendix B.2. P and dS are made twice, once transposed:
    XLA transposes a matrix on the CPU in four times the time that it takes to make it.
    """
    query, key, value, mixed = residuals
    scale = query.shape[-1] ** -0.5
    rows = jnp.sum(gradient.astype(jnp.float32) * mixed, axis=-1)
    weights = jax.nn.softmax(_matmul(query, key.T) * scale, axis=1)
    on_scores = weights * (_matmul(gradient, value.T) - rows[:, None]) * scale
    on_query = _matmul(on_scores.astype(key.dtype), key)
    weights = jax.nn.softmax(_matmul(key, query.T) * scale, axis=0)
    on_scores = weights * (_matmul(value, gradient.T) - rows[None, :]) * scale
    on_key = _matmul(on_scores.astype(query.dtype), query)
    on_value = _matmul(weights.astype(gradient.dtype), gradient)
    return on_query.astype(query.dtype), on_key.astype(key.dtype), on_value.astype(value.dtype)


attention_of_head.defvjp(_attention_of_head_forward, _attention_of_head_backward)


def sparse_causal_attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """Returns each frame's attention over the tokens of frame 0 and of the frame before it.

    Wu et al. 2023 (arXiv:2212.11565), section 3.2: Q = W_Q z_i, K = W_K [z_0, z_{i-1}],
    V = W_V [z_0, z_{i-1}]. Frame 0 has no predecessor: it looks at itself twice, which is the
    same as once.
    """
    key, value = (jnp.concatenate([first_frame(x), former_frame(x)], axis=2) for x in (key, value))
    return attention(query, key, value)


def first_frame(x: Heads) -> Heads:
    """Returns frame 0 in the place of every frame."""
    return jnp.broadcast_to(x[:, :1], x.shape)


def former_frame(x: Heads) -> Heads:
    """Returns for each frame the one before it, and frame 0 for itself."""
    return jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)


def first_frame_attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """Returns each frame's attention over the tokens of frame 0 alone."""
    return full_attention(query, key[:, :1], value[:, :1])


def full_attention(
    query: Heads,
    key: Float[Array, "b g n heads k"],
    value: Float[Array, "b g n heads k"],
) -> Heads:
    """Returns each token's attention over every token of every frame that key and value hold."""
    frames = query.shape[1]
    query, key, value = (
        rearrange(x, "b f n heads k -> b (f n) heads k") for x in (query, key, value)
    )
    return rearrange(attention(query, key, value), "b (f n) heads k -> b f n heads k", f=frames)


FRAME_ATTENTION: dict[str, Callable[[Heads, Heads, Heads], Heads]] = {
    "sparse_causal": sparse_causal_attention,
    "spatial": attention,
    "first_frame": first_frame_attention,
    "full": full_attention,
}


class Attention(nnx.Module):
    """Projections around one of the attention functions above."""

    def __init__(
        self,
        query_dim: int,
        num_attention_heads: int,
        *,
        context_dim: int | None = None,
        attend: Callable[[Array, Array, Array], Array] = attention,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        context_dim = query_dim if context_dim is None else context_dim
        self.to_q = Linear(query_dim, query_dim, use_bias=use_bias, rngs=rngs)
        self.to_k = Linear(context_dim, query_dim, use_bias=use_bias, rngs=rngs)
        self.to_v = Linear(context_dim, query_dim, use_bias=use_bias, rngs=rngs)
        # The checkpoint counts a dropout as to_out.1.
        self.to_out = nnx.List([Linear(query_dim, query_dim, rngs=rngs)])
        self.num_attention_heads = num_attention_heads
        self.attend = attend

    def __call__(
        self, x: Float[Array, "*axes n c"], context: Float[Array, "*axes m d"]
    ) -> Float[Array, "*axes n c"]:
        query, key, value = (
            rearrange(y, "... (heads k) -> ... heads k", heads=self.num_attention_heads)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        mixed = self.attend(query, key, value)
        return self.to_out[0](rearrange(mixed, "... heads k -> ... (heads k)"))


class GEGLU(nnx.Module):
    """Value times gelu(gate), the exact gelu (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, inner_dim: int, *, rngs: nnx.Rngs):
        self.proj = Linear(dim, 2 * inner_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "*axes c"]) -> Float[Array, "*axes i"]:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        inner_dim = 4 * dim
        # The checkpoint counts a dropout as net.1, which holds no parameters.
        self.net: nnx.List = nnx.List(
            [GEGLU(dim, inner_dim, rngs=rngs), None, Linear(inner_dim, dim, rngs=rngs)]
        )

    def __call__(self, x: Float[Array, "*axes c"]) -> Float[Array, "*axes c"]:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Attention between frames, to the text, feed-forward, then attention over time.

    Wu et al. 2023, figure 3, and the published BasicTransformerBlock: the temporal attention
    comes last, after the feed-forward.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        *,
        context_dim: int,
        attention_scope: AttentionScope,
        temporal_attention: bool = True,
        rngs: nnx.Rngs,
    ):
        attend = FRAME_ATTENTION[attention_scope]
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, num_attention_heads, attend=attend, rngs=rngs)
        self.norm2 = LayerNorm(dim)
        self.attn2 = Attention(dim, num_attention_heads, context_dim=context_dim, rngs=rngs)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim, rngs=rngs)
        self.norm_temp = LayerNorm(dim) if temporal_attention else None
        self.attn_temp = (
            Attention(dim, num_attention_heads, rngs=rngs) if temporal_attention else None
        )

    def __call__(
        self, x: Float[Array, "b f n c"], context: Float[Array, "b s d"]
    ) -> Float[Array, "b f n c"]:
        frames = x.shape[1]
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        # The text is the same for every frame: its keys and values are made once per prompt.
        queries = rearrange(self.norm2(x), "b f n c -> b (f n) c")
        x = x + rearrange(self.attn2(queries, context), "b (f n) c -> b f n c", f=frames)
        x = x + self.ff(self.norm3(x))
        if self.norm_temp is None or self.attn_temp is None:
            return x
        over_time = rearrange(self.norm_temp(x), "b f n c -> b n f c")
        return x + rearrange(self.attn_temp(over_time, over_time), "b n f c -> b f n c")
