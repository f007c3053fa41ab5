"""Stable Diffusion's autoencoder: from images to posterior moments, and from latents to images.

Parameter names follow diffusers' AutoencoderKL. A video's frames are independent images here, and
every norm's statistics are those of one image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jaxtyping import Float

from tav_jax.models.attention.frame_attention import spatial_attention
from tav_jax.models.compute import ComputeOptions
from tav_jax.models.layers import Conv, Downsample, GroupNorm, Linear, ResnetBlock, Upsample
from tav_jax.types import Latents, Moments, PixelValues

NORM_EPS = 1e-6  # of all the norms; those in the U-Net's residual blocks have 1e-5


@dataclass(frozen=True)
class VAEConfig:
    """The shape of an autoencoder, and how many frames it computes at a time.

    Args:
        in_channels: Channels of the images to encode.
        out_channels: Channels of the decoded images.
        latent_channels: Channels of the latents.
        block_out_channels: Width of each level, finest first.
        layers_per_block: Residual blocks of a level in the encoder. The decoder has one more.
        norm_num_groups: Groups of channels in all group norms.
        scaling_factor: Factor that gives the latents a standard deviation of about 1.
        frames_per_chunk: Frames that are encoded or decoded at a time. More take more memory and
            less time.
    """

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    frames_per_chunk: int = 4

    @property
    def downsampling(self) -> int:
        """Pixels along one side of the square that one latent point stands for."""
        return 2 ** (len(self.block_out_channels) - 1)


class SpatialAttention(nnx.Module):
    """Self-attention over the points of an image, with one head, plus a residual.

    Args:
        channels: Channels of input and output.
        config: The autoencoder's config.
        rngs: Source of randomness.
    """

    def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(
            config.norm_num_groups, channels, eps=NORM_EPS, joint_frames=False
        )
        self.to_q = Linear(channels, channels, rngs=rngs)
        self.to_k = Linear(channels, channels, rngs=rngs)
        self.to_v = Linear(channels, channels, rngs=rngs)
        self.to_out = nnx.List([Linear(channels, channels, rngs=rngs)])

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Return x plus the attention's output."""
        normed = rearrange(self.group_norm(x), "n h w c -> n 1 (h w) 1 c")
        out = spatial_attention(self.to_q(normed), self.to_k(normed), self.to_v(normed))
        return x + self.to_out[0](rearrange(out, "n 1 (h w) 1 c -> n h w c", h=x.shape[1]))


