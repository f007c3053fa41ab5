"""CLIP's image encoder, and both encoders with their projections into one space.

Radford et al. 2021 (arXiv:2103.00020). Parameter names follow transformers' CLIPModel, of which
OpenAI's and LAION's CLIP and PickScore are checkpoints.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from tav_jax.models.clip import CLIPEncoderConfig, CLIPTextConfig, Encoder, TextTransformer
from tav_jax.models.compute import ComputeOptions
from tav_jax.models.layers import Embed, LayerNorm, Linear, draw, fan_in_uniform
from tav_jax.types import PRNGKey, TokenIds


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig(CLIPEncoderConfig):
    """The shape of an image encoder. Fields have the names of the published config."""

    image_size: int
    patch_size: int


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """The shape of both encoders. Fields have the names of the published config.

    Args:
        text_config: Shape of the text encoder.
        vision_config: Shape of the image encoder.
        projection_dim: Width of the space in which texts and images are compared.
        eos_token_id: The token whose state stands for its text, see `end_of_text`.
    """

    text_config: CLIPTextConfig
    vision_config: CLIPVisionConfig
    projection_dim: int
    eos_token_id: int


class Features(NamedTuple):
    """Features of images or texts, float32. None has unit length.

    Attributes:
        projected: In the space in which images and texts are compared.
        pooled: Before the projection: transformers' `pooler_output`.
    """

    projected: Float[Array | np.ndarray, "n p"]
    pooled: Float[Array | np.ndarray, "n d"]


class PatchEmbedding(nnx.Module):
    """A convolution without bias whose stride is its kernel's size.

    No two windows overlap, so it is one matrix product.
    """

    def __init__(self, patch_size: int, width: int, *, rngs: nnx.Rngs):
        shape = (patch_size, patch_size, 3, width)
        self.kernel = nnx.Param(draw(rngs, fan_in_uniform, shape))

    def __call__(self, images: Float[Array, "n H W 3"]) -> Float[Array, "n s d"]:
        """Return the patches, row by row. Pixels beyond the last whole patch are not seen."""
        kernel = self.kernel[...].astype(images.dtype)
        size = kernel.shape[0]
        rows, columns = (side // size * size for side in images.shape[1:3])
        patches = rearrange(
            images[:, :rows, :columns], "n (h p) (w q) c -> n (h w) (p q c)", p=size, q=size
        )
        return patches @ rearrange(kernel, "p q c d -> (p q c) d")


class VisionEmbeddings(nnx.Module):
    """The class token and the patches, each with the embedding of its position."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size

        def normal(key: PRNGKey, shape: tuple[int, ...]) -> Array:
            return width**-0.5 * jax.random.normal(key, shape)

        self.class_embedding = nnx.Param(draw(rngs, normal, (width,)))
        self.patch_embedding = PatchEmbedding(config.patch_size, width, rngs=rngs)
        num_patches = (config.image_size // config.patch_size) ** 2
        self.position_embedding = Embed(1 + num_patches, width, rngs=rngs)

    def __call__(self, images: Float[Array, "n H W 3"]) -> Float[Array, "n s d"]:
        """Return the embedded tokens, in the images' type."""
        patches = self.patch_embedding(images)
        first = self.class_embedding[...].astype(images.dtype)
        first = jnp.broadcast_to(first, (len(images), 1, patches.shape[-1]))
        tokens = jnp.concatenate([first, patches], axis=1)
        positions = self.position_embedding(jnp.arange(tokens.shape[1]))
        return tokens + positions[None].astype(tokens.dtype)


class VisionTransformer(nnx.Module):
    """Embeddings and layers. A norm follows the embeddings, another one the class token's state."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = VisionEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = LayerNorm(width, eps=eps)  # the checkpoints' spelling
        self.encoder = Encoder(config, rngs=rngs)
        self.post_layernorm = LayerNorm(width, eps=eps)

    def __call__(self, images: Float[Array, "n H W 3"]) -> Float[Array, "n d"]:
        """Return the class token's last state after the norm, float32."""
        x = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        return self.post_layernorm(x[:, 0]).astype(jnp.float32)


def end_of_text(input_ids: TokenIds, eos_token_id: int) -> Int[Array, "b"]:
    """Return the position of each text's last token, whose state stands for the text.

    It is the first one with the id `eos_token_id`. Older configs have the id 2 by mistake (see
    transformers' pull request 24773). They mean the largest id, which is that of CLIP's last token.
    """
    ranks = input_ids if eos_token_id == 2 else input_ids == eos_token_id
    return jnp.argmax(ranks, axis=-1)  # the first one, if tokens are equal


class CLIPModel(nnx.Module):
    """Both encoders, their projections, and the scale of similarities.

    Args:
        config: Its shape.
        compute: Its type of computation. The other options do not apply.
        rngs: Source of randomness.
    """

    def __init__(self, config: CLIPConfig, compute: ComputeOptions, *, rngs: nnx.Rngs):
        text, vision, width = config.text_config, config.vision_config, config.projection_dim
        self.text_model = TextTransformer(text, rngs=rngs)
        self.vision_model = VisionTransformer(vision, rngs=rngs)
        self.text_projection = Linear(text.hidden_size, width, use_bias=False, rngs=rngs)
        self.visual_projection = Linear(vision.hidden_size, width, use_bias=False, rngs=rngs)
        # log(1 / 0.07), with which its training starts.
        self.logit_scale = nnx.Param(np.array(2.6592, np.float32))
        self.eos_token_id = config.eos_token_id
        self.dtype = compute.dtype

    def image_features(self, pixel_values: Float[Array, "n H W 3"]) -> Features:
        """Return the features of images that `preprocess` has prepared."""
        pooled = self.vision_model(pixel_values.astype(self.dtype))
        return Features(self.visual_projection(pooled), pooled)

    def text_features(self, input_ids: TokenIds) -> Features:
        """Return the features of texts."""
        states = self.text_model(input_ids, self.dtype)
        ends = end_of_text(input_ids, self.eos_token_id)
        pooled = states[jnp.arange(len(states)), ends]
        return Features(self.text_projection(pooled), pooled)
