"""The scenes of the world, and the captions that describe them. `drawing` draws them.

Lengths are in pixels of the image, which is 64 wide and high. (0, 0) is its top left corner.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tav_jax.worlds.captions import choose_form

SIZE = 64

SUBJECTS = ("man", "woman", "panda", "bear", "astronaut", "robot")
# Prompts use the first phrase. Captions sometimes use the second.
VERBS = {
    "walking": ("walking", "strolling"),
    "running": ("running", "jogging"),
    "waving": ("waving", "waving a hand"),
    "jumping": ("jumping", "leaping"),
    "skiing": ("skiing", "riding skis"),
    "playing guitar": ("playing guitar", "playing the guitar"),
    "doing push-ups": ("doing push-ups", "exercising"),
}
BACKGROUNDS = {
    "snow": ("on snow", "in the snow"),
    "beach": ("on the beach", "by the sea"),
    "forest": ("in the forest", "among trees"),
    "moon": ("on the moon", "in space"),
    "street": ("in the street", "in the city"),
}
# "own" is what a subject wears if its prompt names no colour.
CLOTHES = ("own", "red", "blue", "yellow", "purple")
STYLES = ("plain", "cartoon", "sketch")

ATTRIBUTES = {
    "subject": SUBJECTS,
    "verb": tuple(VERBS),
    "clothes": CLOTHES,
    "background": tuple(BACKGROUNDS),
    "style": STYLES,
}

# Pairs that are never drawn with `held_out=False`: each subject and each verb at least once.
HELD_OUT = frozenset(
    {
        ("panda", "skiing"),
        ("astronaut", "skiing"),
        ("robot", "playing guitar"),
        ("woman", "jumping"),
        ("bear", "waving"),
        ("man", "doing push-ups"),
        ("woman", "walking"),
        ("robot", "running"),
    }
)

# Verbs that carry a figure across the image.
TRAVELLING = ("walking", "running", "skiing")
# Cycles that look alike in one period: after half a stride, the legs have changed places.
STEPS_PER_PERIOD = {"walking": 2, "running": 2}
# How far a figure of scale 1 reaches forwards and backwards.
REACH = {
    "walking": (16, 16),
    "running": (18, 19),
    "waving": (19, 19),
    "jumping": (24, 24),
    "skiing": (21, 21),
    "playing guitar": (24, 24),
    "doing push-ups": (28, 28),
}
SLOPE = 0.2  # how far a skier goes down, in lengths of `travel`
WIDEST_PAN = 24
VIEWS = 64  # different backgrounds of each kind


@dataclass(frozen=True)
class Scene:
    """One figure before a background, and what it does from time 0 to time 1.

    Args:
        subject: One of `SUBJECTS`.
        verb: One of `VERBS`.
        background: One of `BACKGROUNDS`.
        clothes: One of `CLOTHES`.
        style: One of `STYLES`.
        facing: 1 to the right, -1 to the left.
        scale: The figure's size. A man of scale 1 is 43 pixels high.
        x: Its place at time 0, from the left.
        ground: Where it stands at time 0, from the top.
        travel: How far it moves in its direction. Only `TRAVELLING` verbs do.
        phase: Part of the verb's period that is over at time 0, from 0 to 1.
        periods: Periods of the verb from time 0 to time 1.
        pan: How far the background moves to the left.
        view: Seed of the background, less than `VIEWS`.
    """

    subject: str
    verb: str
    background: str
    clothes: str = "own"
    style: str = "plain"
    facing: int = 1
    scale: float = 1.0
    x: float = 32.0
    ground: float = 57.0
    travel: float = 0.0
    phase: float = 0.0
    periods: float = 1.0
    pan: float = 0.0
    view: int = 0


CLIPS = {
    "man-skiing": Scene("man", "skiing", "snow", x=22.0, ground=55.0, travel=18.0, view=1),
    "bear-guitar": Scene("bear", "playing guitar", "forest", periods=2.0, view=2),
    "woman-waving": Scene("woman", "waving", "beach", x=30.0, periods=1.5, view=3),
    "astronaut-walking": Scene("astronaut", "walking", "moon", x=17.0, travel=29.0, view=4),
    "man-running": Scene("man", "running", "street", x=18.0, travel=28.0, view=5),
    "panda-jumping": Scene("panda", "jumping", "beach", x=34.0, ground=60.5, periods=1.5, view=6),
    "robot-walking": Scene("robot", "walking", "street", facing=-1, x=34.0, pan=-20.0, view=7),
    "woman-push-ups": Scene("woman", "doing push-ups", "forest", periods=1.5, view=8),
}


def sample_scenes(
    rng: np.random.Generator,
    n: int,
    *,
    held_out: bool | None = False,
    styles: Sequence[str] = STYLES,
) -> list[Scene]:
    """Return random scenes whose figure stays within the image from time 0 to 1.

    Half of the figures wear their own clothes.

    Args:
        rng: Source of randomness.
        n: Number of scenes.
        held_out: False for no pair of `HELD_OUT`, True for only those, None for any pair.
        styles: The styles to choose from.
    """
    pairs = [
        (subject, verb)
        for subject in SUBJECTS
        for verb in VERBS
        if held_out is None or ((subject, verb) in HELD_OUT) == held_out
    ]
    backgrounds = tuple(BACKGROUNDS)
    clothes = CLOTHES[:1] * (len(CLOTHES) - 1) + CLOTHES[1:]
    kinds = zip(
        rng.integers(len(pairs), size=n).tolist(),
        rng.integers(len(backgrounds), size=n).tolist(),
        rng.integers(len(clothes), size=n).tolist(),
        rng.integers(len(styles), size=n).tolist(),
        rng.integers(VIEWS, size=n).tolist(),
        rng.choice((-1, 1), size=n).tolist(),
        rng.random((n, 7)).tolist(),
        strict=True,
    )
    scenes: list[Scene] = []
    for pair, background, worn, style, view, facing, (a, b, c, d, e, f, g) in kinds:
        subject, verb = pairs[pair]
        scale = 0.88 + 0.15 * a
        ahead, behind = (scale * reach for reach in REACH[verb])
        room = SIZE - ahead - behind
        travel = room * (0.6 + 0.4 * b) if verb in TRAVELLING else 0.0
        lowest = 61.0 if verb == "jumping" else 59.5
        if verb == "skiing":
            lowest -= SLOPE * travel
        start = behind + c * (room - travel)  # from the side that the figure looks away from
        scenes.append(
            Scene(
                subject,
                verb,
                backgrounds[background],
                clothes[worn],
                styles[style],
                facing,
                scale,
                x=start if facing == 1 else SIZE - start,
                ground=lowest - (1 if verb == "jumping" else 4) * d,
                travel=travel,
                phase=e,
                periods=1.0 + f,
                pan=WIDEST_PAN * (2 * g - 1),
                view=view,
            )
        )
    return scenes


def describe(
    scene: Scene,
    *,
    subject: bool = True,
    verb: bool = True,
    background: bool = True,
    phrases: tuple[int, int] = (0, 0),
    link: str = "",
) -> str:
    """Return the prompt of a scene. It leaves open what is switched off.

    Clothes are named if they are not the subject's own, and the style if it is not plain.

    Args:
        scene: The scene.
        subject: Name the subject. Otherwise it is "someone".
        verb: Name the verb.
        background: Name the background.
        phrases: Indices of the verb's and the background's phrase.
        link: Stands before the background if the verb is not named: " is", or nothing.
    """
    words = f"{'an' if scene.subject[0] in 'aeiou' else 'a'} {scene.subject}"
    if not subject:
        words = "someone"
    if scene.clothes != "own":
        words += f" wearing {scene.clothes} clothes"
    words += f" is {VERBS[scene.verb][phrases[0]]}" if verb else link
    if background:
        words += f" {BACKGROUNDS[scene.background][phrases[1]]}"
    return words + ("" if scene.style == "plain" else f", {scene.style} style")


# How often a caption names these: subject, verb, background.
FORMS = {
    (True, True, True): 0.66,
    (True, True, False): 0.12,
    (True, False, True): 0.08,
    (False, True, True): 0.08,
    (True, False, False): 0.06,
}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a random caption that is true of any frame of the scene, as often as `FORMS` says."""
    form, verb_phrase, background_phrase, link = rng.random(4).tolist()
    subject, verb, background = choose_form(FORMS, form)
    return describe(
        scene,
        subject=subject,
        verb=verb,
        background=background,
        phrases=(int(verb_phrase > 0.75), int(background_phrase > 0.75)),
        link=" is" if background and link > 0.5 else "",
    )


