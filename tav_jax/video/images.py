"""Read images: those of a folder, and the frames of an animated one."""

import re
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from tav_jax.errors import MissingFileError, UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# Pillow's readers. It has others, some of which start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")

MAX_PIXELS = 64_000_000  # of a frame: 256 MB, which is what Pillow takes for RGB and RGBA
MAX_CANVAS_PIXELS = 36_000_000  # of an animated image, or a WebP, of which Pillow holds five copies
STRIP_PIXELS = 2**22  # Larger images and frames are converted in strips, which bounds the memory.

WEBP_ANIMATION, WEBP_ALPHA = 0x02, 0x10  # flags in the chunk VP8X

# Returns the indices to read, of a clip of so many frames.
Choose = Callable[[int], list[int]]

# Returns an array of an image and the width of its pixels relative to their height.
Resize = Callable[[Image.Image, float], np.ndarray]

# What Pillow raises for damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
)


def read_folder(path: Path, choose: Choose, resize: Resize) -> list[np.ndarray]:
    """Return frames from a folder of images in natural order.

    Raises:
        MissingFileError: There is no image in the folder.
        UserError: An image cannot be read or is of another size, or there are too few.
    """
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
            frames.append(resize(_to_rgb(image), 1.0))
    return frames


def is_image(path: Path) -> bool:
    """Tell from a file's first bytes whether it is an image, animated or not."""
    with path.open("rb") as file:
        start = file.read(12)
    return (
        start.startswith((b"GIF8", b"\x89PNG", b"BM"))
        or start[8:] == b"WEBP"
        # A video may be many JPEGs one after another.
        or (start.startswith(b"\xff\xd8\xff") and path.suffix.lower() in IMAGE_SUFFIXES)
    )


def read_image(path: Path, choose: Choose, resize: Resize) -> tuple[list[np.ndarray], float | None]:
    """Return frames of a GIF, APNG or WebP, or the one of an image, and their rate.

    The rate is None if the file names no durations.

    Raises:
        UserError: The file is damaged, or there are too few frames.
    """
    with _open_image(path) as image:
        wanted = choose(getattr(image, "n_frames", 1) - _first_shown(image))
    frames, milliseconds = [], []
    for index, (image, duration) in enumerate(islice(_shown_images(path), wanted[-1] + 1)):
        milliseconds.append(duration)
        if index in wanted:
            frames.append(resize(image, 1.0))
    total = sum(milliseconds)
    return frames, 1000 * len(milliseconds) / total if total else None


def _shown_images(path: Path) -> Iterator[tuple[Image.Image, float]]:
    """Yield the frames of an image file with their durations in milliseconds."""
    with _open_image(path) as image:
        for index in range(_first_shown(image), getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()
            yield _to_rgb(image), image.info.get("duration", 0)


def _first_shown(image: Image.Image) -> int:
    # An APNG may begin with an image for programs that show no animation.
    return int(getattr(image, "default_image", False))


def refuse_large(path: Path, width: int, height: int, most: int) -> None:
    """Raise UserError if frames of this size would take too much memory."""
    if width * height > most:
        raise UserError(
            f"{path}: {width}x{height} is over {most / 1e6:.3g} megapixels; scale it down"
        )


def lay_on_white(image: Image.Image) -> Image.Image:
    """Return an image with transparency on a white ground, as browsers show it."""
    opaque = Image.new("RGB", image.size)
    height = max(STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, height):
        strip = image.crop((0, top, image.width, min(top + height, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        opaque.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return opaque


def _natural_order(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", path.name)
    # frame1 and frame01 are equal as numbers, hence the name itself last.
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image and report as the user's error what Pillow raises for a damaged one."""
    if not path.is_file():  # To open a pipe would wait for ever.
        raise UserError(f"{path}: not a regular file; replace or remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(_content(path), formats=FORMATS)
        with opened as image:
            several = image.format == "WEBP" or getattr(image, "is_animated", False)
            refuse_large(path, *image.size, MAX_CANVAS_PIXELS if several else MAX_PIXELS)
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(
            f"{path}: over {MAX_PIXELS // 10**6} megapixels; scale it down or remove it"
        ) from None
    except _DAMAGE:
        raise UserError(f"{path}: not a readable image; replace or remove it") from None


def _content(path: Path) -> Path | BytesIO:
    """Return the file, or a corrected copy in memory.

    The canvas of an animated WebP is transparent where no frame lies. Encoders may leave out the
    flag for transparency if the frames themselves have none, and Pillow then shows black.
    """
    with path.open("rb") as file:
        start = file.read(21)
        if start[8:16] != b"WEBPVP8X" or not start[20] & WEBP_ANIMATION:
            return path
        return BytesIO(start[:20] + bytes([start[20] | WEBP_ALPHA]) + file.read())


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":  # Pillow would clip 16-bit grey at 255 instead of scaling it.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        return lay_on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")
