"""Transformer blocks over the tokens of a video.

Parameter names follow diffusers' CrossAttention and Tune-A-Video's BasicTransformerBlock.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jaxtyping import Float

from tav_jax.models.attention.dispatch import AttentionImplementation, AttentionScope
from tav_jax.models.attention.frame_attention import FRAME_ATTENTION, spatial_attention
from tav_jax.models.frame_collectives import to_frames, to_positions
from tav_jax.models.layers import LayerNorm, Linear
from tav_jax.types import KeysValues


class Attention(nnx.Module):
    """Projections around one of the functions of `tav_jax.models.attention.dispatch`."""

    def __init__(
        self,
        query_dim: int,
        num_attention_heads: int,
        *,
        context_dim: int | None = None,
        attend: Callable[[Array, Array, Array], Array] = spatial_attention,
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

    def keys_values(self, context: Float[Array, "b g m d"]) -> KeysValues:
        """Returns keys and values of a context, of each frame or of one that all share."""
        return self._heads(self.to_k(context)), self._heads(self.to_v(context))

    def __call__(
        self, x: Float[Array, "b f n c"], keys_values: KeysValues
    ) -> Float[Array, "b f n c"]:
        mixed = self.attend(self._heads(self.to_q(x)), *keys_values)
        return self.to_out[0](rearrange(mixed, "b f n heads k -> b f n (heads k)"))

    def _heads(self, x: Float[Array, "b f n c"]) -> Float[Array, "b f n heads k"]:
        return rearrange(x, "b f n (heads k) -> b f n heads k", heads=self.num_attention_heads)


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
        attention_implementation: AttentionImplementation = "auto",
        temporal_attention: bool = True,
        keep_inputs_only: bool = False,
        rngs: nnx.Rngs,
    ):
        within = partial(spatial_attention, implementation=attention_implementation)
        between = partial(FRAME_ATTENTION[attention_scope], implementation=attention_implementation)
        make = partial(Attention, dim, num_attention_heads, rngs=rngs)
        self.norm1 = LayerNorm(dim)
        self.attn1 = make(attend=between)
        self.norm2 = LayerNorm(dim)
        self.attn2 = make(attend=within, context_dim=context_dim)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim, rngs=rngs)
        self.norm_temp = LayerNorm(dim) if temporal_attention else None
        self.attn_temp = make(attend=within) if temporal_attention else None
        self.keep_inputs_only = keep_inputs_only

    def __call__(self, x: Float[Array, "b f n c"], text: KeysValues) -> Float[Array, "b f n c"]:
        for part in (self.to_frames, self.to_text, self.feed_forward, self.to_time):
            x = (jax.checkpoint(part) if self.keep_inputs_only else part)(x, text)
        return x

    def to_frames(self, x: Float[Array, "b f n c"], _: KeysValues) -> Float[Array, "b f n c"]:
        normed = self.norm1(x)
        return x + self.attn1(normed, self.attn1.keys_values(normed))

    def to_text(self, x: Float[Array, "b f n c"], text: KeysValues) -> Float[Array, "b f n c"]:
        return x + self.attn2(self.norm2(x), text)

    def feed_forward(self, x: Float[Array, "b f n c"], _: KeysValues) -> Float[Array, "b f n c"]:
        return x + self.ff(self.norm3(x))

    def to_time(self, x: Float[Array, "b f n c"], _: KeysValues) -> Float[Array, "b f n c"]:
        if self.norm_temp is None or self.attn_temp is None:
            return x
        normed = rearrange(to_positions(self.norm_temp(x)), "b f n c -> b n f c")
        mixed = self.attn_temp(normed, self.attn_temp.keys_values(normed))
        return x + to_frames(rearrange(mixed, "b n f c -> b f n c"), positions=x.shape[2])
