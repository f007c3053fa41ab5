"""What a run's `metrics.jsonl` says, for the tests that run it."""

import json
from pathlib import Path


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_metrics(folder: Path) -> list[dict]:
    """The lines of steps, without those that say where the time went."""
    return [line for line in read_lines(folder) if "stage" not in line]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder)]
