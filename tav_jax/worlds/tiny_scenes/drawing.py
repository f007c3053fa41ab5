"""Draw scenes as images and clips, and give the ground truth.

Images are computed with integers and with +, -, *, / and sqrt only. IEEE 754 defines how these are
rounded, so a scene is the same image on every machine.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Integer, UInt8, UInt32

from tav_jax.errors import UserError
from tav_jax.worlds.tiny_scenes.scenes import (
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

OUTLINE = (0.4, 0.7)  # width of a line drawing's outline inside and outside the edge
INK = (24, 22, 26)
PALER = 0.6  # how much whiter its background is
FILL_PALER = 0.15  # how much whiter its subject is
STRIPE = 4.0  # two light rows and two dark ones
STRIPE_SHADE = 0.55
CELL = 2.0  # side of pixel art's cells
GRAIN = 7.0  # standard deviation, in levels of 255
SHEEN = 0.12  # a subject is lighter at its upper left edge, by this part

CHUNK = 64  # images that are drawn at once; what fits a cache is twice as fast

Field = Float32[np.ndarray, "n H W"]
Column = Float[np.ndarray, "n 1 1"]


class Truth(NamedTuple):
    """Where the subject is, in pixels, and how much of each pixel it covers."""

    centre: Float64[np.ndarray, "f 2"]
    radius: Float64[np.ndarray, "f"]
    mask: Float32[np.ndarray, "f H W"]


def render(scene: Scene, frames: int, size: int = SIZE) -> UInt8[np.ndarray, "f H W 3"]:
    """Return a scene's clip, from time 0 to time 1, both included."""
    return render_batch([scene] * frames, np.linspace(0, 1, frames), size)


def truth(scene: Scene, frames: int, size: int = SIZE) -> Truth:
    """Return the ground truth of each frame of `render(scene, frames, size)`."""
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
    """Return the subject's x, y and radius at a time from 0 to 1, in units."""
    travel, x, y, radius = scene.travel, scene.x, scene.y, scene.radius
    match scene.motion:
        case "right":
            x += travel * time
        case "left":
            x -= travel * time
        case "up":
            y -= travel * time
        case "falling":
            y += travel * time**2
        case "bouncing":  # twice
            part = 2 * time % 1
            y -= travel * 4 * part * (1 - part)
        case "growing":
            radius += travel * time
        case "circling":  # once, clockwise from the top
            x += travel * float(np.sin(2 * np.pi * time)) / 2
            y += travel * (1 - float(np.cos(2 * np.pi * time))) / 2
    # Rounded, because sines differ in their last bit between machines.
    return round(x * 1024) / 1024, round(y * 1024) / 1024, round(radius * 1024) / 1024


def render_batch(
    scenes: Sequence[Scene], times: Float[np.ndarray, "n"], size: int = SIZE
) -> UInt8[np.ndarray, "n H W 3"]:
    """Return one image of each scene, at its time from 0 to 1."""
    images = np.empty((len(scenes), size, size, 3), np.uint8)
    styles = np.array([scene.style for scene in scenes])
    for style in np.unique(styles).tolist():
        chosen = np.flatnonzero(styles == style)
        for i in range(0, len(chosen), CHUNK):
            part = chosen[i : i + CHUNK].tolist()
            few, moments = [scenes[j] for j in part], [float(times[j]) for j in part]
            if style == "pixel art":
                images[part] = enlarge(_draw(few, moments, cells_of(size), style), size)
            else:
                images[part] = _draw(few, moments, size, style)
    return images


def cells_of(size: int) -> int:
    """Return the number of pixel art's cells along a side of `size` pixels."""
    cells = round(SIZE / CELL)
    if size % cells:
        raise UserError(f"size is {size}; for pixel art it must be a multiple of {cells}")
    return cells


def enlarge(images: np.ndarray, size: int) -> np.ndarray:
    """Return images enlarged by a whole factor to `size` pixels a side."""
    factor = size // images.shape[1]
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def _draw(
    scenes: list[Scene], times: list[float], size: int, style: str
) -> UInt8[np.ndarray, "n H W 3"]:
    lined = style == "line drawing"
    places = np.array([place(*each) for each in zip(scenes, times, strict=True)])
    subjects = np.array([SUBJECTS.index(scene.subject) for scene in scenes])
    grounds = np.array([scene.background for scene in scenes])
    seeds = np.array([scene.seed for scene in scenes], np.uint32)
    colours = np.array([COLOURS[scene.colour] for scene in scenes], np.float32)[:, None, None]

    image = np.empty((len(scenes), size, size, 3), np.float32)
    for name in np.unique(grounds).tolist():
        chosen = np.flatnonzero(grounds == name)
        dark, light = np.array(BACKGROUNDS[name], np.float32)
        image[chosen] = dark + (light - dark) * _texture(name, seeds[chosen], size)[..., None]
    if lined:
        image += np.float32(PALER) * (255 - image)
        colours = colours + np.float32(FILL_PALER) * (255 - colours)

    dx, dy = _offsets(places, size)
    sheen = np.float32(-SHEEN / 2) * (dx + dy) / places[:, 2, None, None].astype(np.float32)
    filled = cover(subjects, places, size, -OUTLINE[0] if lined else 0.0, style == "pixel art")
    if lined:
        inked = cover(subjects, places, size, OUTLINE[1])[..., None]
        image += inked * (np.array(INK, np.float32) - image)
    # Bounded, because it is computed far outside the subject too.
    shaded = colours * (1 + np.clip(sheen, -0.2, 0.2))[..., None]
    image += filled[..., None] * (shaded - image)

    if style == "striped":
        rows = np.arange(size) * SIZE // size % STRIPE >= STRIPE / 2
        image[:, rows] *= np.float32(STRIPE_SHADE)
    # The subject's grain moves with it, and the background's does not move.
    steps = np.floor(places[:, :2] * size / SIZE).astype(np.int64)
    pixels = np.arange(size)
    still = _hash(seeds ^ 0x5BD1, pixels[None], pixels[None])
    taken = _hash(seeds ^ 0x27D4, pixels - steps[:, :1], pixels - steps[:, 1:])
    image += _grain(np.where(filled > 0.5, taken, still))
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)


