"""Training of a world's text encoder and U-Net."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, UInt8

from tav_jax.console import say
from tav_jax.models.network import Network
from tav_jax.models.vae import AutoencoderKL, sample_posterior
from tav_jax.pretrained.model import Model
from tav_jax.training.train_step import NoisedBatch, denoising_loss
from tav_jax.types import Moments, Params, PRNGKey, Scalar, TokenIds
from tav_jax.video.read import to_pixel_values
from tav_jax.worlds.recipe import Recipe, Stream, generator
from tav_jax.worlds.training_loop import Stage, init_or_restore, train
from tav_jax.worlds.training_set import TrainingSet

CLIPS_PER_CHUNK = 64  # clips that are encoded at a time


class EncodedSet(NamedTuple):
    """The training set as the U-Net sees it.

    Args:
        moments: Posteriors of each scene's frames.
        token_ids: Tokens of each scene's captions.
        empty_ids: Tokens of the empty caption.
    """

    moments: Float32[np.ndarray, "n f h w c2"]
    token_ids: Int32[np.ndarray, "n captions s"]
    empty_ids: Int32[np.ndarray, "s"]


class Batch(NamedTuple):
    """A batch of clips, or of single frames, with one caption each."""

    moments: Float32[np.ndarray, "b f h w c2"]
    token_ids: Int32[np.ndarray, "b s"]


def train_diffusion(
    recipe: Recipe,
    model: Model,
    training_set: TrainingSet,
    evaluate: Callable[[Model], str],
    folder: Path,
    key: PRNGKey,
) -> Model:
    """Train a text encoder and a U-Net together on captioned images.

    Args:
        recipe: The numbers of the training.
        model: The model to start from. Its autoencoder is trained.
        training_set: The scenes.
        evaluate: Says how well a model draws. It is called at each checkpoint.
        folder: Where checkpoints and metrics are kept.
        key: Key of the posterior's noise, the diffusion's noise and the timesteps.

    Returns:
        The model with the averaged parameters.
    """
    stage = Stage(
        folder,
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        average_decay=recipe.ema,
        checkpointing_steps=recipe.checkpointing_steps,
        key=key,
    )
    encoded = encode_training_set(model, training_set)
    params = {
        "text_encoder": model.text_encoder.params,
        "unet": model.unet.params,
    }
    loss_fn = partial(diffusion_loss, model=model)
    make_batch = partial(draw_batch, encoded=encoded, recipe=recipe)
    state = start = init_or_restore(stage, params)
    for state in train(stage, start, loss_fn, make_batch):
        said = evaluate(with_params(model, state.average))
        say(f"{folder.name} {int(state.step)}: {said}")
    return with_params(model, state.average)


def with_params(model: Model, params: dict[str, Params]) -> Model:
    """Return the model with other parameters of the text encoder and the U-Net."""
    return replace(
        model,
        text_encoder=model.text_encoder.with_params(params["text_encoder"]),
        unet=model.unet.with_params(params["unet"]),
    )


def encode_training_set(model: Model, training_set: TrainingSet) -> EncodedSet:
    """Return the posteriors of all frames and the tokens of all captions."""
    length = model.text_encoder.config.max_position_embeddings
    padding = {"padding": "max_length", "max_length": length, "truncation": True}
    ids = [model.tokenizer(each, **padding).input_ids for each in training_set.captions]
    empty_ids = model.tokenizer("", **padding).input_ids
    return EncodedSet(
        encode_clips(model.vae, training_set.frames),
        np.array(ids, np.int32),
        np.array(empty_ids, np.int32),
    )


def encode_clips(
    vae: Network[AutoencoderKL], clips: UInt8[np.ndarray, "n f H W 3"]
) -> Float32[np.ndarray, "n f h w c2"]:
    """Return the posteriors of many clips, encoded chunk by chunk."""
    encode = jax.jit(lambda vae, pixel_values: vae.bind().encode(pixel_values))
    parts = [
        np.asarray(encode(vae, to_pixel_values(clips[start : start + CLIPS_PER_CHUNK])))
        for start in range(0, len(clips), CLIPS_PER_CHUNK)
    ]
    return np.concatenate(parts)


def diffusion_loss(
    params: dict[str, Params], key: PRNGKey, moments: Moments, token_ids: TokenIds, *, model: Model
) -> Scalar:
    """Return the denoising loss of a batch.

    The timesteps are stratified: one from each of b equal parts of the schedule, where b is the
    size of the batch. This makes the loss vary less from batch to batch.

    Args:
        params: Parameters under "text_encoder" and "unet".
        key: Key of the posterior's noise, the diffusion's noise and the timesteps.
        moments: See `Batch`.
        token_ids: See `Batch`.
        model: The model that the parameters belong to.
    """
    posterior_key, noise_key, timestep_key = jax.random.split(key, 3)
    shape = (*moments.shape[:-1], moments.shape[-1] // 2)
    posterior_noise = jax.random.normal(posterior_key, shape)
    latents = sample_posterior(moments, posterior_noise, model.vae.config.scaling_factor)
    noise = jax.random.normal(noise_key, shape)
    b, total = len(moments), len(model.schedule.alphas_cumprod)
    within_part = jax.random.uniform(timestep_key, (b,))
    timesteps = ((jnp.arange(b) + within_part) * (total / b)).astype(jnp.int32)
    context = model.text_encoder.with_params(params["text_encoder"])(token_ids)
    return denoising_loss(
        model.unet.with_params(params["unet"]),
        model.schedule,
        NoisedBatch(latents, noise, timesteps),
        context,
    )


def draw_batch(step: int, *, encoded: EncodedSet, recipe: Recipe) -> Batch:
    """Return the random batch of a training step.

    Args:
        step: Number of the step.
        encoded: The training set.
        recipe: Gives the seed, the size of the batch and the shares of groups and empty captions.
    """
    rng = generator(recipe.seed, Stream.DIFFUSION_BATCH, step)
    moments, token_ids, empty_ids = encoded
    num_frames = recipe.frames_per_scene if rng.random() < recipe.group_share else 1
    b = recipe.batch // num_frames
    scenes = rng.integers(len(moments), size=b)
    if num_frames == 1:
        clips = moments[scenes, rng.integers(recipe.frames_per_scene, size=b)][:, None]
    else:
        clips = moments[scenes]
    ids = token_ids[scenes, rng.integers(token_ids.shape[1], size=b)]
    ids = np.where(rng.random((b, 1)) < recipe.caption_dropout, empty_ids, ids)
    return Batch(clips, ids)
