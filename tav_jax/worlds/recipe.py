"""The numbers of a base model's training, and its sources of randomness."""

from enum import IntEnum
from typing import Literal, NamedTuple

import jax
import numpy as np
from pydantic.dataclasses import dataclass

from tav_jax.errors import UserError
from tav_jax.settings import (
    STRICT,
    BatchSize,
    Count,
    Decay,
    GuidanceScale,
    Rate,
    Seed,
    Share,
    Steps,
    StepsFromZero,
)
from tav_jax.types import PRNGKey

WorldName = Literal["tiny-scenes", "figures"]

MOST_IMAGES = 250_000  # 3 GB of 64x64


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """Numbers of the training. The defaults made the shipped `tiny-scenes`.

    Args:
        world: The world to train on.
        start_from: Name or folder of a model of the world, to train its text encoder and U-Net on.
            Its autoencoder stays as it is. None trains all networks from nothing.
        seed: Seed of everything random.
        scenes: Number of scenes in the training set.
        frames_per_scene: Number of times at which each scene is drawn.
        vae_steps: Training steps of the autoencoder.
        vae_batch: Images in one of its batches.
        vae_learning_rate: Peak learning rate of the autoencoder.
        decoder_steps: Further steps of the decoder alone, after which images are sharper.
        kl_weight: Weight of the KL divergence of the posterior, a mean over latent values.
        silhouette_weight: Weight of the squared error between the first latent channel and the
            subject's silhouette.
        prediction_type: What the U-Net predicts.
        steps: Training steps of the text encoder and the U-Net.
        batch: Images in one of their batches.
        learning_rate: Peak learning rate of the text encoder and the U-Net.
        group_share: Share of these steps that train on groups of frames, `frames_per_scene` of
            each scene. The residual blocks normalise a group together, as the inflated network
            does.
        caption_dropout: Share of captions that are replaced by the empty one, for
            classifier-free guidance.
        ema: Decay of the moving average of the parameters.
        guidance_scale: Guidance scale of the evaluation.
        probe: Number of images to draw of seen pairs, and as many of held-out pairs, in each
            evaluation.
        checkpointing_steps: Steps between checkpoints. Each checkpoint is evaluated.
    """

    world: WorldName = "tiny-scenes"
    start_from: str | None = None
    seed: Seed = 0
    scenes: Count = 16_000
    frames_per_scene: BatchSize = 4
    vae_steps: Steps = 2_200
    vae_batch: BatchSize = 32
    vae_learning_rate: Rate = 2e-3
    decoder_steps: StepsFromZero = 0
    kl_weight: GuidanceScale = 1e-4
    silhouette_weight: GuidanceScale = 0.3
    prediction_type: Literal["v_prediction", "epsilon"] = "v_prediction"
    steps: Steps = 7_000
    batch: BatchSize = 64
    learning_rate: Rate = 1.5e-3
    group_share: Share = 0.33
    caption_dropout: Share = 0.1
    ema: Decay = 0.999
    guidance_scale: GuidanceScale = 3.0
    probe: Count = 100
    checkpointing_steps: Steps = 1_000

    def __post_init__(self) -> None:
        if self.frames_per_scene > self.batch:
            raise UserError("frames_per_scene: a batch must hold at least one scene's frames")
        if self.scenes * self.frames_per_scene > MOST_IMAGES:
            raise UserError(f"scenes: at most {MOST_IMAGES} images in the training set")


class TrainingKeys(NamedTuple):
    """The JAX keys of a training, one for each use."""

    autoencoder_init: PRNGKey
    autoencoder_steps: PRNGKey
    text_encoder_init: PRNGKey
    unet_init: PRNGKey
    diffusion_steps: PRNGKey
    decoder_steps: PRNGKey


def training_keys(seed: int) -> TrainingKeys:
    """Return the keys that belong to a recipe's seed.

    The offsets made the shipped weights, so they stay.
    """
    text_encoder_init, unet_init = jax.random.split(jax.random.key(seed + 2))
    return TrainingKeys(
        autoencoder_init=jax.random.key(seed),
        autoencoder_steps=jax.random.key(seed + 1),
        text_encoder_init=text_encoder_init,
        unet_init=unet_init,
        diffusion_steps=jax.random.key(seed + 3),
        decoder_steps=jax.random.key(seed + 4),
    )


class Stream(IntEnum):
    """What NumPy's random numbers are for. Each use has its own independent stream."""

    AUTOENCODER_BATCH = 1
    AUTOENCODER_EVALUATION = 2
    CAPTIONS = 3
    DIFFUSION_BATCH = 4
    DECODER_BATCH = 5


def generator(seed: int, stream: Stream, *step: int) -> np.random.Generator:
    """Return NumPy's generator for one use, and for one training step if it is given."""
    return np.random.default_rng((seed, int(stream), *step))
