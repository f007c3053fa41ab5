"""The scenes that `tiny-scenes` is trained on, and what counts in them."""

from collections.abc import Sequence

import einops
import numpy as np
from jaxtyping import Float, Float32, UInt8

from tav_jax.worlds.tiny_scenes.drawing import cover, place, render_batch
from tav_jax.worlds.tiny_scenes.networks import VAE
from tav_jax.worlds.tiny_scenes.scenes import SIZE, SUBJECTS, TAUGHT_STYLES, Scene, sample_scenes

# Weight of a foreground pixel's error. A background pixel's has weight 1.
FOREGROUND_WEIGHT = 4.0
# A foreground pixel differs from the image's median colour by more than this in some channel, in
# levels of 255.
FOREGROUND_DISTANCE = 60


def training_scenes(rng: np.random.Generator, n: int) -> list[Scene]:
    """Return random scenes without the held-out pairs.

    Half of them are plain and the other half have any taught style, so two thirds are plain.
    """
    half = n // 2
    return sample_scenes(rng, n - half) + sample_scenes(rng, half, styles=TAUGHT_STYLES)


def draw(
    scenes: Sequence[Scene], times: Float[np.ndarray, "n"]
) -> tuple[UInt8[np.ndarray, "n H W 3"], Float32[np.ndarray, "n h w"]]:
    """Return an image of each scene at its time, and what of each latent pixel its subject covers.

    Args:
        scenes: The scenes to draw.
        times: The time of each scene, from 0 to 1.
    """
    places = np.array([place(*each) for each in zip(scenes, times.tolist(), strict=True)])
    subjects = np.array([SUBJECTS.index(scene.subject) for scene in scenes])
    covered = cover(subjects, places, SIZE)
    factor = VAE.downsampling
    silhouettes = einops.reduce(covered, "n (h a) (w b) -> n h w", "mean", a=factor, b=factor)
    return render_batch(scenes, times), silhouettes


def foreground_weights(
    images: UInt8[np.ndarray, "n H W 3"], _: Float32[np.ndarray, "n h w"]
) -> Float32[np.ndarray, "n H W 1"]:
    """Return the weight of each pixel's error in the autoencoder's training."""
    median = np.median(images, axis=(1, 2), keepdims=True)
    distance = np.abs(images.astype(np.float32) - median).max(-1, keepdims=True)
    weight = 1 + (FOREGROUND_WEIGHT - 1) * (distance > FOREGROUND_DISTANCE)
    return weight.astype(np.float32)