def values_named(prompt: str) -> dict[str, str]:
    """Return the value of each attribute that a prompt asks for.

    A prompt without a style asks for the plain one, and a subject without a colour for its own
    clothes. A subject, verb or background that is not named is left out.
    """
    text = " ".join(["", *words_of(prompt.lower()), ""])
    phrases: dict[str, Mapping[str, Sequence[str]]] = {
        "subject": {subject: (subject,) for subject in SUBJECTS},
        "verb": VERBS,
        "clothes": {colour: (f"wearing {colour} clothes",) for colour in CLOTHES[1:]},
        "background": BACKGROUNDS,
        "style": {style: (f"{style} style",) for style in STYLES[1:]},
    }
    named = {
        name: value
        for name, values in phrases.items()
        for value, texts in values.items()
        if any(" ".join(["", *words_of(each), ""]) in text for each in texts)
    }
    unsaid = {"style": STYLES[0]} | ({"clothes": CLOTHES[0]} if "subject" in named else {})
    return unsaid | named


def words_of(text: str) -> list[str]:
    """Return the parts of a caption that a CLIP tokenizer never merges."""
    return text.replace(",", " ,").replace("-", " - ").split()


WORDS = tuple(
    sorted(
        {
            word
            for phrases in (*VERBS.values(), *BACKGROUNDS.values(), SUBJECTS, CLOTHES[1:])
            for phrase in phrases
            for word in words_of(phrase)
        }
        | {*STYLES[1:], "a", "an", "someone", "wearing", "clothes", "is", "style", ","}
    )
)
"""Every word of every caption."""
