"""python -m tav_jax.worlds.figures.train_detector: train the detector from drawings.

Images that a model decodes or draws are less sharp and less clean than drawings. So drawings are
blurred, reduced, recoloured, compressed and made noisy.
"""

import io
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8
from PIL import Image, ImageFilter
from safetensors.numpy import save_file

from tav_jax.console import Parser, command, say
from tav_jax.files import atomic_write
from tav_jax.models.network import Network, init_network
from tav_jax.types import Params, PRNGKey, Scalar
from tav_jax.video.read import to_pixel_values
from tav_jax.worlds.figures.backgrounds import panorama
from tav_jax.worlds.figures.detector import Detector, read_frames
from tav_jax.worlds.figures.drawing import centre, draw_batch, phases_apart, visible_phase
from tav_jax.worlds.figures.scenes import (
    ATTRIBUTES,
    SIZE,
    VERBS,
    WIDEST_PAN,
    Scene,
    sample_scenes,
)
from tav_jax.worlds.training_loop import Stage, init_or_restore, train

STEPS = 4_000
BATCH = 64
DRAWINGS = 30_000
LEARNING_RATE = 2e-3
EMPTY_SHARE = 0.06  # of backgrounds without a figure
CENTRE_WEIGHT, PHASE_WEIGHT = 4.0, 2.0


class Labels(NamedTuple):
    """What images show.

    Args:
        attributes: Index of each attribute's value, by the attribute's name.
        present: Whether there is a figure. If not, only background and style have a meaning.
        centre: The middle of the torso, from -1 at the left and top to 1.
        phase: Sine and cosine of the visible phase.
    """

    attributes: dict[str, Int[np.ndarray, "n"]]
    present: Bool[np.ndarray, "n"]
    centre: Float32[np.ndarray, "n 2"]
    phase: Float32[np.ndarray, "n 2"]


class Drawings(NamedTuple):
    """Images and what they show."""

    images: UInt8[np.ndarray, "n H W 3"]
    labels: Labels


def make_drawings(rng: np.random.Generator, n: int) -> Drawings:
    """Return random drawings of any pair of subject and verb, some without a figure."""
    scenes = sample_scenes(rng, n, held_out=None)
    times = rng.random(n)
    images, _ = draw_batch(scenes, times)
    present = rng.random(n) >= EMPTY_SHARE
    for i in np.flatnonzero(~present):
        wide = panorama(scenes[i].background, scenes[i].style, scenes[i].view)
        offset = rng.integers(2 * WIDEST_PAN + 1)
        images[i] = wide[:, offset : offset + SIZE]
    return Drawings(images, label(scenes, times, present))


