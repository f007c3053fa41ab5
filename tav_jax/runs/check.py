"""Check that everything in a run's folder is as it was written. Nothing is changed."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tav_jax.digests import has_digests
from tav_jax.errors import UserError
from tav_jax.reading import MOST_RECORD_BYTES, parse_json, read_json, read_text
from tav_jax.runs.inputs import read_inputs
from tav_jax.runs.inversions import read_inversion
from tav_jax.runs.overview import sheet_of
from tav_jax.runs.run import Run
from tav_jax.runs.samples import BESIDE, Sample, sample_size
from tav_jax.text import shorten
from tav_jax.training.checkpoints import checkpoint_damage, saved_steps
from tav_jax.video.read import read_frames


class Finding(NamedTuple):
    """One thing that was checked.

    Args:
        path: Its file or folder.
        damage: What is wrong with it, or None.
        is_verified: Whether it was compared with a digest or read completely.
    """

    path: Path
    damage: str | None = None
    is_verified: bool = True


def check_run(folder: Path) -> Iterator[Finding]:
    """Yield a finding for each part of a run.

    Raises:
        MissingFileError: The folder is not a run's.
    """
    config = folder / "config.yaml"
    frames = 1  # that a video is known to have
    try:
        run = Run.open(folder)
    except UserError as error:
        if not config.is_file():
            raise
        yield Finding(config, _without_path(error, config))
    else:
        yield Finding(config)
        frames = sample_size(run.config)[0]
    yield from check_inputs(folder / "inputs.json")
    yield from check_metrics(folder / "metrics.jsonl")
    yield from check_checkpoints(folder / "checkpoints")
    yield from check_inversions(folder / "inv_latents")
    for samples in sorted(folder.glob("samples/*/")):
        yield from check_samples(samples, frames)


def check_inputs(path: Path) -> Iterator[Finding]:
    """Check that the record of the run's clip and model can be read. Older runs have none."""
    try:
        if read_inputs(path):
            yield Finding(path)
    except UserError as error:
        yield Finding(path, _without_path(error, path))


def check_metrics(path: Path) -> Iterator[Finding]:
    """Check that each line is an object with a step. A last line may be half-written."""
    if not path.exists():
        return
    damage = None
    try:
        for number, line in enumerate(read_text(path, MOST_RECORD_BYTES).split("\n")[:-1], 1):
            if not isinstance(parse_json(line, f"line {number}").get("step"), int):
                damage = f"line {number}: it has no step"
                break
    except (UserError, OSError) as error:
        damage = _without_path(error, path)
    yield Finding(path, damage)


def check_checkpoints(folder: Path) -> Iterator[Finding]:
    """Check every checkpoint's files by their digests; read those that have none."""
    for step in reversed(saved_steps(folder)):
        path = folder / str(step)
        yield Finding(path, checkpoint_damage(path), has_digests(path))


def check_inversions(folder: Path) -> Iterator[Finding]:
    """Check every inverted clip."""
    for path in sorted(folder.glob("*.npy")):
        try:
            yield Finding(path, None, read_inversion(path)[1])
        except UserError as error:
            yield Finding(path, _without_path(error, path))


def check_samples(folder: Path, frames: int) -> Iterator[Finding]:
    """Check that videos decode without an error, and that their settings can be read.

    Args:
        folder: Holds samples.
        frames: Number of frames that each video has.
    """
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            Sample.from_record(read_json(path), str(path))
        except UserError as error:
            yield Finding(path, _without_path(error, path))
        else:
            yield Finding(path)
    videos = sorted(path for kind in ("mp4", "gif") for path in folder.glob(f"[!.]*.{kind}"))
    for path in videos:
        damage = decoding_damage(path, frames)
        if damage is None and path.stem != BESIDE and not path.with_suffix(".json").is_file():
            damage = f"its settings, {path.with_suffix('.json').name}, are missing"
        yield Finding(path, damage)
    if (sheet := sheet_of(folder)).exists():
        yield Finding(sheet, decoding_damage(sheet, frames=1))


def decoding_damage(path: Path, frames: int) -> str | None:
    """Return why a video or image does not decode to so many frames, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of packets that were skipped
        try:
            read_frames(path, n_sample_frames=frames, width=8, height=8)
        except (UserError, UserWarning, OSError) as error:
            return _without_path(error, path)
    return None


def _without_path(error: Exception, path: Path) -> str:
    return shorten(str(error).removeprefix(f"{path}").removeprefix(":"), 200)
