"""The sampling loop, and sampling and inversion as plain functions.

Nothing here is jitted: the caller jits once, with the keyword arguments static. Pass the network
as an argument of the jitted function. In a closure its weights would become constants.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key

from tav_jax.diffusion.guidance import Predict, Text, guide
from tav_jax.diffusion.samplers import Sampler, ddim, ddim_inverse, dpm_solver
from tav_jax.diffusion.schedule import NoiseSchedule
from tav_jax.types import Denoiser, Latents, Scalar


def run_steps(
    sampler: Sampler,
    predict: Predict,
    state: Any,
    start: int | Int[Array, ""] = 0,
    stop: int | Int[Array, ""] | None = None,
    *,
    path: Float[Array, "steps b f h w c"] | None = None,
) -> tuple[Any, Float[Array, "steps b f h w c"] | None]:
    """Run steps `start` to before `stop` of a sampler: the only sampling loop in this package.

    The bounds may be traced, so that all parts of a loop are calls of one program.

    Args:
        sampler: The algorithm.
        predict: The prediction for latents at a timestep, as `guide` makes it.
        state: `sampler.init(latents)`, or what an earlier part of the loop returned.
        start: Index of the first step.
        stop: Index after the last step; by default all steps are run.
        path: A buffer in which step i writes the latents that it arrives at, at index i.

    Returns:
        The state after the last step, and the filled buffer or None.
    """

    def body(index: Int[Array, ""], carry: tuple[Any, Any]) -> tuple[Any, Any]:
        state, path = carry
        prediction = predict(sampler.latents(state), sampler.timesteps[index])
        state = sampler.step(index, state, prediction)
        return state, None if path is None else path.at[index].set(sampler.latents(state))

    stop = sampler.num_steps if stop is None else stop
    return jax.lax.fori_loop(start, stop, body, (state, path))


def _sample(sampler: Sampler, predict: Predict, latents: Latents, trajectory: bool) -> Array:
    """Return the latents after all steps, or with `trajectory` after every step."""
    path = jnp.zeros((sampler.num_steps, *latents.shape), latents.dtype) if trajectory else None
    state, path = run_steps(sampler, predict, sampler.init(latents), path=path)
    return sampler.latents(state) if path is None else path


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
    """Return the clean latents that DDIM samples from noise under each prompt.

    The items of a batch do not influence each other.

    Args:
        denoise: The U-Net, or anything called like it.
        schedule: The noise schedule.
        latents: Noise at the first timestep: inverted from a clip, or unit Gaussian.
        context: Text states of each item's prompt, or the keys and values made of them.
        negative_context: Text states to be guided away from. Without them there is no guidance
            and half the work.
        guidance_scale: See `guide`.
        eta: Share of fresh noise in each step, 0 to 1; above 0 it needs `keys`.
        keys: One key per item.
        num_inference_steps: 1 to 999.
        trajectory: Return the latents after every step, the last of them clean.

    Raises:
        UserError: the number of steps does not fit, or eta is above 0 without keys.
    """
    sampler = ddim(schedule, num_inference_steps, eta, keys)
    predict = guide(denoise, context, negative_context, guidance_scale)
    return _sample(sampler, predict, latents, trajectory)


def ddim_invert(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    latents: Latents,
    context: Text,
    *,
    num_inv_steps: int,
    trajectory: bool = False,
) -> Latents | Float[Array, "steps b f h w c"]:
    """Return the noise from which DDIM would sample the given clean latents.

    Wu et al. 2023, section 3.3: the mirror image of deterministic sampling, without guidance.

    Args:
        denoise: The U-Net, or anything called like it.
        schedule: The noise schedule.
        latents: Clean and scaled.
        context: Text states to invert under; the method inverts under "".
        num_inv_steps: 1 to 999.
        trajectory: Return the clean latents, then those after every step, the last the noise.

    Raises:
        UserError: the number of steps does not fit.
    """
    sampler = ddim_inverse(schedule, num_inv_steps)
    result = _sample(sampler, guide(denoise, context), latents, trajectory)
    return jnp.concatenate([latents[None], result]) if trajectory else result


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
    """Return the clean latents that DPM-Solver++(2M) samples from noise under each prompt.

    Arguments, result and errors are `ddim_sample`'s.
    """
    sampler = dpm_solver(schedule, num_inference_steps)
    predict = guide(denoise, context, negative_context, guidance_scale)
    return _sample(sampler, predict, latents, trajectory)
