"""Measure how well a video follows its prompt, keeps a clip's motion, and stays consistent."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, UInt8

from tav_jax.worlds.tiny_scenes.detector import Reading, read_frame
from tav_jax.worlds.tiny_scenes.drawing import cover, truth
from tav_jax.worlds.tiny_scenes.scenes import ATTRIBUTES, SIZE, TAUGHT_STYLES, Scene

Frames = UInt8[np.ndarray, "f H W 3"]

# A trajectory is compared with the clip's if this share of the frames shows a subject.
ENOUGH_FOUND = 0.75


def measure(video: Frames, clip: Scene, asks: Mapping[str, str]) -> dict[str, float | None]:
    """Return the metrics of one edited video.

    Args:
        video: The video.
        clip: The scene of the clip that was edited.
        asks: The attributes that the video's prompt names, by name in `ATTRIBUTES`.

    Returns:
        A dictionary with these values:

        - subject, colour, background, style: share of frames that show what the prompt names, or
          None if it does not name it.
        - found: share of frames in which a subject is recognised.
        - correlation: correlation of the subject's trajectory with the clip's; of the radius, if
          the clip's subject grows. None if the subject is found in too few frames.
        - error: mean distance between the two trajectories, in pixels, or None as above.
        - flips: share of pairs of neighbouring frames that differ in what they show.
        - change: mean difference between neighbouring frames, in levels of 255, in what does not
          move: the background away from the subject, and the subject's mean colour.
    """
    seen = read_frame(video, styles=TAUGHT_STYLES)
    metrics: dict[str, float | None] = {}
    for name in ATTRIBUTES:
        if name not in asks:
            metrics[name] = None
            continue
        right = getattr(seen, name) == ATTRIBUTES[name].index(asks[name])
        if name in ("subject", "colour"):
            right &= seen.present
        metrics[name] = float(right.mean())
    metrics["found"] = float(seen.present.mean())
    metrics["correlation"], metrics["error"] = follow(seen, clip, size=video.shape[1])
    metrics["flips"] = flips(seen)
    metrics["change"] = change(video, seen)
    return metrics


def follow(seen: Reading, clip: Scene, size: int) -> tuple[float | None, float | None]:
    """Return correlation and mean distance of the detected and the clip's trajectory."""
    if seen.present.mean() < ENOUGH_FOUND:
        return None, None
    true = truth(clip, len(seen.x), size)
    centre = np.stack([seen.x, seen.y], axis=1)[seen.present]
    error = float(np.linalg.norm(centre - true.centre[seen.present], axis=1).mean())
    if clip.motion == "growing":
        return correlation(seen.radius[seen.present, None], true.radius[seen.present, None]), error
    return correlation(centre, true.centre[seen.present]), error


def correlation(a: Float[np.ndarray, "n k"], b: Float[np.ndarray, "n k"]) -> float:
    """Return the cosine between two centred trajectories: 1 if one is the other, shifted."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / lengths) if lengths else 0.0


def flips(seen: Reading) -> float:
    """Return the share of pairs of neighbouring frames that differ in what they show."""
    # Without a subject, its attributes have no meaning.
    shown = np.stack(
        [np.where(seen.present, getattr(seen, name), -1) for name in ("subject", "colour")]
        + [seen.background, seen.style]
    )
    return float((shown[:, 1:] != shown[:, :-1]).any(axis=0).mean())


def change(video: Frames, seen: Reading) -> float:
    """Return the change from frame to frame that motion does not explain, in levels of 255."""
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
