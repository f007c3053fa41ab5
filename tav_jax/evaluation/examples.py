"""What is scored: the videos of runs, and those of any system with a table of prompts."""

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from tav_jax.errors import MissingFileError, UserError
from tav_jax.reading import read_json, read_text
from tav_jax.runs.overview import shown
from tav_jax.runs.run import Run
from tav_jax.runs.samples import Frames, Sample, sample_size, sampled_steps, video_records
from tav_jax.text import brief
from tav_jax.video.read import read_all_frames

REQUIRED, OPTIONAL = ("video", "prompt"), ("source", "source_prompt", "mask")
MOST_PROBLEMS = 20  # that one message lists


@dataclass(frozen=True)
class Example:
    """One edited video, and what it was made from.

    Args:
        system: The name of what made it.
        video: A video file or a folder of images.
        prompt: What it was to show.
        clip: Names its source. Intervals are over clips.
        source: The source video's path, if that is a file or folder.
        source_prompt: What the source shows.
        mask: A video or folder of images, light where the edited object is.
        run: The run whose clip is the source.
        made_by: The base model that made it, as a run's config.yaml names it.
    """

    system: str
    video: Path
    prompt: str
    clip: str
    source: Path | None = None
    source_prompt: str | None = None
    mask: Path | None = None
    run: Run | None = field(default=None, compare=False)
    made_by: str | None = None


@dataclass(frozen=True)
class Material:
    """The decoded frames of an example: of the video, its source and its mask.

    The source has the video's size. Of the mask, True is the edited object.
    """

    frames: UInt8[np.ndarray, "f H W 3"]
    source: UInt8[np.ndarray, "f H W 3"] | None = None
    mask: Bool[np.ndarray, "f H W"] | None = None
    no_source: str = "no source video is given"


def examples_of_run(name: str | None, folder: Path, step: int | None = None) -> list[Example]:
    """Return the sampled videos of a run.

    Args:
        name: What the table calls it; by default the folder's name.
        folder: The run's folder.
        step: The checkpoint that they were sampled from, by default the newest with videos.

    Raises:
        UserError: The folder is no run, or has no videos.
    """
    run = Run.open(folder)
    steps = sampled_steps(run)
    if not steps:
        raise MissingFileError(f"--run: {folder} has no videos yet; sample some first")
    if step is not None and step not in steps:
        there = ", ".join(map(str, sorted(steps)))
        raise MissingFileError(f"--step: {folder} has no videos of step {step}; there are {there}")
    suffix = run.config.validation_data.video_format
    chosen = steps[max(steps) if step is None else step]
    videos = {path.with_suffix(f".{suffix}"): path for path in video_records(chosen)}
    return [
        Example(
            name or folder.resolve().name,
            video,
            Sample.from_record(read_json(record), str(record)).prompt,
            clip=str(run.config.train_data.video_path),
            source_prompt=run.config.train_data.prompt,
            run=run,
            made_by=run.config.pretrained_model_path,
        )
        for video, record in videos.items()
    ]


