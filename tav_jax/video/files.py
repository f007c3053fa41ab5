"""Files <-> frames: the only room that knows uint8. Everything past it sees floats in [-1, 1]."""

import hashlib
import math
import os
import re
import unicodedata
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import imageio_ffmpeg
import matplotlib
import mediapy
import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tav_jax.errors import MissingFileError, UserError
from tav_jax.files import written_whole

# The wheel brings an ffmpeg; the machine need not have one. (0.7.0: mediapy 1.2.7 passes `-vsync`,
# which the ffmpeg of imageio-ffmpeg 0.8 no longer knows.)
mediapy.set_ffmpeg(imageio_ffmpeg.get_ffmpeg_exe())

# Pillow's own font knows hardly a letter outside ASCII; matplotlib, which mediapy needs, ships
# one with Latin, Greek and Cyrillic.
LABEL_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"

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
    """Frames chosen from a video file, or from a folder of images in natural order.

    Args:
      sampling: "rate" or "uniform", see `frame_indices`.
      fit: "stretch" ignores the aspect ratio, as the original does; "crop" scales until the
        short side fits and takes the centre.
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
    """Which of `length` frames are read.

    "rate" takes every `sample_frame_rate`-th frame from `sample_start_idx` on, as the original
    does (which goes on with fewer frames when the clip is short; here that is an error).
    "uniform" spreads them evenly from `sample_start_idx` to the end, both ends included.
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
            with mediapy.VideoReader(path.absolute()) as reader:
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
    """Floats in [-1, 1]: `x / 127.5 - 1`."""
    return frames.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_frames(
    pixel_values: Float[np.ndarray, "*batch H W 3"],
) -> UInt8[np.ndarray, "*batch H W 3"]:
    """The inverse of `to_pixel_values`, rounded to nearest; values beyond [-1, 1] are clipped."""
    values = np.asarray(pixel_values, np.float32)
    if missing := int(np.isnan(values).sum()):
        raise UserError(
            f"pixel_values: {missing} of {values.size} are NaN; "
            "try dtype float32, a smaller learning_rate or an earlier checkpoint"
        )
    return np.rint((np.clip(values, -1, 1) + 1) * 127.5).astype(np.uint8)


def write_video(
    path: str | os.PathLike[str], frames: UInt8[np.ndarray, "f H W 3"], fps: int | float = 8
) -> None:
    """Writes an .mp4 (h264) or a .gif, by the suffix of `path`.

    An mp4 that browsers play has even sides, so odd ones grow by a repeated row or column.
    """
    path = Path(path)
    _require_uint8(frames)
    if not len(frames):
        raise UserError(f"{path}: no frames to write")
    if path.suffix.lower() == ".mp4":
        _, height, width, _ = frames.shape
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        # Untagged colours are guessed from the size, by each player in its own way: say bt709.
        tags = "-colorspace bt709 -color_primaries bt709 -color_trc bt709 -movflags +faststart"
        options = {
            "crf": 18,  # x264's guide: "visually lossless or nearly so".
            "encoded_format": "yuv420p",
            "ffmpeg_args": f"-vf scale=out_color_matrix=bt709 {tags}",
        }
    elif path.suffix.lower() == ".gif":
        options = {"codec": "gif"}
    else:
        raise UserError(f"{path}: a video is written as .mp4 or .gif, not {path.suffix!r}")
    with written_whole(path) as partial:
        try:
            mediapy.write_video(partial.absolute(), frames, fps=fps, **options)
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise OSError(f"{path}: ffmpeg could not write it ({reason})") from None


