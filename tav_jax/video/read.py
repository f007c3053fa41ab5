"""Read frames from video files, animated images and folders of images."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from tav_jax.errors import MissingFileError, UserError
from tav_jax.video.images import Choose, Resize, is_image, read_folder, read_image

MOST_WHOLE_PIXELS = 2**29  # of a clip that is read whole: 1.6 GB as 8-bit colours


class Clip(NamedTuple):
    """Frames chosen from a source.

    Args:
        frames: The frames.
        fps: How many a second are shown for the speed of the source. None if the source has no
            rate, as a folder of images.
        indices: The number of each frame in the source, from 0 on.
    """

    frames: UInt8[np.ndarray, "f H W 3"]
    fps: float | None
    indices: list[int]


def read_frames(
    path: str | os.PathLike[str],
    *,
    n_sample_frames: int,
    width: int,
    height: int,
    sample_start_idx: int = 0,
    sample_frame_rate: int = 1,
    sampling: str = "rate",
    fit: str = "stretch",
) -> UInt8[np.ndarray, "f H W 3"]:
    """Return frames chosen from a clip. Arguments and errors are those of `read_clip`."""
    return read_clip(
        path,
        n_sample_frames=n_sample_frames,
        width=width,
        height=height,
        sample_start_idx=sample_start_idx,
        sample_frame_rate=sample_frame_rate,
        sampling=sampling,
        fit=fit,
    ).frames


def read_clip(
    path: str | os.PathLike[str],
    *,
    n_sample_frames: int,
    width: int,
    height: int,
    sample_start_idx: int = 0,
    sample_frame_rate: int = 1,
    sampling: str = "rate",
    fit: str = "stretch",
) -> Clip:
    """Return frames chosen from a clip, with their rate.

    Frames are those that a player shows, in its order: upright, with square pixels, in sRGB and on
    white where they are transparent. HDR becomes SDR, with a warning.

    Args:
        path: A video file, a GIF, APNG or WebP, or a folder of images in natural order.
        n_sample_frames: Number of frames to return.
        width: Width of the returned frames, in pixels.
        height: Their height.
        sample_start_idx: Index of the first frame.
        sample_frame_rate: Distance between frames: 2 takes every second one.
        sampling: "rate" or "uniform", see `frame_indices`.
        fit: "stretch" ignores the aspect ratio, as the original does. "crop" scales until the
            short side fits and takes the centre.

    Raises:
        MissingFileError: There is no such file or folder, or no image in the folder.
        UserError: The frames cannot be read, or there are too few.
    """
    path = Path(path)
    if fit not in ("stretch", "crop"):
        raise UserError(f"fit is {fit!r}; it must be 'stretch' or 'crop'")
    indices: list[int] = []

    def choose(length: int) -> list[int]:
        try:
            indices[:] = frame_indices(
                length, n_sample_frames, sample_start_idx, sample_frame_rate, sampling
            )
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return list(indices)

    def resize(image: Image.Image, pixel_aspect: float) -> np.ndarray:
        crop = _centre(image.size, width / height / pixel_aspect) if fit == "crop" else None
        resized = image.resize((width, height), Image.Resampling.BICUBIC, box=crop)
        return np.asarray(resized)

    last = sample_start_idx + (n_sample_frames - 1) * sample_frame_rate
    frames, rate = _read(path, choose, resize, last if sampling == "rate" else None)
    step = (indices[-1] - indices[0]) / max(len(indices) - 1, 1) or sample_frame_rate
    fps = float(f"{rate / step:.5g}") if rate else None  # 29.97 and not 29.97002997
    return Clip(frames, fps, indices)


def read_all_frames(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "f H W 3"]:
    """Return every frame of a clip in its own size, as a player shows it (see `read_clip`).

    Args:
        path: A video file, a GIF, APNG or WebP, or a folder of images in natural order.

    Raises:
        MissingFileError: There is no such file or folder, or no image in the folder.
        UserError: The frames cannot be read, or have more than `MOST_WHOLE_PIXELS` in all.
    """
    path, length = Path(path), 0

    def choose(number: int) -> list[int]:
        nonlocal length
        length = number
        return list(range(number))

    def keep(image: Image.Image, pixel_aspect: float) -> np.ndarray:
        if (pixels := length * image.width * image.height) > MOST_WHOLE_PIXELS:
            raise UserError(
                f"{path}: {length} frames of {image.width}x{image.height} are {pixels:,} pixels; "
                f"at most {MOST_WHOLE_PIXELS:,} are read at once"
            )
        if pixel_aspect != 1:
            square = (max(1, round(image.width * pixel_aspect)), image.height)
            image = image.resize(square, Image.Resampling.BICUBIC)
        return np.asarray(image)

    return _read(path, choose, keep)[0]


def _read(
    path: Path, choose: Choose, resize: Resize, last: int | None = None
) -> tuple[UInt8[np.ndarray, "f H W 3"], float | None]:
    """Return the chosen frames, and how many of the clip's frames are shown in a second.

    Args:
        path: The clip.
        choose: Returns the indices to read.
        resize: Returns a frame as it is wanted.
        last: The index of the last frame, if it is known without the clip's length.
    """
    if not path.exists():
        raise MissingFileError(f"{path}: no such video file or folder of images")
    if not (path.is_file() or path.is_dir()):  # To open a pipe would wait for ever.
        raise UserError(f"{path}: not a regular file; give a video file or a folder of images")
    if path.is_dir():
        frames, rate = read_folder(path, choose, resize), None
    elif is_image(path):
        frames, rate = read_image(path, choose, resize)
    else:
        # Imported at its first use, because FFmpeg's libraries take a tenth of a second.
        from tav_jax.video.decode import FEW_FRAMES, read_video

        from_start = last is not None and last < FEW_FRAMES
        frames, rate = read_video(path, choose, resize, from_start=from_start)
    return np.stack(frames), rate


def _centre(size: tuple[int, int], aspect: float) -> tuple[float, float, float, float]:
    """Return the largest box of an aspect ratio in the middle of an image."""
    width, height = min(size[0], size[1] * aspect), min(size[1], size[0] / aspect)
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


def frame_indices(
    length: int,
    n_sample_frames: int,
    sample_start_idx: int = 0,
    sample_frame_rate: int = 1,
    sampling: str = "rate",
) -> list[int]:
    """Return the indices of the frames that are read, of a clip of `length` frames.

    "rate" takes every `sample_frame_rate`-th frame from `sample_start_idx` on, as the original
    does. If the clip is too short, the original takes fewer frames; here that is an error.
    "uniform" spreads the frames evenly from `sample_start_idx` to the end, both included.

    Raises:
        UserError: A number is out of range, or there are too few frames.
    """
    n, start, rate = n_sample_frames, sample_start_idx, sample_frame_rate
    if sampling not in ("rate", "uniform"):
        raise UserError(f"sampling is {sampling!r}; it must be 'rate' or 'uniform'")
    if n < 1 or rate < 1:
        raise UserError(
            f"n_sample_frames is {n}, sample_frame_rate is {rate}; each must be at least 1"
        )
    if not 0 <= start < length:
        raise UserError(f"sample_start_idx is {start}, but there are {length} frames from 0 on")

    candidates = range(start, length, rate if sampling == "rate" else 1)
    if n > len(candidates):
        largest_rate = (length - 1 - start) // (n - 1)
        or_rate = f" or sample_frame_rate <= {largest_rate}" if 0 < largest_rate < rate else ""
        raise UserError(
            f"n_sample_frames is {n}, but from frame {start} of {length} on there are "
            f"{len(candidates)} in steps of {candidates.step}; "
            f"use n_sample_frames <= {len(candidates)}{or_rate}"
        )
    if sampling == "uniform":
        return np.linspace(start, length - 1, n).round().astype(int).tolist()
    return list(candidates[:n])


def to_pixel_values(
    frames: UInt8[np.ndarray, "*batch H W 3"],
) -> Float32[np.ndarray, "*batch H W 3"]:
    """Return frames as floats in [-1, 1]: `x / 127.5 - 1`."""
    return frames.astype(np.float32) / np.float32(127.5) - np.float32(1)
