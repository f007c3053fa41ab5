"""Detect what an image shows, without any training.

Most pixels look like the background, and the subject's pixels look least like it. The share of a
pixel that the subject covers follows from its distances to both colours, because the drawing mixes
them in that way. The silhouette is then compared with that of each subject, drawn at the same place
and size.
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
from tav_jax.worlds.tiny_scenes.scenes import BACKGROUNDS, COLOURS, MEASURES, SIZE, STYLES, SUBJECTS

Pixels = Float32[np.ndarray, "n H W 3"]
Field = Float32[np.ndarray, "n H W"]

WHITE = 255.0
CHUNK = 128  # frames that are processed at once
PRESENT = 0.7  # the lowest score at which a subject counts as present
SMALLEST, LARGEST = 3.5, 12.5  # radii, in units; those that are drawn are 5 to 10

# Distances are in levels of 255. A pixel that is further than this from a colour does not have it.
# The most similar subject and background, pink on sand, are 104 apart.
FAR = 60.0
# A pixel that is further than UNMIXED from the line between two colours is no mixture of them. The
# sum of what is beyond, divided by the side, is over 35 with an outline, under 30 without (JPEG).
UNMIXED, MUCH_INK = 45.0, 32.0

PALETTE = np.array(list(COLOURS.values()), np.float32)


class Reading(NamedTuple):
    """What was detected in each frame.

    Args:
        subject: Index into `SUBJECTS`.
        colour: Index into `list(COLOURS)`.
        background: Index into `list(BACKGROUNDS)`.
        style: Index into `STYLES`.
        x: The subject's centre, in pixels from the left.
        y: The subject's centre, in pixels from the top.
        radius: The subject's radius, in pixels.
        score: How well silhouette and colours explain the image, from 0 to 1.
        present: Whether a subject was recognised. If not, subject, colour, x, y and radius have no
            meaning.
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
    """Return what each frame shows.

    Args:
        frames: The frames.
        styles: The styles that are possible. Others are not recognised.
    """
    parts = [_read(frames[i : i + CHUNK], styles) for i in range(0, len(frames), CHUNK)]
    return Reading(*map(np.concatenate, zip(*parts, strict=True)))


def _read(frames: UInt8[np.ndarray, "n H W 3"], styles: Sequence[str]) -> Reading:
    may_be_lined = "line drawing" in styles
    pixels = frames.astype(np.float32)
    style = np.zeros(len(frames), int)
    if "pixel art" in styles:
        style[_has_cells(pixels)] = STYLES.index("pixel art")
    if "striped" in styles:
        strength = _stripes(pixels)
        striped = strength.max(axis=1) - strength.min(axis=1) > 0.15
        style[striped] = STYLES.index("striped")
        pixels[striped] = _without_stripes(pixels[striped], strength[striped])
    is_striped = style == STYLES.index("striped")

    background, is_paler = _classify_background(pixels, may_be_lined)
    lined = is_paler & ~is_striped
    ends = _fit_background(pixels, background, lined)
    far, _ = _distance(pixels, ends)
    colour, near_colour = _classify_colour(pixels, far, np.where(lined, FILL_PALER, 0))
    if may_be_lined:
        # Snow is as white when it is paler. There the outline decides.
        snow = background == list(BACKGROUNDS).index("snow")
        lined = np.where(snow & ~is_striped, _has_outline(pixels, ends, colour), lined)
        style[lined] = STYLES.index("line drawing")
        ink = np.broadcast_to(np.array(INK, np.float32), (len(pixels), 2, 3))
        near_ink, _ = _distance(pixels, ink)
        near_colour = np.where(lined[:, None, None], np.minimum(near_colour, near_ink), near_colour)

    subject, x, y, radius, fit = _fit_subject(
        _silhouette(far, near_colour), np.where(lined, OUTLINE[1], 0.0).astype(np.float32)
    )
    explained = (np.minimum(far, near_colour) < FAR).mean(axis=(1, 2))
    score = fit * explained * ((radius > SMALLEST) & (radius < LARGEST))
    scale = frames.shape[1] / SIZE
    place = x * scale, y * scale, radius * scale
    return Reading(subject, colour, background, style, *place, score, score > PRESENT)


