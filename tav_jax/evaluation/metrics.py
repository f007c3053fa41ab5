"""All metrics by name: what each needs, how it is computed, and which value is better.

The part of a name after the dot is the protocol: who has defined it, or what flow it uses. Values
of different protocols must not be compared. docs/evaluation.md says what each shows.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from tav_jax.errors import UserError
from tav_jax.evaluation import clip_metrics, flow_metrics, frame_metrics, optical_flow
from tav_jax.evaluation.clip_features import image_features, text_features
from tav_jax.evaluation.examples import Example, Frames, Material
from tav_jax.pretrained.clip import Clip

Vectors = Float[np.ndarray, "f d"]
Flow = Float[np.ndarray, "g H W 2"]


class VideoFeatures(NamedTuple):
    """CLIP's features of a video's frames, on this host."""

    projected: Vectors
    pooled: Vectors


@dataclass(frozen=True)
class Subject:
    """An example with its frames and the network that looks at them. Features are computed once."""

    example: Example
    material: Material
    clip: Clip | None = None
    kept: dict[str, Any] = field(default_factory=dict, compare=False)
    """What metrics that are defined elsewhere compute once for all of them."""

    @property
    def frames(self) -> Frames:
        """The video."""
        return self.material.frames

    @property
    def source(self) -> Frames:
        """The source video."""
        if self.material.source is None:
            raise UserError(self.material.no_source)
        return self.material.source

    @property
    def mask(self) -> Bool[np.ndarray, "f H W"]:
        """Where the edited object is."""
        if self.material.mask is None:
            raise UserError("no mask is given")
        return self.material.mask

    @cached_property
    def features(self) -> "VideoFeatures":
        """The features of the frames."""
        return self._look_at(self.frames)

    @cached_property
    def square_features(self) -> "VideoFeatures":
        """The features of the frames at 480x480."""
        return self._look_at(clip_metrics.resize_as_loveu(self.frames))

    def _look_at(self, frames: Frames) -> "VideoFeatures":
        assert self.clip is not None
        features = image_features(self.clip, frames)
        return VideoFeatures(np.asarray(features.projected), np.asarray(features.pooled))

    @cached_property
    def flow(self) -> Flow:
        """The optical flow of the video."""
        return optical_flow.dis_flow(self.frames)

    @cached_property
    def source_flow(self) -> Flow:
        """The optical flow of the source."""
        return optical_flow.dis_flow(self.source)

    @cached_property
    def editboard(self) -> tuple[Frames, Frames]:
        """The video and its source as EditBoard resizes them."""
        video, source = map(optical_flow.resize_as_editboard, (self.frames, self.source))
        return video, source

    @cached_property
    def editboard_source_flow(self) -> Flow:
        """The source's optical flow as EditBoard computes it."""
        return optical_flow.farneback_flow(self.editboard[1])

    @cached_property
    def texts(self) -> Vectors:
        """The features of the prompt and of the source's prompt."""
        assert self.clip is not None
        prompts = [self.example.prompt, self.example.source_prompt or ""]
        return np.asarray(text_features(self.clip, prompts).projected)

    @property
    def scale(self) -> float:
        """The network's factor of cosines."""
        assert self.clip is not None
        return self.clip.scale


@dataclass(frozen=True)
class Metric:
    """A metric of one video.

    Args:
        name: Its name, with its protocol.
        better: Which value is better.
        score: Computes it. Raises `UserError` if the example lacks what it needs.
        network: The CLIP network that it needs, a key of `networks.NETWORKS`.
    """

    name: str
    better: Literal["more", "less"]
    score: Callable[[Subject], float]
    network: str | None = None


def compute(metrics: Sequence[Metric], subject: Subject) -> tuple[dict[str, float], dict[str, str]]:
    """Return the scores by the metrics' names, and why there is none of the others."""
    scores, reasons = {}, {}
    for metric in metrics:
        try:
            scores[metric.name] = metric.score(subject)
        except UserError as error:
            reasons[metric.name] = str(error)
    return scores, reasons


def _text_loveu(subject: Subject) -> float:
    frames = subject.square_features.projected
    return clip_metrics.text_alignment(frames, subject.texts[0], subject.scale)


def _text(subject: Subject) -> float:
    frames = subject.features.projected
    return clip_metrics.text_alignment(frames, subject.texts[0], subject.scale)


