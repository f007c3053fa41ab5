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
TokenIds: TypeAlias = Int[Array, "b s"]
Timesteps: TypeAlias = Int[Array, "b"]
Scalar: TypeAlias = Float[Array, ""]
PRNGKey: TypeAlias = Key[Array, ""]

Params: TypeAlias = dict[str, Array]
"""Parameters of one network, by name: `down_blocks.0.attentions.1.proj_in.kernel`."""

Denoiser: TypeAlias = Callable[[Latents, Timesteps, Context], Latents]
"""Predicts the noise, or the velocity, in latents at their timesteps, given text states."""
