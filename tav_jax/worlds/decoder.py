"""More training for an autoencoder's decoder alone.

Encoder and decoder learn together until the latents are good. Sharp images take longer. The latents
do not change any more, so a U-Net that was trained on them still fits.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from tav_jax.console import say
from tav_jax.models.network import Network, in_modules
from tav_jax.models.vae import AutoencoderKL, sample_posterior
from tav_jax.types import Moments, Params, PixelValues, PRNGKey, Scalar
from tav_jax.video.read import to_pixel_values
from tav_jax.video.write import to_frames
from tav_jax.worlds.autoencoder import Evaluation, reconstruct
from tav_jax.worlds.diffusion import encode_clips
from tav_jax.worlds.recipe import Recipe, Stream, generator
from tav_jax.worlds.training_loop import Stage, init_or_restore, train
from tav_jax.worlds.training_set import TrainingSet
from tav_jax.worlds.world import World

MODULES = ("post_quant_conv", "decoder")


class Batch(NamedTuple):
    """A batch of images with their posteriors.

    Args:
        moments: The posteriors.
        pixel_values: The images.
        weight: Weight of each pixel's error.
    """

    moments: Float32[np.ndarray, "b 1 h w c2"]
    pixel_values: Float32[np.ndarray, "b 1 H W 3"]
    weight: Float32[np.ndarray, "b 1 H W 1"]


def refine_decoder(
    world: World,
    recipe: Recipe,
    vae: Network[AutoencoderKL],
    training_set: TrainingSet,
    evaluation: Evaluation,
    folder: Path,
    key: PRNGKey,
) -> Network[AutoencoderKL]:
    """Return an autoencoder with a better decoder and the same encoder.

    Args:
        world: Gives the weight of each pixel's error.
        recipe: The numbers of the training. Without `decoder_steps` nothing is done.
        vae: The trained autoencoder.
        training_set: Its frames are used as separate images.
        evaluation: How the decoder is judged at each checkpoint.
        folder: Where checkpoints and metrics are kept.
        key: Key of the posterior's noise.
    """
    if not recipe.decoder_steps:
        return vae
    stage = Stage(
        folder,
        steps=recipe.decoder_steps,
        learning_rate=recipe.vae_learning_rate,
        average_decay=recipe.ema,
        checkpointing_steps=recipe.checkpointing_steps,
        key=key,
    )
    # A whole batch at once. Loops over few images are slower.
    whole = vae.with_config(frames_per_chunk=recipe.vae_batch)
    params = {"decoder": {k: v for k, v in vae.params.items() if in_modules(k, MODULES)}}
    moments = encode_clips(whole, training_set.frames)
    make_batch = partial(
        draw_batch, world=world, training_set=training_set, moments=moments, recipe=recipe
    )
    pixel_values = to_pixel_values(evaluation.images)[:, None]
    reconstruct_jit = jax.jit(reconstruct)
    state = start = init_or_restore(stage, params)
    for state in train(stage, start, partial(decoder_loss, vae=whole), make_batch):
        decoded, _ = reconstruct_jit(with_decoder(vae, state.average), pixel_values)
        error = float(jnp.abs(decoded - pixel_values).mean())
        accuracy = evaluation.describe_accuracy(to_frames(np.asarray(decoded))[:, 0])
        say(f"{folder.name} {int(state.step)}: {accuracy}; mean error {127.5 * error:.2f} levels")
    return with_decoder(vae, state.average)


def with_decoder(vae: Network[AutoencoderKL], params: dict[str, Params]) -> Network[AutoencoderKL]:
    """Return the autoencoder with other parameters of its decoder."""
    return vae.with_params(vae.params | params["decoder"])


def decoder_loss(
    params: dict[str, Params],
    key: PRNGKey,
    moments: Moments,
    pixel_values: PixelValues,
    weight: Float[Array, "b 1 H W 1"],
    *,
    vae: Network[AutoencoderKL],
) -> Scalar:
    """Return the mean error of decoded images and of their edges.

    The edges are the differences between neighbouring pixels. An error in them is what a blurred
    outline has, which hardly counts in the pixels' own error.

    Args:
        params: Parameters of the decoder, under "decoder".
        key: Key of the posterior's noise.
        moments: See `Batch`.
        pixel_values: See `Batch`.
        weight: See `Batch`.
        vae: The autoencoder that the parameters belong to.
    """
    noise = jax.random.normal(key, (*moments.shape[:-1], moments.shape[-1] // 2))
    latents = sample_posterior(moments, noise, vae.config.scaling_factor)
    error = with_decoder(vae, params).bind().decode(latents) - pixel_values
    loss = jnp.mean(weight * jnp.abs(error))
    for axis in (2, 3):
        edges = jnp.abs(jnp.diff(error, axis=axis))
        loss += jnp.mean(jax.lax.slice_in_dim(weight, 1, None, axis=axis) * edges)
    return loss


def draw_batch(
    step: int,
    *,
    world: World,
    training_set: TrainingSet,
    moments: Float32[np.ndarray, "n f h w c2"],
    recipe: Recipe,
) -> Batch:
    """Return the random batch of a training step.

    Args:
        step: Number of the step.
        world: Gives the weight of each pixel's error.
        training_set: The images and their silhouettes.
        moments: The images' posteriors.
        recipe: Gives the seed and the size of the batch.
    """
    rng = generator(recipe.seed, Stream.DECODER_BATCH, step)
    scenes = rng.integers(len(moments), size=recipe.vae_batch)
    times = rng.integers(moments.shape[1], size=recipe.vae_batch)
    images = training_set.frames[scenes, times]
    weight = world.pixel_weights(images, training_set.silhouettes[scenes, times])
    return Batch(moments[scenes, times][:, None], to_pixel_values(images)[:, None], weight[:, None])
