"""What a drawn world offers to train a base model on it and to measure one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from tav_jax.models.unet import UNetConfig
from tav_jax.models.vae import VAEConfig
from tav_jax.worlds.recipe import Recipe

Scene = TypeVar("Scene")
"""A world's description of one clip."""

Images = UInt8[np.ndarray, "n H W 3"]
Silhouettes = Float32[np.ndarray, "n h w"]
"""The share of each latent pixel that an image's subject covers, from 0 to 1."""


@dataclass(frozen=True)
class Edit:
    """A prompt for a clip and what it asks for.

    Args:
        kind: "source" for the source prompt, "open" if the prompt leaves attributes open. Otherwise
            the attribute that is changed, or "all" if several are.
        prompt: The prompt.
        asks: The values that the prompt asks for, by name in `World.attributes`.
    """

    kind: str
    prompt: str
    asks: Mapping[str, str]


@runtime_checkable  # where tests check types
class SampleScenes(Protocol[Scene]):
    """Draws random scenes, of any kind that the base model is taught."""

    def __call__(self, rng: np.random.Generator, n: int, *, held_out: bool | None) -> list[Scene]:
        """Return random scenes.

        Args:
            rng: Source of randomness.
            n: Number of scenes.
            held_out: False for none of the pairs of attributes that are kept out of training, True
                for only those, None for any pair.
        """
        ...


@dataclass(frozen=True)
class World(Generic[Scene]):
    """A drawn world.

    Args:
        model: Name of the base model that is trained on it.
        size: Width and height of its images.
        recipe: The numbers of that training.
        vae: Shape of the autoencoder.
        unet: Shape of the U-Net.
        words: Every word of every caption.
        attributes: The values of each attribute of a scene, by the attribute's name.
        sample_scenes: See `SampleScenes`.
        training_scenes: Returns this many random scenes to train on.
        draw: Returns an image of each scene at its time from 0 to 1, and the subject's silhouette.
        describe: Returns the prompt that names everything in a scene.
        caption: Returns a random caption that is true of any frame of a scene.
        pixel_weights: Returns the weight of each pixel's error in the autoencoder's training.
        read: Returns, for each attribute, the index of the value that each image shows, or -1 if
            no subject is recognised.
        clips: The scenes that experiments edit, by name.
        edits: The prompts for each clip, by the clip's name.
        motion: Returns the name of what the subject of a scene does.
        render: Returns a scene's clip of this many frames.
        measure: Returns the metrics of a video that was made by editing a scene's clip. The prompt
            asked for these values of attributes.
    """

    model: str
    size: int
    recipe: Recipe
    vae: VAEConfig
    unet: UNetConfig
    words: Sequence[str]
    attributes: Mapping[str, Sequence[str]]
    sample_scenes: SampleScenes[Scene]
    training_scenes: Callable[[np.random.Generator, int], list[Scene]]
    draw: Callable[[Sequence[Scene], Float[np.ndarray, "n"]], tuple[Images, Silhouettes]]
    describe: Callable[[Scene], str]
    caption: Callable[[Scene, np.random.Generator], str]
    pixel_weights: Callable[[Images, Silhouettes], Float32[np.ndarray, "n H W 1"]]
    read: Callable[[Images], Mapping[str, Int[np.ndarray, "n"]]]
    clips: Mapping[str, Scene]
    edits: Mapping[str, Sequence[Edit]]
    motion: Callable[[Scene], str]
    render: Callable[[Scene, int], Images]
    measure: Callable[[Images, Scene, Mapping[str, str]], Mapping[str, float | None]]
