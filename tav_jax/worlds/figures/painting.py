"""Paint shapes with Pillow at four times the image's size."""

import colorsys
import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import ImageDraw

from tav_jax.worlds.figures.poses import Number, Point

ZOOM = 4  # canvas pixels in an image pixel, along each axis

Colour = tuple[int, int, int]

INK = (24, 22, 26)
PENCIL = (74, 72, 78)


class Shape(NamedTuple):
    """A shape to paint.

    Args:
        kind: "polygon" for corners, "capsule" for a thick line with round ends, or "disc".
        points: The corners, the two ends, or the middle.
        colour: What it is filled with.
        radius: Half the width of a capsule, or a disc's radius.
    """

    kind: str
    points: Sequence[Point]
    colour: Colour
    radius: Number = 0.0


def capsule(start: Point, end: Point, width: Number, colour: Colour) -> Shape:
    """Return a thick line with round ends."""
    return Shape("capsule", (start, end), colour, width / 2)


def disc(middle: Point, radius: Number, colour: Colour) -> Shape:
    """Return a filled circle."""
    return Shape("disc", (middle,), colour, radius)


def polygon(points: Sequence[Point], colour: Colour) -> Shape:
    """Return a filled polygon."""
    return Shape("polygon", points, colour)


def ellipse(middle: Point, radii: Point, colour: Colour, tilt: Number = 0.0) -> Shape:
    """Return a filled ellipse, turned clockwise by `tilt` radians."""
    turned = math.cos(tilt), math.sin(tilt)
    points = []
    for i in range(20):
        x, y = radii[0] * math.cos(i * math.pi / 10), radii[1] * math.sin(i * math.pi / 10)
        points.append(
            (middle[0] + x * turned[0] - y * turned[1], middle[1] + x * turned[1] + y * turned[0])
        )
    return Shape("polygon", points, colour)


def paint(draw: ImageDraw.ImageDraw, shape: Shape, colour: Colour, grow: Number = 0.0) -> None:
    """Paint a shape in a colour, enlarged by `grow` pixels on all sides."""
    # Rounded, because sines differ in their last bit between machines.
    points = [(round(x * ZOOM * 8) / 8, round(y * ZOOM * 8) / 8) for x, y in shape.points]
    reach = (shape.radius + grow) * ZOOM
    match shape.kind:
        case "polygon":
            draw.polygon(points, fill=colour)
            if grow > 0:
                draw.line([*points, *points[:2]], colour, round(2 * grow * ZOOM), joint="curve")
        case "capsule":
            draw.line(points, colour, max(1, round(2 * reach)))
            for point in points:
                draw.circle(point, reach, colour)
        case "disc":
            draw.circle(points[0], reach, colour)


def mix(a: Colour, b: Colour, share: Number) -> Colour:
    """Return a colour between two: `a` at 0, `b` at 1."""
    red, green, blue = (round(x + share * (y - x)) for x, y in zip(a, b, strict=True))
    return red, green, blue


def saturate(colour: Colour, factor: Number, lightness: Number = 0.0) -> Colour:
    """Return a colour of another saturation and lightness, both bounded."""
    hue, light, saturation = colorsys.rgb_to_hls(*(value / 255 for value in colour))
    light = min(max(light + lightness, 0.0), 1.0)
    red, green, blue = colorsys.hls_to_rgb(hue, light, min(saturation * factor, 1.0))
    return round(255 * red), round(255 * green), round(255 * blue)


class Look(NamedTuple):
    """How a style paints figures.

    Args:
        outline: Width of the outline, in pixels.
        ink: The outline's colour, or None for a darker or lighter tone of what it is around.
    """

    outline: float
    ink: Colour | None


LOOKS = {
    "plain": Look(0.35, None),
    "cartoon": Look(1.0, INK),
    "sketch": Look(0.6, PENCIL),
}


def tint(colour: Colour, style: str) -> Colour:
    """Return a figure's colour in a style."""
    match style:
        case "cartoon":
            return saturate(colour, 1.35)
        case "sketch":
            return mix(saturate(colour, 0.9), (252, 250, 244), 0.42)
        case _:
            return colour


def tint_background(colour: Colour, style: str) -> Colour:
    """Return a background's colour in a style."""
    match style:
        case "cartoon":
            return saturate(colour, 1.7, 0.03)
        case "sketch":
            return mix(saturate(colour, 0.45), (252, 250, 244), 0.66)
        case _:
            return colour


def outline_of(colour: Colour, look: Look) -> Colour:
    """Return the colour of the outline around a colour."""
    if look.ink:
        return look.ink
    # Dark fur before a dark sky needs a lighter edge.
    return mix(colour, (120, 120, 130), 0.55) if max(colour) < 70 else mix(colour, INK, 0.5)
