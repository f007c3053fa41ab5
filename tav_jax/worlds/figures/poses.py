"""The mathematics of the joints: how a figure holds itself at each phase of a verb.

A figure's coordinates are x towards where it looks and y downwards, in pixels at scale 1. The
middle between its hips is the origin until `Pose.ground` is known. An angle of 0 points straight
down and 90 degrees points forwards.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from tav_jax.errors import UserError

Number = float | int
Point = tuple[Number, Number]

TORSO, UPPER_ARM, LOWER_ARM, THIGH, SHIN = 12.0, 7.0, 7.0, 8.0, 8.0
HEAD = 7.0  # radius
NECK = 0.5


class Limb(NamedTuple):
    """An arm or a leg: shoulder, elbow and hand, or hip, knee and foot."""

    root: Point
    joint: Point
    end: Point


@dataclass(frozen=True)
class Pose:
    """Where all joints are.

    Args:
        hips: The middle between the hips.
        chest: The middle between the shoulders.
        head: The middle of the head.
        tilt: How far the head is turned clockwise, in radians.
        turned: How far the face is turned forwards: 0 looks at the viewer, 1 to the side.
        arms: The farther and the nearer arm. From the front, the one behind and the one ahead.
        legs: The farther and the nearer leg.
        ground: The height of the ground.
        lift: How far the figure is above the ground.
    """

    hips: Point
    chest: Point
    head: Point
    tilt: float
    turned: float
    arms: tuple[Limb, Limb]
    legs: tuple[Limb, Limb]
    ground: float
    lift: Number = 0.0


def pose(verb: str, phase: float) -> Pose:
    """Return the pose of a verb. `phase` counts its periods, so the pose repeats after 1."""
    turn = 2 * math.pi * phase
    s, c = math.sin(turn), math.cos(turn)
    match verb:
        case "walking":
            return _from_the_side(
                lean=4,
                arms=[(30 * s, 30 * s + 14), (-30 * s, -30 * s + 14)],
                legs=[_stride(-s, -c, 30, 0, 6, 45), _stride(s, c, 30, 0, 6, 45)],
            )
        case "running":
            return _from_the_side(
                lean=22,
                arms=[(55 * s - 5, 55 * s + 85), (-55 * s - 5, -55 * s + 85)],
                legs=[_stride(-s, -c, 46, 14, 22, 75), _stride(s, c, 46, 14, 22, 75)],
                lift=1 + 2.5 * s * s,
            )
        case "waving":
            return _from_the_front(
                lean=6 * c,
                arms=[(16 + 10 * c, 8 + 14 * c), (120, 180 - 42 * s)],
                legs=[(9, 4), (9, 4)],
                tilt=8 * c,
            )
        case "jumping":
            height = (1 - c) / 2
            out = 34 + 14 * (1 - height)
            return _from_the_front(
                lean=0,
                arms=[(122 + 40 * s, 136 + 40 * s)] * 2,
                legs=[(out, out - 8 - 52 * (1 - height))] * 2,
                lift=7.5 * height,
            )
        case "skiing":
            return _from_the_side(
                lean=40 + 8 * c,
                arms=[(25 + 40 * s, 75 + 40 * s), (20 + 40 * s, 70 + 40 * s)],
                legs=[(62 + 7 * c, -24 - 4 * c), (56 + 7 * c, -28 - 4 * c)],
            )
        case "playing guitar":
            return _playing_guitar(s, c)
        case "doing push-ups":
            return _doing_push_ups(s, c)
    raise UserError(f"verb is {verb!r}, which no figure can do")


def direction(degrees: Number) -> Point:
    """Return the unit vector of an angle."""
    angle = math.radians(degrees)
    return math.sin(angle), math.cos(angle)


def along(start: Point, way: Point, length: Number) -> Point:
    """Return the point at a distance from `start`."""
    return start[0] + way[0] * length, start[1] + way[1] * length


def _stride(
    s: Number, c: Number, swing: Number, forward: Number, bend: Number, kick: Number
) -> tuple[Number, Number]:
    """Return the angles of thigh and shin. The knee bends while the leg swings forwards."""
    thigh = forward + swing * s
    return thigh, thigh - bend - kick * max(c, 0.0) ** 1.5


def _limb(root: Point, angles: tuple[Number, Number], lengths: tuple[Number, Number]) -> Limb:
    joint = along(root, direction(angles[0]), lengths[0])
    return Limb(root, joint, along(joint, direction(angles[1]), lengths[1]))


def _reach(root: Point, end: Point, lengths: tuple[Number, Number], bend: Number) -> Limb:
    """Return the limb that ends at a point, or as near to it as it can.

    Args:
        root: The shoulder or hip.
        end: Where hand or foot should be.
        lengths: Lengths of the two parts.
        bend: On which side the joint is, 1 or -1.
    """
    dx, dy = end[0] - root[0], end[1] - root[1]
    a, b = lengths
    distance = min(max(math.hypot(dx, dy), abs(a - b) + 1e-3), a + b - 1e-3)
    to_end = math.atan2(dx, dy)
    inner = math.acos((a * a + distance * distance - b * b) / (2 * a * distance))
    joint = along(root, direction(math.degrees(to_end + bend * inner)), a)
    return Limb(root, joint, along(root, direction(math.degrees(to_end)), distance))


def _from_the_side(
    *,
    lean: Number,
    arms: list[tuple[Number, Number]],
    legs: list[tuple[Number, Number]],
    lift: Number = 0.0,
) -> Pose:
    up = direction(180 - lean)
    hips, chest = (0.0, 0.0), along((0.0, 0.0), up, TORSO)
    head = along(along(chest, up, NECK), direction(180 - lean / 2), HEAD)
    far, near = ((hips[0] + dx, hips[1]) for dx in (1.2, -1.2))
    far_leg, near_leg = (
        _limb(root, angles, (THIGH, SHIN)) for root, angles in zip((far, near), legs, strict=True)
    )
    shoulder = along(chest, up, -2.5)
    far_arm, near_arm = (
        _limb((shoulder[0] + dx, shoulder[1]), angles, (UPPER_ARM, LOWER_ARM))
        for dx, angles in zip((1.5, -1.0), arms, strict=True)
    )
    ground = max(far_leg.end[1], near_leg.end[1]) + 2 + lift
    tilt = math.radians(lean / 3)
    return Pose(
        hips, chest, head, tilt, 1.0, (far_arm, near_arm), (far_leg, near_leg), ground, lift
    )


def _from_the_front(
    *,
    lean: Number,
    arms: list[tuple[Number, Number]],
    legs: list[tuple[Number, Number]],
    tilt: Number = 0.0,
    lift: Number = 0.0,
) -> Pose:
    up = direction(180 - lean)
    hips, chest = (0.0, 0.0), along((0.0, 0.0), up, TORSO)
    head = along(along(chest, up, NECK), direction(180 - lean - tilt), HEAD)
    limbs = []
    for (upper, lower), side in zip(arms, (-1, 1), strict=True):
        root = (chest[0] + side * 4.2, chest[1] + 2.2)
        limbs.append(_limb(root, (side * upper, side * lower), (UPPER_ARM, LOWER_ARM)))
    for (upper, lower), side in zip(legs, (-1, 1), strict=True):
        root = (side * 2.6, 0.0)
        limbs.append(_limb(root, (side * upper, side * lower), (THIGH, SHIN)))
    ground = max(limbs[2].end[1], limbs[3].end[1]) + 2 + lift
    arms_and_legs = (limbs[0], limbs[1]), (limbs[2], limbs[3])
    return Pose(hips, chest, head, math.radians(tilt), 0.0, *arms_and_legs, ground, lift)


def _playing_guitar(s: Number, c: Number) -> Pose:
    """Return the pose of a guitar player: one hand strums at the belly, one holds the neck."""
    still = _from_the_front(lean=5 * c, arms=[(0, 0), (0, 0)], legs=[(13, 6), (13, 6)], tilt=9 * c)
    strumming, holding = (arm.root for arm in still.arms)
    lengths = UPPER_ARM, LOWER_ARM
    body, top = guitar(still)
    hand = body[0] - 1.5 + 0.8 * s, body[1] + 4.2 * s
    fingers = tuple(a + 0.72 * (b - a) for a, b in zip(body, top, strict=True))
    arms = (
        _reach(strumming, hand, lengths, -1),
        _reach(holding, (fingers[0], fingers[1]), lengths, 1),
    )
    return Pose(
        still.hips, still.chest, still.head, still.tilt, 0.0, arms, still.legs, still.ground
    )


def guitar(held: Pose) -> tuple[Point, Point]:
    """Return the middle of the guitar's body, and the top of its neck."""
    body = held.hips[0] - 2.0, held.hips[1] - 3.0
    lean = math.degrees(math.atan2(held.chest[0], -held.chest[1]))
    return body, along(body, direction(118 + lean), 21.0)


