"""Score videos by metrics, and keep the scores by the content of what they were computed from.

So an evaluation that was interrupted goes on, and a video is scored once however often it is asked
for, in whatever folder it lies.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tav_jax.errors import UserError
from tav_jax.evaluation.examples import Example, Material, check_each, read_material
from tav_jax.evaluation.metrics import Metric, Subject, compute
from tav_jax.evaluation.networks import Located, locate_all
from tav_jax.files import atomic_write
from tav_jax.parallel.sharding import make_mesh, on_mesh, shard
from tav_jax.pretrained.clip import Clip
from tav_jax.progress import progress_bar
from tav_jax.reading import read_json

VERSION = 1
"""Raise it when a metric's value changes, so that no kept score of before is used."""


@dataclass(frozen=True)
class Scored:
    """An example's scores, and for the metrics that it has no score of the reason."""

    example: Example
    scores: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def score_examples(
    examples: Sequence[Example],
    metrics: Sequence[Metric],
    store: Path | None,
    *,
    networks: Mapping[str, str] | None = None,
    download: bool = False,
) -> list[Scored]:
    """Return the scores of examples. Before anything is computed, everything is read once.

    Args:
        examples: The videos.
        metrics: What to compute.
        store: The folder where scores are kept, or None.
        networks: Folders or Hub ids of CLIP networks, by their names in `networks.NETWORKS`.
        download: Whether to fetch networks from the Hub that are not on this machine.

    Raises:
        UserError: Videos, sources or masks cannot be read or do not fit each other, or a named
            folder is not the network's. All offenders are listed.
    """
    digests: list[str] = []
    check_each(examples, lambda one: digests.append(_digest(one, read_material(one))))
    wanted = [metric.network for metric in metrics if metric.network]
    located, missing = locate_all(wanted, networks or {}, download=download)
    for name in located.keys() & (networks or {}).keys():
        located[name].load()  # refuses another network's folder before anything is computed
    results = [Scored(example) for example in examples]
    for network in dict.fromkeys(metric.network for metric in metrics):
        group = [metric for metric in metrics if metric.network == network]
        if network and network in missing:
            for result in results:
                result.reasons.update((metric.name, missing[network]) for metric in group)
            continue
        where = located.get(network or "")
        network_digest = where.digest() if where else ""
        kept = [_Kept(store, digest, network_digest) for digest in digests]
        _score_group(results, group, kept, where)
    for result, digest in zip(results, digests, strict=True):
        last = _last_scores(store, digest)
        if (scores := last.read()) != scores | result.scores:
            last.write(scores | result.scores)
    return results


def last_scores(examples: Sequence[Example], store: Path | None) -> list[dict[str, float]]:
    """Return the scores that were last computed of examples, by whatever networks.

    Nothing is computed. An example that cannot be read has none.
    """
    found = []
    for example in examples:
        scores: dict[str, float] = {}
        if store is not None and any(store.iterdir()):
            with suppress(UserError, OSError):
                scores = _last_scores(store, _digest(example, read_material(example))).read()
        found.append(scores)
    return found


def _score_group(
    results: Sequence[Scored],
    metrics: Sequence[Metric],
    kept: Sequence["_Kept"],
    where: Located | None,
) -> None:
    """Add the scores of metrics that share a network."""
    wanted = []
    for result, scores in zip(results, kept, strict=True):
        values = scores.read()
        for metric in metrics:
            if metric.name in values:
                result.scores[metric.name] = values[metric.name]
        if any(metric.name not in values for metric in metrics):
            wanted.append((result, scores, values))
    if not wanted:
        return
    # Frames go to all devices; their number in a batch is a multiple of the devices'.
    mesh = make_mesh({"data": -1, "frames": 1, "fsdp": 1}, frames=1)
    with on_mesh(mesh), progress_bar("scoring", total=len(wanted)) as progress:
        clip = _placed(where.load()) if where else None
        for result, scores, values in wanted:
            subject = Subject(result.example, read_material(result.example), clip)
            found, reasons = compute([m for m in metrics if m.name not in values], subject)
            values.update(found)
            result.scores.update(found)
            result.reasons.update(reasons)
            scores.write(values)
            progress.update(1)


def _placed(clip: Clip) -> Clip:
    """Return the model with its parameters on the devices of the current mesh."""
    return replace(clip, network=shard(clip.network))


class _Kept:
    """The kept scores of one content by one network, which a digest names."""

    def __init__(self, store: Path | None, content: str, network: str):
        key = hashlib.sha256(f"{VERSION} {content} {network}".encode()).hexdigest()
        self.file = store / f"{key}.json" if store else None

    def read(self) -> dict[str, float]:
        """Return the scores by the metrics' names. A damaged file counts as none."""
        if self.file is None:
            return {}
        with suppress(UserError, OSError):
            values = read_json(self.file)
            if all(isinstance(value, float) for value in values.values()):
                return values
        return {}

    def write(self, values: Mapping[str, float]) -> None:
        """Keep the scores."""
        if self.file is not None and values:
            with atomic_write(self.file) as path:
                path.write_text(json.dumps(values), encoding="utf-8")


def _last_scores(store: Path | None, content: str) -> _Kept:
    """Return the record of the last scores of one content."""
    return _Kept(store, content, "any")


def _digest(example: Example, material: Material) -> str:
    """Return a digest of everything that a score depends on, but the network."""
    digest = hashlib.sha256(json.dumps([example.prompt, example.source_prompt]).encode())
    for array in (material.frames, material.source, material.mask):
        digest.update(repr(None if array is None else array.shape).encode())
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
