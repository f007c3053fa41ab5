"""What the page of a run shows: its clip and edits, and what its files say of how it was made."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tav_jax.console import say
from tav_jax.errors import MissingFileError, UserError
from tav_jax.reading import read_json, read_text
from tav_jax.runs.config import TuneConfig
from tav_jax.runs.metrics_log import read_metrics
from tav_jax.runs.overview import sheet_of, shown
from tav_jax.runs.run import DEFAULT_FPS, Run
from tav_jax.runs.samples import (
    Frames,
    Sample,
    default_sample,
    sample_size,
    sampled_steps,
    video_records,
)
from tav_jax.settings import flatten
from tav_jax.text import shorten

NAME = "report.html"  # in the run's folder


class Scores(NamedTuple):
    """What `evaluate` has computed.

    Args:
        of: The scores of each video, by the metrics' names.
        better: For each metric which value is better, "more" or "less".
    """

    of: Mapping[Path, Mapping[str, float]] = {}
    better: Mapping[str, str] = {}


@dataclass(frozen=True)
class Edit:
    """A sampled video.

    Args:
        prompt: What it was to show, and its seed if its name has it. Edits of several runs that
            have this in common are compared.
        video: Its file.
        note: In which settings it differs from those of its run.
        scores: Its scores by the metrics' names.
    """

    prompt: str
    video: Path
    note: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Stage:
    """A stage of a run: its seconds, and the most memory that was in use until its end."""

    name: str
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Report:
    """What the page of one run shows.

    Args:
        name: What the page calls the run.
        run: The run.
        config: Its settings.
        config_text: The text of its config.yaml.
        fps: The rate of its videos.
        size: Height and width of its videos.
        steps_done: Its newest checkpoint's step, or 0.
        step: The checkpoint that the edits are from, or None.
        source: The frames that it was tuned on, as its videos show them, or None.
        no_source: Why there are none.
        edits: The edits.
        metrics: The steps that were logged, with "step", "loss" and "lr" as columns.
        seconds_per_step: The median time of a step, or None.
        stages: Where time and memory went.
        planned_bytes: The memory that the compiler plans for a step, or None.
        last_logged: When the last step was logged.
        better: See `Scores`.
    """

    name: str
    run: Run
    config: TuneConfig
    config_text: str
    fps: float
    size: tuple[int, int]
    steps_done: int
    step: int | None
    source: Frames | None
    no_source: str
    edits: list[Edit]
    metrics: Mapping[str, np.ndarray]
    seconds_per_step: float | None
    stages: list[Stage]
    planned_bytes: int | None
    last_logged: datetime | None
    better: Mapping[str, str]

    def metric_names(self) -> list[str]:
        """Return the metrics of which some edit has a score, in the order of `better`."""
        return [name for name in self.better if any(name in edit.scores for edit in self.edits)]


def find_samples(run: Run, step: int | None = None) -> tuple[int | None, Path | None]:
    """Return the checkpoint whose samples a page shows, by default the newest, and their folder.

    Raises:
        MissingFileError: There are no videos of the named step.
    """
    steps = sampled_steps(run)
    if step is not None and step not in steps:
        there = f"there are {', '.join(map(str, sorted(steps)))}" if steps else "there are none"
        raise MissingFileError(f"--step: {run.folder} has no videos of step {step}; {there}")
    chosen = step if step is not None else max(steps, default=None)
    return chosen, None if chosen is None else steps[chosen]


def make_report(run: Run, name: str, scores: Scores, step: int | None = None) -> Report:
    """Return what a run's page shows.

    Args:
        run: The run, also one that is not finished.
        name: What the page calls it.
        scores: Scores of its videos.
        step: The checkpoint of the edits, by default the newest that has some.

    Raises:
        UserError: There are no videos of that step.
    """
    config = run.config
    step, folder = find_samples(run, step)
    try:
        source, no_source = shown(run.clip()), ""
    except (UserError, OSError) as error:
        source, no_source = None, shorten(str(error))
    lines = read_metrics(run.metrics)
    logged = [line for line in lines if _is_number(line.get("loss"), line.get("lr"))]
    times = [line["seconds"] for line in logged if _is_number(line.get("seconds"))]
    stages, planned = _stages(lines)
    return Report(
        name=name,
        run=run,
        config=config,
        config_text=read_text(run.config_file),
        fps=_fps(run),
        size=_shown_size(config),
        steps_done=run.latest_step() or 0,
        step=step,
        source=source,
        no_source=no_source,
        edits=_edits(run, step, folder, scores) if folder and step is not None else [],
        metrics={
            name: np.array([line[name] for line in logged], np.float64)
            for name in ("step", "loss", "lr")
        },
        seconds_per_step=float(np.median(times)) if times else None,
        stages=stages,
        planned_bytes=planned,
        last_logged=datetime.fromtimestamp(run.metrics.stat().st_mtime, UTC) if logged else None,
        better=scores.better,
    )


def _is_number(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _fps(run: Run) -> float:
    try:
        return run.fps
    except (UserError, OSError):  # an old run's, whose clip is gone
        return DEFAULT_FPS


def _shown_size(config: TuneConfig) -> tuple[int, int]:
    _, height, width = sample_size(config)
    frame = shown(np.zeros((1, height, width, 3), np.uint8))
    return frame.shape[1], frame.shape[2]


def _stages(lines: list[dict]) -> tuple[list[Stage], int | None]:
    """Return the stages in their order, and the planned memory of a step. Starts are summed up."""
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    planned = None
    for line in lines:
        stage = line.get("stage")
        if isinstance(stage, str) and _is_number(line.get("seconds")):
            seconds[stage] = seconds.get(stage, 0.0) + line["seconds"]
            if isinstance(peak := line.get("peak_bytes"), int):
                peaks[stage] = max(peaks.get(stage, 0), peak)
            if isinstance(plan := line.get("planned_bytes"), int):
                planned = plan
    return [Stage(name, took, peaks.get(name)) for name, took in seconds.items()], planned


def _edits(run: Run, step: int, folder: Path, scores: Scores) -> list[Edit]:
    """Return the edits: those of the run's own prompts first, in their order."""
    default = default_sample(run.config, step).to_record()
    edits = []
    for record in video_records(folder):
        try:
            sample = Sample.from_record(read_json(record), str(record))
        except UserError as error:
            say(f"the report goes without a video: {shorten(str(error))}")
            continue
        others = {
            name: value
            for name, value in sample.to_record().items()
            if name not in ("prompt", "step", "name_seed") and value != default[name]
        }
        preferred = (f".{run.config.validation_data.video_format}", ".mp4", ".gif")
        videos = (record.with_suffix(suffix) for suffix in preferred)
        video = next(path for path in videos if path.is_file())
        edits.append(
            Edit(
                prompt=sample.prompt + (f" (seed {sample.seed})" if sample.name_seed else ""),
                video=video,
                note=", ".join(f"{name} {value}" for name, value in others.items()),
                scores=scores.of.get(video, {}),
            )
        )
    order = {prompt: index for index, prompt in enumerate(run.config.validation_data.prompts)}
    return sorted(edits, key=lambda edit: order.get(edit.prompt, len(order)))


def has_report(run: Run) -> bool:
    """Tell whether a run's folder has a page that is newer than all that it shows."""
    page = run.folder / NAME
    shows = [run.metrics, *(sheet_of(folder) for folder in sampled_steps(run).values())]
    return page.is_file() and all(
        path.stat().st_mtime_ns <= page.stat().st_mtime_ns for path in shows if path.exists()
    )


def flat_settings(config: TuneConfig) -> dict[str, object]:
    """Return a run's settings by their full keys, without the folder of its own."""
    flat = flatten(asdict(config))
    del flat["output_dir"]
    return flat
