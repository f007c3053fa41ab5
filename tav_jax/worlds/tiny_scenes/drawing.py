"""Scenes -> pictures, clips, and the truth about them.

What ends up in a picture is computed with integers and with +, -, *, / and sqrt alone, which IEEE
754 rounds in one way: a scene is the same picture on every machine.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Integer, UInt8, UInt32

from tav_jax.errors import UserError
from tav_jax.worlds.tiny_scenes.world import (
    ARM,
    BACKGROUNDS,
    COLOURS,
    HALF_SIDE,
    HALF_WIDTH,
    HOLE,
    INRADIUS,
    SIZE,
    SUBJECTS,
    Scene,
)

OUTLINE = (0.4, 0.7)  # Of a line drawing: so far inside the edge, and outside.
INK = (24, 22, 26)
PALER = 0.6  # How white its background gets, and
FILL_PALER = 0.15  # its colours.
STRIPE = 4.0  # Two light rows, two dark ones.
STRIPE_SHADE = 0.55
CELL = 2.0  # Of pixel art.
GRAIN = 7.0  # Standard deviation, in levels of 255.
SHEEN = 0.12  # A subject is lighter at its upper left, by this part at a radius.

CHUNK = 64  # Pictures drawn at once: what fits a cache is drawn twice as fast.

Field = Float32[np.ndarray, "n H W"]
Column = Float[np.ndarray, "n 1 1"]


class Truth(NamedTuple):
    """Where the subject is, in pixels, and how much of each pixel it covers."""

    centre: Float64[np.ndarray, "f 2"]
    radius: Float64[np.ndarray, "f"]
    mask: Float32[np.ndarray, "f H W"]


def render(scene: Scene, frames: int, size: int = SIZE) -> UInt8[np.ndarray, "f H W 3"]:
    """The scene's clip, from time 0 to time 1, both included."""
    return render_batch([scene] * frames, np.linspace(0, 1, frames), size)


def truth(scene: Scene, frames: int, size: int = SIZE) -> Truth:
    """What is so in each frame of `render(scene, frames, size)`."""
    places = np.array([place(scene, time) for time in np.linspace(0, 1, frames)])
    index = np.full(frames, SUBJECTS.index(scene.subject))
    if scene.style == "pixel art":
        mask = enlarge(cover(index, places, cells_of(size), hard=True), size)
    else:
        grow = OUTLINE[1] if scene.style == "line drawing" else 0.0
        mask = cover(index, places, size, grow)
    places *= size / SIZE
    return Truth(places[:, :2], places[:, 2], mask)


def place(scene: Scene, time: float) -> tuple[float, float, float]:
    """The subject's x, y and radius."""
    way, x, y, radius = scene.travel, scene.x, scene.y, scene.radius
    match scene.motion:
        case "right":
            x += way * time
        case "left":
            x -= way * time
        case "up":
            y -= way * time
        case "falling":
            y += way * time**2
        case "bouncing":  # Twice.
            part = 2 * time % 1
            y -= way * 4 * part * (1 - part)
        case "growing":
            radius += way * time
        case "circling":  # Once, clockwise from the top.
            x += way * float(np.sin(2 * np.pi * time)) / 2
            y += way * (1 - float(np.cos(2 * np.pi * time))) / 2
    # Rounded, since sines differ in their last bit from machine to machine.
    return round(x * 1024) / 1024, round(y * 1024) / 1024, round(radius * 1024) / 1024


def render_batch(
    scenes: Sequence[Scene], times: Float[np.ndarray, "n"], size: int = SIZE
) -> UInt8[np.ndarray, "n H W 3"]:
    """One picture of each scene, at its time from 0 to 1."""
    pictures = np.empty((len(scenes), size, size, 3), np.uint8)
    styles = np.array([scene.style for scene in scenes])
    for style in np.unique(styles).tolist():
        chosen = np.flatnonzero(styles == style)
        for i in range(0, len(chosen), CHUNK):
            part = chosen[i : i + CHUNK].tolist()
            few, moments = [scenes[j] for j in part], [float(times[j]) for j in part]
            if style == "pixel art":
                pictures[part] = enlarge(_draw(few, moments, cells_of(size), style), size)
            else:
                pictures[part] = _draw(few, moments, size, style)
    return pictures


