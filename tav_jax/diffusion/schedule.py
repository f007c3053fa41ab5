"""The noise schedule, and DDIM's steps along it: pure arithmetic in float32.

| code             | paper                         | meaning                                  |
|------------------|-------------------------------|------------------------------------------|
| `alphas_cumprod` | alpha_t (DDIM), abar_t (DDPM) | share of signal left after t steps       |
| `latents`        | z_t                           | latents at timestep t                    |
| `noise`          | epsilon                       | the Gaussian in z_t                      |
| `velocity`       | v_t (arXiv:2202.00512)        | sqrt(abar) epsilon - sqrt(1 - abar) x0   |
| `step_size`      | tau_i - tau_{i-1}             | timesteps from one DDIM step to the next |
| `eta`            | eta                           | 0: deterministic, 1: DDPM's noise        |
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Int32

from tav_jax.errors import UserError
from tav_jax.types import Latents, Scalar, Timesteps

PredictionType = Literal["epsilon", "v_prediction"]

# Stable Diffusion's schedulers count their steps from timestep 1. The published pipeline sets
# this whatever the model's config says.
STEPS_OFFSET = 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoiseSchedule:
    """How much of the signal is left at each timestep, and what the network predicts.

    Args:
        final_alpha_cumprod: What DDIM's last step arrives at: abar_0 for Stable Diffusion,
            1 where the scheduler config says `set_alpha_to_one`.
    """

    # Arrays, one number per timestep and one; or what a transformation puts in their place.
    alphas_cumprod: Any
    final_alpha_cumprod: Any
    prediction_type: PredictionType = field(metadata={"static": True})


def make_schedule(
    *,
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    beta_schedule: Literal["linear", "scaled_linear"],
    prediction_type: PredictionType,
    set_alpha_to_one: bool,
) -> NoiseSchedule:
    """Return the schedule abar_t = prod_{s <= t} (1 - beta_s) (Ho et al. 2020, eq. 4).

    "scaled_linear" betas are the squares of numbers evenly spaced between the roots.
    """
    power = {"linear": 1, "scaled_linear": 2}[beta_schedule]
    ends = beta_start ** (1 / power), beta_end ** (1 / power)
    betas = np.linspace(*ends, num_train_timesteps) ** power
    alphas_cumprod = np.cumprod(1 - betas).astype(np.float32)
    return NoiseSchedule(
        jnp.asarray(alphas_cumprod),
        jnp.float32(1 if set_alpha_to_one else alphas_cumprod[0]),
        prediction_type,
    )


def add_noise(
    schedule: NoiseSchedule, latents: Latents, noise: Latents, timesteps: Timesteps
) -> Latents:
    """Return z_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) epsilon (Ho et al. 2020, eq. 4)."""
    signal, sigma = _signal_and_sigma(schedule, timesteps)
    return signal * latents + sigma * noise


def velocity(
    schedule: NoiseSchedule, latents: Latents, noise: Latents, timesteps: Timesteps
) -> Latents:
    """Return v_t = sqrt(abar_t) epsilon - sqrt(1 - abar_t) x0 (Salimans & Ho 2022, app. D)."""
    signal, sigma = _signal_and_sigma(schedule, timesteps)
    return signal * noise - sigma * latents


def training_target(
    schedule: NoiseSchedule, latents: Latents, noise: Latents, timesteps: Timesteps
) -> Latents:
    """Return what the network is to predict: the noise or the velocity."""
    if schedule.prediction_type == "v_prediction":
        return velocity(schedule, latents, noise, timesteps)
    return noise


def ddim_timesteps(schedule: NoiseSchedule, num_steps: int) -> Int32[np.ndarray, "n"]:
    """Return `num_steps` timesteps from the noisiest down, "leading" spacing.

    Raises:
        UserError: there are more steps than timesteps, or none.
    """
    _last_timestep(schedule, num_steps, "DDIM")
    steps = np.arange(num_steps, dtype=np.int32) * ddim_step_size(schedule, num_steps)
    return steps[::-1] + np.int32(STEPS_OFFSET)


def ddim_step_size(schedule: NoiseSchedule, num_steps: int) -> int:
    """Return how many timesteps one of `num_steps` DDIM steps spans."""
    return len(schedule.alphas_cumprod) // num_steps


def ddim_step(
    schedule: NoiseSchedule,
    model_output: Latents,
    latents: Latents,
    timestep: Int[Array, ""],
    step_size: int,
    eta: float | Scalar = 0.0,
    noise: Latents | None = None,
) -> Latents:
    """Return the latents one DDIM step nearer to the data, at `timestep - step_size`.

    Song et al. 2021 (arXiv:2010.02502), eq. 12, without clipping x0. The last step arrives at
    `final_alpha_cumprod`.

    Args:
        schedule: The noise schedule.
        model_output: Prediction at `timestep`, after guidance.
        latents: Latents at `timestep`.
        timestep: Where the step starts.
        step_size: Distance to the next timestep, in training timesteps.
        eta: Share of the noise of eq. 16, from 0 (DDIM) to 1 (DDPM). Used only with `noise`.
        noise: Standard normal noise. Without it the step is deterministic.
    """
    alpha = schedule.alphas_cumprod[timestep]
    alpha_to = _alpha_or_final(schedule, timestep - step_size)
    clean, noise_pred = _split_prediction(schedule, model_output, latents, alpha)
    if noise is None:
        return jnp.sqrt(alpha_to) * clean + jnp.sqrt(1 - alpha_to) * noise_pred
    sigma = eta * jnp.sqrt((1 - alpha_to) / (1 - alpha) * (1 - alpha / alpha_to))
    direction = jnp.sqrt(1 - alpha_to - sigma**2) * noise_pred
    return jnp.sqrt(alpha_to) * clean + direction + sigma * noise


def ddim_inverse_step(
    schedule: NoiseSchedule,
    model_output: Latents,
    latents: Latents,
    timestep: Int[Array, ""],
    step_size: int,
) -> Latents:
    """Return the latents one DDIM step nearer to the noise, at `timestep`.

    `ddim_step` with eta = 0 run backwards: from `timestep - step_size` up to `timestep`, under
    the assumption that the prediction is the same at both ends (Song et al. 2021, eq. 13).

    Args:
        schedule: The noise schedule.
        model_output: Prediction for these latents as if they were at `timestep` already. The
            published code calls the network in the same way.
        latents: Latents at `timestep - step_size`.
        timestep: Where the step ends.
        step_size: Distance between the two timesteps, in training timesteps.
    """
    alpha = _alpha_or_final(schedule, timestep - step_size)
    alpha_to = schedule.alphas_cumprod[timestep]
    clean, noise_pred = _split_prediction(schedule, model_output, latents, alpha)
    return jnp.sqrt(alpha_to) * clean + jnp.sqrt(1 - alpha_to) * noise_pred


def dpm_solver_timesteps(schedule: NoiseSchedule, num_steps: int) -> Int32[np.ndarray, "n"]:
    """Return `num_steps` timesteps from the noisiest down, evenly spread over all of them.

    Raises:
        UserError: there are more steps than timesteps, or none.
    """
    last = _last_timestep(schedule, num_steps, "DPM-Solver")
    return np.linspace(last, 0, num_steps + 1)[:-1].round().astype(np.int32)


def dpm_solver_coefficients(
    schedule: NoiseSchedule, timesteps: Int32[np.ndarray, "n"]
) -> tuple[Float[Array, "n"], Float[Array, "n"], Float[Array, "n"]]:
    """Return a, b, c of each step x' = a x + b x0 + c (x0 - previous x0), down to the data.

    DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095), algorithm 2: with lambda the logarithm of
    signal over noise, h = lambda' - lambda and h' the step before's, a = sigma' / sigma,
    b = -alpha' (exp(-h) - 1), c = b h / (2 h'). The first step has no previous one, and the last,
    where h is infinite, arrives at x0: both are of first order.
    """
    alphas = schedule.alphas_cumprod[timesteps]
    signal = jnp.append(jnp.sqrt(alphas), 1.0)
    sigma = jnp.append(jnp.sqrt(1 - alphas), 0.0)
    h = jnp.diff(jnp.log(signal[:-1] / sigma[:-1]))
    towards = jnp.append(-signal[1:-1] * jnp.expm1(-h), 1.0)
    ratios = jnp.append(h[1:] / h[:-1], 0.0)[: len(h)]
    bend = jnp.append(0.0, towards[1:] * ratios / 2)
    return sigma[1:] / sigma[:-1], towards, bend


def clean_prediction(
    schedule: NoiseSchedule, model_output: Latents, latents: Latents, timestep: Int[Array, ""]
) -> Latents:
    """Return the clean latents that a prediction at a timestep implies."""
    return _split_prediction(schedule, model_output, latents, schedule.alphas_cumprod[timestep])[0]


def _last_timestep(schedule: NoiseSchedule, num_steps: int, sampler: str) -> int:
    """Return the noisiest timestep; raises if so many steps do not fit."""
    last = len(schedule.alphas_cumprod) - 1
    if not 1 <= num_steps <= last:
        raise UserError(f"number of {sampler} steps: expected 1 to {last}, got {num_steps}")
    return last


def _alpha_or_final(schedule: NoiseSchedule, timestep: Int[Array, ""]) -> Scalar:
    return jnp.where(
        timestep >= 0,
        schedule.alphas_cumprod[jnp.maximum(timestep, 0)],
        schedule.final_alpha_cumprod,
    )


def _split_prediction(
    schedule: NoiseSchedule, model_output: Latents, latents: Latents, alpha: Scalar
) -> tuple[Latents, Latents]:
    """Return the clean latents and the noise that a prediction implies."""
    signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
    if schedule.prediction_type == "v_prediction":
        return signal * latents - sigma * model_output, signal * model_output + sigma * latents
    return (latents - sigma * model_output) / signal, model_output


def _signal_and_sigma(
    schedule: NoiseSchedule, timesteps: Timesteps
) -> tuple[Float[Array, "b 1 1 1 1"], Float[Array, "b 1 1 1 1"]]:
    alpha = schedule.alphas_cumprod[timesteps][:, None, None, None, None]
    return jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
