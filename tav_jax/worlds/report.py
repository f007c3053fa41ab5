"""Write tables with intervals (Markdown) and plots (PNG) of measured videos."""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from tav_jax.evaluation.intervals import Interval, bootstrap_over_clips
from tav_jax.files import atomic_write

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Record = dict[str, Any]
"""One variant on one clip with one seed: variant, clip, motion, seed, and the videos' metrics."""


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
    return not (_open(video) or _source(video))


def _open(video: Mapping[str, Any]) -> bool:
    return video["kind"] == "open"


def _source(video: Mapping[str, Any]) -> bool:
    return video["kind"] == "source"


def _moves(video: Mapping[str, Any]) -> bool:
    return video["motion"] != "growing"


def right_share(attribute: str) -> Measure:
    """Return the column that says how often edits show what they ask for of an attribute."""
    return Measure(f"{attribute} right", attribute, _full, "more")


# A report leaves out the metrics that its world does not have.
EDITS = [
    Measure("subject found", "found", _full, "more"),
    Measure("motion: correlation", "correlation", lambda v: _full(v) and _moves(v), "more"),
    Measure("motion: error, pixels", "error", _full, "less"),
    Measure("motion: in phase", "phase", _full, "more"),
    Measure("change, levels", "change", _full, "less"),
]
OPEN = [
    Measure("what is said is right", "said", _open, "more"),
    Measure("subject found", "found", _open, "more"),
    Measure("change, levels", "change", _open, "less"),
    Measure("flips", "flips", _open, "less"),
    Measure("motion: correlation", "correlation", lambda v: _open(v) and _moves(v), "more"),
    Measure("motion: in phase", "phase", _open, "more"),
]
SOURCE = [
    Measure("all right", "said", _source, "more"),
    Measure("error, pixels", "error", _source, "less"),
    Measure("motion: correlation", "correlation", _source, "more"),
    Measure("motion: in phase", "phase", _source, "more"),
    Measure("change, levels", "change", _source, "less"),
]
PLOTTED = {
    "edits: subject right": right_share("subject"),
    "edits: correlation with the clip's motion": EDITS[1],
    "edits: in phase with the clip": EDITS[3],
    "open prompts: change, levels": OPEN[2],
    "source prompt: error, pixels": SOURCE[1],
}


def summarise(records: Sequence[Record], measure: Measure) -> Interval | None:
    """Return a metric over records. Seeds and prompts are first averaged within each clip.

    Videos without the metric, such as a motion where no subject was found, are left out. Return
    None if no video has it.
    """
    by_clip = _by_clip(records, measure)
    return bootstrap_over_clips(by_clip) if by_clip else None


def compare(
    records: Sequence[Record], others: Sequence[Record], measure: Measure
) -> Interval | None:
    """Return how much larger a metric is over records than over others, clip by clip.

    Clips differ more than variants do, so this interval may leave out zero where the intervals of
    both overlap. Return None if no clip has the metric in both.
    """
    ours, theirs = _by_clip(records, measure), _by_clip(others, measure)
    differences = {
        clip: [float(np.mean(values) - np.mean(theirs[clip]))]
        for clip, values in ours.items()
        if clip in theirs
    }
    return bootstrap_over_clips(differences) if differences else None


def _by_clip(records: Sequence[Record], measure: Measure) -> dict[str, list[float]]:
    """Return the values that a measure selects, by clip."""
    by_clip: dict[str, list[float]] = {}
    for record in records:
        for video in record["videos"]:
            metrics = video | {"motion": record["motion"]}
            if measure.selects(metrics) and metrics[measure.metric] is not None:
                by_clip.setdefault(record["clip"], []).append(metrics[measure.metric])
    return by_clip