def cells_of(size: int) -> int:
    cells = round(SIZE / CELL)
    if size % cells:
        raise UserError(f"size is {size}; for pixel art it must be a multiple of {cells}")
    return cells


def enlarge(pictures: np.ndarray, size: int) -> np.ndarray:
    factor = size // pictures.shape[1]
    return pictures.repeat(factor, axis=1).repeat(factor, axis=2)


def _draw(
    scenes: list[Scene], times: list[float], size: int, style: str
) -> UInt8[np.ndarray, "n H W 3"]:
    lined = style == "line drawing"
    places = np.array([place(*each) for each in zip(scenes, times, strict=True)])
    subjects = np.array([SUBJECTS.index(scene.subject) for scene in scenes])
    grounds = np.array([scene.background for scene in scenes])
    seeds = np.array([scene.seed for scene in scenes], np.uint32)
    colours = np.array([COLOURS[scene.colour] for scene in scenes], np.float32)[:, None, None]

    picture = np.empty((len(scenes), size, size, 3), np.float32)
    for name in np.unique(grounds).tolist():
        chosen = np.flatnonzero(grounds == name)
        dark, light = np.array(BACKGROUNDS[name], np.float32)
        picture[chosen] = dark + (light - dark) * _texture(name, seeds[chosen], size)[..., None]
    if lined:
        picture += np.float32(PALER) * (255 - picture)
        colours = colours + np.float32(FILL_PALER) * (255 - colours)

    dx, dy = _offsets(places, size)
    sheen = np.float32(-SHEEN / 2) * (dx + dy) / places[:, 2, None, None].astype(np.float32)
    filled = cover(subjects, places, size, -OUTLINE[0] if lined else 0.0, style == "pixel art")
    if lined:
        inked = cover(subjects, places, size, OUTLINE[1])[..., None]
        picture += inked * (np.array(INK, np.float32) - picture)
    # Bounded, since it is computed far outside the subject too.
    shaded = colours * (1 + np.clip(sheen, -0.2, 0.2))[..., None]
    picture += filled[..., None] * (shaded - picture)

    if style == "striped":
        rows = np.arange(size) * SIZE // size % STRIPE >= STRIPE / 2
        picture[:, rows] *= np.float32(STRIPE_SHADE)
    # The subject's grain goes with it, the background's stands still.
    steps = np.floor(places[:, :2] * size / SIZE).astype(np.int64)
    pixels = np.arange(size)
    still = _hash(seeds ^ 0x5BD1, pixels[None], pixels[None])
    taken = _hash(seeds ^ 0x27D4, pixels - steps[:, :1], pixels - steps[:, 1:])
    picture += _grain(np.where(filled > 0.5, taken, still))
    return np.rint(np.clip(picture, 0, 255)).astype(np.uint8)


