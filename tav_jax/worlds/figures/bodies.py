"""Give a posed figure its body: heads, clothes and what it holds."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from tav_jax.worlds.figures.painting import (
    Colour,
    Point,
    Shape,
    capsule,
    disc,
    ellipse,
    mix,
    polygon,
)
from tav_jax.worlds.figures.poses import HEAD, Limb, Pose, along, direction, guitar

WEARABLE = {
    "red": (214, 34, 34),
    "blue": (34, 84, 226),
    "yellow": (252, 212, 20),
    "purple": (146, 46, 190),
}
BLACK = (30, 28, 32)
WHITE = (240, 240, 240)
WOOD, DARK_WOOD = (206, 120, 40), (90, 52, 30)
SKI, POLE = (226, 60, 130), (70, 74, 84)


class Body(NamedTuple):
    """What a subject looks like.

    Args:
        skin: Colour of head and hands.
        top: Colour of the torso in its own clothes.
        sleeve: Colour of the arms.
        leg: Colour of the legs.
        foot: Colour of the feet.
        torso: Width of the torso.
        arm: Width of the arms.
        thigh: Width of the legs.
    """

    skin: Colour
    top: Colour
    sleeve: Colour
    leg: Colour
    foot: Colour
    torso: float | int
    arm: float | int
    thigh: float | int


BODIES = {
    "man": Body((240, 190, 150), (60, 130, 110), (60, 130, 110), (62, 66, 84), BLACK, 9.5, 4.2, 5),
    "woman": Body(
        (250, 206, 176), (240, 120, 170), (250, 206, 176), (250, 206, 176), (170, 40, 90), 8, 3.6, 4
    ),
    "panda": Body(WHITE, WHITE, BLACK, BLACK, BLACK, 13, 5.4, 6.2),
    "bear": Body(
        (146, 90, 46), (146, 90, 46), (132, 80, 40), (132, 80, 40), (112, 66, 32), 13, 5.4, 6.2
    ),
    "astronaut": Body(
        (236, 238, 242),
        (232, 234, 240),
        (222, 226, 234),
        (222, 226, 234),
        (120, 126, 140),
        12,
        5.6,
        6,
    ),
    "robot": Body(
        (120, 196, 200),
        (96, 170, 178),
        (150, 160, 168),
        (150, 160, 168),
        (84, 94, 104),
        11,
        3.4,
        3.8,
    ),
}


def parts(subject: str, clothes: str, verb: str, held: Pose) -> Iterator[list[Shape]]:
    """Yield a figure's parts from back to front. Each part gets its own outline."""
    body = BODIES[subject]
    worn = WEARABLE.get(clothes)
    if worn:
        body = body._replace(top=worn)
        if subject in ("man", "astronaut"):
            body = body._replace(sleeve=worn, leg=mix(worn, BLACK, 0.18))
    frontal = held.turned == 0
    dark = 0.0 if frontal else 0.22  # the farther limbs are in the shade
    far_arm, near_arm = held.arms
    far_leg, near_leg = held.legs
    if subject == "astronaut" and not frontal:
        middle = along(held.chest, _unit(held.hips, held.chest), -4.5)
        yield [disc(along(middle, _across(held), -6.5), 4.4, (150, 156, 170))]
    if subject == "woman":
        yield _hair_behind(held)
    if verb == "skiing":
        yield _ski(far_leg.end, held, 0.3)
        yield _pole(far_arm)
    if not frontal:
        yield _arm(far_arm, body, worn, subject, dark)
    yield _leg(far_leg, body, worn, subject, dark)
    yield _leg(near_leg, body, worn, subject, 0.0)
    yield _torso(held, body, subject, worn)
    if frontal and verb != "playing guitar":
        yield _arm(far_arm, body, worn, subject, 0.0)
    yield from _head(subject, body, held)
    if verb == "playing guitar":
        yield _guitar(held)
        yield _arm(far_arm, body, worn, subject, 0.0)
    if verb == "skiing":
        yield _ski(near_leg.end, held, 0.0)
        yield _pole(near_arm)
    yield _arm(near_arm, body, worn, subject, 0.0)


def _unit(start: Point, end: Point) -> Point:
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy)
    return dx / length, dy / length


def _across(held: Pose) -> Point:
    """Return the direction from the back to the chest, seen from the side."""
    up = _unit(held.hips, held.chest)
    return -up[1], up[0]