def write_image(path: str | os.PathLike[str], image: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes one image in the format of its suffix."""
    _require_uint8(image)
    with written_whole(Path(path)) as partial:
        Image.fromarray(image).save(partial)


def _require_uint8(frames: np.ndarray) -> None:
    # mediapy would take floats for [0, 1] and write grey without a word.
    if frames.dtype != np.uint8:
        raise TypeError(f"frames are {frames.dtype}, not uint8; pass to_frames(pixel_values)")


def side_by_side(*videos: UInt8[np.ndarray, "_ _ _ 3"]) -> UInt8[np.ndarray, "f H W 3"]:
    """One video that shows the given ones next to each other: a source and its edits."""
    if len({video.shape[:2] for video in videos}) != 1:
        given = ", ".join("{} frames of height {}".format(*video.shape[:2]) for video in videos)
        raise UserError(
            f"side_by_side: videos must agree in frames and height, not {given or 'none'}"
        )
    return np.concatenate(videos, axis=2)


def enlarged(frames: UInt8[np.ndarray, "f H W 3"], least: int) -> UInt8[np.ndarray, "f H2 W2 3"]:
    """The same frames with every pixel a square, so large that no side is under `least`."""
    factor = math.ceil(least / min(*frames.shape[1:3], least))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def contact_sheet(
    rows: dict[str, UInt8[np.ndarray, "_ _ _ 3"]], columns: int = 8
) -> UInt8[np.ndarray, "H W 3"]:
    """One picture with a labelled row for each video, its frames evenly chosen.

    Frames below 64 pixels are enlarged by a whole factor, so that they and the text are seen.
    """
    sizes = {label: "{2}x{1}".format(*video.shape) for label, video in rows.items()}
    if columns < 1 or len(set(sizes.values())) != 1:
        raise UserError(
            f"contact_sheet: needs rows of one frame size and columns >= 1, not {sizes}, {columns}"
        )
    rows = {label: enlarged(video, 64) for label, video in rows.items()}
    height, width = next(iter(rows.values())).shape[1:3]
    columns = min(columns, max(map(len, rows.values())))
    gap = max(4, width // 48)
    text_size = max(14, width // 12)

    sheet_width = columns * (width + gap) + gap
    parts = []
    for label, video in rows.items():
        chosen = np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int)
        row = np.full((height + gap, sheet_width, 3), 255, np.uint8)
        for i, tile in enumerate(video[chosen]):
            left = gap + i * (width + gap)
            row[:height, left : left + width] = tile
        parts += [_draw_label(label, sheet_width, text_size, margin=gap), row]
    return np.concatenate(parts)


def _draw_label(label: str, width: int, text_size: int, margin: int) -> np.ndarray:
    """A white strip with one line of text; what does not fit ends in an ellipsis."""
    font = ImageFont.truetype(LABEL_FONT, text_size)
    text = unicodedata.normalize("NFC", " ".join(label.split()))
    room = width - 2 * margin
    if font.getlength(text) > room:
        fitting = bisect(range(len(text)), room, key=lambda n: int(font.getlength(text[:n] + "…")))
        text = text[: fitting - 1].rstrip() + "…"
    strip = Image.new("RGB", (width, round(1.8 * text_size)), "white")
    baseline = strip.height - round(0.5 * text_size)  # Nearer to its own row than to the last.
    ImageDraw.Draw(strip).text((margin, baseline), text, fill=(40, 40, 40), font=font, anchor="ls")
    return np.asarray(strip)


def file_stem(prompt: str) -> str:
    """A file name, without suffix, that reads like the prompt on any system.

    A prompt that can be a name as it is stays as it is, like the original's `<prompt>.gif`. Any
    other gets a hash of the whole prompt at its end, so that `a/b` and `a:b` remain two files.
    """
    # What Windows refuses, which includes what macOS and Linux do; lone surrogates have no UTF-8.
    stem = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]', "_", prompt)
    stem = unicodedata.normalize("NFC", stem).strip(" .")  # macOS takes both forms of é for one.
    # Devices of Windows, whatever follows the dot.
    stem = re.sub(r"(?i)^(?=(con|prn|aux|nul|(com|lpt)[\d¹²³]) *(\.|$))", "_", stem)
    if stem == prompt and 0 < len(stem.encode()) <= 120:
        return stem
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    kept = stem.encode()[: 120 - len("-") - len(digest)].decode(errors="ignore").strip(" .")
    return f"{kept or 'prompt'}-{digest}"