def label(
    scenes: Sequence[Scene], times: Float[np.ndarray, "n"], present: Bool[np.ndarray, "n"]
) -> Labels:
    """Return what drawings of scenes at these times show."""
    moments = list(zip(scenes, times.tolist(), strict=True))
    angles = 2 * np.pi * np.array([visible_phase(*each) for each in moments])
    return Labels(
        {
            name: np.array([values.index(getattr(scene, name)) for scene in scenes])
            for name, values in ATTRIBUTES.items()
        },
        present,
        np.array([centre(*each) for each in moments], np.float32) / (SIZE / 2) - 1,
        np.stack([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32),
    )


def spoil(rng: np.random.Generator, image: UInt8[np.ndarray, "H W 3"]) -> np.ndarray:
    """Return an image that is less sharp, less clean, or of other tones; one in six as it is."""
    if rng.random() < 1 / 6:
        return image
    picture = Image.fromarray(image)
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(1.3 * rng.random()))
    if rng.random() < 0.25:
        side = int(rng.integers(SIZE // 2, SIZE))
        picture = picture.resize((side, side), Image.Resampling.BILINEAR)
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if rng.random() < 0.3:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(25, 95)))
        picture = Image.open(buffer)
    pixels = np.asarray(picture, np.float64)
    if rng.random() < 0.5:
        pixels = (pixels - 128) * rng.uniform(0.85, 1.15) + 128 + rng.normal(0, 8, 3)
    if rng.random() < 0.4:  # in patches, as decoders err
        side = int(2 ** rng.integers(2, 7))
        noise = rng.normal(0, 14 * rng.random(), (side, side, 3)).repeat(SIZE // side, axis=0)
        pixels = pixels + noise.repeat(SIZE // side, axis=1)
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def draw_batch_of(step: int, *, drawings: Drawings) -> tuple[np.ndarray, Labels]:
    """Return the spoilt images of a training step, half of them mirrored, and their labels."""
    rng = np.random.default_rng((1, step))
    chosen = rng.integers(len(drawings.images), size=BATCH)
    images = np.stack([spoil(rng, image) for image in drawings.images[chosen]])
    labels: Labels = jax.tree.map(lambda x: x[chosen], drawings.labels)
    mirrored = rng.random(BATCH) < 0.5
    images[mirrored] = images[mirrored, :, ::-1]
    sign = np.where(mirrored, -1, 1).astype(np.float32)
    centres = labels.centre * np.stack([sign, np.ones_like(sign)], axis=1)
    return to_pixel_values(images), labels._replace(centre=centres)


def detection_loss(
    params: dict[str, Params],
    key: PRNGKey,
    pixel_values: Float[Array, "n H W 3"],
    labels: Labels,
    *,
    network: Network[Detector],
) -> Scalar:
    """Return cross entropies of attributes and presence, plus errors of centre and phase."""
    del key
    outputs = network.with_params(params["detector"])(pixel_values)
    present = labels.present.astype(jnp.float32)
    everywhere = jnp.ones_like(present)
    loss = optax.sigmoid_binary_cross_entropy(outputs.present, present).mean()
    for name, logits in outputs.attributes.items():
        error = optax.softmax_cross_entropy_with_integer_labels(logits, labels.attributes[name])
        seen = everywhere if name in ("background", "style") else present
        loss += (seen * error).mean()
    distance = jnp.abs(outputs.centre - labels.centre).sum(-1)
    loss += CENTRE_WEIGHT * (present * distance).mean()
    verbs = jax.nn.one_hot(labels.attributes["verb"], len(VERBS))
    phase = jnp.einsum("n v c, n v -> n c", outputs.phase, verbs)
    missed = jnp.square(phase - labels.phase).sum(-1)
    return loss + PHASE_WEIGHT * (present * missed).mean()


def judge(network: Network[Detector], drawings: Drawings) -> str:
    """Return how often a detector is right, its error of the centre and of the phase."""
    seen, labels = read_frames(drawings.images, network), drawings.labels
    there = labels.present
    parts = [f"present {np.mean(seen.present == there):.3f}"]
    for name, values in labels.attributes.items():
        counts = np.ones_like(there) if name in ("background", "style") else there
        parts.append(f"{name} {np.mean((getattr(seen, name) == values)[counts]):.3f}")
    place = np.stack([seen.x, seen.y], axis=1)
    apart = np.linalg.norm(place - (labels.centre + 1) * (SIZE / 2), axis=1)[there]
    phase = np.arctan2(labels.phase[:, 0], labels.phase[:, 1]) / (2 * np.pi)
    turn = phases_apart(seen.phase, phase)[there]
    parts.append(f"centre {apart.mean():.2f} pixels")
    parts.append(f"phase within 1/8 {np.mean(turn < 1 / 8):.3f}")
    return ", ".join(parts)


def train_detector(folder: Path) -> None:
    """Train, and write `detector.safetensors` in float16. A training that was stopped goes on."""
    network = init_network(Detector, None, jax.random.key(0))
    stage = Stage(
        folder / "detector",
        steps=STEPS,
        learning_rate=LEARNING_RATE,
        average_decay=0.998,
        checkpointing_steps=500,
        key=jax.random.key(1),
    )
    drawings = make_drawings(np.random.default_rng(0), DRAWINGS)
    clean = make_drawings(np.random.default_rng(1), 1_000)
    rng = np.random.default_rng(2)
    spoilt = clean._replace(images=np.stack([spoil(rng, image) for image in clean.images]))
    state = start = init_or_restore(stage, {"detector": network.params})
    loss_fn = partial(detection_loss, network=network)
    for state in train(stage, start, loss_fn, partial(draw_batch_of, drawings=drawings)):
        average = network.with_params(state.average["detector"])
        say(f"{int(state.step)}: {judge(average, clean)}; spoilt: {judge(average, spoilt)}")
    params = {name: np.asarray(x, np.float16) for name, x in state.average["detector"].items()}
    with atomic_write(folder / "detector.safetensors") as path:
        save_file(params, path)
    say(f"wrote {folder / 'detector.safetensors'}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default the process's own."""
    parser = Parser(
        prog="python -m tav_jax.worlds.figures.train_detector",
        description="Train the detector of the world of figures. Run the same command again to "
        "resume an interrupted training.",
        epilog="example: python -m tav_jax.worlds.figures.train_detector --output-dir outputs/look",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/detector"), metavar="DIR")
    args = parser.parse_args(argv)
    train_detector(args.output_dir)


if __name__ == "__main__":
    sys.exit(main())