def _offsets(places: Float64[np.ndarray, "n 3"], size: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels' x [n 1 W] and y [n H 1] from the subject's centre, in units."""
    middles = (np.arange(size) + 0.5) * (SIZE / size)
    offsets = (middles - places[:, :2, None]).astype(np.float32)
    return offsets[:, 0, None, :], offsets[:, 1, :, None]


def cover(
    subjects: Integer[np.ndarray, "n"],
    places: Float64[np.ndarray, "n 3"],
    size: int,
    grow: float | Column = 0.0,
    hard: bool = False,
) -> Field:
    """How much of each pixel lies in the subject grown by so many units; 0 or 1 if `hard`."""
    dx, dy = _offsets(places, size)
    radius = places[:, 2, None, None].astype(np.float32)
    distance = np.empty((len(places), size, size), np.float32)
    for index in np.unique(subjects).tolist():
        each = subjects == index
        distance[each] = signed_distance(SUBJECTS[index], dx[each], dy[each], radius[each])
    distance = (np.asarray(grow, np.float32) - distance) * np.float32(size / SIZE)
    return (distance > 0).astype(np.float32) if hard else np.clip(distance + 0.5, 0, 1)


def signed_distance(subject: str, dx: np.ndarray, dy: np.ndarray, radius: Column) -> Field:
    """Units to the subject's edge, negative inside. Beyond corners it is the larger side's."""
    x, y = np.abs(dx), np.abs(dy)
    match subject:
        case "circle":
            return np.sqrt(dx * dx + dy * dy) - radius
        case "square":
            return np.maximum(x, y) - HALF_SIDE * radius
        case "triangle":
            return np.maximum(dy, np.float32(0.75**0.5) * x - dy / 2) - INRADIUS * radius
        case "cross":
            longer, shorter = np.maximum(x, y), np.minimum(x, y)
            return np.maximum(longer - ARM * radius, shorter - HALF_WIDTH * radius)
        case "ring":
            middle, half = (1 + HOLE) / 2, (1 - HOLE) / 2
            return np.abs(np.sqrt(dx * dx + dy * dy) - middle * radius) - half * radius
    raise UserError(f"subject is {subject!r}; it must be one of {', '.join(SUBJECTS)}")


def _texture(name: str, seeds: UInt32[np.ndarray, "n"], size: int) -> Field:
    """0 where the background is darkest, 1 where it is lightest; a star is far beyond."""
    units = np.arange(size) * SIZE // size
    shifts = _hash(seeds, np.arange(SIZE)[None], np.zeros((1, 1), int))[:, 0]  # n 32
    if name == "grass":  # Blades a unit wide and five high, that begin where they like.
        rows = (units[:, None] + (shifts >> 16)[:, None, units] % 5).astype(np.int64) // 5
        return _mix(rows * 0x9E37 + units + (shifts[:, :1, None] & 0xFFFF)).astype(
            np.float32
        ) / np.float32(2**32)
    middles = ((np.arange(size) + 0.5) * (SIZE / size)).astype(np.float32)
    if name == "sand":  # Ripples, six units apart.
        phases = (shifts[:, :2] >> 8).astype(np.float32) / np.float32(2**24)
        bend = 3 * _wave(middles / 20 + phases[:, :1])
        return _wave((middles[:, None] + bend[:, None]) / 6 + phases[:, 1:, None])
    if name == "snow":  # Soft drifts, eight units wide.
        knots = np.arange(SIZE // 8 + 1)[None]
        drifts = (_hash(seeds, knots, knots) >> 8).astype(np.float32) / np.float32(2**24)
        knot, between = np.divmod(middles / 8, 1)
        first = knot.astype(np.int64)
        drifts = drifts[:, first] * (1 - between)[:, None] + drifts[:, first + 1] * between[:, None]
        return drifts[:, :, first] * (1 - between) + drifts[:, :, first + 1] * between
    # Night: lighter towards the ground, and one unit in eighty is a star.
    stars = _hash(seeds, units[None], units[None]) < 2**32 // 80
    return np.where(stars, np.float32(6), (middles / SIZE)[:, None])


def _wave(x: np.ndarray) -> np.ndarray:
    """A triangle wave between 0 and 1, of period 1."""
    return np.abs(2 * (x - np.floor(x)) - 1)


def _grain(bits: UInt32[np.ndarray, "n H W"]) -> Float32[np.ndarray, "n H W 3"]:
    """Noise mostly of lightness, a little of colour, nearly normal as a sum of four bytes."""
    a, b, c, d = np.moveaxis(bits.astype("<u4")[..., None].view(np.uint8).astype(np.float32), -1, 0)
    byte = np.float32(GRAIN / (4 * (256**2 - 1) / 12) ** 0.5)
    light = (a + b + c + d - 510) * byte
    return np.stack([light + (a - b) * byte / 2, light, light + (c - d) * byte / 2], axis=-1)


def _hash(seeds: np.ndarray, x: np.ndarray, y: np.ndarray) -> UInt32[np.ndarray, "n H W"]:
    """Random bits of the pixel at x [n or 1, W] and y [n or 1, H], for each seed."""
    columns = _mix(x + seeds[:, None].astype(np.int64) * 0x3C6F)
    return _mix(columns[:, None] + y[:, :, None] * np.int64(0x85EBCA6B))


def _mix(values: np.ndarray) -> UInt32[np.ndarray, "*shape"]:
    """Chris Wellons' lowbias32 (github.com/skeeto/hash-prospector), of the lower 32 bits."""
    bits = values.astype(np.uint32)
    bits ^= bits >> 16
    bits *= np.uint32(0x7FEB352D)
    bits ^= bits >> 15
    bits *= np.uint32(0x846CA68B)
    bits ^= bits >> 16
    return bits
