"""Training of a world's autoencoder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from tav_jax.console import say
from tav_jax.models.network import Network
from tav_jax.models.vae import AutoencoderKL, sample_posterior, split_moments
from tav_jax.types import Moments, Params, PixelValues, PRNGKey, Scalar
from tav_jax.video.read import to_pixel_values
from tav_jax.video.write import to_frames
from tav_jax.worlds.recipe import Recipe, Stream, generator
from tav_jax.worlds.training_loop import Stage, init_or_restore, train
from tav_jax.worlds.training_set import TrainingSet
from tav_jax.worlds.world import Images, Silhouettes, World

INITIAL_LOGVAR = -4.0
# Standard deviations of the latent channels after normalisation, 1 together (root mean square).
# The silhouette has the largest, so that sampling settles a subject's place before its colour.
LATENT_DEVIATIONS = (1.6, 0.7, 0.7, 0.7)


class Batch(NamedTuple):
    """A batch of images.

    Args:
        pixel_values: The images.
        weight: Weight of each pixel's error.
        silhouette: Share of each latent pixel that the subject covers, from 0 to 1.
    """

    pixel_values: Float32[np.ndarray, "b 1 H W 3"]
    weight: Float32[np.ndarray, "b 1 H W 1"]
    silhouette: Float32[np.ndarray, "b 1 h w"]


class Evaluation(NamedTuple):
    """How the autoencoder is judged.

    Args:
        images: Images that are not in the training set.
        describe_accuracy: Says what detectors find in reconstructions of these images.
    """

    images: Images
    describe_accuracy: Callable[[Images], str]


def train_autoencoder(
    world: World,
    recipe: Recipe,
    vae: Network[AutoencoderKL],
    training_set: TrainingSet,
    evaluation: Evaluation,
    folder: Path,
    key: PRNGKey,
) -> Network[AutoencoderKL]:
    """Train an autoencoder and normalise its latents.

    Args:
        world: Gives the weight of each pixel's error.
        recipe: The numbers of the training.
        vae: The untrained autoencoder.
        training_set: Its frames are used as separate images.
        evaluation: How the autoencoder is judged at each checkpoint.
        folder: Where checkpoints and metrics are kept.
        key: Key of the posterior's noise.

    Returns:
        The trained autoencoder. The diffusion model sees its latents unscaled.
    """
    stage = Stage(
        folder,
        steps=recipe.vae_steps,
        learning_rate=recipe.vae_learning_rate,
        average_decay=recipe.ema,
        checkpointing_steps=recipe.checkpointing_steps,
        key=key,
    )
    config = vae.config
    # A whole batch at once. After training, videos are processed in chunks.
    vae = narrow_posterior(vae.with_config(frames_per_chunk=recipe.vae_batch))
    images = training_set.frames.reshape(-1, *training_set.frames.shape[2:])
    silhouettes = training_set.silhouettes.reshape(-1, *training_set.silhouettes.shape[2:])
    loss_fn = partial(
        autoencoder_loss,
        vae=vae,
        kl_weight=recipe.kl_weight,
        silhouette_weight=recipe.silhouette_weight,
    )
    make_batch = partial(
        draw_batch, world=world, images=images, silhouettes=silhouettes, recipe=recipe
    )
    reconstruct_jit = jax.jit(reconstruct)
    pixel_values = to_pixel_values(evaluation.images)[:, None]

    def evaluate(vae: Network[AutoencoderKL]) -> tuple[str, Moments]:
        decoded, moments = reconstruct_jit(vae, pixel_values)
        accuracy = evaluation.describe_accuracy(to_frames(np.asarray(decoded))[:, 0])
        return f"{accuracy}; {describe_latents(moments)}", moments

    state = start = init_or_restore(stage, {"vae": vae.params})
    for state in train(stage, start, loss_fn, make_batch):
        said, _ = evaluate(vae.with_params(state.average["vae"]))
        say(f"{folder.name} {int(state.step)}: {said}")
    vae = vae.with_params(state.average["vae"])
    _, moments = reconstruct_jit(vae, pixel_values)
    vae = vae.with_params(normalise_latents(vae.params, moments))
    said, _ = evaluate(vae)
    say(f"with normalised latents: {said}")
    return Network(AutoencoderKL, config, vae.params)


def narrow_posterior(vae: Network[AutoencoderKL]) -> Network[AutoencoderKL]:
    """Return an untrained autoencoder whose posterior has a small deviation.

    From deviations near 1, the decoder learns to ignore a channel because of its noise. Then the
    encoder never learns to use it.
    """
    bias = vae.params["quant_conv.bias"].at[vae.config.latent_channels :].set(INITIAL_LOGVAR)
    return vae.with_params(vae.params | {"quant_conv.bias": bias})


def autoencoder_loss(
    params: dict[str, Params],
    key: PRNGKey,
    pixel_values: PixelValues,
    weight: Float[Array, "b 1 H W 1"],
    silhouette: Float[Array, "b 1 h w"],
    *,
    vae: Network[AutoencoderKL],
    kl_weight: float,
    silhouette_weight: float,
) -> Scalar:
    """Return the sum of reconstruction error, KL divergence and silhouette error.

    The reconstruction error is L1 + L2. The silhouette error is the mean squared difference
    between the first latent channel and the silhouette, which is mapped from [0, 1] to [-1, 1].

    Args:
        params: Parameters of the autoencoder, under "vae".
        key: Key of the posterior's noise.
        pixel_values: See `Batch`.
        weight: See `Batch`.
        silhouette: See `Batch`.
        vae: The autoencoder that the parameters belong to.
        kl_weight: Weight of the divergence.
        silhouette_weight: Weight of the silhouette error.
    """
    module = vae.with_params(params["vae"]).bind()
    moments = module.encode(pixel_values)
    mean, logvar = split_moments(moments)
    noise = jax.random.normal(key, mean.shape)
    error = module.decode(sample_posterior(moments, noise, 1.0)) - pixel_values
    reconstruction = jnp.mean(weight * (jnp.abs(error) + jnp.square(error)))
    divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
    silhouette_error = jnp.mean(jnp.square(mean[..., 0] - (2 * silhouette - 1)))
    return reconstruction + kl_weight * divergence + silhouette_weight * silhouette_error


def draw_batch(
    step: int, *, world: World, images: Images, silhouettes: Silhouettes, recipe: Recipe
) -> Batch:
    """Return the random batch of a training step.

    Args:
        step: Number of the step.
        world: Gives the weight of each pixel's error.
        images: All images of the training set.
        silhouettes: Their silhouettes.
        recipe: Gives the seed and the size of the batch.
    """
    rng = generator(recipe.seed, Stream.AUTOENCODER_BATCH, step)
    indices = rng.integers(len(images), size=recipe.vae_batch)
    chosen, covered = images[indices], silhouettes[indices]
    weight = world.pixel_weights(chosen, covered)
    return Batch(to_pixel_values(chosen)[:, None], weight[:, None], covered[:, None])


def reconstruct(
    vae: Network[AutoencoderKL], pixel_values: PixelValues
) -> tuple[PixelValues, Moments]:
    """Return the decoded means of the posterior, and its moments."""
    module = vae.bind()
    moments = module.encode(pixel_values)
    mean, _ = split_moments(moments)
    return module.decode(mean * vae.config.scaling_factor), moments


def describe_latents(moments: Moments) -> str:
    """Return a sentence about the deviations of each channel, over images and in the posterior."""
    mean, logvar = split_moments(moments)
    over_images = jnp.sqrt(mean.var((0, 1, 2, 3)))
    posterior = jnp.exp(0.5 * logvar).mean((0, 1, 2, 3))
    return (
        f"deviation per latent channel: of the means {np.round(over_images, 2).tolist()}, "
        f"of the posterior {np.round(posterior, 2).tolist()}"
    )


def normalise_latents(params: Params, moments: Moments) -> Params:
    """Return the parameters of an autoencoder whose latents are normalised.

    The latents get mean 0 and `LATENT_DEVIATIONS`, and decoded images stay the same. The layers
    next to the latents are 1x1 convolutions, so their weights absorb the scale and the shift.

    Args:
        params: Parameters of the autoencoder.
        moments: Posteriors of many images.
    """
    mean, logvar = split_moments(moments)
    axes = tuple(range(mean.ndim - 1))
    centre = mean.mean(axes)
    scale = jnp.sqrt(mean.var(axes) + jnp.exp(logvar).mean(axes)) / np.array(LATENT_DEVIATIONS)
    # The encoder's last layer gives mean and log-variance. A log-variance is shifted, not scaled.
    shift = jnp.concatenate([centre / scale, 2 * jnp.log(scale)])
    divisor = jnp.concatenate([scale, jnp.ones_like(scale)])
    decoding = params["post_quant_conv.kernel"]
    return params | {
        "quant_conv.kernel": params["quant_conv.kernel"] / divisor[None, None, None],
        "quant_conv.bias": params["quant_conv.bias"] / divisor - shift,
        "post_quant_conv.kernel": decoding * scale[None, None, :, None],
        "post_quant_conv.bias": params["post_quant_conv.bias"] + centre @ decoding[0, 0],
    }
