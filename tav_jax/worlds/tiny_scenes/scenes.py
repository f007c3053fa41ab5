"""The scenes of the world, and the captions that describe them. `drawing` draws them.

Lengths are in units. An image is 32 units wide and high at any size in pixels, and (0, 0) is its
top left corner.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tav_jax.worlds.captions import choose_form

SIZE = 32

SUBJECTS = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (214, 32, 30),
    "yellow": (255, 226, 0),
    "blue": (38, 84, 240),
    "purple": (132, 32, 176),
    "pink": (250, 100, 180),
    "cyan": (0, 214, 222),
}
# The two ends between which a background's texture varies.
BACKGROUNDS = {
    "grass": ((38, 96, 30), (92, 158, 58)),
    "sand": ((198, 160, 108), (228, 196, 146)),
    "snow": ((216, 224, 236), (248, 250, 252)),
    "night": ((8, 10, 30), (32, 34, 62)),
}
STYLES = ("plain", "line drawing", "pixel art", "striped")
# The styles that the base model learns. Its autoencoder would smooth the cells of pixel art away.
TAUGHT_STYLES = ("plain", "line drawing", "striped")

ATTRIBUTES = {
    "subject": SUBJECTS,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "style": STYLES,
}

# Prompts use the first phrase. Captions sometimes use the second.
MOTIONS = {
    "still": ("resting", "standing still"),
    "right": ("moving right", "sliding right"),
    "left": ("moving left", "sliding left"),
    "up": ("moving up", "rising"),
    "falling": ("falling", "dropping"),
    "bouncing": ("bouncing", "jumping"),
    "growing": ("growing", "growing"),
    "circling": ("circling", "circling"),
}
# The trajectory's least and greatest x and y, in lengths of `travel` from the start.
SPANS = {
    "still": (0, 0, 0, 0),
    "right": (0, 1, 0, 0),
    "left": (-1, 0, 0, 0),
    "up": (0, 0, -1, 0),
    "falling": (0, 0, 0, 1),
    "bouncing": (0, 0, -1, 0),
    "growing": (0, 0, 0, 0),
    "circling": (-0.5, 0.5, 0, 1),
}

# Pairs that are never drawn with `held_out=False`: each colour once, each subject at least once.
HELD_OUT = frozenset(
    {
        ("circle", "purple"),
        ("square", "cyan"),
        ("triangle", "red"),
        ("cross", "pink"),
        ("ring", "yellow"),
        ("circle", "blue"),
    }
)

# In radii: half a square's side, a triangle's inradius, a cross's arm and half its width, and the
# inner radius of a ring. All subjects have about the same area.
HALF_SIDE, INRADIUS, ARM, HALF_WIDTH, HOLE = 0.88, 0.66, 1.05, 0.35, 0.5
# How far a subject reaches to the sides, upwards and downwards, in radii.
EXTENTS = {
    "circle": (1.0, 1.0, 1.0),
    "square": (HALF_SIDE, HALF_SIDE, HALF_SIDE),
    "triangle": (3**0.5 * INRADIUS, 2 * INRADIUS, INRADIUS),
    "cross": (ARM, ARM, ARM),
    "ring": (1.0, 1.0, 1.0),
}
MARGIN = 1.5  # between a subject and the border; an outlined triangle's tip needs 1.4
# Area, and length of all edges, of a subject of radius 1.
MEASURES = {
    "circle": (math.pi, 2 * math.pi),
    "square": (4 * HALF_SIDE**2, 8 * HALF_SIDE),
    "triangle": (3 * 3**0.5 * INRADIUS**2, 6 * 3**0.5 * INRADIUS),
    "cross": (4 * HALF_WIDTH * (2 * ARM - HALF_WIDTH), 8 * ARM),
    "ring": (math.pi * (1 - HOLE**2), 2 * math.pi * (1 + HOLE)),
}


@dataclass(frozen=True)
class Scene:
    """One subject on one background, and its motion from time 0 to time 1.

    Args:
        subject: One of `SUBJECTS`.
        colour: One of `COLOURS`.
        background: One of `BACKGROUNDS`.
        style: One of `STYLES`.
        motion: One of `MOTIONS`.
        radius: The subject's radius at time 0.
        x: Its centre at time 0, from the left.
        y: Its centre at time 0, from the top.
        travel: How far it moves. For "circling" the circle's diameter, for "bouncing" the height,
            for "growing" the increase of the radius.
        seed: Seed of texture and grain.
    """

    subject: str
    colour: str
    background: str
    style: str = "plain"
    motion: str = "still"
    radius: float = 7.5
    x: float = 16.0
    y: float = 16.0
    travel: float = 0.0
    seed: int = 0


CLIPS = {
    "circle-right": Scene("circle", "red", "grass", "plain", "right", 7.0, 8.5, 17.0, 15.0, 1),
    "square-falling": Scene(
        "square", "yellow", "snow", "plain", "falling", 7.0, 15.0, 7.5, 16.0, 2
    ),
    "triangle-left": Scene("triangle", "blue", "sand", "plain", "left", 6.5, 23.0, 19.0, 14.0, 3),
    "ring-up": Scene("ring", "pink", "night", "plain", "up", 7.5, 17.0, 23.0, 14.0, 4),
    "cross-circling": Scene(
        "cross", "purple", "grass", "plain", "circling", 6.5, 16.0, 8.5, 15.0, 5
    ),
    "circle-bouncing": Scene(
        "circle", "cyan", "sand", "plain", "bouncing", 6.5, 15.0, 24.0, 15.0, 6
    ),
    "square-right": Scene("square", "red", "night", "plain", "right", 7.5, 8.0, 14.0, 16.0, 7),
    "ring-growing": Scene("ring", "blue", "snow", "plain", "growing", 5.5, 16.0, 16.0, 4.5, 8),
}


def sample_scenes(
    rng: np.random.Generator,
    n: int,
    *,
    held_out: bool | None = False,
    styles: Sequence[str] = STYLES[:1],
    motions: Sequence[str] = tuple(MOTIONS),
) -> list[Scene]:
    """Return random scenes whose subject stays within the image from time 0 to 1.

    Args:
        rng: Source of randomness.
        n: Number of scenes.
        held_out: False for no pair of `HELD_OUT`, True for only those, None for any pair.
        styles: The styles to choose from.
        motions: The motions to choose from.
    """
    pairs = [
        (subject, colour)
        for subject in SUBJECTS
        for colour in COLOURS
        if held_out is None or ((subject, colour) in HELD_OUT) == held_out
    ]
    backgrounds = tuple(BACKGROUNDS)
    kinds = zip(
        rng.integers(len(pairs), size=n).tolist(),
        rng.integers(len(backgrounds), size=n).tolist(),
        rng.integers(len(styles), size=n).tolist(),
        rng.integers(len(motions), size=n).tolist(),
        rng.integers(2**31, size=n).tolist(),
        rng.random((n, 4)).tolist(),
        strict=True,
    )
    scenes = []
    for pair, background, style, motion_index, seed, (a, b, c, d) in kinds:
        (subject, colour), motion = pairs[pair], motions[motion_index]
        radius = largest = 6 + 3 * a
        if motion == "growing":
            radius, largest = 5 + a, 8.5 + a
        side, up, down = (MARGIN + largest * extent for extent in EXTENTS[subject])
        x_low, x_high, y_low, y_high = SPANS[motion]
        rooms = [
            room / (high - low)
            for room, low, high in (
                (SIZE - 2 * side, x_low, x_high),
                (SIZE - up - down, y_low, y_high),
            )
            if high > low
        ]
        travel = min(rooms) * (0.7 + 0.3 * b) if rooms else largest - radius
        left, right = side - x_low * travel, SIZE - side - x_high * travel
        top, bottom = up - y_low * travel, SIZE - down - y_high * travel
        x, y = left + c * (right - left), top + d * (bottom - top)
        numbers = (radius, x, y, travel, seed)
        scenes.append(
            Scene(subject, colour, backgrounds[background], styles[style], motion, *numbers)
        )
    return scenes


def describe(
    scene: Scene,
    *,
    subject: bool = True,
    colour: bool = True,
    motion: bool = True,
    background: bool = True,
    phrase: int = 0,
    link: str = "",
) -> str:
    """Return the prompt of a scene. It leaves open what is switched off.

    Args:
        scene: The scene.
        subject: Name the subject. Otherwise it is "a shape".
        colour: Name the colour.
        motion: Name the motion.
        background: Name the background.
        phrase: Index of the motion's phrase.
        link: Stands before the background if the motion is not named: " is", or nothing.
    """
    words = f"a {scene.colour if colour else ''} {scene.subject if subject else 'shape'}"
    words += f" is {MOTIONS[scene.motion][phrase]}" if motion else link
    if background:
        words += " at night" if scene.background == "night" else f" on {scene.background}"
    style = "" if scene.style == "plain" else f", {scene.style} style"
    return " ".join(words.split()) + style


# How often a caption names these: colour, subject, motion, background.
FORMS = {
    (True, True, True, True): 0.42,
    (True, True, False, True): 0.16,
    (True, True, True, False): 0.08,
    (True, True, False, False): 0.04,
    (False, True, True, True): 0.06,
    (True, False, True, True): 0.06,
    (False, True, False, True): 0.05,
    (True, False, False, True): 0.05,
    (False, True, True, False): 0.04,
    (True, False, True, False): 0.04,
}

WORDS = tuple(
    sorted(
        {word for phrases in MOTIONS.values() for phrase in phrases for word in phrase.split()}
        | {word for style in STYLES[1:] for word in style.split()}
        | {*SUBJECTS, *COLOURS, *BACKGROUNDS, "a", "shape", "is", "on", "at", "style", ","}
    )
)
"""Every word of every caption."""


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a random caption that is true of any frame of the scene, as often as `FORMS` says."""
    form, phrase, link = rng.random(3).tolist()
    colour, subject, motion, background = choose_form(FORMS, form)
    return describe(
        scene,
        subject=subject,
        colour=colour,
        motion=motion,
        background=background,
        phrase=int(phrase > 0.75),
        link=" is" if background and link > 0.5 else "",
    )
