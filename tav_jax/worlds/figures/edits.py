"""Prompts for the world's clips, and what a video must show to follow them."""

from dataclasses import replace
from typing import Any

from tav_jax.worlds.figures.scenes import ATTRIBUTES, CLIPS, Scene, describe
from tav_jax.worlds.world import Edit

# What edits of each clip change: two subjects, two colours of clothes, two backgrounds, a style,
# and subject, clothes and background at once. Skiers and guitar players become what the paper
# (Wu et al. 2022) makes of them, as far as this world has words for it.
CHANGES = {
    "man-skiing": ("panda astronaut", "red purple", "beach moon", "cartoon", "astronaut blue moon"),
    "bear-guitar": ("panda astronaut", "blue red", "beach street", "cartoon", "panda yellow beach"),
    "woman-waving": ("man bear", "blue yellow", "snow forest", "sketch", "robot purple street"),
    "astronaut-walking": ("woman bear", "red blue", "street snow", "sketch", "man yellow beach"),
    "man-running": ("robot panda", "yellow purple", "forest beach", "cartoon", "bear red snow"),
    "panda-jumping": ("woman robot", "purple red", "moon street", "sketch", "man blue forest"),
    "robot-walking": ("man panda", "red yellow", "forest moon", "cartoon", "bear purple snow"),
    "woman-push-ups": ("man astronaut", "blue purple", "snow beach", "sketch", "robot red moon"),
}


def edits_of(
    clip: Scene, subjects: str, clothes: str, backgrounds: str, style: str, combined: str
) -> list[Edit]:
    """Return the source prompt, eight edits that name everything, and three open prompts.

    Args:
        clip: The scene of the clip.
        subjects: The subjects to change to, in words separated by spaces.
        clothes: The colours of clothes to change to.
        backgrounds: The backgrounds to change to.
        style: The style to change to.
        combined: The subject, clothes and background to change to at once.
    """
    changed: list[tuple[str, dict[str, Any]]] = [
        ("source", {}),
        *(("subject", {"subject": value}) for value in subjects.split()),
        *(("clothes", {"clothes": value}) for value in clothes.split()),
        *(("background", {"background": value}) for value in backgrounds.split()),
        ("style", {"style": style}),
        ("all", dict(zip(("subject", "clothes", "background"), combined.split(), strict=True))),
    ]
    edits = []
    for kind, changes in changed:
        scene = replace(clip, **changes)
        asks = {name: getattr(scene, name) for name in ATTRIBUTES}
        edits.append(Edit(kind, describe(scene), asks))
    named = ("subject", "verb", "background")
    for left_open in named:
        asks = {name: getattr(clip, name) for name in named if name != left_open}
        said: dict[str, Any] = {left_open: False, "link": " is"}
        edits.append(Edit("open", describe(clip, **said), asks))
    return edits


EDITS = {name: edits_of(CLIPS[name], *changes) for name, changes in CHANGES.items()}
"""The prompts for each clip of `CLIPS`."""
