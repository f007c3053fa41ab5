"""The world as its base model's training and measuring see it."""

from operator import attrgetter

from tav_jax.worlds.figures.detector import read
from tav_jax.worlds.figures.drawing import render
from tav_jax.worlds.figures.edits import EDITS
from tav_jax.worlds.figures.metrics import measure
from tav_jax.worlds.figures.networks import UNET, VAE
from tav_jax.worlds.figures.scenes import (
    ATTRIBUTES,
    CLIPS,
    SIZE,
    WORDS,
    caption,
    describe,
    sample_scenes,
)
from tav_jax.worlds.figures.training_set import draw, figure_weights, training_scenes
from tav_jax.worlds.recipe import Recipe
from tav_jax.worlds.world import World

FIGURES = World(
    model="tiny-figures",
    size=SIZE,
    recipe=Recipe(
        world="figures",
        scenes=10_000,
        vae_steps=1_600,
        vae_batch=16,
        decoder_steps=6_000,
        steps=5_000,
        batch=32,
        learning_rate=1.2e-3,
    ),
    vae=VAE,
    unet=UNET,
    words=WORDS,
    attributes=ATTRIBUTES,
    sample_scenes=sample_scenes,
    training_scenes=training_scenes,
    draw=draw,
    describe=describe,
    caption=caption,
    pixel_weights=figure_weights,
    read=read,
    clips=CLIPS,
    edits=EDITS,
    motion=attrgetter("verb"),
    render=render,
    measure=measure,
)
