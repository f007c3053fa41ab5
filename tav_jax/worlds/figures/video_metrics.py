"""Metrics of `evaluate` that the detector of figures computes, for videos of this world only."""

from functools import partial

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tav_jax.errors import UserError
from tav_jax.evaluation.metrics import Metric, Subject
from tav_jax.worlds.figures.detector import Reading, read_frames
from tav_jax.worlds.figures.drawing import phases_apart
from tav_jax.worlds.figures.metrics import IN_PHASE, LEAST_MOTION, values_shown
from tav_jax.worlds.figures.scenes import ATTRIBUTES, SIZE, values_named
from tav_jax.worlds.metrics import ENOUGH_FOUND, follow_clip, follow_prompt

Frames = UInt8[np.ndarray, "f H W 3"]


def attribute_shown(name: str, subject: Subject) -> float:
    """Return the share of frames that show the prompt's value of an attribute.

    Args:
        name: One of `ATTRIBUTES`.
        subject: The video.

    Raises:
        UserError: The prompt does not say which value.
    """
    share = _follows(subject)[name]
    if share is None:
        raise UserError(f"the prompt names no {name}")
    return share


def attributes_shown(subject: Subject) -> float:
    """Return the mean of `attribute_shown` over the attributes that the prompt names."""
    return float(np.mean([share for share in _follows(subject).values() if share is not None]))


def trajectory_correlation(subject: Subject) -> float:
    """Return the correlation of the figure's trajectory with the source's, from -1 to 1.

    It is 0 if the figure is found in too few frames of the video.

    Raises:
        UserError: There is no source, or its figure hardly moves or is not found.
    """
    seen, source = _reading(subject, "video"), _reading(subject, "source")
    centre, true = (np.stack([one.x, one.y], axis=1) for one in (seen, source))
    if np.ptp(true[source.present], axis=0).max() < LEAST_MOTION:
        raise UserError("the source's figure stays where it is")
    correlation, _ = follow_clip(centre, true, seen.present & source.present)
    return correlation or 0.0


def frames_in_phase(subject: Subject) -> float:
    """Return the share of frames with the source's verb, less than an eighth of a cycle apart.

    Raises:
        UserError: There is no source, or no figure is found in it.
    """
    seen, source = _reading(subject, "video"), _reading(subject, "source")
    same = seen.present & (seen.verb == source.verb)
    return float((same & (phases_apart(seen.phase, source.phase) < IN_PHASE)).mean())


def _follows(subject: Subject) -> dict[str, float | None]:
    """Return, for each attribute, the share of frames that show what the prompt asks for."""
    asks = values_named(subject.example.prompt)
    if not asks.keys() & {"subject", "verb", "background"}:
        raise UserError("the prompt names nothing of the figures' world")
    return follow_prompt(values_shown(_reading(subject, "video")), ATTRIBUTES, asks)


def _reading(subject: Subject, which: str) -> Reading:
    """Return what the detector sees in the video, or in its source."""
    if which not in subject.kept:
        frames = subject.frames if which == "video" else subject.source
        reading = read_frames(in_the_worlds_size(frames))
        if which == "source" and reading.present.mean() < ENOUGH_FOUND:
            raise UserError("the detector finds no figure in the source")
        subject.kept[which] = reading
    return subject.kept[which]


def in_the_worlds_size(frames: Frames) -> UInt8[np.ndarray, "f 64 64 3"]:
    """Return frames of 64x64, each pixel the mean of those that it stands for."""
    if frames.shape[1:3] == (SIZE, SIZE):
        return frames
    return np.stack(
        [
            np.asarray(Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BOX))
            for frame in frames
        ]
    )


METRICS = {
    metric.name: metric
    for metric in (
        *(Metric(f"{name}.figures", "more", partial(attribute_shown, name)) for name in ATTRIBUTES),
        Metric("attributes.figures", "more", attributes_shown),
        Metric("trajectory.figures", "more", trajectory_correlation),
        Metric("phase.figures", "more", frames_in_phase),
    )
}
