"""Measure how well a video follows its prompt and its clip, and how steady it is.

These parts are the same in every drawn world. What a frame shows is for the world's detector.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

Shown = Mapping[str, Int[np.ndarray, "f"]]
"""For each attribute the index of the value that each frame shows, or -1."""

# A trajectory is compared with the clip's if this share of the frames shows a subject.
ENOUGH_FOUND = 0.75


def follow_prompt(
    shown: Shown, attributes: Mapping[str, Sequence[str]], asks: Mapping[str, str]
) -> dict[str, float | None]:
    """Return, for each attribute, the share of frames that show what the prompt asks for.

    Args:
        shown: What each frame shows.
        attributes: The values of each attribute.
        asks: The values that the prompt asks for. The share of any other attribute is None.
    """
    return {
        name: float((shown[name] == attributes[name].index(asks[name])).mean())
        if name in asks
        else None
        for name in attributes
    }


def follow_clip(
    centre: Float[np.ndarray, "f 2"], true: Float[np.ndarray, "f 2"], present: Bool[np.ndarray, "f"]
) -> tuple[float | None, float | None]:
    """Return correlation and mean distance of the detected and the clip's trajectory.

    Both are None if the subject is found in too few frames.

    Args:
        centre: The detected subject's place in each frame.
        true: The place of the clip's subject.
        present: Whether a subject was recognised. Other frames are left out.
    """
    if present.mean() < ENOUGH_FOUND:
        return None, None
    distances = np.linalg.norm((centre - true)[present], axis=1)
    return correlation(centre[present], true[present]), float(distances.mean())


def correlation(a: Float[np.ndarray, "n k"], b: Float[np.ndarray, "n k"]) -> float:
    """Return the cosine between two centred trajectories: 1 if one is the other, shifted."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / lengths) if lengths else 0.0


def flips(shown: Shown) -> float:
    """Return the share of pairs of neighbouring frames that differ in what they show."""
    values = np.stack(list(shown.values()))
    return float((values[:, 1:] != values[:, :-1]).any(axis=0).mean())


def change(
    video: UInt8[np.ndarray, "f H W 3"],
    around: Bool[np.ndarray, "f H W"],
    within: Float[np.ndarray, "f H W"],
    present: Bool[np.ndarray, "f"],
    panned: Sequence[int],
) -> float:
    """Return the change from frame to frame that motion does not explain, in levels of 255.

    It is the mean difference between neighbouring frames of the background and of the subject's
    mean colour, each with the share of the image that it has.

    Args:
        video: The video.
        around: The pixels that are too near to the subject to be background.
        within: How much each pixel counts in the subject's mean colour.
        present: Whether a subject was recognised. Without one, only the background counts.
        panned: How far the clip's background has moved to the left in each frame, in pixels.
    """
    pixels, width = video.astype(np.float64), video.shape[2]
    colours = (within[..., None] * pixels).sum((1, 2)) / np.maximum(
        within.sum((1, 2)), 1e-3
    ).reshape(-1, 1)
    changes = []
    for i in range(len(video) - 1):
        moved = panned[i + 1] - panned[i]
        here = slice(max(moved, 0), width + min(moved, 0))
        there = slice(max(-moved, 0), width + min(-moved, 0))
        still = ~(around[i, :, here] | around[i + 1, :, there])
        background = np.abs(pixels[i + 1, :, there] - pixels[i, :, here])[still].mean()
        if not (present[i] and present[i + 1]):
            changes.append(background)
            continue
        subject = np.abs(colours[i + 1] - colours[i]).mean()
        share = within[i : i + 2].mean()
        changes.append(share * subject + (1 - share) * background)
    return float(np.mean(changes))
