"""How well a video follows its prompt, keeps a clip's motion, and stays the same over time."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, UInt8

from tav_jax.worlds.tiny_scenes.detector import Reading, read_frame
from tav_jax.worlds.tiny_scenes.drawing import cover, truth
from tav_jax.worlds.tiny_scenes.world import ATTRIBUTES, SIZE, TAUGHT_STYLES, Scene

Frames = UInt8[np.ndarray, "f H W 3"]

# Of the frames, so many must show a subject before its way is compared with the clip's.
ENOUGH_FOUND = 0.75


def measure(video: Frames, clip: Scene, asks: Mapping[str, str]) -> dict[str, float | None]:
    """Returns the figures of one video, sampled after a clip.

    Args:
        asks: What its prompt names, of `ATTRIBUTES`.

    Returns:
        subject, colour, background, style: Share of frames that show what was asked; None if it
            was not.
        found: Share of frames in which a subject is recognised.
        correlation, error: Of its way (or its radius, where the clip's subject grows) with the
            clip's; the mean distance in pixels. None if it is found in too few frames.
        flips: Share of neighbouring frames that differ in what they show.
        change: Mean difference between neighbouring frames, in levels of 255, of what does not
            move: the background where neither frame has the subject, and the subject's own
            colour.
    """
    seen = read_frame(video, styles=TAUGHT_STYLES)
    figures: dict[str, float | None] = {}
    for name in ATTRIBUTES:
        if name not in asks:
            figures[name] = None
            continue
        right = getattr(seen, name) == ATTRIBUTES[name].index(asks[name])
        if name in ("subject", "colour"):
            right &= seen.present
        figures[name] = float(right.mean())
    figures["found"] = float(seen.present.mean())
    figures["correlation"], figures["error"] = follow(seen, clip, size=video.shape[1])
    figures["flips"] = flips(seen)
    figures["change"] = change(video, seen)
    return figures


def follow(seen: Reading, clip: Scene, size: int) -> tuple[float | None, float | None]:
    """Returns correlation and mean distance of a seen subject's way and the clip's."""
    if seen.present.mean() < ENOUGH_FOUND:
        return None, None
    true = truth(clip, len(seen.x), size)
    centre = np.stack([seen.x, seen.y], axis=1)[seen.present]
    error = float(np.linalg.norm(centre - true.centre[seen.present], axis=1).mean())
    if clip.motion == "growing":
        return correlation(seen.radius[seen.present, None], true.radius[seen.present, None]), error
    return correlation(centre, true.centre[seen.present]), error


def correlation(a: Float[np.ndarray, "n k"], b: Float[np.ndarray, "n k"]) -> float:
    """Returns the cosine between two ways about their own means: 1 for the same way elsewhere."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / lengths) if lengths else 0.0


def flips(seen: Reading) -> float:
    """Returns the share of neighbouring frames that do not show the same."""
    # Without a subject, what is read of it means nothing.
    shown = np.stack(
        [np.where(seen.present, getattr(seen, name), -1) for name in ("subject", "colour")]
        + [seen.background, seen.style]
    )
    return float((shown[:, 1:] != shown[:, :-1]).any(axis=0).mean())


def change(video: Frames, seen: Reading) -> float:
    """Returns how much of the look changes from frame to frame that motion does not explain."""
    pixels, size = video.astype(np.float64), video.shape[1]
    places = np.stack([seen.x, seen.y, seen.radius], axis=1) * (SIZE / size)
    around = cover(seen.subject, places, size, grow=1.5)
    within = cover(seen.subject, places, size, grow=-1.0)
    around[~seen.present] = 0
    colours = (within[..., None] * pixels).sum((1, 2)) / np.maximum(
        within.sum((1, 2)), 1e-3
    ).reshape(-1, 1)
    changes = []
    for i in range(len(video) - 1):
        still = (around[i] == 0) & (around[i + 1] == 0)
        background = np.abs(pixels[i + 1] - pixels[i])[still].mean()
        if not (seen.present[i] and seen.present[i + 1]):
            changes.append(background)
            continue
        subject = np.abs(colours[i + 1] - colours[i]).mean()
        share = within[i : i + 2].mean()
        changes.append(share * subject + (1 - share) * background)
    return float(np.mean(changes))
