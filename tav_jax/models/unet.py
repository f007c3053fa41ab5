"""The 3D U-Net: Stable Diffusion's image U-Net inflated to frames.

Parameter names follow diffusers' UNet2DConditionModel and Tune-A-Video's UNet3DConditionModel.
With one frame, and while the output of the temporal attention is still zero, it gives the same
numbers as the image U-Net.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from tav_jax.models import backend
from tav_jax.models.attention.dispatch import AttentionScope
from tav_jax.models.compute import ComputeOptions
from tav_jax.models.group_norm import Parts
from tav_jax.models.layers import Conv, Downsample, GroupNorm, Linear, ResnetBlock, Upsample
from tav_jax.models.transformer import Transformer3D
from tav_jax.types import Context, KeysValues, Latents, TextKeysValues, Timesteps

BlockText: TypeAlias = tuple[tuple[KeysValues, ...], ...]
"""The text's keys and values in each transformer block of a level, by transformer."""


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a 3D U-Net, and what its attention may see.

    Args:
        in_channels: Channels of the latents.
        out_channels: Channels of the prediction.
        block_out_channels: Width of each level, finest first.
        down_attention: Whether each level has transformers on the way down, finest first.
        up_attention: The same on the way up, coarsest first as in the published
            `up_block_types`.
        num_attention_heads: Number of heads at each level. The published config calls it
            `attention_head_dim`.
        layers_per_block: Residual blocks of a level on the way down. There is one more on the way
            up.
        cross_attention_dim: Width of the text states.
        norm_num_groups: Groups of channels in all group norms.
        norm_eps: Added to the variance in the norms of residual blocks and of the output.
        use_linear_projection: Whether transformers project by dense layers or 1x1 convolutions.
        flip_sin_to_cos: See `timestep_embedding`.
        freq_shift: See `timestep_embedding`.
        sample_size: Side of the latents that it was trained on. Not used here. It is kept for
            saved configs, from which diffusers reads its default size.
        attention_scope: What a frame's self-attention may see.
        temporal_attention: Whether there is a temporal attention. Without it, and with the scope
            "spatial", frames interact only in the group norms. With one frame that is the image
            U-Net with its exact parameters.
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

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.block_out_channels)

    @property
    def time_embed_dim(self) -> int:
        """Width of the timestep's embedding."""
        return 4 * self.block_out_channels[0]


