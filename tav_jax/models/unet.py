"""The 3D U-Net: Stable Diffusion's image U-Net inflated to frames.

Parameter names follow diffusers' UNet2DConditionModel and Tune-A-Video's UNet3DConditionModel.
At one frame, with the temporal attention at its start, it is the image U-Net.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jaxtyping import Float

from tav_jax.models.attention.dispatch import AttentionScope
from tav_jax.models.compute import ComputeOptions
from tav_jax.models.layers import Conv, Downsample, GroupNorm, Linear, ResnetBlock, Upsample
from tav_jax.models.transformer import BasicTransformerBlock
from tav_jax.types import Context, KeysValues, Latents, TextKeysValues, Timesteps

TRANSFORMER_NORM_EPS = 1e-6  # diffusers' Transformer2DModel; the residual blocks take norm_eps


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a 3D U-Net, and what its attention may look at.

    Args:
        block_out_channels: Width of each level, from the finest.
        down_attention: Whether each level has transformers on the way down; `up_attention`
            counts from the coarsest, as the published `up_block_types` does.
        num_attention_heads: Heads of each level. The published config has these numbers under
            the name `attention_head_dim`.
        sample_size: Side of the latents it was trained on. Nothing here reads it; it is written
            because the published pipeline reads it from saved configs.
        attention_scope: What a frame's self-attention may look at.
        temporal_attention: Without it, and "spatial", frames meet in the group norms alone; at
            one frame that is the image U-Net, with exactly its parameters.
    """

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    num_attention_heads: tuple[int, ...]
    layers_per_block: int
    cross_attention_dim: int
    norm_num_groups: int
    norm_eps: float
    use_linear_projection: bool
    flip_sin_to_cos: bool
    freq_shift: float
    sample_size: int = 64
    attention_scope: AttentionScope = "sparse_causal"
    temporal_attention: bool = True


def timestep_embedding(
    timesteps: Timesteps, dim: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "b dim"]:
    """Returns sines and cosines of the timesteps at `dim / 2` geometric frequencies, float32.

    Vaswani et al. 2017, section 3.5, with the frequency exponent i / (dim / 2 - freq_shift).
    Stable Diffusion puts the cosines first (`flip_sin_to_cos`).
    """
    half = dim // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    frequencies = jnp.exp(-math.log(10000) * exponents)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    waves = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(waves[::-1] if flip_sin_to_cos else waves, axis=-1)