def write_report(
    folder: Path,
    records: Sequence[Record],
    variants: Sequence[str],
    sweep: str | None,
    attributes: Iterable[str],
) -> None:
    """Write `report.md` and its plot.

    Args:
        folder: Where to write them.
        records: What was measured.
        variants: The names of the variants, in the order of the tables' rows.
        sweep: The one setting in which the variants differ, if they are a scale of it.
        attributes: The names of the world's attributes.
    """
    names = list(attributes)
    records = [_with_said(record, names) for record in records]
    of = {name: [r for r in records if r["variant"] == name] for name in variants}
    first = of[variants[0]]
    clips, seeds = ({record[key] for record in first} for key in ("clip", "seed"))
    edits = sum(_full(video) for video in first[0]["videos"])
    metrics = first[0]["videos"][0]
    full, left_open, source = (
        [measure for measure in measures if measure.metric in metrics]
        for measures in ([*map(right_share, names), *EDITS], OPEN, SOURCE)
    )
    plotted = {title: m for title, m in PLOTTED.items() if m.metric in metrics}
    seeded = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    parts = [
        f"# {folder.name}",
        f"{len(clips)} clips, {seeded}, {edits} edits of each; means over clips, and 95 % of their "
        "bootstrap (clips drawn with replacement).",
        f"![all variants]({folder.name}.png)",
        "## Edits by prompts that say everything",
        table(of, full),
        f"## Kinds of edit: {variants[0]}",
        table(_kinds(first), full),
        "## Prompts that leave something open",
        table(of, left_open),
        "## The clip's own caption",
        table(of, source),
    ]
    if not sweep and len(variants) > 1:
        parts += [
            f"## Less {variants[0]}, clip by clip",
            "Edits:",
            table(of, full, less=variants[0]),
            "Prompts that leave something open:",
            table(of, left_open, less=variants[0]),
        ]
    with atomic_write(folder / "report.md") as path:
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    figure = plot_sweep(of, plotted, sweep) if sweep else plot_variants(of, plotted)
    figure.savefig(folder / f"{folder.name}.png", dpi=110)
    plt.close(figure)


def _with_said(record: Record, attributes: Sequence[str]) -> Record:
    """Return the record, in which each video has the lowest share of what its prompt names."""

    def said(video: Mapping[str, Any]) -> float | None:
        asked = [video[name] for name in attributes]
        return min((value for value in asked if value is not None), default=None)

    return record | {"videos": [video | {"said": said(video)} for video in record["videos"]]}


def _kinds(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records by kind of edit, each with the videos of that kind only."""
    kinds = dict.fromkeys(v["kind"] for r in records for v in r["videos"] if _full(v))
    return {
        kind: [r | {"videos": [v for v in r["videos"] if v["kind"] == kind]} for r in records]
        for kind in kinds
    }


def table(
    rows: Mapping[str, Sequence[Record]], measures: Sequence[Measure], less: str | None = None
) -> str:
    """Return a Markdown table with a row for each group of records.

    Args:
        rows: Groups of records by name.
        measures: The columns.
        less: The name of a group. The others' differences from it are then shown.
    """
    lines = ["| | " + " | ".join(measure.title for measure in measures) + " |"]
    lines.append("|---" * (len(measures) + 1) + "|")
    for name, records in rows.items():
        if name == less:
            continue
        intervals = [
            summarise(records, measure) if less is None else compare(records, rows[less], measure)
            for measure in measures
        ]
        cells = [str(interval or "-") for interval in intervals]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_variants(of: Mapping[str, Sequence[Record]], plotted: Mapping[str, Measure]) -> plt.Figure:
    """Return a row of panels that show each variant's interval, one below the other."""
    figure, panels = plt.subplots(
        1, len(plotted), figsize=(13, 1.4 + 0.34 * len(of)), sharey=True, layout="constrained"
    )
    for panel, (title, measure) in zip(panels, plotted.items(), strict=True):
        for row, records in enumerate(of.values()):
            interval = summarise(records, measure)
            if interval is None:
                continue
            colour = "tab:red" if row == 0 else "tab:blue"
            panel.plot([interval.low, interval.high], [row, row], color=colour, lw=2)
            panel.plot(interval.mean, row, "o", color=colour)
        panel.set_title(textwrap.fill(title, 24), fontsize=9)
        panel.grid(axis="x", alpha=0.3)
        panel.set_xlabel(f"{measure.better} is better", fontsize=8)
    panels[0].set_yticks(range(len(of)), list(of))
    panels[0].invert_yaxis()
    return figure


def plot_sweep(
    of: Mapping[str, Sequence[Record]], plotted: Mapping[str, Measure], sweep: str
) -> plt.Figure:
    """Return a row of panels: metrics against the setting that names the variants."""
    figure, panels = plt.subplots(1, len(plotted), figsize=(13, 3), layout="constrained")
    ticks = np.arange(len(of))
    for panel, (title, measure) in zip(panels, plotted.items(), strict=True):
        intervals = [summarise(records, measure) for records in of.values()]
        shown = [(x, interval) for x, interval in zip(ticks, intervals, strict=True) if interval]
        x, means = [x for x, _ in shown], [interval.mean for _, interval in shown]
        panel.plot(x, means, "o-", color="tab:red")
        panel.fill_between(
            x, [i.low for _, i in shown], [i.high for _, i in shown], color="tab:red", alpha=0.15
        )
        panel.set_xticks(ticks, list(of), fontsize=8)
        panel.set_title(textwrap.fill(title, 24), fontsize=9)
        panel.set_xlabel(f"{sweep}; {measure.better} is better", fontsize=8)
        panel.grid(alpha=0.3)
    return figure