def _arm(arm: Limb, body: Body, worn: Colour | None, subject: str, dark: float) -> list[Shape]:
    upper = lower = body.sleeve
    if worn:
        upper = worn
    shapes = [
        capsule(arm.root, arm.joint, body.arm, mix(upper, BLACK, dark)),
        capsule(arm.joint, arm.end, body.arm, mix(lower, BLACK, dark)),
    ]
    hand = BODIES[subject].foot if subject == "robot" else body.skin
    if subject in ("panda", "bear"):
        hand = lower
    if subject == "astronaut":
        hand = body.foot
    shapes.append(disc(arm.end, body.arm * 0.58, mix(hand, BLACK, dark)))
    if subject == "robot":
        shapes.append(disc(arm.joint, body.arm * 0.66, mix(body.foot, BLACK, dark)))
    return shapes


def _leg(leg: Limb, body: Body, worn: Colour | None, subject: str, dark: float) -> list[Shape]:
    upper = lower = body.leg
    if worn and subject in ("panda", "bear", "robot"):
        upper = mix(worn, BLACK, 0.18)
    way = _unit(leg.joint, leg.end)
    toe = (leg.end[0] + 1.8 * abs(way[1]) + 0.4, leg.end[1] + 0.3)
    return [
        capsule(leg.root, leg.joint, body.thigh, mix(upper, BLACK, dark)),
        capsule(leg.joint, leg.end, body.thigh * 0.9, mix(lower, BLACK, dark)),
        capsule(leg.end, toe, body.thigh * 0.85, mix(body.foot, BLACK, dark)),
    ]


def _torso(held: Pose, body: Body, subject: str, worn: Colour | None) -> list[Shape]:
    hips, chest, width = held.hips, held.chest, body.torso
    up = _unit(hips, chest)
    across = _across(held)
    if held.turned:
        width *= 0.86
    if subject == "robot":
        corners = [
            along(along(middle, up, lift), across, side * width / 2)
            for middle, lift, side in (
                (hips, -1.5, -1),
                (hips, -1.5, 1),
                (chest, 1, 1),
                (chest, 1, -1),
            )
        ]
        middle = along(hips, up, 7.5)
        light = disc(middle, 1.7, (250, 200, 60) if worn != WEARABLE["yellow"] else (220, 60, 60))
        return [polygon(corners, body.top), light]
    if subject == "woman":
        hem = along(hips, up, -5.0)
        corners = [
            along(hem, across, -7.4 if not held.turned else -6.4),
            along(hem, across, 7.4 if not held.turned else 6.4),
            along(along(chest, up, 0.5), across, 3.2),
            along(along(chest, up, 0.5), across, -3.2),
        ]
        return [
            polygon(corners, body.top),
            capsule(chest, along(hips, up, 3.0), width * 0.8, body.top),
        ]
    if subject in ("panda", "bear"):
        middle = along(hips, up, 5.0)
        tilt = math.atan2(up[0], -up[1])
        shapes = [ellipse(middle, (width / 2, 8.6), body.top, tilt)]
        if subject == "bear" and not worn:
            belly = along(middle, across, 1.5 if held.turned else 0.0)
            shapes.append(ellipse(belly, (width * 0.3, 5.4), (206, 156, 100), tilt))
        if subject == "panda" and not worn:
            shapes.append(capsule(along(chest, across, -3), along(chest, across, 3), 4.5, BLACK))
        return shapes
    shapes = [capsule(along(chest, up, -width * 0.4), along(hips, up, 0.8), width, body.top)]
    if subject == "astronaut":
        pack = along(along(hips, up, 6.5), across, 1.5 if held.turned else 0.0)
        shapes.append(ellipse(pack, (2.6, 2.0), (70, 120, 200), math.atan2(up[0], -up[1])))
    return shapes


def _hair_behind(held: Pose) -> list[Shape]:
    x, y = held.head
    back = -2.4 * held.turned
    down = (x + back - 1.5 * held.turned, y + 6.0)
    return [
        disc((x + back * 0.4, y - 0.4), HEAD + 0.9, (226, 150, 40)),
        capsule((down[0] - 3, down[1]), (down[0] + 3, down[1]), 8.0, (226, 150, 40)),
    ]