def _without_stripes(pixels: Pixels, strength: Float32[np.ndarray, "n 4"]) -> Pixels:
    """Return striped images with the dark rows made as light as the others."""
    size = pixels.shape[1]
    shade = strength * (1 + STRIPE_SHADE) / 2
    rows = (np.arange(size) * SIZE // size % STRIPE).astype(int)
    return pixels / shade[:, rows, None, None]


def _fit_background(
    pixels: Pixels, background: Int[np.ndarray, "n"], is_paler: Bool[np.ndarray, "n"]
) -> Float32[np.ndarray, "n 2 3"]:
    """Return the two colours between which each image's background varies.

    A decoded image may have all its colours a little off. The background shows by how much.
    """
    ends = np.array(list(BACKGROUNDS.values()), np.float32)[background]  # n 2 3
    ends = np.where(is_paler[:, None, None], ends + PALER * (WHITE - ends), ends)
    _, gap = _distance(pixels, ends)
    near = ((gap**2).sum(-1) < FAR**2)[..., None]
    shift = (gap * near).sum(axis=(1, 2)) / np.maximum(near.sum(axis=(1, 2)), 1)
    ends += shift[:, None].astype(np.float32)
    return ends


def _has_outline(
    pixels: Pixels, ends: Float32[np.ndarray, "n 2 3"], colour: Int[np.ndarray, "n"]
) -> Bool[np.ndarray, "n"]:
    """Return whether many pixels are no mixture of the background and the subject's colour."""
    fill = PALETTE[colour]
    distance, _ = _distance(pixels, np.stack([ends.mean(axis=1), fill], axis=1))
    unmixed = np.maximum(distance - UNMIXED, 0).sum(axis=(1, 2)) / pixels.shape[1]
    return unmixed > MUCH_INK


def _silhouette(far: Field, near_colour: Field) -> Field:
    """Return the share of each pixel that the subject covers, from 0 to 1.

    Args:
        far: Distance of each pixel to the background's colours.
        near_colour: Its distance to the subject's colour, or to its outline's.
    """
    share = far / (far + near_colour + 1)
    share = np.clip((share - 0.2) / 0.6, 0, 1)
    share *= _blur(share) > 0.3
    return share


def _distance(pixels: Pixels, ends: Float32[np.ndarray, "n 2 3"]) -> tuple[Field, Pixels]:
    """Return each pixel's distance from the line between two colours, and the vector from there."""
    start, direction = ends[:, None, None, 0], (ends[:, 1] - ends[:, 0])[:, None, None]
    gap = pixels - start
    length = np.maximum((direction**2).sum(-1), 1)
    along = np.clip((gap * direction).sum(-1) / length, 0, 1)
    gap -= along[..., None] * direction
    return np.sqrt((gap**2).sum(-1)), gap


def _classify_background(
    pixels: Pixels, may_be_lined: bool
) -> tuple[Int[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Return the background that most pixels are nearest to, and whether to its paler form."""
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


def _classify_colour(
    pixels: Pixels, far: Field, paler: np.ndarray
) -> tuple[Int[np.ndarray, "n"], Field]:
    """Return the colour that most pixels off the background have, and their distances to it.

    Args:
        pixels: The images.
        far: Distance of each pixel to the background's colours.
        paler: For each image, how much paler than in `COLOURS` the colours are.
    """
    inner = _blur(far)  # edges are mixtures, which may look like a third colour
    weight = (inner / inner.max(axis=(1, 2), keepdims=True)) ** 3
    distances, votes = [], []
    for colour in PALETTE:
        fill = colour + paler[:, None] * (WHITE - colour)
        # The range of the sheen.
        ends = np.stack([0.85 * fill, np.minimum(1.15 * fill, 255)], axis=1).astype(np.float32)
        distances.append(_distance(pixels, ends)[0])
        votes.append((weight * np.exp(-((distances[-1] / FAR) ** 2))).sum((1, 2)))
    colour = np.argmax(votes, axis=0)
    return colour, np.stack(distances)[colour, np.arange(len(pixels))]


def _fit_subject(share: Field, outline: Float32[np.ndarray, "n"]) -> tuple[np.ndarray, ...]:
    """Return subject, x, y and radius in units, and the overlap with that subject's silhouette.

    Args:
        share: The share of each pixel that the subject covers.
        outline: Width of the outline outside the subject's edge, in units.
    """
    n, size = share.shape[:2]
    middles = (np.arange(size) + 0.5) * (SIZE / size)
    least = min(area for area, _ in MEASURES.values())
    window = np.ones_like(share)
    for _ in range(3):  # pixels far from the centre are not part of the subject
        kept = share * window
        area = np.maximum(kept.sum((1, 2)), 1e-3) * (SIZE / size) ** 2
        x = (kept.sum(1) * middles).sum(1) / area * (SIZE / size) ** 2
        y = (kept.sum(2) * middles).sum(1) / area * (SIZE / size) ** 2
        reach = (1.5 * np.sqrt(area / least) + 2)[:, None, None]
        squared = (middles - x[:, None])[:, None] ** 2 + (middles - y[:, None])[:, :, None] ** 2
        window = squared < reach**2
    total = share.sum((1, 2))
    fits, radii = [], []
    for index, name in enumerate(SUBJECTS):
        # The area of an outlined silhouette is one r^2 + edge r.
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
    """Return the means of 3 x 3 pixels."""
    wide = np.pad(field, ((0, 0), (1, 1), (1, 1)), mode="edge")
    wide = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    return (wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]) / 9


def _has_cells(pixels: Pixels) -> Bool[np.ndarray, "n"]:
    """Return whether pixels differ less within the cells of pixel art than between them.

    Differences are limited, since otherwise a square's edges would look like edges of cells.
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
    """Return the lightness of the four rows of a stripe's period, divided by their mean."""
    size = pixels.shape[1]
    light = pixels.mean(-1)
    light = light.reshape(len(light), SIZE, size // SIZE, size).mean(2)
    periods = light.reshape(len(light), -1, int(STRIPE), size)
    shade = periods / (periods.mean(axis=2, keepdims=True) + 1)
    shade = np.median(shade.swapaxes(1, 2).reshape(len(light), int(STRIPE), -1), axis=-1)
    return shade / shade.mean(axis=1, keepdims=True)
