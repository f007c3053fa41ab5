"""The tuning step: add noise to the clip, predict the noise, update what trains."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Int, UInt32

from tav_jax.diffusion.schedule import NoiseSchedule, add_noise, training_target
from tav_jax.errors import NotLearningError
from tav_jax.models.network import Network, in_modules
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.models.vae import sample_posterior
from tav_jax.parallel.sharding import constrain, denoiser
from tav_jax.training.optimizer import Label, select
from tav_jax.types import Context, Denoiser, Latents, Moments, Params, PRNGKey, Scalar, Timesteps


class TrainState(NamedTuple):
    """Everything that a step changes, and the key, which it does not change.

    Args:
        unet: The whole network, with the frozen parameters.
        opt_state: The optimiser's state.
        step: Number of updates so far. The next update's randomness depends on `key` and `step`
            only.
        key: The run's key.
    """

    unet: Network[UNet3DConditionModel]
    opt_state: optax.OptState
    step: Int[Array, ""]
    key: PRNGKey


class NoisedBatch(NamedTuple):
    """The random values of one step: latents of the clip, noise and a timestep."""

    latents: Latents
    noise: Latents
    timesteps: Timesteps


def init_state(
    unet: Network[UNet3DConditionModel], optimizer: optax.GradientTransformation, key: PRNGKey
) -> TrainState:
    """Return the state before the first step."""
    return TrainState(unet, optimizer.init(unet.params), jnp.int32(0), key)


def denoising_loss(
    denoise: Denoiser, schedule: NoiseSchedule, draw: NoisedBatch, context: Context
) -> Scalar:
    """Return the mean squared error of the prediction, in float32.

    Wu et al. 2023, eq. 1 (Ho et al. 2020, eq. 14), or its v-prediction form.
    """
    noisy_latents = add_noise(schedule, draw.latents, draw.noise, draw.timesteps)
    model_pred = denoise(noisy_latents, draw.timesteps, context)
    target = training_target(schedule, draw.latents, draw.noise, draw.timesteps)
    return jnp.mean(jnp.square(model_pred.astype(jnp.float32) - target))


def draw_batch(
    key: PRNGKey, moments: Moments, schedule: NoiseSchedule, scaling_factor: float
) -> NoisedBatch:
    """Return latents from the posterior, noise, and one uniform timestep per clip.

    The posterior is sampled anew for each step, as the published code does by encoding again.
    """
    posterior_key, noise_key, timestep_key = jax.random.split(key, 3)
    shape = (*moments.shape[:-1], moments.shape[-1] // 2)
    return NoisedBatch(
        sample_posterior(moments, jax.random.normal(posterior_key, shape), scaling_factor),
        jax.random.normal(noise_key, shape),
        jax.random.randint(timestep_key, shape[:1], 0, len(schedule.alphas_cumprod)),
    )


def loss_and_gradients(
    unet: Network[UNet3DConditionModel],
    labels: dict[str, Label],
    schedule: NoiseSchedule,
    draw: NoisedBatch,
    context: Context,
) -> tuple[Scalar, Params]:
    """Return the loss and its gradients by the parameters labelled "train".

    Only these are differentiated, so no weight gradient of a frozen parameter exists, not even
    before the compiler removes what is not used.
    """

    def loss(trained: Params) -> Scalar:
        network = unet.with_params(unet.params | trained)
        return denoising_loss(denoiser(network), schedule, draw, context)

    return jax.value_and_grad(loss)(select(unet.params, labels, "train"))


def apply_gradients(
    state: TrainState, gradients: Params, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the state after one update, given the gradients of all trained parameters.

    The frozen parameters stay the same buffers.
    """
    params = state.unet.params
    every = {name: gradients.get(name, jnp.zeros_like(value)) for name, value in params.items()}
    updates, opt_state = optimizer.update(every, state.opt_state, params)
    moved = {name: optax.apply_updates(params[name], updates[name]) for name in gradients}
    unet = state.unet.with_params(params | moved)
    # The next step takes this state, so it must be sharded in the same way.
    return constrain(state._replace(unet=unet, opt_state=opt_state, step=state.step + 1))


def train_step(
    state: TrainState,
    moments: Moments,
    context: Context,
    schedule: NoiseSchedule,
    *,
    optimizer: optax.GradientTransformation,
    labels: dict[str, Label],
    scaling_factor: float,
    gradient_accumulation_steps: int = 1,
) -> tuple[TrainState, dict[str, Scalar]]:
    """Return the state after one update, with its `loss` and `grad_norm` (before clipping).

    Args:
        state: The state before the update.
        moments: Posterior of the clip as `vae.encode` gives it, one batch item for each draw.
        context: Text states of the clip's prompt, one batch item for each draw.
        schedule: The noise schedule.
        optimizer: As `make_optimizer` makes it.
        labels: As `label_params` gives them, the same that made the optimiser.
        scaling_factor: That of the autoencoder's config.
        gradient_accumulation_steps: Batches of draws, computed one after another, over which the
            gradient is a mean.
    """
    step_key = jax.random.fold_in(state.key, state.step)

    def add_draw(total: tuple[Scalar, Params], index: Int[Array, ""]):
        draw = draw_batch(jax.random.fold_in(step_key, index), moments, schedule, scaling_factor)
        one = loss_and_gradients(state.unet, labels, schedule, draw, context)
        return jax.tree.map(jnp.add, total, one), None

    nothing = jax.tree.map(jnp.zeros_like, select(state.unet.params, labels, "train"))
    total, _ = jax.lax.scan(
        add_draw, (jnp.float32(0), nothing), jnp.arange(gradient_accumulation_steps)
    )
    loss, gradients = jax.tree.map(lambda x: x / gradient_accumulation_steps, total)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients)}
    return apply_gradients(state, gradients, optimizer), metrics


def fingerprints(params: Params) -> dict[str, UInt32[Array, ""]]:
    """Return a number for each parameter that changes when one element of it changes.

    It is the sum of the elements' bit patterns, each times an odd number of its own, modulo 2^32.
    """

    def fingerprint(value: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(value, f"uint{8 * value.dtype.itemsize}")
        odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        return jnp.sum(bits.ravel().astype(jnp.uint32) * odd, dtype=jnp.uint32)

    return {name: fingerprint(value) for name, value in params.items()}


def check_movement(
    before: Mapping[str, Array],
    after: Mapping[str, Array],
    labels: dict[str, Label],
    trainable_modules: Sequence[str],
) -> None:
    """Raise unless every trained group has moved and no frozen parameter has.

    Args:
        before: Fingerprints of the U-Net's parameters at some step.
        after: Those a few updates later.
        labels: "train" or "freeze" for each parameter.
        trainable_modules: The groups: in each of them some parameter must have moved.

    Raises:
        NotLearningError: Lists the groups that did not move, or the frozen parameters that did.
    """
    moved = {name for name in before if int(before[name]) != int(after[name])}
    still = [m for m in trainable_modules if not any(in_modules(name, [m]) for name in moved)]
    drifted = sorted(name for name in moved if labels[name] == "freeze")
    if still:
        raise NotLearningError(
            f"nothing has moved in {', '.join(still)}: this run learns nothing there; "
            "look at learning_rate, lr_warmup_steps and grad_norm in metrics.jsonl"
        )
    if drifted:
        raise NotLearningError(f"frozen parameters have changed: {', '.join(drifted)}")
