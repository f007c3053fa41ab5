"""Tables of scores: for a terminal, and as JSON, CSV and Markdown."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tav_jax.errors import UserError
from tav_jax.evaluation.examples import Example
from tav_jax.evaluation.intervals import Interval, bootstrap_over_clips
from tav_jax.evaluation.metrics import Metric
from tav_jax.evaluation.published import PublishedRow
from tav_jax.evaluation.scores import Scored
from tav_jax.reading import read_text

# The columns of the miniature's table: text and frames as in the paper, then what the edit shows
# and whether it moves as the clip does.
OF_MINIATURE = (
    "clip_text.figures",
    "clip_frames.figures",
    "attributes.figures",
    "trajectory.figures",
    "motion_alignment.dis",
)
IDENTITY = ("system", "clip", "video", "prompt")  # columns that say which video a row is about


class Mean(NamedTuple):
    """The mean of a metric over the clips of a system, its interval, and its number of videos."""

    interval: Interval
    n: int

    def __str__(self) -> str:
        mean, low, high = self.rounded()
        # Of one clip there is no interval.
        return mean if self.interval.low == self.interval.high else f"{mean} ({low} to {high})"

    def rounded(self) -> list[str]:
        """Return the mean and the ends of its interval as a table shows them."""
        digits = 2 if abs(self.interval.mean) >= 10 else 4
        return [f"{value:.{digits}f}" for value in self.interval]


class Evaluation(NamedTuple):
    """What was measured.

    Args:
        metrics: The metrics, in the order of the table's rows.
        results: The scores of every video.
        published: Published figures that are shown beside them.
        miniature: The scores of the paper's comparison in miniature, shown beside them, too.
    """

    metrics: Sequence[Metric]
    results: Sequence[Scored]
    published: Sequence[PublishedRow]
    miniature: Sequence[Scored] = ()

    def systems(self) -> dict[str, dict[str, Mean]]:
        """Return the means of each system by metric. A metric without any score is left out."""
        return _means(self.results, self.metrics)

    def not_computed(self) -> dict[str, list[str]]:
        """Return the metrics that some videos have no score of, by the reason."""
        by_reason: dict[str, list[str]] = {}
        for metric in self.metrics:
            reasons: dict[str, int] = {}
            for result in self.results:
                if metric.name in result.reasons:
                    reason = result.reasons[metric.name]
                    reasons[reason] = reasons.get(reason, 0) + 1
            for reason, count in reasons.items():
                some = f" (for {count} of {len(self.results)} videos)"
                named = metric.name + (some if count < len(self.results) else "")
                by_reason.setdefault(reason, []).append(named)
        return by_reason


def _means(results: Sequence[Scored], metrics: Sequence[Metric]) -> dict[str, dict[str, Mean]]:
    groups: dict[str, list[Scored]] = {}
    for result in results:
        groups.setdefault(result.example.system, []).append(result)
    return {
        system: {
            metric.name: mean
            for metric in metrics
            if (mean := _mean(scored, metric.name)) is not None
        }
        for system, scored in groups.items()
    }


def _mean(results: Sequence[Scored], metric: str) -> Mean | None:
    by_clip: dict[str, list[float]] = {}
    for result in results:
        if metric in result.scores:
            by_clip.setdefault(result.example.clip, []).append(result.scores[metric])
    if not by_clip:
        return None
    return Mean(bootstrap_over_clips(by_clip), sum(map(len, by_clip.values())))


def text_table(evaluation: Evaluation) -> str:
    """Return the table for a terminal: a row for each metric, a column for each system."""
    return "\n\n".join(_parts(evaluation, _aligned))


def markdown_table(evaluation: Evaluation) -> str:
    """Return the same tables as Markdown."""
    note = "Means over clips, with the interval that holds 95 % of their bootstrap."
    return "\n\n".join(_parts(evaluation, _markdown, note)) + "\n"


def _parts(evaluation: Evaluation, render: Callable[[Sequence], str], *notes: str) -> list[str]:
    """Return the table with notes below it, that of published figures, and what is not computed."""
    header, *rows = _rows(evaluation)
    parts = [render([header, *rows]), *notes] if rows else []
    if miniature := _miniature(evaluation):
        parts.append(render(miniature))
    if evaluation.published:
        head = ("published elsewhere, on other clips", "metric", "value", "source")
        parts.append(render([head, *_published(evaluation)]))
    return parts + _reasons(evaluation)


def json_text(evaluation: Evaluation) -> str:
    """Return as JSON the systems' means, every video's scores, and what is shown beside them."""
    tree = {
        "systems": _as_tree(evaluation.systems()),
        "videos": [_record(result) for result in evaluation.results],
        "miniature": _as_tree(_means(evaluation.miniature, evaluation.metrics)),
        "published": [row._asdict() for row in evaluation.published],
        "not_computed": {
            name: reason for reason, names in evaluation.not_computed().items() for name in names
        },
    }
    return json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _as_tree(systems: dict[str, dict[str, Mean]]) -> dict[str, Any]:
    return {
        system: {name: {**mean.interval._asdict(), "n": mean.n} for name, mean in means.items()}
        for system, means in systems.items()
    }


def csv_text(evaluation: Evaluation) -> str:
    """Return a row for every video."""
    text = io.StringIO()
    names = [*IDENTITY, *(metric.name for metric in evaluation.metrics)]
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"clip": one.example.clip} | _record(one) for one in evaluation.results)
    return text.getvalue()


def read_scores(file: Path, metrics: Sequence[Metric]) -> list[Scored]:
    """Return the scores that `csv_text` has written, as far as they are of these metrics.

    Raises:
        UserError: The file cannot be read, lacks a column, or has a score that is no number.
    """
    reader = csv.DictReader(read_text(file).splitlines())
    if missing := [name for name in IDENTITY if name not in (reader.fieldnames or [])]:
        raise UserError(
            f"--earlier: {file}: it has no column {', '.join(missing)}; take a file that --csv "
            "has written"
        )
    results = []
    for row in reader:
        system, clip, video, prompt = (row[name] or "" for name in IDENTITY)
        example = Example(system, Path(video), prompt, clip)
        texts = {one.name: text for one in metrics if (text := row.get(one.name))}
        scores = {name: _number(text) for name, text in texts.items()}
        if not all(map(math.isfinite, scores.values())):
            raise UserError(f"--earlier: {file}, line {reader.line_num}: a score is no number")
        results.append(Scored(example, scores))
    return results


def _number(text: str) -> float:
    """Return the number that a text is, or NaN."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _record(result: Scored) -> dict[str, Any]:
    example = result.example
    return {
        "system": example.system,
        "video": str(example.video),
        "prompt": example.prompt,
        **result.scores,
    }