class Level(nnx.Module):
    """One level of encoder or decoder, or the middle: residual blocks, attention and resampling.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        config: The autoencoder's config.
        layers: Number of residual blocks.
        downsample: Whether a down-sampling comes last.
        upsample: Whether an up-sampling comes last.
        attention: Whether there is an attention after the first residual block.
        rngs: Source of randomness.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: VAEConfig,
        *,
        layers: int,
        downsample: bool = False,
        upsample: bool = False,
        attention: bool = False,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List(
            ResnetBlock(
                in_channels if index == 0 else out_channels,
                out_channels,
                num_groups=config.norm_num_groups,
                eps=NORM_EPS,
                joint_frames=False,
                rngs=rngs,
            )
            for index in range(layers)
        )
        self.attentions = nnx.List(
            [SpatialAttention(out_channels, config, rngs=rngs)] if attention else []
        )
        # The VAE pads only right and bottom, the U-Net all four sides.
        self.downsamplers = nnx.List(
            [Downsample(out_channels, padding=(0, 1), rngs=rngs)] if downsample else []
        )
        self.upsamplers = nnx.List([Upsample(out_channels, rngs=rngs)] if upsample else [])

    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n h2 w2 o"]:
        """Return the next level's input."""
        first, *rest = self.resnets
        x = first(x)
        for index, resnet in enumerate(rest):
            if index < len(self.attentions):
                x = self.attentions[index](x)
            x = resnet(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
        for upsampler in self.upsamplers:
            x = upsampler(x, (2 * x.shape[1], 2 * x.shape[2]))
        return x


class Encoder(nnx.Module):
    """The network from images to the posterior's moments."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths, layers = config.block_out_channels, config.layers_per_block
        self.conv_in = Conv(config.in_channels, widths[0], rngs=rngs)
        self.down_blocks = nnx.List(
            Level(before, width, config, layers=layers, downsample=level < len(widths), rngs=rngs)
            for level, (before, width) in enumerate(pairwise((widths[0], *widths)), start=1)
        )
        self.mid_block = Level(widths[-1], widths[-1], config, layers=2, attention=True, rngs=rngs)
        self.conv_norm_out = GroupNorm(
            config.norm_num_groups, widths[-1], eps=NORM_EPS, joint_frames=False
        )
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "n H W 3"]) -> Float[Array, "n h w c2"]:
        """Return mean and log variance of each latent point, before `quant_conv`."""
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class Decoder(nnx.Module):
    """The network from latents to images."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = config.block_out_channels[::-1]
        layers = config.layers_per_block + 1
        self.conv_in = Conv(config.latent_channels, widths[0], rngs=rngs)
        self.mid_block = Level(widths[0], widths[0], config, layers=2, attention=True, rngs=rngs)
        self.up_blocks = nnx.List(
            Level(before, width, config, layers=layers, upsample=level < len(widths), rngs=rngs)
            for level, (before, width) in enumerate(pairwise((widths[0], *widths)), start=1)
        )
        self.conv_norm_out = GroupNorm(
            config.norm_num_groups, widths[-1], eps=NORM_EPS, joint_frames=False
        )
        self.conv_out = Conv(widths[-1], config.out_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n H W 3"]:
        """Return the pixel values of each image."""
        x = self.conv_in(x)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class AutoencoderKL(nnx.Module):
    """The autoencoder.

    Args:
        config: Its shape.
        compute: Its type of computation. The other options do not apply.
        rngs: Source of randomness.
    """

    def __init__(self, config: VAEConfig, compute: ComputeOptions, *, rngs: nnx.Rngs):
        channels = config.latent_channels
        self.config = config
        self.dtype = compute.dtype
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = Conv(2 * channels, 2 * channels, 1, rngs=rngs)
        self.post_quant_conv = Conv(channels, channels, 1, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, pixel_values: PixelValues) -> Moments:
        """Return mean and log variance of the posterior, in float32, before scaling.

        The mean comes first along the last axis. The log variance is clipped to [-30, 20], as
        published.
        """
        moments = self._by_chunk(lambda x: self.quant_conv(self.encoder(x)), pixel_values)
        mean, logvar = split_moments(moments)
        return jnp.concatenate([mean, jnp.clip(logvar, -30.0, 20.0)], axis=-1)

    def decode(self, latents: Latents) -> PixelValues:
        """Return pixel values in float32. Most are in [-1, 1], but they are not clipped to it.

        Args:
            latents: Latents of the diffusion model. They are divided by the scaling factor here.
        """
        return self._by_chunk(
            lambda x: self.decoder(self.post_quant_conv(x)), latents / self.config.scaling_factor
        )

    def _by_chunk(
        self, run: Callable[[Array], Array], video: Float[Array, "b f h w i"]
    ) -> Float[Array, "b f h2 w2 o"]:
        """Return `run` of all frames, computed a few frames at a time to save memory."""
        images = rearrange(video, "b f h w c -> (b f) h w c").astype(self.dtype)
        chunk = self.config.frames_per_chunk
        if len(images) <= chunk:
            # No loop: on a CPU, XLA computes convolutions inside loops more slowly.
            done = run(images)
        else:
            done = jax.lax.map(lambda image: run(image[None])[0], images, batch_size=chunk)
        return rearrange(done, "(b f) h w c -> b f h w c", b=len(video)).astype(jnp.float32)


def split_moments(moments: Moments) -> tuple[Latents, Latents]:
    """Return the mean and the log variance of a posterior."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, logvar


def sample_posterior(
    moments: Moments, noise: Float[Array, "b f h w c"], scaling_factor: float
) -> Latents:
    """Return scaled latents drawn from the posterior: (mean + deviation * noise) * factor.

    Args:
        moments: Mean and log variance of the posterior.
        noise: Standard normal noise.
        scaling_factor: That of the autoencoder's config.
    """
    mean, logvar = split_moments(moments)
    return (mean + jnp.exp(0.5 * logvar) * noise) * scaling_factor