def _frames_loveu(subject: Subject) -> float:
    return clip_metrics.pairwise_similarity(subject.square_features.projected)


def _frames_figures(subject: Subject) -> float:
    return clip_metrics.pairwise_similarity(subject.features.projected)


def _frames_fatezero(subject: Subject) -> float:
    return clip_metrics.temporal_similarity(subject.features.projected)


def _frames_v2vbench(subject: Subject) -> float:
    return clip_metrics.clamped_similarity(subject.features.pooled)


def _accuracy_fatezero(subject: Subject) -> float:
    if not subject.example.source_prompt:
        raise UserError("no source_prompt is given")
    prompt, source_prompt = subject.texts
    return clip_metrics.prompt_accuracy(subject.features.projected, source_prompt, prompt)


def _motion_alignment(subject: Subject) -> float:
    return flow_metrics.motion_alignment(subject.flow, subject.source_flow)


def _ff_alpha(subject: Subject) -> float:
    return flow_metrics.ff_alpha(*subject.editboard, subject.editboard_source_flow)


def _ff_beta(subject: Subject) -> float:
    flow = optical_flow.farneback_flow(subject.editboard[0])
    return flow_metrics.ff_beta(flow, subject.editboard_source_flow)


def _warp_error(subject: Subject) -> float:
    back = optical_flow.dis_flow(subject.source[::-1])[::-1]
    return flow_metrics.warp_error(subject.frames, subject.source_flow, back)


def _semantic_score(subject: Subject) -> float:
    mask = optical_flow.resize_mask_as_editboard(subject.mask)
    return frame_metrics.semantic_score(*subject.editboard, mask)


def _with_mask(function: Callable[[Frames, Frames, np.ndarray], float], subject: Subject) -> float:
    return function(subject.frames, subject.source, subject.mask)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("clip_text.loveu", "more", _text_loveu, "ViT-L/14"),
        Metric("clip_frames.loveu", "more", _frames_loveu, "ViT-L/14"),
        Metric("pick_score.loveu", "more", _text_loveu, "PickScore"),
        Metric("clip_text.v2vbench", "more", _text, "ViT-L/14"),
        Metric("clip_frames.v2vbench", "more", _frames_v2vbench, "ViT-L/14"),
        Metric("clip_frames.fatezero", "more", _frames_fatezero, "ViT-B/32"),
        Metric("clip_accuracy.fatezero", "more", _accuracy_fatezero, "ViT-B/32"),
        Metric("clip_text.figures", "more", _text, "figures"),
        Metric("clip_frames.figures", "more", _frames_figures, "figures"),
        Metric("motion_alignment.dis", "more", _motion_alignment),
        Metric("ff_alpha.editboard", "less", _ff_alpha),
        Metric("ff_beta.editboard", "less", _ff_beta),
        Metric("warp_error.dis", "less", _warp_error),
        Metric("flicker.vbench", "more", lambda subject: frame_metrics.flicker(subject.frames)),
        Metric("semantic_score.editboard", "less", _semantic_score),
        Metric("background_psnr", "more", partial(_with_mask, frame_metrics.background_psnr)),
        Metric("background_ssim", "more", partial(_with_mask, frame_metrics.background_ssim)),
        Metric(
            "background_psnr.five",
            "more",
            partial(_with_mask, frame_metrics.five_background_psnr),
        ),
    )
}


def select_metrics(
    names: Sequence[str] | None,
    models: Collection[str] = (),
    known: Mapping[str, Metric] = METRICS,
) -> list[Metric]:
    """Return the metrics that are asked for, in the order of the table.

    Args:
        names: Names, or beginnings of names such as "clip_frames". None: all that mean something.
        models: The base models that made the videos. Metrics whose protocol is "figures" know the
            world of `tiny-figures` only.
        known: All metrics by name.

    Raises:
        UserError: A name is no metric's. All such names are listed.
    """
    if names is None:
        every = "tiny-figures" in models
        return [one for name, one in known.items() if every or not name.endswith(".figures")]
    if unknown := [name for name in names if not any(m.startswith(name) for m in known)]:
        raise UserError(
            f"--metrics: {', '.join(unknown)} is no metric; there are {', '.join(known)}"
        )
    return [metric for name, metric in known.items() if name.startswith(tuple(names))]
