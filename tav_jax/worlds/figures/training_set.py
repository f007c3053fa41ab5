"""The scenes that `tiny-figures` is trained on, and what counts in them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, UInt8

from tav_jax.worlds.figures.drawing import cover, draw_batch
from tav_jax.worlds.figures.networks import VAE
from tav_jax.worlds.figures.scenes import STYLES, Scene, sample_scenes

# Weight of the error of pixels near the figure. Others have weight 1.
FIGURE_WEIGHT = 4.0


def training_scenes(rng: np.random.Generator, n: int) -> list[Scene]:
    """Return random scenes without the held-out pairs. Half of them are plain."""
    return sample_scenes(rng, n, styles=(STYLES[0], *STYLES))


def draw(
    scenes: Sequence[Scene], times: Float[np.ndarray, "n"]
) -> tuple[UInt8[np.ndarray, "n H W 3"], Float32[np.ndarray, "n h w"]]:
    """Return an image of each scene at its time, and what of each latent pixel its figure covers.

    Args:
        scenes: The scenes to draw.
        times: The time of each scene, from 0 to 1.
    """
    images, masks = draw_batch(scenes, times)
    return images, cover(masks, VAE.downsampling)


def figure_weights(
    images: UInt8[np.ndarray, "n H W 3"], silhouettes: Float32[np.ndarray, "n h w"]
) -> Float32[np.ndarray, "n H W 1"]:
    """Return the weight of each pixel's error in the autoencoder's training."""
    factor = images.shape[1] // silhouettes.shape[1]
    near = silhouettes.repeat(factor, axis=1).repeat(factor, axis=2) > 0
    return np.where(near, FIGURE_WEIGHT, 1).astype(np.float32)[..., None]
