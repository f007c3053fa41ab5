"""Other places that a run's metrics go to: event files of TensorBoard, wandb and trackio.

`metrics.jsonl` stays the record: these get the same values when they are written there, and no run
ends because one of them fails.
"""

import importlib
import math
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from tav_jax.console import say
from tav_jax.errors import UserError
from tav_jax.files import atomic_write
from tav_jax.parallel.processes import is_main_process
from tav_jax.reading import read_text
from tav_jax.runs.config import LogName
from tav_jax.runs.metrics_log import read_metrics
from tav_jax.runs.run import Run
from tav_jax.settings import to_plain
from tav_jax.text import shorten
from tav_jax.video.read import read_all_frames
from tav_jax.video.write import write_video

# The package of each, and how it is installed.
PACKAGES: dict[LogName, tuple[str, str]] = {
    "tensorboard": ("tensorboardX", "pip install 'tav_jax[log]'"),
    "wandb": ("wandb", "pip install wandb"),
    "trackio": ("trackio", "pip install trackio"),
}
PROJECT = "tav_jax"
EVENTS = "tensorboard"  # the folder of event files in a run's


def require_loggers(names: Sequence[LogName]) -> None:
    """Raise `UserError` if the package of a logger is not installed; lists all of them."""
    packages = {name: PACKAGES[name] for name in names}
    missing = [
        f"log: {name} needs the package {package}, which is not installed: {install}"
        for name, (package, install) in packages.items()
        if find_spec(package) is None
    ]
    if missing:
        raise UserError("\n".join(missing))


class Logger:
    """A place to log to. What it does not override it leaves out."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""

    def video(self, step: int, path: Path) -> None:
        """Log a sample."""

    def flush(self) -> None:
        """Let what was logged be seen."""

    def close(self) -> None:
        """Log no more."""


class Loggers:
    """The loggers that a run's config names. Each is opened when there is something to log.

    Args:
        run: The run.
        start: The step that it goes on from. What was logged of later steps is logged again.
    """

    def __init__(self, run: Run, start: int):
        self._run, self.start = run, start
        self._names = list(run.config.log) if is_main_process() else []
        self._open: dict[LogName, Logger] = {}
        trackers = {"wandb", "trackio"} & set(self._names)
        # Before the log is cut back to the start.
        steps = (line["step"] for line in read_metrics(run.metrics)) if trackers else ()
        self._logged = max(steps, default=0)

    def scalars(self, line: Mapping[str, Any]) -> None:
        """Log a line of the metrics."""
        values = {
            name: float(value)
            for name, value in line.items()
            if name != "step" and value is not None and math.isfinite(value)
        }
        self._each(lambda logger: logger.scalars(line["step"], values))

    def video(self, step: int, path: Path) -> None:
        """Log a sample of a step."""
        self._each(lambda logger: logger.video(step, path))

    def flush(self) -> None:
        """Let what was logged be seen."""
        if self._open:
            self._each(lambda logger: logger.flush())

    def close(self) -> None:
        """Close what is open."""
        if self._open:
            self._each(lambda logger: logger.close())

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name in tuple(self._names):
            try:
                if name not in self._open:
                    self._open[name] = self._make(name)
                call(self._open[name])
            except Exception as error:
                self._names.remove(name)
                if name in self._open:
                    with suppress(Exception):
                        self._open.pop(name).close()
                say(
                    f"log: {name} has failed and gets no more of this run: "
                    f"{shorten(str(error) or repr(error), 200)}; metrics.jsonl has everything"
                )

    def _make(self, name: LogName) -> Logger:
        if name == "tensorboard":
            return _TensorBoard(self._run, self.start)
        return _Tracker(name, self._run, self._logged)


class _TensorBoard(Logger):
    """An event file for each start of the run, written at once and not by a thread.

    tensorboardX's SummaryWriter writes in a thread, where a full disk would be a traceback.
    """

    def __init__(self, run: Run, start: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._fps = run.fps
        folder = run.folder / EVENTS
        folder.mkdir(exist_ok=True)  # in a folder that is still there
        # TensorBoard reads files in the order of their names, in which tensorboardX puts the
        # second alone: two starts in one must neither share a file nor change places.
        suffix = f".{time.time_ns()}.{os.getpid()}"
        self._writer = EventsWriter(str(folder.absolute() / "events"), suffix)
        # TensorBoard then drops what an earlier start has logged from this step on.
        self._add(start + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        tags = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, summary=Summary(value=tags))

    def video(self, step: int, path: Path) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        content, (width, height) = _gif(path, self._fps)
        image = Summary.Image(
            width=width, height=height, colorspace=3, encoded_image_string=content
        )
        # The file's name is the prompt, or resembles it and is short.
        value = Summary.Value(tag=f"samples/{path.stem}", image=image)
        self._add(step, summary=Summary(value=[value]))
        self.flush()

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _gif(path: Path, fps: float) -> tuple[bytes, tuple[int, int]]:
    """Return a sample as a GIF, which TensorBoard plays, and its width and height."""
    with tempfile.TemporaryDirectory() as folder:
        if path.suffix != ".gif":
            made = Path(folder) / "sample.gif"
            write_video(made, read_all_frames(path), fps=fps)
            path = made
        with Image.open(path) as image:
            size = image.size
        return path.read_bytes(), size


class _Tracker(Logger):
    """wandb, or trackio, which has the same three calls. They get numbers and no videos.

    Args:
        name: The package.
        run: The run. A file in its folder has the name by which a later start goes on.
        logged: The last step that the run had logged before this start. Both cannot take back
            what they have, so steps up to this one are not sent again; a run that goes on repeats
            them exactly.
    """

    def __init__(self, name: LogName, run: Run, logged: int):
        self._module = importlib.import_module(name)
        mark = run.folder / f"{name}-run.txt"
        self._sent = logged if mark.is_file() else 0
        if not mark.is_file():
            run.require_folder()
            with atomic_write(mark) as partial:
                partial.write_text(f"{secrets.token_hex(6)}\n", encoding="utf-8")
        identity = read_text(mark).strip()
        settings = {"config": to_plain(asdict(run.config)), "resume": "allow"}
        if name == "wandb":
            settings |= {"id": identity, "name": run.folder.name, "dir": str(run.folder)}
        else:
            settings |= {"name": f"{run.folder.name}-{identity}"}
        self._module.init(project=PROJECT, **settings)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._sent:
            self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()
