"""The log of a run: a line for each step's metrics, and where the time goes."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np

from tav_jax.errors import NotLearningError
from tav_jax.files import keep_json_lines


class Stages:
    """Seconds by stage. `with stages("decode"): ...` adds to those of "decode".

    JAX computes asynchronously, so a stage must wait for its results. Otherwise their time would
    be counted with the stage that first uses them.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the `with` block to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a stage."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def taken(self) -> dict[str, float]:
        """Return the seconds by stage, rounded, and start again from zero."""
        seconds = {name: round(value, 4) for name, value in self.seconds.items()}
        self.seconds = {}
        return seconds


def keep_metrics(metrics: Path, steps: int) -> None:
    """Drop the lines of later steps, which no checkpoint holds: they will be written again."""
    keep_json_lines(metrics, lambda line: line["step"] <= steps)


def log(file: TextIO, steps: Sequence[dict], seconds: float) -> None:
    """Write one line for each step, with the mean time of a step.

    Raises:
        NotLearningError: A loss or a gradient norm is not finite.
    """
    for metrics in steps:
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        line = {"step": metrics["step"], "loss": loss, "grad_norm": grad_norm}
        line |= {"lr": metrics["lr"], "seconds": round(seconds, 4)}
        broken = [name for name, value in line.items() if not np.isfinite(value)]
        file.write(json.dumps(line | dict.fromkeys(broken)) + "\n")  # JSON has no NaN
        if broken:
            raise NotLearningError(
                f"step {line['step']}: loss {loss}, grad_norm {grad_norm}; lower learning_rate, or "
                "mixed_precision: no, and start from the last checkpoint"
            )


def log_stages(file: TextIO, step: int, stages: Stages) -> None:
    """Write where the time went since this was last written, a line a stage."""
    for stage, seconds in stages.taken().items():
        file.write(json.dumps({"step": step, "stage": stage, "seconds": seconds}) + "\n")
