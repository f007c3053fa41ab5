"""Guided sampling by DDIM and DPM-Solver++, and DDIM inversion: each a step, and a scan over it.

A stepper returns `(index, state) -> state`, which any loop may run: `ddim_sample` and its
siblings scan over all steps, the pipeline runs a range of them at a time. Nothing here is jitted;
the caller jits once, with the keyword arguments static. The network goes in as an argument and
not through a closure, where its weights would become constants of the program.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key

from tav_jax.diffusion.schedule import (
    NoiseSchedule,
    clean_prediction,
    ddim_inverse_step,
    ddim_step,
    ddim_timesteps,
    dpm_solver_coefficients,
    dpm_solver_timesteps,
    step_size,
)
from tav_jax.errors import UserError
from tav_jax.types import Context, Denoiser, Latents, Scalar, TextKeysValues

Sampler = Literal["ddim", "dpm_solver"]
Text = Context | TextKeysValues  # leaves begin with the batch axis; the network takes either

State = TypeVar("State")
Step = Callable[[Int[Array, ""], State], State]


class DPMSolverState(NamedTuple):
    """Latents, and the clean ones that the step before predicted."""

    latents: Latents
    clean: Latents


def check_eta(sampler: Sampler, eta: float) -> None:
    """Raises ValueError if a sampler is to draw noise at its steps that draws none."""
    if sampler != "ddim" and eta > 0:
        raise UserError(f"eta {eta}: of the samplers only ddim draws noise; set it to 0")


def ddim_sample(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    latents: Latents,
    context: Text,
    negative_context: Text | None = None,
    guidance_scale: float | Scalar = 1.0,
    eta: float | Scalar = 0.0,
    keys: Key[Array, "b"] | None = None,
    *,
    num_inference_steps: int,
    trajectory: bool = False,
) -> Latents | Float[Array, "steps b f h w c"]:
    """Returns the clean latents that DDIM finds from noise under each prompt.

    Guidance (Ho & Salimans 2022, arXiv:2207.12598): e = e(negative) + s (e(prompt) - e(negative)).
    Both predictions come from one call on a batch twice as long, the unconditional half first.
    Items of the batch never meet: prompts and seeds side by side give what each gives alone.

    Args:
        denoise: The U-Net, or anything called like it.
        latents: Noise at the first timestep: inverted from a clip, or unit Gaussian.
        context: Text states of each item's prompt, or the keys and values made of them.
        negative_context: Text states to be guided away from, mostly of "". Without them there
            is no guidance and half the work.
        eta: Noise of each step, 0 to 1; above 0 it needs `keys`.
        keys: One key per item, so that an item's noise does not depend on its neighbours.
        trajectory: Return the latents after every step, the last of them clean.
    """
    step = ddim_stepper(
        denoise,
        schedule,
        context,
        negative_context,
        guidance_scale,
        eta,
        keys,
        num_steps=num_inference_steps,
    )
    last, path = _scan(step, latents, num_inference_steps, trajectory)
    return path if trajectory else last


def ddim_stepper(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    context: Text,
    negative_context: Text | None = None,
    guidance_scale: float | Scalar = 1.0,
    eta: float | Scalar = 0.0,
    keys: Key[Array, "b"] | None = None,
    *,
    num_steps: int,
) -> Step[Latents]:
    """Returns one step of `ddim_sample`, by its index."""
    timesteps = jnp.asarray(ddim_timesteps(schedule, num_steps))
    stride = step_size(schedule, num_steps)
    predict = _guided(denoise, context, negative_context, guidance_scale)

    def step(index: Int[Array, ""], latents: Latents) -> Latents:
        timestep = timesteps[index]
        noise = None
        if keys is not None:
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
            noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(step_keys)
        return ddim_step(
            schedule, predict(latents, timestep), latents, timestep, stride, eta, noise
        )

    return step


def ddim_invert(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    latents: Latents,
    context: Text,
    *,
    num_inv_steps: int,
    trajectory: bool = False,
) -> Latents | Float[Array, "steps b f h w c"]:
    """Returns the noise from which DDIM would sample the given clean latents.

    Wu et al. 2023, section 3.3: the mirror image of deterministic sampling, without guidance.

    Args:
        latents: Clean and scaled.
        context: Text states to invert under; the method inverts under "".
        trajectory: Return the clean latents, then those after every step, the last the noise.
    """
    step = ddim_inverter(denoise, schedule, context, num_steps=num_inv_steps)
    last, path = _scan(step, latents, num_inv_steps, trajectory)
    return jnp.concatenate([latents[None], path]) if trajectory else last


def ddim_inverter(
    denoise: Denoiser, schedule: NoiseSchedule, context: Text, *, num_steps: int
) -> Step[Latents]:
    """Returns one step of `ddim_invert`, by its index."""
    timesteps = jnp.asarray(ddim_timesteps(schedule, num_steps)[::-1])
    stride = step_size(schedule, num_steps)
    predict = _guided(denoise, context, None, 1.0)

    def step(index: Int[Array, ""], latents: Latents) -> Latents:
        timestep = timesteps[index]
        return ddim_inverse_step(schedule, predict(latents, timestep), latents, timestep, stride)

    return step


def dpm_solver_sample(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    latents: Latents,
    context: Text,
    negative_context: Text | None = None,
    guidance_scale: float | Scalar = 1.0,
    *,
    num_inference_steps: int,
    trajectory: bool = False,
) -> Latents | Float[Array, "steps b f h w c"]:
    """Returns the clean latents that DPM-Solver++(2M) finds from noise under each prompt.

    Lu et al. 2022 (arXiv:2211.01095), algorithm 2: of second order at one call of the network a
    step, so that some 20 steps do what takes DDIM 50. Arguments and result are `ddim_sample`'s.
    """
    step = dpm_solver_stepper(
        denoise,
        schedule,
        context,
        negative_context,
        guidance_scale,
        num_steps=num_inference_steps,
    )
    last, path = _scan(step, dpm_solver_start(latents), num_inference_steps, trajectory)
    return path.latents if trajectory else last.latents


def dpm_solver_start(latents: Latents) -> DPMSolverState:
    """Returns the state before the first step, which gives the prediction before it no weight."""
    return DPMSolverState(latents, jnp.zeros_like(latents))


def dpm_solver_stepper(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    context: Text,
    negative_context: Text | None = None,
    guidance_scale: float | Scalar = 1.0,
    *,
    num_steps: int,
) -> Step[DPMSolverState]:
    """Returns one step of `dpm_solver_sample`, by its index."""
    timesteps = dpm_solver_timesteps(schedule, num_steps)
    coefficients = dpm_solver_coefficients(schedule, timesteps)
    predict = _guided(denoise, context, negative_context, guidance_scale)

    def step(index: Int[Array, ""], state: DPMSolverState) -> DPMSolverState:
        timestep = jnp.asarray(timesteps)[index]
        a, b, c = (one[index] for one in coefficients)
        latents, former = state
        clean = clean_prediction(schedule, predict(latents, timestep), latents, timestep)
        return DPMSolverState(a * latents + b * clean + c * (clean - former), clean)

    return step


def _scan(step: Step[State], state: State, num_steps: int, trajectory: bool) -> tuple[State, Any]:
    """Returns the state after the last step, and with `trajectory` all of them, stacked."""

    def body(state: State, index: Int[Array, ""]) -> tuple[State, State | None]:
        state = step(index, state)
        return state, state if trajectory else None

    return jax.lax.scan(body, state, jnp.arange(num_steps))


def _guided(
    denoise: Denoiser,
    context: Text,
    negative_context: Text | None,
    guidance_scale: float | Scalar,
) -> Callable[[Latents, Int[Array, ""]], Latents]:
    """Returns the prediction as a function of latents and timestep, guided if there is whence."""
    if negative_context is None:
        return lambda latents, timestep: denoise(latents, jnp.full(len(latents), timestep), context)
    both = jax.tree.map(lambda *halves: jnp.concatenate(halves), negative_context, context)

    def predict(latents: Latents, timestep: Int[Array, ""]) -> Latents:
        twice = jnp.concatenate([latents, latents])
        away, towards = jnp.split(denoise(twice, jnp.full(len(twice), timestep), both), 2)
        return away + guidance_scale * (towards - away)

    return predict
