"""Draw scenes as images and clips, and give the ground truth.

Figures are painted at four times the size and reduced, so edges are smooth. Everything random
comes from the scene.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import einops
import numpy as np
from jaxtyping import Float, Float32, Float64, UInt8
from PIL import Image, ImageDraw

from tav_jax.worlds.figures.backgrounds import panorama
from tav_jax.worlds.figures.bodies import parts
from tav_jax.worlds.figures.painting import LOOKS, ZOOM, Point, Shape, outline_of, paint, tint
from tav_jax.worlds.figures.poses import Pose, along, pose
from tav_jax.worlds.figures.scenes import SIZE, SLOPE, STEPS_PER_PERIOD, WIDEST_PAN, Scene

SHADOW = 0.38  # how much darker the ground is under a figure


class Truth(NamedTuple):
    """Where a figure is, in pixels, and what it does.

    Args:
        centre: The middle of the figure's torso.
        phase: The visible phase of the verb, from 0 to 1.
        mask: Share of each pixel that the figure and its props cover.
    """

    centre: Float64[np.ndarray, "f 2"]
    phase: Float64[np.ndarray, "f"]
    mask: Float32[np.ndarray, "f H W"]


def render(scene: Scene, frames: int) -> UInt8[np.ndarray, "f H W 3"]:
    """Return a scene's clip, from time 0 to time 1, both included."""
    return draw_clip(scene, frames)[0]


def truth(scene: Scene, frames: int) -> Truth:
    """Return the ground truth of each frame of `render(scene, frames)`."""
    times = np.linspace(0, 1, frames).tolist()
    return Truth(
        np.array([centre(scene, time) for time in times]),
        np.array([visible_phase(scene, time) for time in times]),
        draw_clip(scene, frames)[1],
    )


def draw_clip(
    scene: Scene, frames: int
) -> tuple[UInt8[np.ndarray, "f H W 3"], Float32[np.ndarray, "f H W"]]:
    """Return a scene's clip, and the share of each pixel that the figure covers."""
    return draw_batch([scene] * frames, np.linspace(0, 1, frames))


def draw_batch(
    scenes: Sequence[Scene], times: Float[np.ndarray, "n"]
) -> tuple[UInt8[np.ndarray, "n H W 3"], Float32[np.ndarray, "n H W"]]:
    """Return one image of each scene at its time from 0 to 1, and what its figure covers."""
    images = np.empty((len(scenes), SIZE, SIZE, 3), np.uint8)
    masks = np.empty((len(scenes), SIZE, SIZE), np.float32)
    for i, (scene, time) in enumerate(zip(scenes, times.tolist(), strict=True)):
        images[i], masks[i] = _draw(scene, time)
    return images, masks


def render_batch(
    scenes: Sequence[Scene], times: Float[np.ndarray, "n"]
) -> UInt8[np.ndarray, "n H W 3"]:
    """Return one image of each scene, at its time from 0 to 1."""
    return draw_batch(scenes, times)[0]


def cover(mask: Float32[np.ndarray, "n H W"], factor: int) -> Float32[np.ndarray, "n h w"]:
    """Return the share of each latent pixel that a figure covers, from the share of each pixel."""
    return einops.reduce(mask, "n (h a) (w b) -> n h w", "mean", a=factor, b=factor)


def phase_at(scene: Scene, time: float | int) -> float:
    """Return the phase of the verb's period at a time."""
    return (scene.phase + scene.periods * time) % 1


def visible_phase(scene: Scene, time: float | int) -> float:
    """Return the phase that a still shows: after half a stride, the legs have changed places."""
    return phase_at(scene, time) * STEPS_PER_PERIOD.get(scene.verb, 1) % 1


def phases_apart(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Return how far phases are from one another, from 0 to 1/2 of a period."""
    return np.abs((a - b + 0.5) % 1 - 0.5)


def centre(scene: Scene, time: float | int) -> Point:
    """Return where the middle of the figure's torso is at a time, in pixels."""
    held = pose(scene.verb, phase_at(scene, time))
    middle = along(held.hips, (held.chest[0] - held.hips[0], held.chest[1] - held.hips[1]), 0.5)
    return _place(scene, time, held)(middle)


def pan_at(scene: Scene, time: float | int) -> int:
    """Return where in its panorama an image begins at a time, in pixels from the left."""
    return round(WIDEST_PAN + scene.pan * time)


def _place(scene: Scene, time: float | int, held: Pose) -> Callable[[Point], Point]:
    """Return the function from a pose's coordinates to the image's."""
    foot_x = scene.x + scene.facing * scene.travel * time
    foot_y = scene.ground + (SLOPE * scene.travel * time if scene.verb == "skiing" else 0.0)
    anchor = held.chest[0] / 2

    def to_image(point: Point) -> Point:
        x = foot_x + scene.facing * scene.scale * (point[0] - anchor)
        return x, foot_y + scene.scale * (point[1] - held.ground)

    return to_image


def _draw(
    scene: Scene, time: float
) -> tuple[UInt8[np.ndarray, "H W 3"], Float32[np.ndarray, "H W"]]:
    held = pose(scene.verb, phase_at(scene, time))
    to_image = _place(scene, time, held)
    look = LOOKS[scene.style]
    canvas = Image.new("RGBA", (SIZE * ZOOM, SIZE * ZOOM))
    draw = ImageDraw.Draw(canvas)
    for part in parts(scene.subject, scene.clothes, scene.verb, held):
        shapes = [
            Shape(
                shape.kind,
                [to_image(point) for point in shape.points],
                tint(shape.colour, scene.style),
                shape.radius * scene.scale,
            )
            for shape in part
        ]
        small = max(shape.radius for shape in shapes) < 1.2 and shapes[0].kind != "polygon"
        if not small or scene.verb == "skiing":
            for shape in shapes:
                paint(draw, shape, outline_of(shape.colour, look), look.outline * (1 - 0.5 * small))
        for shape in shapes:
            paint(draw, shape, shape.colour)
    figure = np.asarray(canvas.reduce(ZOOM), np.float32)
    mask = figure[..., 3] * np.float32(1 / 255)

    left = pan_at(scene, time)
    image = panorama(scene.background, scene.style, scene.view)[:, left : left + SIZE]
    x, y = to_image((held.chest[0] / 2, held.ground))
    ground = _shadow(image.astype(np.float32), x, y, scene, held)
    image = ground + mask[..., None] * (figure[..., :3] - ground)
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8), mask


def _shadow(
    image: Float32[np.ndarray, "H W 3"], x: float, y: float, scene: Scene, held: Pose
) -> Float32[np.ndarray, "H W 3"]:
    """Return the background with the figure's shadow on the ground."""
    wide = scene.scale * (20.0 if scene.verb == "doing push-ups" else 11.0 - 0.35 * held.lift)
    middles = np.arange(SIZE, dtype=np.float32) + np.float32(0.5)
    squared = ((middles - x) / wide) ** 2 + (((middles - y) / 2.4) ** 2)[:, None]
    share = SHADOW * np.clip(2 * (1 - squared), 0, 1)
    return image * (1 - share[..., None]).astype(np.float32)
