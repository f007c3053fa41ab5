"""Guided sampling by DDIM and DPM-Solver++, and DDIM inversion, each one scan over timesteps.

Nothing here is jitted; the caller jits once, with the keyword arguments static. The network
goes in as an argument and not through a closure, where its weights would become constants of
the program.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key

from tav_jax.schedule import (
    NoiseSchedule,
    clean_prediction,
    ddim_inverse_step,
    ddim_step,
    ddim_timesteps,
    dpm_solver_coefficients,
    dpm_solver_timesteps,
    step_size,
)
from tav_jax.types import Context, Denoiser, Latents, Scalar

Sampler = Literal["ddim", "dpm_solver"]


def check_eta(sampler: Sampler, eta: float) -> None:
    """Raises ValueError if a sampler is to draw noise at its steps that draws none."""
    if sampler != "ddim" and eta > 0:
        raise ValueError(f"eta {eta}: of the samplers only ddim draws noise; set it to 0")


OnStep = Callable[[Any], None]  # called with the number of steps done, an integer


def ddim_sample(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    latents: Latents,
    context: Context,
    negative_context: Context | None = None,
    guidance_scale: float | Scalar = 1.0,
    eta: float | Scalar = 0.0,
    keys: Key[Array, "b"] | None = None,
    *,
    num_inference_steps: int,
    trajectory: bool = False,
    on_step: OnStep | None = None,
) -> Latents | Float[Array, "steps b f h w c"]:
    """Returns the clean latents that DDIM finds from noise under each prompt.

    Guidance (Ho & Salimans 2022, arXiv:2207.12598): e = e(negative) + s (e(prompt) - e(negative)).
    Both predictions come from one call on a batch twice as long, the unconditional half first.
    Items of the batch never meet: prompts and seeds side by side give what each gives alone.

    Args:
        denoise: The U-Net, or anything called like it.
        latents: Noise at the first timestep: inverted from a clip, or unit Gaussian.
        context: Text states of each item's prompt.
        negative_context: Text states to be guided away from, mostly of "". Without them there
            is no guidance and half the work.
        eta: Noise of each step, 0 to 1; above 0 it needs `keys`.
        keys: One key per item, so that an item's noise does not depend on its neighbours.
        trajectory: Return the latents after every step, the last of them clean.
        on_step: Called on the host with the number of steps done; for progress bars.
    """
    timesteps = jnp.asarray(ddim_timesteps(schedule, num_inference_steps))
    stride = step_size(schedule, num_inference_steps)

    predict = _guided(denoise, context, negative_context, guidance_scale)

    def step(latents: Latents, at: tuple[Array, Array]) -> tuple[Latents, Latents | None]:
        index, timestep = at
        noise = None
        if keys is not None:
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
            noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(step_keys)
        latents = ddim_step(
            schedule, predict(latents, timestep), latents, timestep, stride, eta, noise
        )
        _report(on_step, index + 1)
        return latents, latents if trajectory else None

    last, path = jax.lax.scan(step, latents, (jnp.arange(num_inference_steps), timesteps))
    return last if path is None else path


def ddim_invert(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    latents: Latents,
    context: Context,
    *,
    num_inv_steps: int,
    trajectory: bool = False,
    on_step: OnStep | None = None,
) -> Latents | Float[Array, "steps b f h w c"]:
    """Returns the noise from which DDIM would sample the given clean latents.

    Wu et al. 2023, section 3.3: the mirror image of deterministic sampling, without guidance.

    Args:
        latents: Clean and scaled.
        context: Text states to invert under; the method inverts under "".
        trajectory: Return the clean latents, then those after every step, the last the noise.
        on_step: Called on the host with the number of steps done; for progress bars.
    """
    timesteps = jnp.asarray(ddim_timesteps(schedule, num_inv_steps)[::-1])
    stride = step_size(schedule, num_inv_steps)

    def step(latents: Latents, at: tuple[Array, Array]) -> tuple[Latents, Latents | None]:
        index, timestep = at
        model_output = denoise(latents, jnp.full(len(latents), timestep), context)
        latents = ddim_inverse_step(schedule, model_output, latents, timestep, stride)
        _report(on_step, index + 1)
        return latents, latents if trajectory else None

    last, path = jax.lax.scan(step, latents, (jnp.arange(num_inv_steps), timesteps))
    return last if path is None else jnp.concatenate([latents[None], path])


def dpm_solver_sample(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    latents: Latents,
    context: Context,
    negative_context: Context | None = None,
    guidance_scale: float | Scalar = 1.0,
    *,
    num_inference_steps: int,
    trajectory: bool = False,
    on_step: OnStep | None = None,
) -> Latents | Float[Array, "steps b f h w c"]:
    """Returns the clean latents that DPM-Solver++(2M) finds from noise under each prompt.

    Lu et al. 2022 (arXiv:2211.01095), algorithm 2: of second order at one call of the network a
    step, so that some 20 steps do what takes DDIM 50. Arguments and result are `ddim_sample`'s.
    """
    timesteps = dpm_solver_timesteps(schedule, num_inference_steps)
    coefficients = dpm_solver_coefficients(schedule, timesteps)
    predict = _guided(denoise, context, negative_context, guidance_scale)

    def step(
        carry: tuple[Latents, Latents], at: tuple[Array, ...]
    ) -> tuple[tuple[Latents, Latents], Latents | None]:
        latents, former = carry
        index, timestep, a, b, c = at
        clean = clean_prediction(schedule, predict(latents, timestep), latents, timestep)
        latents = a * latents + b * clean + c * (clean - former)
        _report(on_step, index + 1)
        return (latents, clean), latents if trajectory else None

    at = (jnp.arange(num_inference_steps), jnp.asarray(timesteps), *coefficients)
    (last, _), path = jax.lax.scan(step, (latents, jnp.zeros_like(latents)), at)
    return last if path is None else path


def _guided(
    denoise: Denoiser,
    context: Context,
    negative_context: Context | None,
    guidance_scale: float | Scalar,
) -> Callable[[Latents, Int[Array, ""]], Latents]:
    """Returns the prediction as a function of latents and timestep, guided if there is whence."""

    def predict(latents: Latents, timestep: Int[Array, ""]) -> Latents:
        at = jnp.full(len(latents), timestep)
        if negative_context is None:
            return denoise(latents, at, context)
        both = denoise(
            jnp.concatenate([latents, latents]),
            jnp.concatenate([at, at]),
            jnp.concatenate([negative_context, context]),
        )
        away, towards = jnp.split(both, 2)
        return away + guidance_scale * (towards - away)

    return predict


def _report(on_step: OnStep | None, done: Int[Array, ""]) -> None:
    if on_step is not None:
        jax.debug.callback(on_step, done)
