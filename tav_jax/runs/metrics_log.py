"""Where the time of a run goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stages:
    """Seconds by stage: `with stages("decode"): ...` adds to them.

    A stage must end with its results there and not merely asked for, or their making would be
    counted with the stage that first needs them.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def taken(self) -> dict[str, float]:
        """Returns the seconds so far, rounded, and starts over."""
        seconds = {name: round(value, 4) for name, value in self.seconds.items()}
        self.seconds = {}
        return seconds