def _offsets(places: Float64[np.ndarray, "n 3"], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels' x [n 1 W] and y [n H 1] from the subject's centre, in units."""
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
    """Return the share of each pixel that a subject covers.

    Args:
        subjects: Index of each image's subject in `SUBJECTS`.
        places: Its x, y and radius, in units.
        size: Side of the images, in pixels.
        grow: Units by which the subject is enlarged at its edge.
        hard: Round the shares to 0 or 1.
    """
    dx, dy = _offsets(places, size)
    radius = places[:, 2, None, None].astype(np.float32)
    distance = np.empty((len(places), size, size), np.float32)
    for index in np.unique(subjects).tolist():
        each = subjects == index
        distance[each] = signed_distance(SUBJECTS[index], dx[each], dy[each], radius[each])
    distance = (np.asarray(grow, np.float32) - distance) * np.float32(size / SIZE)
    return (distance > 0).astype(np.float32) if hard else np.clip(distance + 0.5, 0, 1)


def signed_distance(subject: str, dx: np.ndarray, dy: np.ndarray, radius: Column) -> Field:
    """Return the distance to the subject's edge in units, negative inside.

    Beyond corners it is the larger distance to the two sides.
    """
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
    """Return 0 where the background is darkest and 1 where it is lightest. Stars are beyond 1."""
    units = np.arange(size) * SIZE // size
    shifts = _hash(seeds, np.arange(SIZE)[None], np.zeros((1, 1), int))[:, 0]  # n 32
    if name == "grass":  # blades, a unit wide and five high, each with its own offset
        rows = (units[:, None] + (shifts >> 16)[:, None, units] % 5).astype(np.int64) // 5
        return _mix(rows * 0x9E37 + units + (shifts[:, :1, None] & 0xFFFF)).astype(
            np.float32
        ) / np.float32(2**32)
    middles = ((np.arange(size) + 0.5) * (SIZE / size)).astype(np.float32)
    if name == "sand":  # ripples, six units apart
        phases = (shifts[:, :2] >> 8).astype(np.float32) / np.float32(2**24)
        bend = 3 * _wave(middles / 20 + phases[:, :1])
        return _wave((middles[:, None] + bend[:, None]) / 6 + phases[:, 1:, None])
    if name == "snow":  # soft drifts, eight units wide
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
    """Return a triangle wave between 0 and 1, of period 1."""
    return np.abs(2 * (x - np.floor(x)) - 1)


def _grain(bits: UInt32[np.ndarray, "n H W"]) -> Float32[np.ndarray, "n H W 3"]:
    """Return noise, mostly in lightness, nearly normal because it is a sum of four bytes."""
    a, b, c, d = np.moveaxis(bits.astype("<u4")[..., None].view(np.uint8).astype(np.float32), -1, 0)
    byte = np.float32(GRAIN / (4 * (256**2 - 1) / 12) ** 0.5)
    light = (a + b + c + d - 510) * byte
    return np.stack([light + (a - b) * byte / 2, light, light + (c - d) * byte / 2], axis=-1)


def _hash(seeds: np.ndarray, x: np.ndarray, y: np.ndarray) -> UInt32[np.ndarray, "n H W"]:
    """Return random bits for the pixel at x [n or 1, W] and y [n or 1, H], for each seed."""
    columns = _mix(x + seeds[:, None].astype(np.int64) * 0x3C6F)
    return _mix(columns[:, None] + y[:, :, None] * np.int64(0x85EBCA6B))


def _mix(values: np.ndarray) -> UInt32[np.ndarray, "*shape"]:
    """Return Chris Wellons' lowbias32 of the lower 32 bits (github.com/skeeto/hash-prospector)."""
    bits = values.astype(np.uint32)
    bits ^= bits >> 16
    bits *= np.uint32(0x7FEB352D)
    bits ^= bits >> 15
    bits *= np.uint32(0x846CA68B)
    bits ^= bits >> 16
    return bits
