"""Encode videos with mediapy, which runs the program ffmpeg that imageio-ffmpeg brings."""

import errno
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tav_jax.errors import MACHINE_ERRNOS
from tav_jax.files import own_writers

BT709 = (
    # swscale would convert by BT.601's matrix, and its defaults are up to 4 levels off.
    "-vf",
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int,"
    # Untagged colours are guessed from the size, by each player in its own way.
    "setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709",
)


def encode_mp4(path: Path, frames: UInt8[np.ndarray, "f H W 3"], rate: Fraction, crf: int) -> None:
    """Write an h264 that browsers play; an odd side grows by a repetition of its last line."""
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    options = (*BT709, "-movflags", "+faststart")
    _encode(
        path, frames, rate, codec="libx264", crf=crf, encoded_format="yuv420p", ffmpeg_args=options
    )


def encode_gif(path: Path, frames: UInt8[np.ndarray, "f H W 3"], rate: Fraction) -> None:
    """Write a GIF with one palette that is made for all frames."""
    _encode(path, frames, rate, codec="gif")


def load_mediapy() -> ModuleType:
    """Import mediapy, and let it use the program of imageio-ffmpeg and not one of the machine.

    Imported at its first use, because with matplotlib and IPython it takes half a second.
    """
    import imageio_ffmpeg
    import mediapy

    mediapy.set_ffmpeg(imageio_ffmpeg.get_ffmpeg_exe())
    return mediapy


def _encode(path: Path, frames: np.ndarray, rate: Fraction, **options: Any) -> None:
    """Run ffmpeg.

    Raises:
        OSError: ffmpeg failed. The message is its own, and the number that of the machine's error,
            or None.
    """
    writer = load_mediapy().VideoWriter(
        path.absolute(),  # ffmpeg takes `take:2.mp4` for a protocol
        frames.shape[1:3],
        fps=rate,
        **options,
    )
    try:
        with ExitStack() as stack:
            with _blocked_signals():
                stack.enter_context(writer)
                process = writer._proc
                own_writers.add(process)
                stack.callback(own_writers.discard, process)
            for pixels in frames:
                writer.add_image(pixels)
    except (RuntimeError, OSError, UnicodeDecodeError) as error:
        raise _failure(writer, error) from None


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Let a process that is started in the block inherit that these signals wait.

    Ctrl-C and a scheduler signal all processes of a job. ffmpeg would end its file there, and we
    would take that for an error. It ends by itself when this process does.
    """
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _failure(writer: Any, error: Exception) -> OSError:
    """Return the error that ffmpeg ended with. mediapy gives it only after the last frame."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    status = 0
    process: subprocess.Popen[bytes] | None = getattr(writer, "_proc", None)
    if process:
        with process:
            said += process.stderr.read().decode(errors="replace") if process.stderr else ""
        status = process.returncode
    if not said and not status:
        return error if isinstance(error, OSError) else OSError(str(error))
    if status == -signal.SIGXFSZ:
        return OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    for number in (*MACHINE_ERRNOS, errno.ENOENT):
        if os.strerror(number) in said:
            return OSError(number, os.strerror(number))
    # Lines begin with the part of ffmpeg that speaks: `[libx264 @ 0x55d0] `.
    lines = [re.sub(r"^(\[[^]]+\] )+", "", line) for line in said.split("': ", 1)[-1].splitlines()]
    return OSError(next((line for line in lines if line), f"it ended with status {status}"))
