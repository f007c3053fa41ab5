"""Sampling algorithms as values: DDIM, its inverse and DPM-Solver++.

A `Sampler` is a NamedTuple of pure functions, as an optimiser is in optax. It knows nothing of
networks: its `step` takes the prediction that the loop in `tav_jax.diffusion.sampling` asked for.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Int32, Key

from tav_jax.diffusion.schedule import (
    NoiseSchedule,
    clean_prediction,
    ddim_inverse_step,
    ddim_step,
    ddim_step_size,
    ddim_timesteps,
    dpm_solver_coefficients,
    dpm_solver_timesteps,
)
from tav_jax.errors import UserError
from tav_jax.types import Latents, Scalar

SamplerName = Literal["ddim", "dpm_solver"]


class Sampler(NamedTuple):
    """A sampling algorithm with its timesteps.

    Args:
        timesteps: The timestep at which the network is asked in each step, in order.
        init: Makes the state before the first step from latents.
        step: Returns the next state from the step's index, the state and the prediction.
        latents: Reads the latents from a state.
    """

    timesteps: Int32[Array, "n"]
    init: Callable[[Latents], Any]
    step: Callable[[Int[Array, ""], Any, Latents], Any]
    latents: Callable[[Any], Latents]

    @property
    def num_steps(self) -> int:
        """Return the number of steps."""
        return len(self.timesteps)


def ddim(
    schedule: NoiseSchedule,
    num_steps: int,
    eta: float | Scalar = 0.0,
    keys: Key[Array, "b"] | None = None,
) -> Sampler:
    """Return DDIM sampling (Song et al. 2021, arXiv:2010.02502, eq. 12).

    Args:
        schedule: The noise schedule that the network was trained with.
        num_steps: Steps from noise to data, 1 to 999.
        eta: Share of fresh noise in each step, 0 (deterministic) to 1 (DDPM).
        keys: One key per batch item, needed if eta is above 0. Each item draws its own noise, so
            it does not depend on its neighbours in the batch.

    Raises:
        UserError: `num_steps` does not fit, or eta is above 0 and there are no keys.
    """
    timesteps = jnp.asarray(ddim_timesteps(schedule, num_steps))
    step_size = ddim_step_size(schedule, num_steps)
    if keys is None and not (isinstance(eta, int | float) and eta == 0):
        raise UserError(f"eta {eta} draws noise at every step: give keys, one for each batch item")

    def step(index: Int[Array, ""], latents: Latents, prediction: Latents) -> Latents:
        noise = None
        if keys is not None:
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
            noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(step_keys)
        return ddim_step(schedule, prediction, latents, timesteps[index], step_size, eta, noise)

    return Sampler(timesteps, _same, step, _same)


def ddim_inverse(schedule: NoiseSchedule, num_steps: int) -> Sampler:
    """Return DDIM inversion: from clean latents to the noise that DDIM would sample them from.

    Wu et al. 2023, section 3.3 (Song et al. 2021, eq. 13): deterministic sampling run backwards.

    Raises:
        UserError: `num_steps` does not fit.
    """
    timesteps = jnp.asarray(ddim_timesteps(schedule, num_steps)[::-1])
    step_size = ddim_step_size(schedule, num_steps)

    def step(index: Int[Array, ""], latents: Latents, prediction: Latents) -> Latents:
        return ddim_inverse_step(schedule, prediction, latents, timesteps[index], step_size)

    return Sampler(timesteps, _same, step, _same)


class DPMSolverState(NamedTuple):
    """Latents, and the clean latents that the previous step predicted."""

    latents: Latents
    clean: Latents


def dpm_solver(schedule: NoiseSchedule, num_steps: int) -> Sampler:
    """Return DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

    It is of second order with one network call per step: some 20 steps do what takes DDIM 50.

    Raises:
        UserError: `num_steps` does not fit.
    """
    timesteps = dpm_solver_timesteps(schedule, num_steps)
    coefficients = dpm_solver_coefficients(schedule, timesteps)
    at = jnp.asarray(timesteps)

    def init(latents: Latents) -> DPMSolverState:
        # The first step gives the previous prediction no weight.
        return DPMSolverState(latents, jnp.zeros_like(latents))

    def step(index: Int[Array, ""], state: DPMSolverState, prediction: Latents) -> DPMSolverState:
        a, b, c = (coefficient[index] for coefficient in coefficients)
        latents, previous = state
        clean = clean_prediction(schedule, prediction, latents, at[index])
        return DPMSolverState(a * latents + b * clean + c * (clean - previous), clean)

    return Sampler(at, init, step, lambda state: state.latents)


def check_eta(sampler: SamplerName, eta: float) -> None:
    """Raise UserError if `eta` asks for noise from a sampler that draws none."""
    if sampler != "ddim" and eta > 0:
        raise UserError(f"eta {eta}: of the samplers only ddim draws noise; set it to 0")


def _same(latents: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    return latents
