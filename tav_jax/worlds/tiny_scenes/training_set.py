"""The scenes that `tiny-scenes` is trained on."""

from collections.abc import Sequence

import einops
import numpy as np
from jaxtyping import Float, Float32

from tav_jax.worlds.recipe import Recipe, Stream, generator
from tav_jax.worlds.tiny_scenes.drawing import cover, place, render_batch
from tav_jax.worlds.tiny_scenes.networks import VAE
from tav_jax.worlds.tiny_scenes.world import (
    SIZE,
    SUBJECTS,
    TAUGHT_STYLES,
    Scene,
    caption,
    sample_scenes,
)
from tav_jax.worlds.training_set import TrainingSet

CAPTIONS_PER_SCENE = 4


def make_training_set(recipe: Recipe) -> TrainingSet:
    """Return random scenes without the held-out pairs, drawn at random times.

    Half of the scenes are plain and the other half have any taught style, so two thirds are plain.
    """
    rng = np.random.default_rng(recipe.seed)
    half = recipe.scenes // 2
    scenes = sample_scenes(rng, recipe.scenes - half) + sample_scenes(
        rng, half, styles=TAUGHT_STYLES
    )
    times = np.sort(rng.random((recipe.scenes, recipe.frames_per_scene)), axis=1)
    frames = [render_batch(scenes, column) for column in times.T]
    silhouettes = [draw_silhouettes(scenes, column) for column in times.T]
    rng = generator(recipe.seed, Stream.CAPTIONS)
    captions = [[caption(scene, rng) for _ in range(CAPTIONS_PER_SCENE)] for scene in scenes]
    return TrainingSet(np.stack(frames, axis=1), np.stack(silhouettes, axis=1), captions)


def draw_silhouettes(
    scenes: Sequence[Scene], times: Float[np.ndarray, "n"]
) -> Float32[np.ndarray, "n h w"]:
    """Return the share of each latent pixel that the scene's subject covers, from 0 to 1.

    Args:
        scenes: The scenes to draw.
        times: The time of each scene, from 0 to 1.
    """
    places = np.array([place(*each) for each in zip(scenes, times.tolist(), strict=True)])
    subjects = np.array([SUBJECTS.index(scene.subject) for scene in scenes])
    covered = cover(subjects, places, SIZE)
    factor = VAE.downsampling
    return einops.reduce(covered, "n (h a) (w b) -> n h w", "mean", a=factor, b=factor)
