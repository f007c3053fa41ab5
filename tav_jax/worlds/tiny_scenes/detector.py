"""What a picture shows, read without training by taking it apart into background and subject.

The background is what most pixels look like, the subject what looks least like it: how much of
each pixel is subject follows from its distances to both colours, as it does in the drawing. Then
that silhouette is compared with each subject's own, drawn at the same place in the same size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, UInt8

from tav_jax.worlds.tiny_scenes.drawing import (
    CELL,
    FILL_PALER,
    INK,
    OUTLINE,
    PALER,
    STRIPE,
    STRIPE_SHADE,
    cover,
)
from tav_jax.worlds.tiny_scenes.world import BACKGROUNDS, COLOURS, MEASURES, SIZE, STYLES, SUBJECTS

Pixels = Float32[np.ndarray, "n H W 3"]
Field = Float32[np.ndarray, "n H W"]

WHITE = 255.0
CHUNK = 128  # Frames read at once.
PRESENT = 0.7  # The least score of a subject.
SMALLEST, LARGEST = 3.5, 12.5  # Radii, in units; drawn are 5 to 10.

# Distances in levels of 255. A pixel further than FAR from a colour does not have it; the nearest
# colour and background of the world, pink on sand, are 104 apart.
FAR = 60.0
# A pixel further than this from the line between two colours is no mixture of them; and how much
# further the pixels of an outline are, in sum, by the side: over 35, without one under 30 (JPEG).
UNMIXED, MUCH_INK = 45.0, 32.0


class Reading(NamedTuple):
    """Indices into `SUBJECTS`, `list(COLOURS)`, `list(BACKGROUNDS)` and `STYLES`; pixels.

    `score` is how well silhouette and colours explain the picture, from 0 to 1. Where `present`
    is false no subject was recognised, and subject, colour, place and radius mean nothing.
    """

    subject: Int[np.ndarray, "n"]
    colour: Int[np.ndarray, "n"]
    background: Int[np.ndarray, "n"]
    style: Int[np.ndarray, "n"]
    x: Float64[np.ndarray, "n"]
    y: Float64[np.ndarray, "n"]
    radius: Float64[np.ndarray, "n"]
    score: Float64[np.ndarray, "n"]
    present: Bool[np.ndarray, "n"]


def read_frame(
    frames: UInt8[np.ndarray, "n H W 3"], *, styles: Sequence[str] = STYLES[:1]
) -> Reading:
    """What each frame shows, its style being one of `styles`."""
    parts = [_read(frames[i : i + CHUNK], styles) for i in range(0, len(frames), CHUNK)]
    return Reading(*map(np.concatenate, zip(*parts, strict=True)))


def _read(frames: UInt8[np.ndarray, "n H W 3"], styles: Sequence[str]) -> Reading:
    size = frames.shape[1]
    pixels = frames.astype(np.float32)
    n = len(frames)
    style = np.zeros(n, int)
    if "pixel art" in styles:
        style[_has_cells(pixels)] = STYLES.index("pixel art")
    if "striped" in styles:
        strength = _stripes(pixels)
        style[strength.max(axis=1) - strength.min(axis=1) > 0.15] = STYLES.index("striped")
        striped = style == STYLES.index("striped")
        shade = strength[striped] * (1 + STRIPE_SHADE) / 2
        rows = (np.arange(size) * SIZE // size % STRIPE).astype(int)
        pixels[striped] /= shade[:, rows, None, None]

    may_be_lined = "line drawing" in styles
    background, paled = _background(pixels, may_be_lined)
    not_striped = style != STYLES.index("striped")
    ends = np.array(list(BACKGROUNDS.values()), np.float32)[background]  # n 2 3
    pale = (paled & not_striped)[:, None, None]
    ends = np.where(pale, ends + PALER * (WHITE - ends), ends)
    # Where the colours are a little off, all of them are: the background says by how much.
    _, gap = _distance(pixels, ends)
    near = ((gap**2).sum(-1) < FAR**2)[..., None]
    shift = (gap * near).sum(axis=(1, 2)) / np.maximum(near.sum(axis=(1, 2)), 1)
    ends += shift[:, None].astype(np.float32)
    far, _ = _distance(pixels, ends)

    palette = np.array(list(COLOURS.values()), np.float32)
    lined = paled & not_striped
    colour, near_colour = _colour(pixels, far, np.where(lined, FILL_PALER, 0), palette)
    if may_be_lined:  # Snow is as white when paler: there the outline tells.
        fill = palette[colour]
        mixed, _ = _distance(pixels, np.stack([ends.mean(axis=1), fill], axis=1))
        off = np.maximum(mixed - UNMIXED, 0).sum(axis=(1, 2)) / size
        snow = background == list(BACKGROUNDS).index("snow")
        lined = np.where(snow & not_striped, off > MUCH_INK, lined)
        style[lined] = STYLES.index("line drawing")
        ink, _ = _distance(pixels, np.broadcast_to(np.array(INK, np.float32), (n, 2, 3)))
        near_colour = np.where(lined[:, None, None], np.minimum(near_colour, ink), near_colour)

    share = far / (far + near_colour + 1)
    share = np.clip((share - 0.2) / 0.6, 0, 1)
    share *= _blur(share) > 0.3
    subject, x, y, radius, fit = _silhouette(
        share, np.where(lined, OUTLINE[1], 0.0).astype(np.float32)
    )
    explained = (np.minimum(far, near_colour) < FAR).mean(axis=(1, 2))
    score = fit * explained * ((radius > SMALLEST) & (radius < LARGEST))
    scale = size / SIZE
    return Reading(
        subject,
        colour,
        background,
        style,
        x * scale,
        y * scale,
        radius * scale,
        score,
        score > PRESENT,
    )


def _distance(pixels: Pixels, ends: Float32[np.ndarray, "n 2 3"]) -> tuple[Field, Pixels]:
    """From each pixel to the line between two colours, and the vector from there."""
    start, way = ends[:, None, None, 0], (ends[:, 1] - ends[:, 0])[:, None, None]
    gap = pixels - start
    length = np.maximum((way**2).sum(-1), 1)
    along = np.clip((gap * way).sum(-1) / length, 0, 1)
    gap -= along[..., None] * way
    return np.sqrt((gap**2).sum(-1)), gap


def _background(
    pixels: Pixels, may_be_lined: bool
) -> tuple[Int[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Which background most pixels are nearest to, and whether to its paler form."""
    n = len(pixels)
    ends = np.array(list(BACKGROUNDS.values()), np.float32)
    forms = np.stack([ends, ends + PALER * (WHITE - ends)] if may_be_lined else [ends])
    distances = [
        _distance(pixels, np.broadcast_to(each, (n, 2, 3)))[0] for each in forms.reshape(-1, 2, 3)
    ]
    nearest = np.argmin(distances, axis=0)
    near = np.min(distances, axis=0) < FAR
    votes = np.stack([((nearest == i) & near).sum((1, 2)) for i in range(len(distances))], axis=1)
    votes = votes.reshape(n, len(forms), -1)
    background = votes.sum(axis=1).argmax(axis=1)
    return background, votes[np.arange(n), :, background].argmax(axis=1) == 1


