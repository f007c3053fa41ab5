"""Clips and edits of published benchmarks, in the layouts in which they are distributed.

The data stays where the user has put it. LOVEU-TGVE-2023 (Wu et al. 2023, arXiv:2310.16003) has a
table, and a folder for each of its three sources of clips. V2VBench (Sun et al. 2024,
arXiv:2407.07111) has a `config.yaml` beside its videos.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tav_jax.errors import UserError
from tav_jax.evaluation.examples import Example, raise_all
from tav_jax.reading import read_text, read_yaml
from tav_jax.text import brief

LOVEU_TABLE = "LOVEU-TGVE-2023_Dataset.csv"
LOVEU_FOLDERS = ("DAVIS_480p", "youtube_480p", "videvo_480p")
LOVEU_NAME, LOVEU_CAPTION = "Video name", "Our GT caption"
# The column of each kind of edit. An edited video lies in a folder of the kind's name.
LOVEU_EDITS = {
    "style": "Style Change Caption",
    "object": "Object Change Caption",
    "background": "Background Change Caption",
    "multiple": "Multiple Changes Caption",
}
V2VBENCH_TABLE = "config.yaml"
V2VBENCH_FOLDERS = (".", "videos", "source_videos")
VIDEO_SUFFIXES = (".mp4", ".gif", "")  # none: a folder of images


class BenchmarkClip(NamedTuple):
    """A clip of a benchmark.

    Args:
        name: Its name, and that of the folder of its edits.
        source: A video file or a folder of images.
        prompt: What it shows, if the benchmark says so.
        edits: The prompts of its edits, by the names of the edited videos.
    """

    name: str
    source: Path
    prompt: str | None
    edits: dict[str, str]


def loveu_clips(folder: Path) -> list[BenchmarkClip]:
    """Return the clips of LOVEU-TGVE-2023, of which there are 76 with four edits each.

    Raises:
        UserError: The table is missing or another one, or clips are missing. All are listed.
    """
    table = folder / LOVEU_TABLE
    reader = csv.DictReader(read_text(table).splitlines())
    names = [name.strip() for name in reader.fieldnames or []]
    columns = (LOVEU_NAME, LOVEU_CAPTION, *LOVEU_EDITS.values())
    if missing := [column for column in columns if column not in names]:
        raise UserError(f"{table}: it has no column {', '.join(missing)}")
    reader.fieldnames = names
    clips, problems = [], []
    for row in reader:
        values = {column: (row[column] or "").strip() for column in columns}
        # Lines with the name of a source, and empty ones, are between the clips.
        if not all(values.values()):
            continue
        name = values[LOVEU_NAME]
        places = [
            folder / part / place
            for part in LOVEU_FOLDERS
            for place in (f"480p_frames/{name}", f"480p_videos/{name}.mp4")
        ]
        source = next((place for place in places if place.exists()), None)
        if source is None:
            problems.append(f"{table}, line {reader.line_num}: no frames or video of {brief(name)}")
            continue
        edits = {kind: values[column] for kind, column in LOVEU_EDITS.items()}
        part = source.relative_to(folder).parts[0]
        clips.append(BenchmarkClip(f"{part}/{name}", source, values[LOVEU_CAPTION], edits))
    if not (clips or problems):
        problems.append(f"{table} has no clips")
    raise_all(problems)
    return clips


def v2vbench_clips(folder: Path) -> list[BenchmarkClip]:
    """Return the clips of V2VBench, of which there are 50 with three edits each.

    Raises:
        UserError: `config.yaml` is missing or another one, or videos are missing. All are listed.
    """
    table = folder / V2VBENCH_TABLE
    tree = read_yaml(table, "--v2vbench")
    entries = tree.get("data") if isinstance(tree, dict) else tree
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{table}: expected a list under data")
    clips, problems = [], []
    for number, entry in enumerate(entries, 1):
        try:
            name, edits = entry["video_id"], [edit["prompt"] for edit in entry["edit"]]
            if not all(isinstance(text, str) and text for text in (name, *edits)) or not edits:
                raise TypeError
        except (LookupError, TypeError):
            problems.append(f"{table}, entry {number}: expected video_id, and prompts under edit")
            continue
        prompt = entry.get("prompt")
        source = _video([folder / place / name for place in V2VBENCH_FOLDERS])
        if source is None:
            problems.append(f"{table}, entry {number}: no video of {brief(name)}")
            continue
        prompts = {str(index): text for index, text in enumerate(edits)}
        known = prompt if isinstance(prompt, str) else None
        clips.append(BenchmarkClip(name, source, known, prompts))
    raise_all(problems)
    return clips


BENCHMARKS: dict[str, Callable[[Path], list[BenchmarkClip]]] = {
    "loveu": loveu_clips,
    "v2vbench": v2vbench_clips,
}


def examples_of_benchmark(folders: dict[str, Path], clips: list[BenchmarkClip]) -> list[Example]:
    """Return the edited videos of systems, as they are handed in: SYSTEM/CLIP/EDIT.

    Args:
        folders: The folder of each system's videos.
        clips: The benchmark's clips.

    Raises:
        UserError: Videos are missing. All are listed.
    """
    problems, examples = [], []
    for system, folder in folders.items():
        for clip in clips:
            for name, prompt in clip.edits.items():
                video = _video([folder / clip.name / name])
                if video is None:
                    problems.append(f"{system}: no video {folder / clip.name / name}")
                    continue
                examples.append(
                    Example(
                        system,
                        video,
                        prompt,
                        clip=clip.name,
                        source=clip.source,
                        source_prompt=clip.prompt,
                    )
                )
    raise_all(problems)
    return examples


def _video(places: list[Path]) -> Path | None:
    """Return the first of these names under which there is a video or a folder of images."""
    files = (place.with_name(place.name + suffix) for place in places for suffix in VIDEO_SUFFIXES)
    return next((file for file in files if file.exists()), None)
