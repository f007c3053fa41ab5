"""The overview of a folder of samples: a contact sheet, and videos side by side."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from tav_jax.console import say
from tav_jax.errors import UserError
from tav_jax.files import atomic_write
from tav_jax.reading import read_json
from tav_jax.runs.run import Run
from tav_jax.runs.samples import BESIDE, SHEET, Frames, Sample, sample_size
from tav_jax.text import shorten
from tav_jax.video.read import read_frames
from tav_jax.video.sheets import contact_sheet, enlarge, sheet_labels, side_by_side
from tav_jax.video.write import write_image, write_video

ROWS_OF_SHEET = 24

VIDEOS_BESIDE = 4

GIF_WIDTH = 1600  # beyond it a GIF has tens of megabytes

TINY, LEAST_SIDE = 96, 256  # pixels


def shown(video: Frames) -> UInt8[np.ndarray, "f H2 W2 3"]:
    """Return a video as it is written: tiny frames are enlarged.

    Players show 64 pixels as a speck, and an mp4 stores colour for every second pixel only.
    """
    return enlarge(video, LEAST_SIDE) if min(video.shape[1:3]) < TINY else video


def sheet_of(folder: Path) -> Path:
    """Return the path of a folder's contact sheet."""
    return folder / f"{SHEET}.png"


def has_overview(folder: Path) -> bool:
    """Tell whether a folder has a contact sheet that is newer than each of its samples."""
    sheet = sheet_of(folder)
    return sheet.is_file() and all(
        video.stat().st_mtime_ns < sheet.stat().st_mtime_ns
        for video in (*folder.glob("[!.]*.mp4"), *folder.glob("[!.]*.gif"))
        if video.stem != BESIDE
    )


def write_overview(
    folder: Path, run: Run, fresh: Mapping[Path, Frames] | None = None
) -> list[Path]:
    """Write a contact sheet and side-by-side videos of a folder's samples; return their paths.

    They show the clip first and then the newest samples of the folder, whoever wrote them.

    Args:
        folder: Holds the samples.
        run: The run that they come from.
        fresh: Frames of videos that this process has just sampled, by the video's path. Other
            videos are read back from their files.
    """
    config, fresh = run.config, fresh or {}
    frames, height, width = sample_size(config)
    suffix = config.validation_data.video_format
    rows: dict[str, Frames] = {}
    source = _read_source(run)
    if source is not None and source.shape == (frames, height, width, 3):
        rows[f"source: {config.train_data.prompt}"] = source
    records = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    for record in records[-ROWS_OF_SHEET:]:
        if (video := record.with_suffix(f".{suffix}")).is_file():
            try:
                sample = Sample.from_record(read_json(record), str(record))
            except UserError as error:
                say(f"the contact sheet goes without a video: {shorten(str(error))}")
                continue
            label = sample.prompt + (f" (seed {sample.seed})" if sample.name_seed else "")
            rows[label] = (
                fresh[video]
                if video in fresh
                else read_frames(video, n_sample_frames=frames, width=width, height=height)
            )
    if not rows:
        return []
    joined = side_by_side(*(shown(video) for video in list(rows.values())[: 1 + VIDEOS_BESIDE]))
    # A small one is written as a GIF too, which web pages and slides play by themselves.
    suffixes = dict.fromkeys([suffix, "gif"] if joined.shape[2] <= GIF_WIDTH else [suffix])
    videos = [folder / f"{BESIDE}.{suffix}" for suffix in suffixes]
    for path in videos:
        write_video(path, joined, fps=run.fps)
    sheet = sheet_of(folder)
    _, legend = sheet_labels(rows)
    texts = [sheet.with_suffix(".txt")] if legend else []
    for path in texts:
        with atomic_write(path) as partial:
            partial.write_text(legend, encoding="utf-8")
    # Last, because the sheet's presence says that the overview is complete.
    write_image(sheet, contact_sheet(rows))
    return [sheet, *texts, *videos]


def _read_source(run: Run) -> Frames | None:
    try:
        return run.clip()
    except UserError as error:
        say(f"the contact sheet goes without the clip: {error}")
        return None


def renew_overview(folder: Path, run: Run, fresh: Mapping[Path, Frames] | None = None) -> None:
    """Write the overview of a folder of samples unless it is newer than what it shows."""
    if not has_overview(folder):
        for path in write_overview(folder, run, fresh):
            say(f"wrote {path}")
