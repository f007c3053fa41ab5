"""Metrics of edited videos that are arrays, as `tav_jax.edit_clip` returns them."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, UInt8


def score_videos(
    videos: UInt8[np.ndarray, "p f H W 3"],
    prompts: Sequence[str],
    *,
    source: UInt8[np.ndarray, "f H W 3"] | None = None,
    source_prompt: str | None = None,
    mask: Bool[np.ndarray, "f H W"] | None = None,
    metrics: Sequence[str] | None = None,
    networks: Mapping[str, str] | None = None,
) -> list[dict[str, float]]:
    """Return the metrics of several edits of one clip.

    docs/evaluation.md says what each metric shows. Nothing is downloaded.

    Args:
        videos: The edits.
        prompts: What each was to show.
        source: The clip, in the edits' size.
        source_prompt: What the clip shows.
        mask: Where the edited object is.
        metrics: Names of metrics, or their beginnings. By default all that can be computed from
            what is given, with the networks that are on this machine.
        networks: Folders or Hub ids of CLIP networks, by name: "ViT-L/14", "ViT-B/32", "PickScore".

    Returns:
        For each video its scores by the metrics' names.

    Raises:
        UserError: A name is no metric's, or a metric that was named cannot be computed.
        ValueError: There are not as many prompts as videos, or shapes do not fit.
    """
    # Imported here, so that the functional API needs JAX alone until something is scored.
    from pathlib import Path

    from tav_jax.errors import UserError
    from tav_jax.evaluation.examples import Example, Material
    from tav_jax.evaluation.metrics import Subject, compute, select_metrics
    from tav_jax.evaluation.networks import locate_all
    from tav_jax.pretrained.clip import Clip

    if len(videos) != len(prompts):
        raise ValueError(f"{len(videos)} videos have {len(prompts)} prompts")
    for name, array in (("source", source), ("mask", mask)):
        if array is not None and array.shape[:3] != videos.shape[1:4]:
            raise ValueError(f"{name}: its shape is {array.shape}, that of videos {videos.shape}")
    chosen = select_metrics(metrics)
    names = [metric.network for metric in chosen if metric.network]
    located, missing = locate_all(names, networks or {}, download=False)
    clips: dict[str | None, Clip | None] = {None: None}
    for name, where in located.items():
        try:
            clips[name] = where.load()
        except UserError as error:
            missing[name] = str(error)
    problems = {one.name: missing[one.network] for one in chosen if one.network in missing}
    scores: list[dict[str, float]] = []
    for video, prompt in zip(videos, prompts, strict=True):
        example = Example("", Path(), prompt, "", source_prompt=source_prompt)
        found: dict[str, float] = {}
        for network, clip in clips.items():
            subject = Subject(example, Material(video, source, mask), clip)
            group = [m for m in chosen if m.network == network and m.name not in problems]
            values, reasons = compute(group, subject)
            found |= values
            problems |= reasons
        scores.append({one.name: found[one.name] for one in chosen if one.name in found})
    if metrics is not None and problems:
        raise UserError("\n".join(f"{name}: {problem}" for name, problem in problems.items()))
    return scores
