"""The 3D U-Net's transformers over the tokens of a video.

Parameter names follow diffusers' CrossAttention and Transformer2DModel and Tune-A-Video's
BasicTransformerBlock.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jaxtyping import Float

from tav_jax.models import backend
from tav_jax.models.attention.dispatch import (
    AttentionImplementation,
    AttentionScope,
    attends_elementwise,
)
from tav_jax.models.attention.frame_attention import FRAME_ATTENTION, spatial_attention
from tav_jax.models.attention.over_frames import attention_over_frames
from tav_jax.models.compute import ComputeOptions
from tav_jax.models.frame_collectives import to_frames, to_positions
from tav_jax.models.layers import Conv, GroupNorm, LayerNorm, Linear
from tav_jax.types import Context, KeysValues

TRANSFORMER_NORM_EPS = 1e-6  # as in diffusers' Transformer2DModel; residual blocks use norm_eps


class Attention(nnx.Module):
    """Query, key, value and output projections around an attention function.

    Args:
        query_dim: Width of the input and of the output.
        num_attention_heads: Number of heads. It divides `query_dim`.
        context_dim: Width of what is attended to. None: `query_dim`.
        attend: A function of `tav_jax.models.attention.frame_attention`.
        use_bias: Whether the projections of query, key and value have biases.
        rngs: Source of randomness.
    """

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
        # A list, since the published to_out has a dropout as its second item.
        self.to_out = nnx.List([Linear(query_dim, query_dim, rngs=rngs)])
        self.num_attention_heads = num_attention_heads
        self.attend = attend

    def keys_values(self, context: Float[Array, "b g m d"]) -> KeysValues:
        """Return keys and values of a context: one for each frame, or one that all share."""
        return self._split_heads(self.to_k(context)), self._split_heads(self.to_v(context))

    def __call__(
        self,
        x: Float[Array, "b f n c"],
        keys_values: KeysValues,
        attend: Callable[[Array, Array, Array], Array] | None = None,
    ) -> Float[Array, "b f n c"]:
        """Return the attention of x to keys and values from `keys_values`.

        Args:
            x: What attends.
            keys_values: What it attends to.
            attend: Used in place of the function that the layer was made with.
        """
        out = (attend or self.attend)(self._split_heads(self.to_q(x)), *keys_values)
        return self.to_out[0](rearrange(out, "b f n heads k -> b f n (heads k)"))

    def _split_heads(self, x: Float[Array, "b f n c"]) -> Float[Array, "b f n heads k"]:
        return rearrange(x, "b f n (heads k) -> b f n heads k", heads=self.num_attention_heads)


def gated(x: Float[Array, "*axes c"]) -> Float[Array, "*axes i"]:
    """Return the first half of x times gelu(second half), with the exact GELU."""
    value, gate = jnp.split(x, 2, axis=-1)
    return value * jax.nn.gelu(gate, approximate=False)


@jax.custom_vjp
def gated_keeping_input(x: Float[Array, "*axes c"]) -> Float[Array, "*axes i"]:
    """Return `gated` of x. The backward pass keeps x alone, and computes the rest again."""
    return gated(x)


def _gated_backward(x: Array, gradient: Array) -> tuple[Array]:
    """Return the gradient dy gelu(g) by the value v, and dy v gelu'(g) by the gate g.

    gelu(g) = g P(g) and gelu'(g) = P(g) + g p(g), with the normal distribution P and its density p.
    """
    both = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    swapped, is_value = both[..., ::-1, :], jnp.arange(2)[:, None] == 0
    value, gate = jnp.where(is_value, both, swapped), jnp.where(is_value, swapped, both)
    below = 0.5 * jax.lax.erfc(-gate * math.sqrt(0.5))
    density = jnp.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
    dx = jnp.where(is_value, gate * below, value * (below + gate * density))
    dx = dx * gradient.astype(jnp.float32)[..., None, :]
    return (dx.reshape(x.shape).astype(x.dtype),)


gated_keeping_input.defvjp(lambda x: (gated(x), x), _gated_backward)


class GEGLU(nnx.Module):
    """Value times gelu(gate), with the exact GELU (Shazeer 2020, arXiv:2002.05202).

    Args:
        dim: Width of the input.
        inner_dim: Width of the output.
        rngs: Source of randomness.
    """

    def __init__(self, dim: int, inner_dim: int, *, rngs: nnx.Rngs):
        self.proj = Linear(dim, 2 * inner_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "*axes c"]) -> Float[Array, "*axes i"]:
        """Return value times gelu(gate)."""
        gate = gated_keeping_input if backend.platform() == "gpu" else gated
        return gate(self.proj(x))


class FeedForward(nnx.Module):
    """A GEGLU layer four times as wide as the input, and a projection back."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        inner_dim = 4 * dim
        # None takes the place of the published dropout, which has no parameters.
        self.net: nnx.List = nnx.List(
            [GEGLU(dim, inner_dim, rngs=rngs), None, Linear(inner_dim, dim, rngs=rngs)]
        )

    def __call__(self, x: Float[Array, "*axes c"]) -> Float[Array, "*axes c"]:
        """Return the output for each token."""
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Attention between frames, attention to the text, feed-forward, and temporal attention.

    Wu et al. 2023, figure 3, and the published BasicTransformerBlock: the temporal attention
    comes last, after the feed-forward.

    Args:
        dim: Width of the tokens.
        num_attention_heads: Number of heads of each attention.
        context_dim: Width of the text states.
        attention_scope: What a frame's self-attention may see.
        attention_implementation: See `ComputeOptions`.
        temporal_attention: Whether there is a temporal attention.
        checkpoint_parts: Keep only the inputs of the four parts for the backward pass.
        rngs: Source of randomness.
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
        checkpoint_parts: bool = False,
        rngs: nnx.Rngs,
    ):
        between_frames = FRAME_ATTENTION[attention_scope]
        make = partial(Attention, dim, num_attention_heads, rngs=rngs)
        attend_between = partial(between_frames, implementation=attention_implementation)
        attend_within = partial(spatial_attention, implementation=attention_implementation)
        self.norm1 = LayerNorm(dim)
        self.attn1 = make(attend=attend_between)
        self.norm2 = LayerNorm(dim)
        self.attn2 = make(attend=attend_within, context_dim=context_dim)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim, rngs=rngs)
        self.norm_temp = LayerNorm(dim) if temporal_attention else None
        self.attn_temp = make(attend=attend_within) if temporal_attention else None
        self.checkpoint_parts = checkpoint_parts
        self.attention_implementation = attention_implementation

    def __call__(self, x: Float[Array, "b f n c"], text: KeysValues) -> Float[Array, "b f n c"]:
        """Return x after all four parts."""
        parts = (
            self.add_self_attention,
            self.add_cross_attention,
            self.add_feed_forward,
            self.add_temporal_attention,
        )
        for part in parts:
            x = (jax.checkpoint(part) if self.checkpoint_parts else part)(x, text)
        return x

    def add_self_attention(
        self, x: Float[Array, "b f n c"], _: KeysValues
    ) -> Float[Array, "b f n c"]:
        """Return x plus each frame's attention to the frames of the scope."""
        normed = self.norm1(x)
        return x + self.attn1(normed, self.attn1.keys_values(normed))

    def add_cross_attention(
        self, x: Float[Array, "b f n c"], text: KeysValues
    ) -> Float[Array, "b f n c"]:
        """Return x plus each token's attention to the text."""
        return x + self.attn2(self.norm2(x), text)

    def add_feed_forward(
        self, x: Float[Array, "b f n c"], _: KeysValues
    ) -> Float[Array, "b f n c"]:
        """Return x plus the feed-forward layers."""
        return x + self.ff(self.norm3(x))

    def add_temporal_attention(
        self, x: Float[Array, "b f n c"], _: KeysValues
    ) -> Float[Array, "b f n c"]:
        """Return x plus each position's attention over all frames."""
        if self.norm_temp is None or self.attn_temp is None:
            return x
        normed = to_positions(self.norm_temp(x))
        if attends_elementwise(self.attention_implementation, frames=normed.shape[1]):
            out = self.attn_temp(normed, self.attn_temp.keys_values(normed), attention_over_frames)
        else:
            normed = rearrange(normed, "b f n c -> b n f c")
            out = self.attn_temp(normed, self.attn_temp.keys_values(normed))
            out = rearrange(out, "b n f c -> b f n c")
        return x + to_frames(out, positions=x.shape[2])