def timestep_embedding(
    timesteps: Timesteps, dim: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "b dim"]:
    """Return sines and cosines of the timesteps at dim / 2 geometric frequencies, in float32.

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.5.

    Args:
        timesteps: Training timesteps.
        dim: Width of the result.
        flip_sin_to_cos: Put the cosines first, as Stable Diffusion does.
        freq_shift: Frequency i is 10000^(-i / (dim / 2 - freq_shift)).
    """
    half = dim // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    frequencies = jnp.exp(-math.log(10000) * exponents)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    waves = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(waves[::-1] if flip_sin_to_cos else waves, axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two dense layers that turn the timestep's sines and cosines into its embedding."""

    def __init__(self, dim: int, time_embed_dim: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(dim, time_embed_dim, rngs=rngs)
        self.linear_2 = Linear(time_embed_dim, time_embed_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b dim"]) -> Float[Array, "b t"]:
        """Return the embedding of each clip's timestep."""
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class Block(nnx.Module):
    """Residual blocks and transformers of one level, which the three subclasses run in order.

    Args:
        config: The U-Net's config.
        compute: How to compute.
        level: Index into the fields of `config` that have one value for each level.
        in_channels: Input width of each residual block.
        num_transformers: 0, or how many of the residual blocks have a transformer after them.
        rngs: Source of randomness.
    """

    def __init__(
        self,
        config: UNetConfig,
        compute: ComputeOptions,
        level: int,
        in_channels: Sequence[int],
        num_transformers: int,
        *,
        rngs: nnx.Rngs,
    ):
        width = config.block_out_channels[level]
        self.resnets = nnx.List(
            ResnetBlock(
                channels,
                width,
                time_embed_dim=config.time_embed_dim,
                num_groups=config.norm_num_groups,
                eps=config.norm_eps,
                joint_frames=True,
                rngs=rngs,
            )
            for channels in in_channels
        )
        self.attentions = nnx.List(
            Transformer3D(
                width,
                config.num_attention_heads[level],
                context_dim=config.cross_attention_dim,
                num_groups=config.norm_num_groups,
                use_linear_projection=config.use_linear_projection,
                attention_scope=config.attention_scope,
                temporal_attention=config.temporal_attention,
                compute=compute,
                rngs=rngs,
            )
            for _ in range(num_transformers)
        )
        self.compute = compute

    def keys_values(self, context: Context) -> BlockText:
        """Return the text's keys and values in each transformer."""
        return tuple(transformer.keys_values(context) for transformer in self.attentions)

    def run_layer(self, index: int, x: Array | Parts, time_emb: Array, text: BlockText) -> Array:
        """Return x after one residual block, and after its transformer if it has one."""
        x = self._run(self.resnets[index], x, time_emb)
        if index < len(self.attentions):
            x = self._run(self.attentions[index], x, text[index])
        return x

    def _run(self, module: Callable[..., Array], *inputs: Any) -> Array:
        """Return module(*inputs), keeping no more for the backward pass than `compute` says."""
        if self.compute.gradient_checkpointing == "none":
            return module(*inputs)
        return jax.checkpoint(lambda *inputs: module(*inputs))(*inputs)


class DownBlock(Block):
    """One level on the way down."""

    def __init__(
        self,
        config: UNetConfig,
        compute: ComputeOptions,
        level: int,
        in_channels: Sequence[int],
        *,
        rngs: nnx.Rngs,
    ):
        transformers = len(in_channels) if config.down_attention[level] else 0
        super().__init__(config, compute, level, in_channels, transformers, rngs=rngs)
        width, is_last = config.block_out_channels[level], level == config.levels - 1
        # The U-Net pads all four sides, the VAE only two.
        self.downsamplers = nnx.List(
            [] if is_last else [Downsample(width, padding=(1, 1), rngs=rngs)]
        )

    def __call__(self, x: Array, time_emb: Array, text: BlockText) -> tuple[Array, list[Array]]:
        """Return the input of the next level, and the skip connections in the order made."""
        skips = []
        for index in range(len(self.resnets)):
            x = self.run_layer(index, x, time_emb, text)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    """The middle: a residual block, a transformer, and a residual block at the coarsest level."""

    def __init__(self, config: UNetConfig, compute: ComputeOptions, *, rngs: nnx.Rngs):
        width = config.block_out_channels[-1]
        super().__init__(config, compute, config.levels - 1, (width, width), 1, rngs=rngs)

    def __call__(self, x: Array, time_emb: Array, text: BlockText) -> Array:
        """Return the input of the coarsest level on the way up."""
        for index in range(len(self.resnets)):
            x = self.run_layer(index, x, time_emb, text)
        return x


class UpBlock(Block):
    """One level on the way up."""

    def __init__(
        self,
        config: UNetConfig,
        compute: ComputeOptions,
        level: int,
        in_channels: Sequence[int],
        *,
        rngs: nnx.Rngs,
    ):
        # As the published `up_block_types`, `up_attention` starts at the coarsest level.
        has_attention = config.up_attention[config.levels - 1 - level]
        transformers = len(in_channels) if has_attention else 0
        super().__init__(config, compute, level, in_channels, transformers, rngs=rngs)
        width = config.block_out_channels[level]
        self.upsamplers = nnx.List([] if level == 0 else [Upsample(width, rngs=rngs)])

    def __call__(
        self,
        x: Array,
        time_emb: Array,
        text: BlockText,
        skips: list[Array],
    ) -> Array:
        """Return the input of the next finer level.

        Args:
            x: Output of the next coarser level.
            time_emb: Embedding of the timestep.
            text: The text's keys and values in each transformer.
            skips: All skip connections not used yet, in the order made. Those of this level are
                removed from the end.
        """
        for index in range(len(self.resnets)):
            both: Any = x, skips.pop()
            if backend.platform() != "gpu":
                both = jnp.concatenate(both, axis=-1)
            x = self.run_layer(index, both, time_emb, text)
        for upsampler in self.upsamplers:
            _, _, height, width, _ = skips[-1].shape
            x = upsampler(x, (height, width))
        return x


class UNet3DConditionModel(nnx.Module):
    """The 3D U-Net.

    Args:
        config: Its shape.
        compute: How to compute.
        rngs: Source of randomness.
    """

    def __init__(self, config: UNetConfig, compute: ComputeOptions, *, rngs: nnx.Rngs):
        widths, layers = config.block_out_channels, config.layers_per_block
        self.config = config
        self.compute = compute
        self.conv_in = Conv(config.in_channels, widths[0], rngs=rngs)
        self.time_embedding = TimestepEmbedding(widths[0], config.time_embed_dim, rngs=rngs)

        self.down_blocks: nnx.List[DownBlock] = nnx.List()
        skips = [widths[0]]  # widths of all skip connections, in the order made
        for level, width in enumerate(widths):
            in_channels = [skips[-1]] + [width] * (layers - 1)
            block = DownBlock(config, compute, level, in_channels, rngs=rngs)
            self.down_blocks.append(block)
            skips += [width] * (layers + len(block.downsamplers))

        self.mid_block = MidBlock(config, compute, rngs=rngs)

        self.up_blocks: nnx.List[UpBlock] = nnx.List()
        previous = widths[-1]
        for level in reversed(range(config.levels)):
            width = widths[level]
            in_channels = [previous + skips.pop()] + [width + skips.pop() for _ in range(layers)]
            self.up_blocks.append(UpBlock(config, compute, level, in_channels, rngs=rngs))
            previous = width

        self.conv_norm_out = GroupNorm(
            config.norm_num_groups, widths[0], eps=config.norm_eps, joint_frames=True
        )
        self.conv_out = Conv(widths[0], config.out_channels, rngs=rngs)

    def text_keys_values(self, context: Context) -> TextKeysValues:
        """Return the text's keys and values in every transformer.

        They depend on neither timestep nor frame, so a loop over timesteps computes them once.
        """
        context = context.astype(self.compute.dtype)
        blocks = (*self.down_blocks, self.mid_block, *self.up_blocks)
        return tuple(block.keys_values(context) for block in blocks)

    def embed_timesteps(self, timesteps: Timesteps) -> Float[Array, "b t"]:
        """Return the embedding of each clip's timestep, in the type of the computation."""
        config = self.config
        waves = timestep_embedding(
            timesteps,
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        return self.time_embedding(waves.astype(self.compute.dtype))

    def __call__(
        self, latents: Latents, timesteps: Timesteps, context: Context | TextKeysValues
    ) -> Latents:
        """Return the predicted noise, or velocity, in float32.

        Args:
            latents: Noisy latents, multiplied by the VAE's scaling factor.
            timesteps: Training timesteps, 0 to 999, one for each clip.
            context: States of the text encoder's last layer, one prompt for each clip, or the
                result of `text_keys_values` for them.
        """
        time_emb = self.embed_timesteps(timesteps)
        text = context if isinstance(context, tuple) else self.text_keys_values(context)
        levels = self.config.levels
        down_text, mid_text, up_text = text[:levels], text[levels], text[levels + 1 :]

        x = self.conv_in(latents.astype(self.compute.dtype))
        skips = [x]
        for down_block, block_text in zip(self.down_blocks, down_text, strict=True):
            x, more = down_block(x, time_emb, block_text)
            skips += more
        x = self.mid_block(x, time_emb, mid_text)
        for up_block, block_text in zip(self.up_blocks, up_text, strict=True):
            x = up_block(x, time_emb, block_text, skips)

        x = self.conv_out(self.conv_norm_out(x, silu=True))
        return x.astype(jnp.float32)
