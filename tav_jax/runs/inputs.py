"""What a run reads: digests of its clip's frames, its model's files, its LoRAs and embeddings.

They are kept in `inputs.json`.
"""

import hashlib
import json
import platform
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
from jaxtyping import UInt8
from pydantic.dataclasses import dataclass

from tav_jax.digests import sha256
from tav_jax.errors import UserError
from tav_jax.files import atomic_write
from tav_jax.pretrained.model import model_files
from tav_jax.reading import read_json, require_file, why_not_a_file
from tav_jax.settings import STRICT, parse
from tav_jax.text import shorten
from tav_jax.video.images import is_image

T = TypeVar("T")

MOST_NAMES = 3  # of files that a message lists


class OtherInputError(UserError):
    """The clip or the model is not the one that a run was tuned with."""


@dataclass(frozen=True, config=STRICT)
class ClipDigest:
    """The frames of a clip.

    Args:
        sha256: Digest of the colours.
        shape: Number of frames, height, width, 3.
        decoder: What has decoded and resized them. Another one may give slightly other colours.
    """

    sha256: str
    shape: tuple[int, ...]
    decoder: str


@dataclass(frozen=True, config=STRICT)
class FileDigest:
    """A file: its content, and by what it is known to be unchanged without reading it."""

    sha256: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, config=STRICT)
class Inputs:
    """What a run reads.

    Args:
        clip: Its clip. That of a model that the published code has tuned is not known.
        model: The files of its base model, by their names in its folder.
        loras: Its LoRAs, in the order of its settings.
        embeddings: Its embeddings, in that order.
    """

    clip: ClipDigest | None
    model: dict[str, FileDigest]
    loras: tuple[FileDigest, ...] = ()
    embeddings: tuple[FileDigest, ...] = ()

    def to_tree(self) -> dict[str, Any]:
        """Return it as it is written. What a run does not have is not there."""
        return {name: value for name, value in asdict(self).items() if value != ()}


def read_inputs(file: Path) -> Inputs | None:
    """Return what a run has recorded, or None if it has not: it is new, or older than this.

    Raises:
        UserError: The file is damaged.
    """
    if why_not_a_file(file) == "No such file":
        return None
    try:
        return parse(Inputs, read_json(file), str(file))
    except UserError as error:
        raise UserError(
            f"{shorten(str(error))}; put a copy in its place, or rename it: then the clip and the "
            "model of now count as the run's"
        ) from None


def write_inputs(file: Path, inputs: Inputs) -> None:
    """Write what a run reads."""
    with atomic_write(file) as path:
        path.write_text(json.dumps(inputs.to_tree(), indent=2) + "\n", encoding="utf-8")


def digest_frames(frames: UInt8[np.ndarray, "f H W 3"], clip: Path) -> ClipDigest:
    """Return the digest of frames that have been read from a clip."""
    pillow = f"Pillow {PIL.__version__}"  # which resizes all frames
    if clip.is_dir() or is_image(clip):
        decoder = pillow
    else:
        import av

        decoder = f"PyAV {av.__version__}, {pillow}"
    colours = hashlib.sha256(np.ascontiguousarray(frames).data).hexdigest()
    return ClipDigest(colours, frames.shape, f"{decoder}, {platform.machine()}")


def digest_model(
    folder: Path, variant: str | None, known: Mapping[str, FileDigest]
) -> dict[str, FileDigest]:
    """Return the digests of a model's files by their names in its folder.

    Args:
        folder: The model's folder.
        variant: Variant of its weight files.
        known: Earlier digests. A file of the same name, size and time of writing is not read.

    Raises:
        UserError: Files are missing, or are none.
    """
    digests = {}
    for path in model_files(folder, variant):
        name = path.relative_to(folder).as_posix()
        digests[name] = digest_file(path, known.get(name))
    return digests


def digest_file(path: Path, known: FileDigest | None = None) -> FileDigest:
    """Return the digest of a file. If it has the size and time of a known one it is not read."""
    require_file(path)
    stat = path.stat()
    if known is not None and (known.size, known.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
        return known
    return FileDigest(sha256(path), stat.st_size, stat.st_mtime_ns)


def in_background(function: Callable[[], T]) -> "Future[T]":
    """Call a function in a thread, for which the process does not wait at its end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def check_clip(recorded: ClipDigest, now: ClipDigest, run: Path, clip: str) -> None:
    """Raise `OtherInputError` if a clip has other frames than the run was tuned on.

    If another version has decoded them, or another kind of machine, this is a warning.

    Args:
        recorded: The frames of the run.
        now: The frames of now.
        run: The run's folder, for messages.
        clip: The clip's path, for messages.
    """
    if (recorded.sha256, recorded.shape) == (now.sha256, now.shape):
        return
    was, now_is = recorded.decoder, now.decoder
    if was != now_is and was.split()[0] == now_is.split()[0] and recorded.shape == now.shape:
        warnings.warn(
            f"{shorten(clip, 150)}: the frames differ from those that {shorten(str(run), 150)} was "
            f"tuned on, which {shorten(was, 60)} decoded, and now {shorten(now_is, 60)}",
            stacklevel=2,
        )
        return
    raise OtherInputError(
        f"{shorten(str(run), 150)} was tuned on other frames than {shorten(clip, 150)} has now: "
        "put the run's clip back, or tune on this one in another output_dir"
    )


def check_model(
    recorded: Mapping[str, FileDigest], now: Mapping[str, FileDigest], run: Path, model: str
) -> None:
    """Raise `OtherInputError` if a model's files are not those that the run was tuned with.

    Args:
        recorded: The files of the run's model.
        now: The files of now.
        run: The run's folder, for messages.
        model: The model's path, for messages.
    """
    names = sorted(recorded.keys() | now.keys())
    differing = [
        shorten(name, 60)
        for name in names
        if name not in recorded or name not in now or recorded[name].sha256 != now[name].sha256
    ]
    if differing:
        more = len(differing) - MOST_NAMES
        raise OtherInputError(
            f"{shorten(str(run), 100)} was tuned with another model than {shorten(model, 100)} is: "
            f"{', '.join(differing[:MOST_NAMES])}{f' and {more} more' if more > 0 else ''} "
            f"{'differs' if len(differing) == 1 else 'differ'}; sample with --model DIR of the "
            "run's model, or tune with this one in another output_dir"
        )
