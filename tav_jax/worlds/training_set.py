"""What a base model is trained on."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8

from tav_jax.worlds.recipe import Recipe, Stream, generator
from tav_jax.worlds.world import World

CAPTIONS_PER_SCENE = 4


@dataclass(frozen=True)
class TrainingSet:
    """Captioned scenes, each drawn at several times.

    Args:
        frames: A clip of each scene.
        silhouettes: Share of each latent pixel that the scene's subject covers, from 0 to 1.
        captions: The captions of each scene, equally many for all.
    """

    frames: UInt8[np.ndarray, "n f H W 3"]
    silhouettes: Float32[np.ndarray, "n f h w"]
    captions: list[list[str]]


def make_training_set(world: World, recipe: Recipe) -> TrainingSet:
    """Return random scenes without the held-out pairs, drawn at random times."""
    rng = np.random.default_rng(recipe.seed)
    scenes = world.training_scenes(rng, recipe.scenes)
    times = np.sort(rng.random((recipe.scenes, recipe.frames_per_scene)), axis=1)
    drawn = [world.draw(scenes, column) for column in times.T]
    frames, silhouettes = (np.stack(each, axis=1) for each in zip(*drawn, strict=True))
    rng = generator(recipe.seed, Stream.CAPTIONS)
    captions = [[world.caption(scene, rng) for _ in range(CAPTIONS_PER_SCENE)] for scene in scenes]
    return TrainingSet(frames, silhouettes, captions)
