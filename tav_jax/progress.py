"""Progress of long work: a bar in a terminal, whole lines in a log file."""

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


class LineProgress:
    """Progress in a log file: a whole line at most every 30 seconds while work is left."""

    def __init__(self, description: str, *, total: int, initial: int = 0):
        self.description, self.total, self.done = description, total, initial
        self.printed = time.monotonic()

    def update(self, count: int) -> None:
        """Count finished steps, and print a line if it is time."""
        self.done += count
        if time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES and self.done < self.total:
            self.printed = time.monotonic()
            print(f"{self.description}: {self.done} of {self.total}", file=sys.stderr, flush=True)

    def __enter__(self) -> "LineProgress":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def progress_bar(
    description: str, *, total: int, initial: int = 0, leave: bool = True, show: bool = True
) -> "tqdm[Any] | LineProgress":
    """Return a bar for a terminal, or lines now and then for a log file, where a bar would repeat.

    `say` prints its lines above the bar.

    Args:
        description: What is being done.
        total: Number of steps.
        initial: Number of steps that are done already.
        leave: Leave the full bar in the terminal.
        show: If false, nothing is printed.
    """
    if sys.stderr.isatty() or not show:
        return tqdm(
            desc=description,
            total=total,
            initial=initial,
            leave=leave,
            miniters=1,
            disable=not show,
        )
    return LineProgress(description, total=total, initial=initial)
