"""Write videos and images."""

import math
import os
from fractions import Fraction
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from tav_jax.errors import UserError
from tav_jax.files import atomic_write


def to_frames(
    pixel_values: Float[np.ndarray, "*batch H W 3"],
) -> UInt8[np.ndarray, "*batch H W 3"]:
    """Return frames from pixel values: the inverse of `to_pixel_values`.

    Values are rounded to the nearest of 0 to 255. Values beyond [-1, 1] are clipped.

    Raises:
        UserError: Some values are NaN.
    """
    values = np.asarray(pixel_values, np.float32)
    if missing := int(np.isnan(values).sum()):
        raise UserError(
            f"pixel_values: {missing} of {values.size} are NaN; "
            "try dtype float32, a smaller learning_rate or an earlier checkpoint"
        )
    return np.rint((np.clip(values, -1, 1) + 1) * 127.5).astype(np.uint8)


def write_video(
    path: str | os.PathLike[str],
    frames: UInt8[np.ndarray, "f H W 3"],
    fps: int | float = 8,
    crf: int = 18,
) -> None:
    """Write an .mp4 (h264) or a .gif, by the suffix of `path`.

    Browsers play an mp4 only if its sides are even, so the last row or column of an odd side is
    repeated.

    Args:
        path: The file. It is replaced if it is there.
        frames: At least one frame.
        fps: Frames per second.
        crf: The constant rate factor of an .mp4. By x264's guide 18 is "visually lossless or nearly
            so", and six more halve the file.

    Raises:
        UserError: There is no frame, the suffix is another, or `fps` is no rate. Or the disk is
            full or refuses to be written.
        OSError: ffmpeg could not write the file for another reason.
    """
    path = Path(path)
    _require_uint8(frames)
    if not len(frames):
        raise UserError(f"{path}: no frames to write")
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise UserError(f"{path}: a video is written as .mp4 or .gif, not {path.suffix!r}")
    rate = Fraction(fps).limit_denominator(100_000) if math.isfinite(fps) else Fraction(0)
    if rate <= 0:
        raise UserError(f"{path}: fps is {fps}; it must be above 0")
    from tav_jax.video.encode import encode_gif, encode_mp4

    with atomic_write(path) as partial:
        try:
            if path.suffix.lower() == ".mp4":
                encode_mp4(partial, frames, rate, crf)
            else:
                encode_gif(partial, frames, rate)
        except OSError as error:
            failure = OSError(f"{path}: ffmpeg could not write it ({error.strerror or error})")
            failure.errno = error.errno
            raise failure from None


def show_video(
    frames: UInt8[np.ndarray, "f H W 3"], fps: int | float = 8, title: str | None = None
) -> None:
    """Show frames as a video in a notebook, as `write_video` would write them to an .mp4.

    Args:
        frames: At least one frame.
        fps: Frames per second.
        title: A line of text above the video.

    Raises:
        UserError: There is no frame, or `fps` is no rate.
        OSError: ffmpeg could not encode the video.
    """
    from IPython.display import HTML, display

    from tav_jax.video.encode import load_mediapy

    with TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, frames, fps)
        content = path.read_bytes()
    _, height, width, _ = frames.shape
    line = None if title is None else escape(title)
    display(HTML(load_mediapy().html_from_compressed_video(content, width, height, title=line)))


def write_image(path: str | os.PathLike[str], image: UInt8[np.ndarray, "H W 3"]) -> None:
    """Write one image in the format of its suffix.

    Raises:
        UserError: The image is empty.
    """
    path = Path(path)
    _require_uint8(image)
    if not image.size:  # Pillow's error depends on its version
        raise UserError(f"{path}: an image of {image.shape[1]}x{image.shape[0]} cannot be written")
    with atomic_write(path) as partial:
        Image.fromarray(image).save(partial)


def _require_uint8(frames: np.ndarray) -> None:
    # mediapy would take floats for [0, 1] and write grey without a word.
    if frames.dtype != np.uint8:
        raise TypeError(f"frames are {frames.dtype}, not uint8; pass to_frames(pixel_values)")
