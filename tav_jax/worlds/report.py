"""Write tables with intervals (Markdown) and plots (PNG) of measured videos."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from tav_jax.files import atomic_write

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Record = dict[str, Any]
"""One variant on one clip with one seed: variant, clip, motion, seed, and the videos' metrics."""

RESAMPLES = 4000


class Measure(NamedTuple):
    """A column of a table: a metric, over some of the videos.

    Args:
        title: Heading of the column.
        metric: Name of the metric.
        selects: Tells whether a video counts, given its metrics and the motion of its clip.
        better: "more" or "less".
    """

    title: str
    metric: str
    selects: Callable[[Mapping[str, Any]], bool]
    better: str


def _full(video: Mapping[str, Any]) -> bool:
    return video["kind"] not in ("source", "open")


def _moves(video: Mapping[str, Any]) -> bool:
    return _full(video) and video["motion"] != "growing"


EDITS = [
    Measure("subject right", "subject", _full, "more"),
    Measure("colour right", "colour", _full, "more"),
    Measure("background right", "background", _full, "more"),
    Measure("style right", "style", _full, "more"),
    Measure("subject found", "found", _full, "more"),
    Measure("motion: correlation", "correlation", _moves, "more"),
    Measure("motion: error, pixels", "error", _full, "less"),
    Measure("change, levels", "change", _full, "less"),
]
OPEN = [
    Measure("what is said is right", "said", lambda v: v["kind"] == "open", "more"),
    Measure("subject found", "found", lambda v: v["kind"] == "open", "more"),
    Measure("change, levels", "change", lambda v: v["kind"] == "open", "less"),
    Measure("flips", "flips", lambda v: v["kind"] == "open", "less"),
    Measure(
        "motion: correlation",
        "correlation",
        lambda v: v["kind"] == "open" and v["motion"] != "growing",
        "more",
    ),
]
SOURCE = [
    Measure("all right", "said", lambda v: v["kind"] == "source", "more"),
    Measure("error, pixels", "error", lambda v: v["kind"] == "source", "less"),
    Measure("motion: correlation", "correlation", lambda v: v["kind"] == "source", "more"),
    Measure("change, levels", "change", lambda v: v["kind"] == "source", "less"),
]
PLOTTED = [
    ("edits: subject right", EDITS[0]),
    ("edits: correlation with the clip's motion", EDITS[5]),
    ("open prompts: change, levels", OPEN[2]),
    ("source prompt: error, pixels", SOURCE[1]),
]


class Interval(NamedTuple):
    """A mean over clips, and the interval that holds 95 % of the bootstrap means."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


def bootstrap(per_clip: Sequence[float]) -> Interval:
    """Return the mean over clips with its percentile interval, by drawing clips with replacement.

    Efron & Tibshirani 1993, chapter 13.
    """
    values = np.asarray(per_clip, np.float64)
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def summarise(records: Sequence[Record], measure: Measure) -> Interval | None:
    """Return a metric over records. Seeds and prompts are first averaged within each clip.

    Videos without the metric, such as a motion where no subject was found, are left out. Return
    None if no video has it.
    """
    by_clip: dict[str, list[float]] = {}
    for record in records:
        for video in record["videos"]:
            metrics = video | {"motion": record["motion"], "said": _said(video)}
            if measure.selects(metrics) and metrics[measure.metric] is not None:
                by_clip.setdefault(record["clip"], []).append(metrics[measure.metric])
    return bootstrap([float(np.mean(x)) for x in by_clip.values()]) if by_clip else None


def _said(video: Mapping[str, Any]) -> float | None:
    """Return the lowest accuracy among the attributes that a video's prompt names."""
    asked = [video[name] for name in ("subject", "colour", "background", "style")]
    return min((value for value in asked if value is not None), default=None)


def write_report(
    folder: Path, records: Sequence[Record], variants: Sequence[str], sweep: str | None
) -> None:
    """Write `report.md` and its plot."""
    of = {name: [r for r in records if r["variant"] == name] for name in variants}
    first = of[variants[0]]
    clips, seeds = ({record[key] for record in first} for key in ("clip", "seed"))
    edits = sum(_full(video) for video in first[0]["videos"])
    parts = [
        f"# {folder.name}",
        f"{len(clips)} clips, {len(seeds)} seeds, {edits} edits of each; means over clips, and "
        "95 % of their bootstrap (clips drawn with replacement).",
        f"![all variants]({folder.name}.png)",
        "## Edits by prompts that say everything",
        table(of, EDITS),
        f"## Kinds of edit: {variants[0]}",
        table(_kinds(first), EDITS),
        "## Prompts that leave something open",
        table(of, OPEN),
        "## The clip's own caption",
        table(of, SOURCE),
    ]
    with atomic_write(folder / "report.md") as path:
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    figure = plot_sweep(of, sweep) if sweep else plot_variants(of)
    figure.savefig(folder / f"{folder.name}.png", dpi=110)
    plt.close(figure)


def _kinds(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records by kind of edit, each with the videos of that kind only."""
    kinds = dict.fromkeys(v["kind"] for r in records for v in r["videos"] if _full(v))
    return {
        kind: [r | {"videos": [v for v in r["videos"] if v["kind"] == kind]} for r in records]
        for kind in kinds
    }


def table(rows: Mapping[str, Sequence[Record]], measures: Sequence[Measure]) -> str:
    """Return a Markdown table with a row for each group of records."""
    lines = ["| | " + " | ".join(measure.title for measure in measures) + " |"]
    lines.append("|---" * (len(measures) + 1) + "|")
    for name, records in rows.items():
        cells = [str(summarise(records, measure) or "-") for measure in measures]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_variants(of: Mapping[str, Sequence[Record]]) -> plt.Figure:
    """Return a row of panels that show each variant's interval, one below the other."""
    figure, panels = plt.subplots(
        1, len(PLOTTED), figsize=(13, 1.4 + 0.34 * len(of)), sharey=True, layout="constrained"
    )
    for panel, (title, measure) in zip(panels, PLOTTED, strict=True):
        for row, records in enumerate(of.values()):
            interval = summarise(records, measure)
            if interval is None:
                continue
            colour = "tab:red" if row == 0 else "tab:blue"
            panel.plot([interval.low, interval.high], [row, row], color=colour, lw=2)
            panel.plot(interval.mean, row, "o", color=colour)
        panel.set_title(title, fontsize=9)
        panel.grid(axis="x", alpha=0.3)
        panel.set_xlabel(f"{measure.better} is better", fontsize=8)
    panels[0].set_yticks(range(len(of)), list(of))
    panels[0].invert_yaxis()
    return figure


def plot_sweep(of: Mapping[str, Sequence[Record]], sweep: str) -> plt.Figure:
    """Return a row of panels: metrics against the setting that names the variants."""
    figure, panels = plt.subplots(1, len(PLOTTED), figsize=(13, 3), layout="constrained")
    ticks = np.arange(len(of))
    for panel, (title, measure) in zip(panels, PLOTTED, strict=True):
        intervals = [summarise(records, measure) for records in of.values()]
        shown = [(x, interval) for x, interval in zip(ticks, intervals, strict=True) if interval]
        x, means = [x for x, _ in shown], [interval.mean for _, interval in shown]
        panel.plot(x, means, "o-", color="tab:red")
        panel.fill_between(
            x, [i.low for _, i in shown], [i.high for _, i in shown], color="tab:red", alpha=0.15
        )
        panel.set_xticks(ticks, list(of), fontsize=8)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel(f"{sweep}; {measure.better} is better", fontsize=8)
        panel.grid(alpha=0.3)
    return figure
