"""Classifier-free guidance, as a wrapper around a denoiser."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from tav_jax.types import Context, Denoiser, Latents, Scalar, TextKeysValues

Text: TypeAlias = Context | TextKeysValues
"""A batch of text states, or the keys and values that the network made of them."""

Predict: TypeAlias = Callable[[Latents, Int[Array, ""]], Latents]
"""The prediction for latents that are all at one timestep."""


def guide(
    denoise: Denoiser,
    context: Text,
    negative_context: Text | None = None,
    guidance_scale: float | Scalar = 1.0,
) -> Predict:
    """Return the prediction, with classifier-free guidance if `negative_context` is given.

    Ho & Salimans 2022 (arXiv:2207.12598): e = e_uncond + s (e_cond - e_uncond). Both halves are one
    call of the network on a batch twice as long, the unconditional half first, as published.

    Args:
        denoise: The U-Net, or anything called like it.
        context: The prompt of each batch item.
        negative_context: What to be guided away from, mostly the empty prompt.
        guidance_scale: s above; 1 is no guidance.
    """
    if negative_context is None:
        return lambda latents, timestep: denoise(latents, jnp.full(len(latents), timestep), context)
    both = jax.tree.map(lambda *halves: jnp.concatenate(halves), negative_context, context)

    def predict(latents: Latents, timestep: Int[Array, ""]) -> Latents:
        twice = jnp.concatenate([latents, latents])
        uncond, cond = jnp.split(denoise(twice, jnp.full(len(twice), timestep), both), 2)
        return uncond + guidance_scale * (cond - uncond)

    return predict
