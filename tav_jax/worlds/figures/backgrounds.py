"""Draw backgrounds: panoramas, of which an image shows a part."""

import math
from functools import lru_cache

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from tav_jax.worlds.figures.painting import (
    LOOKS,
    PENCIL,
    ZOOM,
    Colour,
    Shape,
    capsule,
    disc,
    ellipse,
    mix,
    outline_of,
    paint,
    polygon,
    tint_background,
)
from tav_jax.worlds.figures.scenes import BACKGROUNDS, SIZE, WIDEST_PAN

WIDTH = SIZE + 2 * WIDEST_PAN
HORIZON = 41.0


@lru_cache(maxsize=1024)
def panorama(background: str, style: str, view: int) -> UInt8[np.ndarray, "H W 3"]:
    """Return a background that is `WIDTH` pixels wide.

    Args:
        background: One of `BACKGROUNDS`.
        style: One of `STYLES`.
        view: Seed of where things are.
    """
    names = list(BACKGROUNDS)
    rng = np.random.default_rng((names.index(background), view))
    sky, ground, things = SCENERY[background](rng)
    image = Image.new("RGB", (WIDTH * ZOOM, SIZE * ZOOM))
    draw = ImageDraw.Draw(image)
    flat = style != "plain"
    _shade(draw, sky, 0, HORIZON, style, flat)
    _shade(draw, ground, HORIZON, SIZE, style, flat)
    look = LOOKS[style]
    for shape in things:
        colour = tint_background(shape.colour, style)
        if flat and shape.radius != 0.61:
            paint(draw, shape, outline_of(colour, look), 0.6 * look.outline)
        paint(draw, shape, colour)
    if style == "sketch":
        _hatch(draw, rng)
    pixels = np.array(image.reduce(ZOOM))
    pixels.flags.writeable = False  # the cache's
    return pixels


def _shade(
    draw: ImageDraw.ImageDraw,
    ends: tuple[Colour, Colour],
    top: float | int,
    bottom: float | int,
    style: str,
    flat: bool,
) -> None:
    """Paint a band from one colour at its top to another at its bottom, or in their mean."""
    for row in range(round(top * ZOOM), round(bottom * ZOOM)):
        share = 0.5 if flat else (row / ZOOM - top) / (bottom - top)
        colour = tint_background(mix(*ends, share), style)
        draw.line([(0, row), (WIDTH * ZOOM, row)], colour)


