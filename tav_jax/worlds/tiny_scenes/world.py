"""The world as its base model's training and measuring see it."""

from functools import partial
from operator import attrgetter

import numpy as np
from jaxtyping import Int, UInt8

from tav_jax.worlds.recipe import Recipe
from tav_jax.worlds.tiny_scenes.detector import read_frame
from tav_jax.worlds.tiny_scenes.drawing import render
from tav_jax.worlds.tiny_scenes.edits import edits_of
from tav_jax.worlds.tiny_scenes.metrics import measure
from tav_jax.worlds.tiny_scenes.networks import UNET, VAE
from tav_jax.worlds.tiny_scenes.scenes import (
    ATTRIBUTES,
    CLIPS,
    SIZE,
    TAUGHT_STYLES,
    WORDS,
    caption,
    describe,
    sample_scenes,
)
from tav_jax.worlds.tiny_scenes.training_set import draw, foreground_weights, training_scenes
from tav_jax.worlds.world import World


def read(images: UInt8[np.ndarray, "n H W 3"]) -> dict[str, Int[np.ndarray, "n"]]:
    """Return the index of each attribute's value in each image, -1 without a subject."""
    seen = read_frame(images, styles=TAUGHT_STYLES)
    return {name: np.where(seen.present, getattr(seen, name), -1) for name in ATTRIBUTES}


TINY_SCENES = World(
    model="tiny-scenes",
    size=SIZE,
    recipe=Recipe(),
    vae=VAE,
    unet=UNET,
    words=WORDS,
    attributes=ATTRIBUTES,
    sample_scenes=partial(sample_scenes, styles=TAUGHT_STYLES),
    training_scenes=training_scenes,
    draw=draw,
    describe=describe,
    caption=caption,
    pixel_weights=foreground_weights,
    read=read,
    clips=CLIPS,
    edits={name: edits_of(clip) for name, clip in CLIPS.items()},
    motion=attrgetter("motion"),
    render=render,
    measure=measure,
)
