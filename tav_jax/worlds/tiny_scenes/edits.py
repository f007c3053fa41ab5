"""Prompts for a clip of the world, and what an image must show to follow them."""

from dataclasses import replace
from typing import Any

from tav_jax.worlds.tiny_scenes.scenes import ATTRIBUTES, SUBJECTS, TAUGHT_STYLES, Scene, describe
from tav_jax.worlds.world import Edit

TAUGHT = ATTRIBUTES | {"style": TAUGHT_STYLES}


def edits_of(clip: Scene) -> list[Edit]:
    """Return the source prompt, eight edits that name every attribute, and three open prompts."""

    def other(attribute: str, steps: int) -> str:
        values = TAUGHT[attribute]
        return values[(values.index(getattr(clip, attribute)) + steps) % len(values)]

    changed: list[tuple[str, dict[str, Any]]] = [
        ("source", {}),
        ("subject", {"subject": other("subject", 1)}),
        ("subject", {"subject": other("subject", 3)}),
        ("colour", {"colour": other("colour", 1)}),
        ("colour", {"colour": other("colour", 4)}),
        ("background", {"background": other("background", 1)}),
        ("background", {"background": other("background", 2)}),
        ("style", {"style": other("style", 1 + SUBJECTS.index(clip.subject) % 2)}),
        ("all", {name: other(name, 2) for name in ("subject", "colour", "background")}),
    ]
    edits = []
    for kind, changes in changed:
        scene = replace(clip, **changes)
        asks = {name: getattr(scene, name) for name in ATTRIBUTES}
        edits.append(Edit(kind, describe(scene), asks))
    for said in (
        {"colour": False, "background": False},
        {"subject": False, "motion": False, "link": " is"},
        {"colour": False, "motion": False, "link": " is"},
    ):
        asks = {
            name: getattr(clip, name)
            for name in ("subject", "colour", "background")
            if said.get(name, True)
        }
        edits.append(Edit("open", describe(clip, **said), asks))
    return edits