def _rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    systems = evaluation.systems()
    counts = dict.fromkeys(systems, 0)
    for result in evaluation.results:
        counts[result.example.system] += 1
    head = ("metric", "better", *(f"{name}, {counts[name]} videos" for name in systems))
    rows = [
        (
            metric.name,
            metric.better,
            *(str(means.get(metric.name, "-")) for means in systems.values()),
        )
        for metric in evaluation.metrics
        if any(metric.name in means for means in systems.values())
    ]
    return [head, *rows]


def _miniature(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Return a row for each system of the miniature, with the metrics that were computed now."""
    metrics = [metric for metric in evaluation.metrics if metric.name in OF_MINIATURE]
    names = [metric.name for metric in metrics]
    rows = [
        (system, *(own[name].rounded()[0] if name in own else "-" for name in names))
        for system, own in _means(evaluation.miniature, metrics).items()
    ]
    head = ("the paper's comparison in miniature, on other clips", *names)
    return [head, *rows] if rows and names else []


def _published(evaluation: Evaluation) -> list[tuple[str, ...]]:
    return [(row.system, row.metric, f"{row.value:g}", row.source) for row in evaluation.published]


def _reasons(evaluation: Evaluation) -> list[str]:
    missing = evaluation.not_computed()
    lines = [f"not computed: {', '.join(names)}: {reason}" for reason, names in missing.items()]
    return ["\n".join(lines)] if lines else []


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
