"""Read frames from video files and folders of images."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from tav_jax.errors import MissingFileError, UserError
from tav_jax.video.ffmpeg import load_mediapy

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

FITS: dict[str, Callable[..., Image.Image]] = {
    "stretch": Image.Image.resize,
    "crop": ImageOps.fit,
}


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
    """Return frames chosen from a video file, or from a folder of images in natural order.

    Args:
        path: The file or folder.
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
    if fit not in FITS:
        raise UserError(f"fit is {fit!r}; it must be 'stretch' or 'crop'")
    if not path.exists():
        raise MissingFileError(f"{path}: no such video file or folder of images")

    def choose(length: int) -> list[int]:
        try:
            return frame_indices(
                length, n_sample_frames, sample_start_idx, sample_frame_rate, sampling
            )
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def resize(image: Image.Image) -> np.ndarray:
        return np.asarray(FITS[fit](image, (width, height), Image.Resampling.BICUBIC))

    read = _read_folder if path.is_dir() else _read_video
    return np.stack(read(path, choose, resize))


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


Choose = Callable[[int], list[int]]

Resize = Callable[[Image.Image], np.ndarray]


def _read_video(path: Path, choose: Choose, resize: Resize) -> list[np.ndarray]:
    length = None
    while True:
        try:
            # Absolute, since ffmpeg takes `take:2.mp4` for a protocol and `-a.mp4` for an option.
            with load_mediapy().VideoReader(path.absolute()) as reader:
                wanted = choose(max(reader.num_images, 0) if length is None else length)
                frames, seen = [], 0
                # The slice ends with the last wanted frame, and decoding with it.
                for seen, image in enumerate(islice(reader, wanted[-1] + 1), start=1):
                    if seen - 1 in wanted:
                        frames.append(resize(Image.fromarray(image)))
        except RuntimeError as error:
            # Of ffmpeg's many lines the one that says why; else how mediapy's own begin.
            said = str(error)
            reasons = re.findall(r"Error [^:\n]+: (.+)", said) or re.split("[:\n]", said)
            raise UserError(
                f"{path}: ffmpeg cannot read a video from it ({reasons[0]}); "
                "give an mp4, gif, webm or mov, or a folder of images"
            ) from None
        if len(frames) == len(wanted):
            return frames
        # In clips of variable frame rate mediapy counts frames which it later leaves out, as they
        # fall on the time of another. Now that the end has been seen, choose again.
        length = seen


def _read_folder(path: Path, choose: Choose, resize: Resize) -> list[np.ndarray]:
    files = sorted(
        (
            file
            for file in path.iterdir()
            # macOS leaves a `._frame.png` that is no image beside each file on foreign disks.
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
        ),
        key=_natural_order,
    )
    if not files:
        raise MissingFileError(
            f"{path}: no images in this folder; expected {' '.join(IMAGE_SUFFIXES)}"
        )
    sizes = {}
    for file in files:
        with _open_image(file) as image:
            sizes[file.name] = "{}x{}".format(*image.size)
    [(usual, _)] = Counter(sizes.values()).most_common(1)
    if odd := [f"{name} ({size})" for name, size in sizes.items() if size != usual]:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise UserError(
            f"{path}: images must have one size; most are {usual}, not {', '.join(odd[:5])}{more}"
        )
    frames = []
    for index in choose(len(files)):
        with _open_image(files[index]) as image:
            frames.append(resize(_to_rgb(ImageOps.exif_transpose(image))))
    return frames


def _natural_order(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", path.name)
    # frame1 and frame01 are equal as numbers, hence the name itself last.
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError):  # Pillow raises SyntaxError for a damaged PNG.
        raise UserError(f"{path}: not a readable image; replace or remove it") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I;16":  # Pillow would clip 16-bit grey at 255 instead of scaling it.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:  # On white, as browsers show it.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixel_values(
    frames: UInt8[np.ndarray, "*batch H W 3"],
) -> Float32[np.ndarray, "*batch H W 3"]:
    """Return frames as floats in [-1, 1]: `x / 127.5 - 1`."""
    return frames.astype(np.float32) / np.float32(127.5) - np.float32(1)
