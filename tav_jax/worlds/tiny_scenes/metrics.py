"""Measure how well a video follows its prompt, keeps a clip's motion, and stays consistent."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from tav_jax.worlds.metrics import change, correlation, flips, follow_clip, follow_prompt
from tav_jax.worlds.tiny_scenes.detector import Reading, read_frame
from tav_jax.worlds.tiny_scenes.drawing import cover, truth
from tav_jax.worlds.tiny_scenes.scenes import ATTRIBUTES, SIZE, TAUGHT_STYLES, Scene

Frames = UInt8[np.ndarray, "f H W 3"]


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
    shown = {
        "subject": np.where(seen.present, seen.subject, -1),
        "colour": np.where(seen.present, seen.colour, -1),
        "background": seen.background,
        "style": seen.style,
    }
    follows, error = follow(seen, clip, size=video.shape[1])
    return follow_prompt(shown, ATTRIBUTES, asks) | {
        "found": float(seen.present.mean()),
        "correlation": follows,
        "error": error,
        "flips": flips(shown),
        "change": unexplained_change(video, seen),
    }


def follow(seen: Reading, clip: Scene, size: int) -> tuple[float | None, float | None]:
    """Return correlation and mean distance of the detected and the clip's trajectory."""
    true, present = truth(clip, len(seen.x), size), seen.present
    follows, error = follow_clip(np.stack([seen.x, seen.y], axis=1), true.centre, present)
    if clip.motion == "growing" and follows is not None:
        follows = correlation(seen.radius[present, None], true.radius[present, None])
    return follows, error


def unexplained_change(video: Frames, seen: Reading) -> float:
    """Return the change from frame to frame that motion does not explain, in levels of 255."""
    size = video.shape[1]
    places = np.stack([seen.x, seen.y, seen.radius], axis=1) * (SIZE / size)
    around = cover(seen.subject, places, size, grow=1.5) > 0
    within = cover(seen.subject, places, size, grow=-1.0)
    around[~seen.present] = False
    return change(video, around, within, seen.present, panned=[0] * len(video))