class Transformer3D(nnx.Module):
    """A transformer block over the tokens of a video, between two projections.

    Args:
        channels: Channels of input and output.
        num_attention_heads: Number of heads of each attention.
        context_dim: Width of the text states.
        num_groups: Groups of channels of the norm.
        use_linear_projection: Dense projections, as in Stable Diffusion 2, or 1x1 convolutions.
        attention_scope: What a frame's self-attention may see.
        temporal_attention: Whether there is a temporal attention.
        compute: How to compute.
        rngs: Source of randomness.
    """

    def __init__(
        self,
        channels: int,
        num_attention_heads: int,
        *,
        context_dim: int,
        num_groups: int,
        use_linear_projection: bool,
        attention_scope: AttentionScope,
        temporal_attention: bool,
        compute: ComputeOptions,
        rngs: nnx.Rngs,
    ):
        project = Linear if use_linear_projection else partial(Conv, kernel_size=1)
        # Statistics are each frame's own here, unlike in the residual blocks.
        self.norm = GroupNorm(num_groups, channels, eps=TRANSFORMER_NORM_EPS, joint_frames=False)
        self.proj_in = project(channels, channels, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(
                    channels,
                    num_attention_heads,
                    context_dim=context_dim,
                    attention_scope=attention_scope,
                    attention_implementation=compute.attention_implementation,
                    temporal_attention=temporal_attention,
                    checkpoint_parts=compute.gradient_checkpointing == "full",
                    rngs=rngs,
                )
            ]
        )
        self.proj_out = project(channels, channels, rngs=rngs)

    def keys_values(self, context: Context) -> tuple[KeysValues, ...]:
        """Return the text's keys and values in each block. All frames share them."""
        return tuple(block.attn2.keys_values(context[:, None]) for block in self.transformer_blocks)

    def __call__(
        self, x: Float[Array, "b f h w c"], text: tuple[KeysValues, ...]
    ) -> Float[Array, "b f h w c"]:
        """Return x plus the transformer's output."""
        b, _, h, _, _ = x.shape
        normed = self.norm(rearrange(x, "b f h w c -> (b f) h w c"))
        hidden = rearrange(self.proj_in(normed), "(b f) h w c -> b f (h w) c", b=b)
        for block, keys_values in zip(self.transformer_blocks, text, strict=True):
            hidden = block(hidden, keys_values)
        hidden = rearrange(hidden, "b f (h w) c -> b f h w c", h=h)
        if isinstance(self.proj_out, Conv):
            return self.proj_out(hidden, x)
        return x + self.proj_out(hidden)