def _doing_push_ups(s: Number, c: Number) -> Pose:
    """Return the pose of push-ups: toes and hands stay, the chest goes down and up."""
    height = 10.0 + 3.2 * c  # of the shoulders above the ground
    legs, body = THIGH + SHIN, THIGH + SHIN + TORSO
    rise = math.asin((height - 2) / body)
    way = math.cos(rise), -math.sin(rise)
    toes = (-legs * way[0], -legs * way[1])
    chest = along((0.0, 0.0), way, TORSO)
    ground = chest[1] + height
    hand = chest[0] + 1.0, ground - 1.5
    lifted = direction(-90 + math.degrees(rise) - 22 * max(s, 0.0))
    head = along(chest, direction(128 - 10 * s), HEAD + NECK + 1)
    arms = tuple(
        _reach((chest[0] + dx, chest[1]), (hand[0] + 2 * dx, hand[1]), (UPPER_ARM, LOWER_ARM), -1)
        for dx in (1.2, -1.2)
    )
    near_knee = along((0.0, 0.0), lifted, THIGH)
    stretched = Limb((0.0, 0.0), (toes[0] / 2, toes[1] / 2), toes)
    raised = Limb((0.0, 0.0), near_knee, along(near_knee, lifted, SHIN))
    tilt = math.radians(8 - 14 * s)
    return Pose((0.0, 0.0), chest, head, tilt, 1.0, (arms[0], arms[1]), (stretched, raised), ground)