def examples_of_systems(folders: dict[str, Path], table: Path) -> list[Example]:
    """Return the videos of systems, all of which have made the videos of one table.

    Args:
        folders: The folder of each system's videos.
        table: A CSV with the columns `video` and `prompt`, and any of `source`, `source_prompt`,
            `mask`. Videos are relative to their folder, sources and masks to the table. Lines
            before the columns that begin with # are comments.

    Raises:
        UserError: The table lacks a column or a value, or files are missing. All are listed.
    """
    problems: list[str] = []
    examples = []
    rows = list(_rows(table))
    for system, folder in folders.items():
        for number, row in rows:
            paths = {
                "video": folder / row["video"],
                **{name: table.parent / row[name] for name in ("source", "mask") if row[name]},
            }
            missing = [name for name, path in paths.items() if not path.exists()]
            if missing:
                where = f"{table}, line {number}"
                problems += [f"{where}: no such {name}: {paths[name]}" for name in missing]
                continue
            examples.append(
                Example(
                    system,
                    paths["video"],
                    row["prompt"],
                    clip=row["source"] or row["video"],
                    source=paths.get("source"),
                    source_prompt=row["source_prompt"] or None,
                    mask=paths.get("mask"),
                )
            )
    raise_all(list(dict.fromkeys(problems)))
    return examples


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line number and values of a table's rows; a column that is not there is empty."""
    try:
        text = read_text(table)
    except (OSError, UserError) as error:
        raise UserError(f"--prompts: {error}") from None
    lines = text.splitlines()
    comments = len(list(takewhile(lambda line: line.startswith("#"), lines)))
    reader = csv.DictReader(lines[comments:])
    names = [name.strip() for name in reader.fieldnames or []]
    known = (*REQUIRED, *OPTIONAL)
    problems = [f"it has no column {name}" for name in REQUIRED if name not in names]
    problems += [f"column {brief(name)} is unknown" for name in names if name not in known]
    problems += [f"column {name} is there twice" for name, n in Counter(names).items() if n > 1]
    if problems:
        raise UserError(
            f"--prompts: {table}: {'; '.join(problems)}. The columns are {', '.join(REQUIRED)} "
            f"and, if they are wanted, {', '.join(OPTIONAL)}"
        )
    reader.fieldnames = names
    found = []
    try:
        for row in reader:
            number = comments + reader.line_num
            where = f"{table}, line {number}"
            if None in row:
                problems.append(f"{where}: more values than columns; quote a prompt with commas")
                continue
            values = {name: (row.get(name) or "").strip() for name in known}
            problems += [f"{where}: no {name}" for name in REQUIRED if not values[name]]
            found.append((number, values))
    except csv.Error as error:
        problems.append(f"{table}, line {comments + reader.line_num}: not CSV ({error})")
    if not problems and not found:
        problems.append(f"--prompts: {table} has no rows")
    raise_all(problems)
    yield from found


def read_material(example: Example) -> Material:
    """Return the frames of an example.

    Raises:
        UserError: Something cannot be read, or the parts do not fit each other.
    """
    frames = read_all_frames(example.video)
    count, height, width = frames.shape[:3]
    source, mask, no_source = None, None, Material.no_source
    if example.run is not None:
        source, no_source = _clip_of_run(example.run, frames)
    elif example.source is not None:
        source = read_all_frames(example.source)
        if len(source) != count:
            raise UserError(
                f"{example.video} has {count} frames, its source {example.source} {len(source)}"
            )
        source = _resize(source, width, height)
    if example.mask is not None:
        light = read_all_frames(example.mask)
        if light.shape != frames.shape:
            raise UserError(
                f"{example.mask}: {_size(light)}, but its video {example.video} has {_size(frames)}"
            )
        mask = light.max(axis=-1) > 127
    return Material(frames, source, mask, no_source)


def _clip_of_run(run: Run, frames: Frames) -> tuple[Frames | None, str]:
    """Return the frames that a run was tuned on as its videos show them, or None and the reason."""
    train = run.config.train_data
    count, height, width = sample_size(run.config)
    if (count, height, width) != (train.n_sample_frames, train.height, train.width):
        return None, "the run's videos have another length or size than its clip"
    try:
        source = shown(run.clip())
    except UserError as error:
        return None, f"the run's clip: {error}"
    if source.shape != frames.shape:
        return None, f"the run's clip has {_size(source)}, the video {_size(frames)}"
    return source, ""


def _resize(frames: Frames, width: int, height: int) -> UInt8[np.ndarray, "f height width 3"]:
    if frames.shape[1:3] == (height, width):
        return frames
    size = (width, height)
    resized = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames]
    return np.stack([np.asarray(frame) for frame in resized])


def _size(frames: Frames) -> str:
    return f"{len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}"


def check_each(examples: Sequence[Example], check: Callable[[Example], None]) -> None:
    """Call a function with each example.

    Raises:
        UserError: It has raised this error for some. All are listed.
    """
    problems = []
    for example in examples:
        try:
            check(example)
        except UserError as error:
            problems.append(str(error))
    raise_all(list(dict.fromkeys(problems)))


def raise_all(problems: Sequence[str]) -> None:
    """Raise `UserError` with these lines if there are any."""
    if problems:
        more = len(problems) - MOST_PROBLEMS
        rest = [f"and {more} more"] if more > 0 else []
        raise UserError("\n".join([*problems[:MOST_PROBLEMS], *rest]))
