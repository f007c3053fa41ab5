"""CLIP's text encoder, and the layers that it shares with the image encoder.

Parameter names follow transformers' CLIPTextModel.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from tav_jax.models.attention.einsum import attention
from tav_jax.models.compute import ComputeOptions
from tav_jax.models.layers import Embed, LayerNorm, Linear
from tav_jax.types import Context, TokenIds


@dataclass(frozen=True, kw_only=True)
class CLIPEncoderConfig:
    """The shape of an encoder's layers. Fields have the names of the published config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float
    hidden_act: Literal["quick_gelu", "gelu"]


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(CLIPEncoderConfig):
    """The shape of a text encoder. Fields have the names of the published config."""

    vocab_size: int
    max_position_embeddings: int


def quick_gelu(x: Float[Array, "*axes c"]) -> Float[Array, "*axes c"]:
    """Return x * sigmoid(1.702 x), the approximate GELU that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "*axes c"]) -> Float[Array, "*axes c"]:
    """Return the exact GELU of x."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class SelfAttention(nnx.Module):
    """Self-attention of several heads."""

    def __init__(self, config: CLIPEncoderConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.q_proj = Linear(width, width, rngs=rngs)
        self.k_proj = Linear(width, width, rngs=rngs)
        self.v_proj = Linear(width, width, rngs=rngs)
        self.out_proj = Linear(width, width, rngs=rngs)
        self.num_attention_heads = config.num_attention_heads

    def __call__(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "s s"] | None
    ) -> Float[Array, "b s d"]:
        """Return the attention's output for each token. See `Encoder` for the mask."""
        query, key, value = (
            rearrange(project(x), "b s (heads k) -> b s heads k", heads=self.num_attention_heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attention(query, key, value, mask)
        return self.out_proj(rearrange(out, "b s heads k -> b s (heads k)"))


class MLP(nnx.Module):
    """Two dense layers with the activation that the config names."""

    def __init__(self, config: CLIPEncoderConfig, *, rngs: nnx.Rngs):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Return the output for each token."""
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Self-attention and MLP, each after a norm and around a residual."""

    def __init__(self, config: CLIPEncoderConfig, *, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "s s"] | None
    ) -> Float[Array, "b s d"]:
        """Return the next layer's input. See `Encoder` for the mask."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nnx.Module):
    """The sum of token and position embeddings."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.token_embedding = Embed(config.vocab_size, width, rngs=rngs)
        self.position_embedding = Embed(config.max_position_embeddings, width, rngs=rngs)

    def __call__(self, input_ids: TokenIds) -> Float[Array, "b s d"]:
        """Return the embedding of each token at its position."""
        positions = jnp.arange(input_ids.shape[1])
        return self.token_embedding(input_ids) + self.position_embedding(positions)[None]


class Encoder(nnx.Module):
    """The layers, one after another."""

    def __init__(self, config: CLIPEncoderConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List(
            EncoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)
        )

    def __call__(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "s s"] | None = None
    ) -> Float[Array, "b s d"]:
        """Return the last layer's states.

        Args:
            x: Embedded tokens.
            mask: True where a token may attend to another one. None: it may attend to all.
        """
        for layer in self.layers:
            x = layer(x, mask)
        return x


class TextTransformer(nnx.Module):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, input_ids: TokenIds, dtype: str) -> Context:
        """Return the last layer's states after the final norm, float32.

        A token attends to itself and to the tokens before it. Padding tokens are not masked: Stable
        Diffusion uses their states too.

        Args:
            input_ids: Tokens.
            dtype: Type of the computation.
        """
        x = self.embeddings(input_ids).astype(dtype)
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), dtype=bool))
        return self.final_layer_norm(self.encoder(x, causal)).astype(jnp.float32)


class CLIPTextModel(nnx.Module):
    """The text encoder.

    Args:
        config: Its shape.
        compute: Its type of computation. The other options do not apply.
        rngs: Source of randomness.
    """

    def __init__(self, config: CLIPTextConfig, compute: ComputeOptions, *, rngs: nnx.Rngs):
        self.text_model = TextTransformer(config, rngs=rngs)
        self.dtype = compute.dtype

    def __call__(self, input_ids: TokenIds) -> Context:
        """Return the states of `TextTransformer`."""
        return self.text_model(input_ids, self.dtype)
