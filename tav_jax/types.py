"""Array types, and the letters that name their axes.

| letter  | axis                                   | letter  | axis                              |
|---------|----------------------------------------|---------|-----------------------------------|
| `b`     | batch: clips, prompts, seeds           | `n`     | tokens of one frame (`h * w`)     |
| `f`     | frames                                 | `m`     | keys that a query may look at     |
| `h w`   | latent grid                            | `s`     | text tokens (77)                  |
| `H W`   | pixels                                 | `d`     | width of the text states          |
| `c`     | channels, always last                  | `heads` | attention heads, each `k` wide    |
"""

from collections.abc import Callable
from typing import TypeAlias

from jax import Array
from jaxtyping import Float, Int, Key

Latents: TypeAlias = Float[Array, "b f h w c"]
Moments: TypeAlias = Float[Array, "b f h w c2"]
PixelValues: TypeAlias = Float[Array, "b f H W 3"]
Context: TypeAlias = Float[Array, "b s d"]
KeysValues: TypeAlias = tuple[Float[Array, "_ _ _ _ _"], Float[Array, "_ _ _ _ _"]]
"""Keys and values, each `b g m heads k`: of g = f frames, or of g = 1 for all."""
TextKeysValues: TypeAlias = tuple[tuple[tuple[KeysValues, ...], ...], ...]
"""The text's keys and values in each transformer block, by transformer, by block of the U-Net."""
TokenIds: TypeAlias = Int[Array, "b s"]
Timesteps: TypeAlias = Int[Array, "b"]
Scalar: TypeAlias = Float[Array, ""]
PRNGKey: TypeAlias = Key[Array, ""]

Params: TypeAlias = dict[str, Array]
"""Parameters of one network, by name: `down_blocks.0.attentions.1.proj_in.kernel`."""

Denoiser: TypeAlias = Callable[[Latents, Timesteps, Context | TextKeysValues], Latents]
"""Predicts the noise, or the velocity, in latents at their timesteps, given a text."""