def _colour(
    pixels: Pixels, far: Field, paler: np.ndarray, palette: Float32[np.ndarray, "k 3"]
) -> tuple[Int[np.ndarray, "n"], Field]:
    """The colour which most of what is not background has, and each pixel's distance to it."""
    inner = _blur(far)  # Edges, being mixtures, may look like yet another colour.
    weight = (inner / inner.max(axis=(1, 2), keepdims=True)) ** 3
    distances, votes = [], []
    for colour in palette:
        fill = colour + paler[:, None] * (WHITE - colour)
        # As far as the sheen goes.
        ends = np.stack([0.85 * fill, np.minimum(1.15 * fill, 255)], axis=1).astype(np.float32)
        distances.append(_distance(pixels, ends)[0])
        votes.append((weight * np.exp(-((distances[-1] / FAR) ** 2))).sum((1, 2)))
    colour = np.argmax(votes, axis=0)
    return colour, np.stack(distances)[colour, np.arange(len(pixels))]


def _silhouette(share: Field, outline: Float32[np.ndarray, "n"]) -> tuple[np.ndarray, ...]:
    """Subject, x, y, radius in units, and the overlap with that subject's own silhouette."""
    n, size = share.shape[:2]
    middles = (np.arange(size) + 0.5) * (SIZE / size)
    least = min(area for area, _ in MEASURES.values())
    window = np.ones_like(share)
    for _ in range(3):  # What lies far from the rest is none of it.
        kept = share * window
        area = np.maximum(kept.sum((1, 2)), 1e-3) * (SIZE / size) ** 2
        x = (kept.sum(1) * middles).sum(1) / area * (SIZE / size) ** 2
        y = (kept.sum(2) * middles).sum(1) / area * (SIZE / size) ** 2
        reach = (1.5 * np.sqrt(area / least) + 2)[:, None, None]
        away = (middles - x[:, None])[:, None] ** 2 + (middles - y[:, None])[:, :, None] ** 2
        window = away < reach**2
    total = share.sum((1, 2))
    fits, radii = [], []
    for index, name in enumerate(SUBJECTS):
        # Of an outlined silhouette it is `one` r^2 + `edge` outline r = area.
        one, edge = MEASURES[name][0], MEASURES[name][1] * outline
        radius = (np.sqrt(edge**2 + 4 * one * area) - edge) / (2 * one)
        places = np.stack([x, y, radius], axis=1)
        drawn = cover(np.full(n, index), places, size, outline[:, None, None])
        apart = np.abs(share - drawn).sum((1, 2))
        fits.append(1 - apart / np.maximum(total + drawn.sum((1, 2)), 1e-3))
        radii.append(radius)
    subject = np.argmax(fits, axis=0)
    chosen = subject, np.arange(n)
    return subject, x, y, np.stack(radii)[chosen], np.stack(fits)[chosen]