def _head(subject: str, body: Body, held: Pose) -> Iterator[list[Shape]]:
    """Yield the parts of the head, which is turned and looks forwards as far as the pose says."""
    turned = held.turned

    def at(x: float | int, y: float | int) -> Point:
        """Return a point of the face, whose features move forwards as it turns."""
        x += 0.34 * turned
        cos, sin = math.cos(held.tilt), math.sin(held.tilt)
        return (
            held.head[0] + HEAD * (x * cos - y * sin),
            held.head[1] + HEAD * (x * sin + y * cos),
        )

    def on(x: float | int, y: float | int) -> Point:
        """Return a point of the skull."""
        return at(x - 0.34 * turned, y)

    centre, tilt = held.head, held.tilt
    eyes = (at(-0.36, 0.02), at(0.36, 0.02))
    match subject:
        case "man" | "woman":
            hair = (62, 40, 28) if subject == "man" else (226, 150, 40)
            yield [disc(centre, HEAD, body.skin)]
            brow = [on(-1.04, -0.1), on(-0.98, -0.55), on(-0.6, -0.98), on(0, -1.16)]
            brow += [on(0.6, -0.98), on(0.98, -0.55), on(1.04, -0.1)]
            fringe = [at(0.7, -0.42), at(0.2, -0.52), at(-0.5, -0.4)]
            if subject == "woman":
                fringe = [at(0.55, -0.3), at(0.1, -0.62), at(-0.6, -0.3)]
            yield [polygon([*brow, *fringe], hair)]
            mouth = (190, 60, 60) if subject == "man" else (220, 40, 80)
            yield [disc(eye, 1.05, BLACK) for eye in eyes]
            yield [capsule(at(-0.2, 0.52), at(0.2, 0.52), 1.1, mouth)]
        case "panda" | "bear":
            dark = BLACK if subject == "panda" else (112, 66, 32)
            for side in (-1, 1):
                yield [disc(on(side * 0.78, -0.78), 2.9, dark)]
            yield [ellipse(centre, (HEAD * 1.1, HEAD), body.skin, tilt)]
            if subject == "panda":
                yield [
                    ellipse(at(side * 0.42, 0.0), (1.8, 2.4), BLACK, tilt + side * 0.5)
                    for side in (-1, 1)
                ]
                yield [disc(eye, 0.7, WHITE) for eye in eyes]
                yield [ellipse(at(0, 0.45), (1.4, 1.0), BLACK, tilt)]
            else:
                yield [ellipse(at(0, 0.42), (3.4, 2.6), (222, 178, 124), tilt)]
                yield [disc(eye, 1.0, BLACK) for eye in eyes]
                yield [ellipse(at(0, 0.24), (1.5, 1.1), BLACK, tilt)]
        case "astronaut":
            yield [disc(centre, HEAD * 1.16, body.skin)]
            yield [ellipse(at(0, 0.04), (HEAD * 0.82, HEAD * 0.66), (40, 60, 110), tilt)]
            yield [capsule(at(-0.4, -0.22), at(-0.05, -0.32), 1.3, (190, 220, 250))]
        case "robot":
            top = on(0, -1.45)
            yield [capsule(on(0, -0.9), top, 1.2, body.foot)]
            yield [disc(top, 1.9, (230, 50, 50))]
            box = [on(-0.95, -0.85), on(0.95, -0.85), on(0.95, 0.85), on(-0.95, 0.85)]
            yield [polygon(box, body.skin)]
            yield [disc(eye, 1.9, (255, 244, 150)) for eye in (at(-0.4, -0.16), at(0.4, -0.16))]
            yield [disc(eye, 0.8, BLACK) for eye in (at(-0.4, -0.16), at(0.4, -0.16))]
            yield [capsule(at(-0.4, 0.46), at(0.4, 0.46), 1.6, body.foot)]


def _ski(foot: Point, held: Pose, dark: float) -> list[Shape]:
    y, colour = held.ground - 0.2, mix(SKI, BLACK, dark)
    tip = (foot[0] + 15.5, y)
    return [
        capsule((foot[0] - 13, y), tip, 1.7, colour),
        capsule(tip, (tip[0] + 2.5, y - 2.6), 1.7, colour),
    ]


def _pole(arm: Limb) -> list[Shape]:
    forearm = math.degrees(math.atan2(arm.end[0] - arm.joint[0], arm.end[1] - arm.joint[1]))
    way = direction(forearm - 105)
    basket = along(arm.end, way, 13.5)
    return [
        capsule(along(arm.end, way, -2.0), along(arm.end, way, 15.5), 1.1, POLE),
        disc(basket, 1.4, POLE),
    ]


def _guitar(held: Pose) -> list[Shape]:
    middle, top = guitar(held)
    way = _unit(middle, top)
    return [
        capsule(middle, top, 1.9, DARK_WOOD),
        disc(along(middle, way, -2.6), 5.3, WOOD),
        disc(along(middle, way, 3.4), 4.0, WOOD),
        disc(along(middle, way, 1.2), 1.7, DARK_WOOD),
        capsule(along(top, way, -0.5), along(top, way, 1.5), 3.2, DARK_WOOD),
    ]
