"""The log of a run: a line for each step's metrics, and where the time goes."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tav_jax.errors import NotLearningError, UserError
from tav_jax.files import keep_json_lines
from tav_jax.reading import MOST_RECORD_BYTES, parse_json, read_text
from tav_jax.training.memory import peak_bytes


class Stages:
    """Time and memory by stage. `with stages("decode"): ...` adds to the seconds of "decode".

    JAX computes asynchronously, so a stage must wait for its results. Otherwise their time would
    be counted with the stage that first uses them.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, dict[str, int]] = {}

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
        self.note(name, peak_bytes=peak_bytes())

    def note(self, name: str, **sizes: int) -> None:
        """Record bytes for a stage: `peak_bytes` of the process so far, or `planned_bytes`."""
        self.bytes.setdefault(name, {}).update(sizes)

    def taken(self) -> dict[str, dict[str, float]]:
        """Return seconds, rounded, and bytes by stage, and start again from zero."""
        taken = {
            name: {"seconds": round(value, 4), **self.bytes.get(name, {})}
            for name, value in self.seconds.items()
        }
        self.seconds, self.bytes = {}, {}
        return taken


def keep_metrics(metrics: Path, steps: int) -> None:
    """Drop the lines of later steps, which no checkpoint holds: they will be written again."""
    keep_json_lines(metrics, lambda line: line["step"] <= steps)


def read_metrics(metrics: Path) -> list[dict[str, Any]]:
    """Return what a run has logged, without lines that are damaged or half-written."""
    lines = []
    for line in read_text(metrics, MOST_RECORD_BYTES).split("\n") if metrics.exists() else ():
        with suppress(UserError):
            values = parse_json(line, str(metrics))
            if type(values.get("step")) is int:
                lines.append(values)
    return lines


def log(
    file: TextIO, steps: Sequence[dict], seconds: float, also: Callable[[dict], object] | None
) -> None:
    """Write one line for each step, with the mean time of a step.

    Args:
        file: The metrics.
        steps: Each with "step", "loss", "grad_norm" and "lr".
        seconds: The mean time of a step.
        also: Is given each line, too.

    Raises:
        NotLearningError: A loss or a gradient norm is not finite.
    """
    for metrics in steps:
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        line = {"step": metrics["step"], "loss": loss, "grad_norm": grad_norm}
        line |= {"lr": metrics["lr"], "seconds": round(seconds, 4)}
        broken = [name for name, value in line.items() if not np.isfinite(value)]
        line |= dict.fromkeys(broken)  # JSON has no NaN
        file.write(json.dumps(line) + "\n")
        if also is not None:
            also(line)
        if broken:
            raise NotLearningError(
                f"step {line['step']}: loss {loss}, grad_norm {grad_norm}; lower learning_rate, or "
                "mixed_precision: no, and start from the last checkpoint"
            )


def log_stages(file: TextIO, step: int, stages: Stages) -> None:
    """Write where time and memory went since this was last written, a line a stage."""
    for stage, taken in stages.taken().items():
        file.write(json.dumps({"step": step, "stage": stage, **taken}) + "\n")
