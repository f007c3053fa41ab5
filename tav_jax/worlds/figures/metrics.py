"""Measure how well a video follows its prompt, keeps a clip's motion, and stays consistent."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, Float64, Int, UInt8
from PIL import Image, ImageFilter

from tav_jax.worlds.figures.detector import Reading, read_frames
from tav_jax.worlds.figures.drawing import Truth, pan_at, phases_apart, truth
from tav_jax.worlds.figures.scenes import ATTRIBUTES, VERBS, Scene
from tav_jax.worlds.metrics import change, flips, follow_clip, follow_prompt

Frames = UInt8[np.ndarray, "f H W 3"]

# Where the clip's figure moves less than this, in pixels, the detector's own errors would decide
# the correlation of trajectories. Figures that wave sway by 0.03, those that do push-ups move by 5.
LEAST_MOTION = 4.0
# A frame is in phase if it is off by less than this part of the verb's period.
IN_PHASE = 1 / 8
# Half the width in pixels of what surrounds a figure: its shadow, and edits with a wider body.
MARGIN = 6


def measure(video: Frames, clip: Scene, asks: Mapping[str, str]) -> dict[str, float | None]:
    """Return the metrics of one edited video.

    Args:
        video: The video.
        clip: The scene of the clip that was edited.
        asks: The values that the video's prompt asks for, by name in `ATTRIBUTES`.

    Returns:
        A dictionary with these values:

        - subject, verb, clothes, background, style: share of frames that show what the prompt asks
          for, or None if it leaves that open.
        - found: share of frames in which a figure is recognised.
        - correlation: correlation of the figure's trajectory with the clip's. None if the figure is
          found in too few frames, or if the clip's figure hardly moves.
        - error: mean distance between the two trajectories, in pixels. None if the figure is found
          in too few frames.
        - phase: share of frames that show the clip's verb, less than an eighth of its visible
          period before or after the clip. Noise is in phase in a quarter of them.
        - flips: share of pairs of neighbouring frames that differ in what they show.
        - change: mean difference between neighbouring frames, in levels of 255, in what does not
          move: the background away from the figure, and the figure's mean colour.
    """
    seen, true = read_frames(video), truth(clip, len(video))
    shown = values_shown(seen)
    centre = np.stack([seen.x, seen.y], axis=1)
    follows, error = follow_clip(centre, true.centre, seen.present)
    moves = np.ptp(true.centre, axis=0).max() >= LEAST_MOTION
    in_time = phases_apart(seen.phase, true.phase) < IN_PHASE
    in_phase = in_time & (shown["verb"] == list(VERBS).index(clip.verb))
    return follow_prompt(shown, ATTRIBUTES, asks) | {
        "found": float(seen.present.mean()),
        "correlation": follows if moves else None,
        "error": error,
        "phase": float(in_phase.mean()),
        "flips": flips(shown),
        "change": unexplained_change(video, clip, seen, true),
    }


def values_shown(seen: Reading) -> dict[str, Int[np.ndarray, "f"]]:
    """Return the index of each attribute's value in each frame, -1 of a figure that is not there.

    Background and style are there without a figure.
    """
    shown = {name: getattr(seen, name) for name in ATTRIBUTES}
    for name in ("subject", "verb", "clothes"):
        shown[name] = np.where(seen.present, shown[name], -1)
    return shown


def unexplained_change(video: Frames, clip: Scene, seen: Reading, true: Truth) -> float:
    """Return the change from frame to frame that motion does not explain, in levels of 255.

    The clip's silhouettes, moved to where the figure was found, stand for the figure's own.
    """
    found = np.stack([seen.x, seen.y], axis=1)
    moved = np.rint(np.where(seen.present[:, None], found - true.centre, 0)).astype(int)
    mask = np.stack(
        [
            np.roll(mask, (y, x), axis=(0, 1))
            for mask, (x, y) in zip(true.mask, moved.tolist(), strict=True)
        ]
    )
    around = _filter(mask, ImageFilter.MaxFilter(2 * MARGIN + 1)) > 0
    within = _filter(mask, ImageFilter.MinFilter(3))
    around[~seen.present] = False
    panned = [pan_at(clip, time) for time in np.linspace(0, 1, len(video)).tolist()]
    return change(video, around, within, seen.present, panned)


def _filter(
    masks: Float32[np.ndarray, "f H W"], kind: ImageFilter.Filter
) -> Float64[np.ndarray, "f H W"]:
    levels = np.rint(255 * masks).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(each).filter(kind)) for each in levels]) / 255