def _blur(field: Field) -> Field:
    """Means of 3 x 3 pixels."""
    wide = np.pad(field, ((0, 0), (1, 1), (1, 1)), mode="edge")
    wide = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    return (wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]) / 9


def _has_cells(pixels: Pixels) -> Bool[np.ndarray, "n"]:
    """Whether pixels differ less within the cells of pixel art than between them.

    Great steps count as middling ones, or a square's edges would do for a sign of cells.
    """
    n, size = pixels.shape[:2]
    unit = size // SIZE
    light = pixels.reshape(n, SIZE, unit, SIZE, unit * 3).mean((2, 4))
    inside, outside = np.zeros(len(light)), np.zeros(len(light))
    for axis in (1, 2):
        steps = np.minimum(np.abs(np.diff(light, axis=axis)), 60)
        edge = np.arange(1, SIZE) % CELL == 0
        inside += np.compress(~edge, steps, axis).mean((1, 2))
        outside += np.compress(edge, steps, axis).mean((1, 2))
    return inside < 0.79 * outside


def _stripes(pixels: Pixels) -> Float32[np.ndarray, "n 4"]:
    """How light the four rows of a stripe's period are, next to their mean."""
    size = pixels.shape[1]
    light = pixels.mean(-1)
    light = light.reshape(len(light), SIZE, size // SIZE, size).mean(2)
    periods = light.reshape(len(light), -1, int(STRIPE), size)
    shade = periods / (periods.mean(axis=2, keepdims=True) + 1)
    shade = np.median(shade.swapaxes(1, 2).reshape(len(light), int(STRIPE), -1), axis=-1)
    return shade / shade.mean(axis=1, keepdims=True)