def _hatch(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Draw the strokes of a pencil, and the horizon."""
    tone = mix(PENCIL, (252, 250, 244), 0.45)
    for x in np.arange(-SIZE, WIDTH, 4.5) + rng.uniform(-0.7, 0.7, math.ceil((WIDTH + SIZE) / 4.5)):
        start, end = sorted(rng.uniform(0, SIZE, 2).tolist())
        line = [((x + start) * ZOOM, start * ZOOM), ((x + end) * ZOOM, end * ZOOM)]
        draw.line(line, tone, 2)
    draw.line([(0, HORIZON * ZOOM), (WIDTH * ZOOM, HORIZON * ZOOM)], PENCIL, 3)


Scenery = tuple[tuple[Colour, Colour], tuple[Colour, Colour], list[Shape]]


def _snow(rng: np.random.Generator) -> Scenery:
    things: list[Shape] = []
    for x in np.arange(4, WIDTH, 24) + rng.uniform(-6, 6, 5):
        top, half = HORIZON - rng.uniform(17, 29), rng.uniform(15, 21)
        peak = (x, top)
        things.append(polygon([(x - half, HORIZON), peak, (x + half, HORIZON)], (104, 124, 156)))
        part = 0.36
        left = (x - part * half, top + part * (HORIZON - top))
        right = (x + part * half, top + part * (HORIZON - top))
        notch = [(x + 0.15 * half, left[1] - 2), (x, left[1] + 1), (x - 0.15 * half, left[1] - 2)]
        things.append(polygon([peak, right, *notch, left], (244, 248, 252)))
    for x, y in zip(rng.uniform(0, WIDTH, 6), rng.uniform(HORIZON + 4, SIZE, 6), strict=True):
        things.append(capsule((x - 5, y), (x + 5, y + 0.6), 1.22, (206, 220, 238)))
    return ((134, 184, 232), (190, 216, 240)), ((232, 240, 248), (246, 249, 252)), things


def _beach(rng: np.random.Generator) -> Scenery:
    things = [
        polygon([(0, HORIZON - 10), (WIDTH, HORIZON - 10), (WIDTH, HORIZON), (0, HORIZON)], SEA)
    ]
    for x in np.arange(3, WIDTH, 11) + rng.uniform(-3, 3, 10):
        y = HORIZON - rng.uniform(2.5, 8)
        things.append(capsule((x - 2.5, y), (x + 2.5, y), 1.22, (150, 216, 226)))
    sun = rng.uniform(8, WIDTH - 8)
    things.append(disc((sun, 10), 5, (255, 226, 90)))
    for x in np.arange(12, WIDTH, 52) + rng.uniform(-10, 10, 2):
        x = min(x, WIDTH - 8.0)
        top = (x + 4, HORIZON - 27)
        things.append(capsule((x, HORIZON + 4), top, 2.6, (150, 104, 60)))
        for angle in (-170, -140, -40, -10, 25, 155):
            tip = (
                top[0] + 9 * math.cos(math.radians(angle)),
                top[1] + 3 + 8 * math.sin(math.radians(angle)),
            )
            things.append(capsule(top, tip, 2.4, (44, 140, 62)))
    return ((120, 198, 240), (196, 230, 246)), ((236, 208, 144), (226, 192, 122)), things


SEA = (24, 128, 178)


def _forest(rng: np.random.Generator) -> Scenery:
    things: list[Shape] = []
    for x in np.arange(0, WIDTH, 13) + rng.uniform(-4, 4, 9):
        width = rng.uniform(3, 5)
        things.append(capsule((x, 10), (x, HORIZON + 1), width, (98, 68, 44)))
        for _ in range(2):
            leaf = (x + rng.uniform(-4, 4), rng.uniform(4, 15))
            tone = mix((34, 100, 44), (66, 138, 62), rng.random())
            things.append(disc(leaf, rng.uniform(6, 9), tone))
    for x in np.arange(4, WIDTH, 16) + rng.uniform(-5, 5, 7):
        bush = (x, HORIZON + rng.uniform(0, 1))
        things.append(ellipse(bush, (rng.uniform(4, 7), rng.uniform(2, 4)), (48, 116, 52)))
    for x, y in zip(rng.uniform(0, WIDTH, 8), rng.uniform(HORIZON + 5, SIZE, 8), strict=True):
        things.append(capsule((x, y), (x + 1, y - 2), 1.22, (64, 122, 50)))
    return ((150, 190, 140), (176, 206, 156)), ((112, 160, 76), (92, 138, 60)), things


def _moon(rng: np.random.Generator) -> Scenery:
    things: list[Shape] = []
    for x, y in zip(rng.uniform(0, WIDTH, 34), rng.uniform(1, HORIZON - 3, 34), strict=True):
        things.append(Shape("disc", ((x, y),), (250, 250, 230), 0.61))
    earth = rng.uniform(8, WIDTH - 8), rng.uniform(8, 14)
    things.append(disc(earth, 6, (50, 120, 220)))
    things.append(ellipse((earth[0] - 1, earth[1] + 1), (3.2, 2), (70, 170, 90), 0.5))
    for x in np.arange(4, WIDTH, 15) + rng.uniform(-5, 5, 8):
        y, wide = rng.uniform(HORIZON + 3, SIZE - 2), rng.uniform(3, 7)
        things.append(ellipse((x, y), (wide, wide * 0.36), (112, 112, 122)))
        things.append(ellipse((x + 0.6, y + 0.5), (wide * 0.75, wide * 0.24), (134, 134, 144)))
    return ((16, 16, 44), (34, 36, 84)), ((156, 156, 164), (172, 172, 178)), things


def _street(rng: np.random.Generator) -> Scenery:
    things: list[Shape] = []
    x = -rng.uniform(0, 8)
    bricks = [(186, 92, 72), (206, 158, 110), (150, 140, 150), (120, 134, 160)]
    which = int(rng.integers(len(bricks)))
    while x < WIDTH:
        wide, top = rng.uniform(15, 21), rng.uniform(5, 16)
        which = (which + int(rng.integers(1, len(bricks)))) % len(bricks)
        corners = [(x, top), (x + wide, top), (x + wide, HORIZON), (x, HORIZON)]
        things.append(polygon(corners, bricks[which]))
        for left in (x + 2.5, x + wide / 2 + 1.2):
            for y in np.arange(top + 3, HORIZON - 6, 8.5):
                a, b = left, left + wide / 2 - 4
                window = [(a, y), (b, y), (b, y + 4.5), (a, y + 4.5)]
                things.append(polygon(window, (236, 232, 176)))
        x += wide
    path = [(0, HORIZON), (WIDTH, HORIZON), (WIDTH, HORIZON + 4), (0, HORIZON + 4)]
    things.append(polygon(path, (190, 188, 184)))
    for x in np.arange(rng.uniform(-8, 0), WIDTH, 16):
        dash = [(x, SIZE - 5), (x + 8, SIZE - 5), (x + 7, SIZE - 3), (x - 1, SIZE - 3)]
        things.append(polygon(dash, (236, 236, 232)))
    return ((168, 206, 232), (204, 224, 236)), ((104, 104, 112), (88, 88, 96)), things


SCENERY = {
    "snow": _snow,
    "beach": _beach,
    "forest": _forest,
    "moon": _moon,
    "street": _street,
}
