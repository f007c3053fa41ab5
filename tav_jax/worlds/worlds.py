"""The drawn worlds, by name."""

from tav_jax.worlds.figures.world import FIGURES
from tav_jax.worlds.tiny_scenes.world import TINY_SCENES
from tav_jax.worlds.world import World

WORLDS: dict[str, World] = {"tiny-scenes": TINY_SCENES, "figures": FIGURES}