class TimestepEmbedding(nnx.Module):
    def __init__(self, dim: int, time_embed_dim: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(dim, time_embed_dim, rngs=rngs)
        self.linear_2 = Linear(time_embed_dim, time_embed_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b dim"]) -> Float[Array, "b t"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class Transformer3D(nnx.Module):
    """Transformer blocks over the tokens of a video, in and out through a projection."""

    def __init__(
        self,
        channels: int,
        num_attention_heads: int,
        config: UNetConfig,
        compute: ComputeOptions,
        *,
        rngs: nnx.Rngs,
    ):
        project = Linear if config.use_linear_projection else pointwise_conv
        self.norm = GroupNorm(config.norm_num_groups, channels, eps=TRANSFORMER_NORM_EPS)
        self.proj_in = project(channels, channels, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(
                    channels,
                    num_attention_heads,
                    context_dim=config.cross_attention_dim,
                    attention_scope=config.attention_scope,
                    attention_implementation=compute.attention_implementation,
                    temporal_attention=config.temporal_attention,
                    keep_inputs_only=compute.gradient_checkpointing == "full",
                    rngs=rngs,
                )
            ]
        )
        self.proj_out = project(channels, channels, rngs=rngs)

    def keys_values(self, context: Context) -> tuple[KeysValues, ...]:
        return tuple(block.attn2.keys_values(context[:, None]) for block in self.transformer_blocks)

    def __call__(
        self, x: Float[Array, "b f h w c"], text: tuple[KeysValues, ...]
    ) -> Float[Array, "b f h w c"]:
        b, _, h, _, _ = x.shape
        # Frame by frame here, unlike in the residual blocks.
        normed = self.norm(rearrange(x, "b f h w c -> (b f) h w c"))
        hidden = rearrange(self.proj_in(normed), "(b f) h w c -> b f (h w) c", b=b)
        for block, keys_values in zip(self.transformer_blocks, text, strict=True):
            hidden = block(hidden, keys_values)
        return x + self.proj_out(rearrange(hidden, "b f (h w) c -> b f h w c", h=h))


def pointwise_conv(in_channels: int, out_channels: int, *, rngs: nnx.Rngs) -> Conv:
    return Conv(in_channels, out_channels, 1, rngs=rngs)


BlockText: TypeAlias = tuple[tuple[KeysValues, ...], ...]


class Block(nnx.Module):
    """One level on the way down or up, or the middle: residual blocks, transformers, resampling.

    `resnets` gives the input width of each residual block. Attributes that a level lacks are
    empty lists, so that the checkpoint's names are exactly the parameters there are.
    """

    def __init__(
        self,
        in_channels: list[int],
        out_channels: int,
        config: UNetConfig,
        compute: ComputeOptions,
        *,
        num_attention_heads: int,
        num_transformers: int,
        downsample: bool = False,
        upsample: bool = False,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List(
            ResnetBlock(
                width,
                out_channels,
                time_embed_dim=time_embed_dim(config),
                num_groups=config.norm_num_groups,
                eps=config.norm_eps,
                rngs=rngs,
            )
            for width in in_channels
        )
        self.attentions = nnx.List(
            Transformer3D(out_channels, num_attention_heads, config, compute, rngs=rngs)
            for _ in range(num_transformers)
        )
        # The U-Net pads all round.
        self.downsamplers = nnx.List(
            [Downsample(out_channels, padding=(1, 1), rngs=rngs)] if downsample else []
        )
        self.upsamplers = nnx.List([Upsample(out_channels, rngs=rngs)] if upsample else [])

        self.compute = compute

    def keys_values(self, context: Context) -> tuple[tuple[KeysValues, ...], ...]:
        return tuple(transformer.keys_values(context) for transformer in self.attentions)

    def run(self, layer: Callable[..., Array], *inputs: Any) -> Array:
        """Returns layer(*inputs), for the gradient made again unless all is to be kept."""
        if self.compute.gradient_checkpointing == "none":
            return layer(*inputs)
        return jax.checkpoint(lambda *inputs: layer(*inputs))(*inputs)

    def down(self, x: Array, time_emb: Array, text: BlockText) -> tuple[Array, list[Array]]:
        """Returns what goes down, and what skips to the way up."""
        skips = []
        for index, resnet in enumerate(self.resnets):
            x = self.run(resnet, x, time_emb)
            if self.attentions:
                x = self.run(self.attentions[index], x, text[index])
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips

    def middle(self, x: Array, time_emb: Array, text: BlockText) -> Array:
        first, second = self.resnets
        x = self.run(first, x, time_emb)
        x = self.run(self.attentions[0], x, text[0])
        return self.run(second, x, time_emb)

    def up(self, x: Array, time_emb: Array, text: BlockText, skips: list[Array]) -> Array:
        """Returns what goes up; `skips` come in the order in which they were made."""
        for index, resnet in enumerate(self.resnets):
            skip = skips[len(self.resnets) - 1 - index]
            x = self.run(resnet, jnp.concatenate([x, skip], axis=-1), time_emb)
            if self.attentions:
                x = self.run(self.attentions[index], x, text[index])
        return x


def time_embed_dim(config: UNetConfig) -> int:
    return 4 * config.block_out_channels[0]


class UNet3DConditionModel(nnx.Module):
    def __init__(self, config: UNetConfig, compute: ComputeOptions, *, rngs: nnx.Rngs):
        widths, layers = config.block_out_channels, config.layers_per_block
        self.config = config
        self.compute = compute
        self.conv_in = Conv(config.in_channels, widths[0], rngs=rngs)
        self.time_embedding = TimestepEmbedding(widths[0], time_embed_dim(config), rngs=rngs)

        self.down_blocks: nnx.List[Block] = nnx.List()
        skips = [widths[0]]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            self.down_blocks.append(
                Block(
                    [skips[-1]] + [width] * (layers - 1),
                    width,
                    config,
                    compute,
                    num_attention_heads=config.num_attention_heads[level],
                    num_transformers=layers if config.down_attention[level] else 0,
                    downsample=not last,
                    rngs=rngs,
                )
            )
            skips += [width] * (layers if last else layers + 1)

        self.mid_block = Block(
            [widths[-1]] * 2,
            widths[-1],
            config,
            compute,
            num_attention_heads=config.num_attention_heads[-1],
            num_transformers=1,
            rngs=rngs,
        )

        self.up_blocks: nnx.List[Block] = nnx.List()
        previous = widths[-1]
        for index, width in enumerate(reversed(widths)):
            in_channels = [previous + skips.pop()] + [width + skips.pop() for _ in range(layers)]
            self.up_blocks.append(
                Block(
                    in_channels,
                    width,
                    config,
                    compute,
                    num_attention_heads=config.num_attention_heads[-1 - index],
                    num_transformers=layers + 1 if config.up_attention[index] else 0,
                    upsample=index < len(widths) - 1,
                    rngs=rngs,
                )
            )
            previous = width

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = Conv(widths[0], config.out_channels, rngs=rngs)

    def text_keys_values(self, context: Context) -> TextKeysValues:
        """Returns the text's keys and values in every transformer.

        They depend on neither timestep nor frame: loops over timesteps make them once.
        """
        context = context.astype(self.compute.dtype)
        return tuple(block.keys_values(context) for block in self._blocks())

    def _blocks(self) -> list[Block]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def __call__(
        self, latents: Latents, timesteps: Timesteps, context: Context | TextKeysValues
    ) -> Latents:
        """Returns the predicted noise (or velocity), float32.

        Args:
            latents: Noisy latents, scaled by the VAE's scaling factor.
            timesteps: Training timesteps, 0 to 999, one per clip.
            context: States of the text encoder's last layer, one prompt per clip; or what
                `text_keys_values` made of them.
        """
        config, dtype = self.config, jnp.dtype(self.compute.dtype)

        waves = timestep_embedding(
            timesteps,
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        time_emb = self.time_embedding(waves.astype(dtype))
        text = context if isinstance(context, tuple) else self.text_keys_values(context)
        blocks = list(zip(self._blocks(), text, strict=True))
        levels = len(self.down_blocks)

        x = self.conv_in(latents.astype(dtype))
        skips = [x]
        for block, keys_values in blocks[:levels]:
            x, more = block.down(x, time_emb, keys_values)
            skips += more
        middle, keys_values = blocks[levels]
        x = middle.middle(x, time_emb, keys_values)
        for block, keys_values in blocks[levels + 1 :]:
            count = len(block.resnets)
            x = block.up(x, time_emb, keys_values, skips[-count:])
            del skips[-count:]
            for upsampler in block.upsamplers:
                x = upsampler(x, (skips[-1].shape[2], skips[-1].shape[3]))

        x = self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
        return x.astype(jnp.float32)
