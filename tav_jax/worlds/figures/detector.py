"""Detect what an image shows, with a small convolutional network.

`train_detector` made its weights, from drawings alone. No image of any base model was used.
"""

import math
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float64, Int, UInt8
from safetensors.numpy import load_file

from tav_jax.models.compute import ComputeOptions
from tav_jax.models.layers import Conv, GroupNorm, Linear
from tav_jax.models.network import Network
from tav_jax.video.read import to_pixel_values
from tav_jax.worlds.figures.scenes import ATTRIBUTES, SIZE, VERBS

WEIGHTS = Path(__file__).with_name("detector.safetensors")
CHUNK = 64  # images at a time, so that one program serves any number of them

# Channels, and the stride, of each convolution.
LAYERS = ((24, 2), (48, 2), (48, 1), (96, 2), (96, 1), (96, 2))
HIDDEN = 128
GROUPS = 8

ENDS = np.cumsum([len(values) for values in ATTRIBUTES.values()]).tolist()
OUTPUTS = ENDS[-1] + 3 + 2 * len(VERBS)


class Outputs(NamedTuple):
    """What the network says of each image.

    Args:
        attributes: Logits of each attribute's values, by the attribute's name.
        present: Logit of whether there is a figure.
        centre: The middle of the torso, from -1 at the left and top to 1.
        phase: Sine and cosine of the visible phase, for each verb.
    """

    attributes: dict[str, Float[Array, "n values"]]
    present: Float[Array, "n"]
    centre: Float[Array, "n 2"]
    phase: Float[Array, "n verbs 2"]


class Reading(NamedTuple):
    """What was detected in each image.

    Args:
        subject: Index into `SUBJECTS`.
        verb: Index into `list(VERBS)`.
        clothes: Index into `CLOTHES`.
        background: Index into `list(BACKGROUNDS)`.
        style: Index into `STYLES`.
        x: The middle of the torso, in pixels from the left.
        y: The middle of the torso, in pixels from the top.
        phase: The visible phase of the verb, from 0 to 1.
        present: Whether a figure was recognised. If not, only background and style have a meaning.
    """

    subject: Int[np.ndarray, "n"]
    verb: Int[np.ndarray, "n"]
    clothes: Int[np.ndarray, "n"]
    background: Int[np.ndarray, "n"]
    style: Int[np.ndarray, "n"]
    x: Float64[np.ndarray, "n"]
    y: Float64[np.ndarray, "n"]
    phase: Float64[np.ndarray, "n"]
    present: Bool[np.ndarray, "n"]


class Detector(nnx.Module):
    """The network. It has one size, so it needs no config."""

    def __init__(self, config: None, compute: ComputeOptions, *, rngs: nnx.Rngs):
        del config, compute
        widths = [3, *(channels for channels, _ in LAYERS)]
        self.convs = nnx.List(
            Conv(before, channels, stride=stride, rngs=rngs)
            for before, (channels, stride) in zip(widths[:-1], LAYERS, strict=True)
        )
        self.norms = nnx.List(
            GroupNorm(GROUPS, channels, eps=1e-5, joint_frames=False) for channels in widths[1:]
        )
        side = SIZE // math.prod(stride for _, stride in LAYERS)
        self.hidden = Linear(side**2 * widths[-1], HIDDEN, rngs=rngs)
        self.out = Linear(HIDDEN, OUTPUTS, rngs=rngs)

    def __call__(self, pixel_values: Float[Array, "n 64 64 3"]) -> Outputs:
        """Return what images from -1 to 1 show."""
        x = pixel_values
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x), silu=True)
        x = jax.nn.silu(self.hidden(x.reshape(len(x), -1)))
        *logits, rest = jnp.split(self.out(x), ENDS, axis=-1)
        return Outputs(
            dict(zip(ATTRIBUTES, logits, strict=True)),
            rest[:, 0],
            rest[:, 1:3],
            rest[:, 3:].reshape(len(x), len(VERBS), 2),
        )


@lru_cache(maxsize=1)
def load_detector() -> Network[Detector]:
    """Return the trained detector, which comes with the package."""
    params = {name: value.astype(np.float32) for name, value in load_file(WEIGHTS).items()}
    return Network(Detector, None, params)


_detect = jax.jit(lambda network, pixel_values: network(pixel_values))


def read_frames(
    images: UInt8[np.ndarray, "n 64 64 3"], network: Network[Detector] | None = None
) -> Reading:
    """Return what each image shows.

    Args:
        images: The images.
        network: The detector, by default the trained one.
    """
    detect = partial(_detect, network or load_detector())
    parts = []
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        padded = np.zeros((CHUNK, SIZE, SIZE, 3), np.uint8)
        padded[: len(chunk)] = chunk
        parts.append(_to_reading(detect(to_pixel_values(padded)), len(chunk)))
    return Reading(*map(np.concatenate, zip(*parts, strict=True)))


def _to_reading(outputs: Outputs, n: int) -> Reading:
    """Return what the first n outputs say."""
    best = {name: np.asarray(logits)[:n].argmax(-1) for name, logits in outputs.attributes.items()}
    centre = (np.asarray(outputs.centre, np.float64)[:n] + 1) * (SIZE / 2)
    sine, cosine = np.asarray(outputs.phase, np.float64)[np.arange(n), best["verb"]].T
    return Reading(
        **best,
        x=centre[:, 0],
        y=centre[:, 1],
        phase=np.arctan2(sine, cosine) / (2 * np.pi) % 1,
        present=np.asarray(outputs.present)[:n] > 0,
    )


def read(images: UInt8[np.ndarray, "n 64 64 3"]) -> dict[str, Int[np.ndarray, "n"]]:
    """Return the index of each attribute's value in each image, -1 without a figure."""
    seen = read_frames(images)
    return {name: np.where(seen.present, getattr(seen, name), -1) for name in ATTRIBUTES}
