"""Contact sheets, and videos side by side."""

import math
import unicodedata
from bisect import bisect
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from tav_jax.errors import UserError
from tav_jax.text import printable


def side_by_side(*videos: UInt8[np.ndarray, "_ _ _ 3"]) -> UInt8[np.ndarray, "f H W 3"]:
    """Return one video that shows several next to each other, such as a source and its edits.

    Raises:
        UserError: The videos differ in number of frames or in height.
    """
    if len({video.shape[:2] for video in videos}) != 1:
        given = ", ".join("{} frames of height {}".format(*video.shape[:2]) for video in videos)
        raise UserError(
            f"side_by_side: videos must agree in frames and height, not {given or 'none'}"
        )
    return np.concatenate(videos, axis=2)


def enlarge(frames: UInt8[np.ndarray, "f H W 3"], least: int) -> UInt8[np.ndarray, "f H2 W2 3"]:
    """Return frames enlarged by a whole factor, so that no side is under `least` pixels."""
    factor = math.ceil(least / min(*frames.shape[1:3], least))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def contact_sheet(
    rows: dict[str, UInt8[np.ndarray, "_ _ _ 3"]], columns: int = 8
) -> UInt8[np.ndarray, "H W 3"]:
    """Return one image with a labelled row for each video, its frames evenly chosen.

    Frames below 96 pixels are enlarged by a whole factor, so that they and the text can be seen.
    A label that the font cannot write is the number of its row, see `sheet_labels`.

    Args:
        rows: Videos by label, with frames of one size.
        columns: Most frames in a row.

    Raises:
        UserError: The frames differ in size, or `columns` is below 1.
    """
    sizes = {label: "{2}x{1}".format(*video.shape) for label, video in rows.items()}
    if columns < 1 or len(set(sizes.values())) != 1:
        raise UserError(
            f"contact_sheet: needs rows of one frame size and columns >= 1, not {sizes}, {columns}"
        )
    labels, _ = sheet_labels(rows)
    videos = [enlarge(video, 96) for video in rows.values()]
    height, width = videos[0].shape[1:3]
    columns = min(columns, max(map(len, videos)))
    gap = max(4, width // 48)
    text_size = max(14, width // 12)

    sheet_width = columns * (width + gap) + gap
    parts = []
    for label, video in zip(labels, videos, strict=True):
        chosen = np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int)
        row = np.full((height + gap, sheet_width, 3), 255, np.uint8)
        for i, tile in enumerate(video[chosen]):
            left = gap + i * (width + gap)
            row[:height, left : left + width] = tile
        parts += [_draw_label(label, sheet_width, text_size, margin=gap), row]
    return np.concatenate(parts)


def sheet_labels(labels: Iterable[str]) -> tuple[list[str], str]:
    """Return the labels that the rows of a sheet can have, and the legend of the others.

    A label with letters that the font lacks becomes the number of its row, which the legend
    explains, a line for each.
    """
    drawn, legend = [], []
    for number, label in enumerate(labels, 1):
        can_draw = set(_label_text(label)) <= _letters()
        drawn.append(label if can_draw else f"row {number}: see the text file")
        if not can_draw:
            legend.append(f"row {number}: {_label_text(label)}\n")
    return drawn, "".join(legend)


def _label_text(label: str) -> str:
    return printable(unicodedata.normalize("NFC", " ".join(label.split())))


def _label_font() -> Path:
    # Pillow's own font has hardly a letter outside ASCII; matplotlib's has Latin, Greek and
    # Cyrillic. Imported here because matplotlib takes half a second.
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _letters() -> frozenset[str]:
    """Return the characters that the font of the labels has."""
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(str(_label_font())).get_charmap()))


def _draw_label(label: str, width: int, text_size: int, margin: int) -> np.ndarray:
    """Return a white strip with one line of text; a long text is cut and ends in an ellipsis."""
    font = ImageFont.truetype(_label_font(), text_size)
    text = _label_text(label)
    room = width - 2 * margin
    if font.getlength(text) > room:
        fitting = bisect(range(len(text)), room, key=lambda n: int(font.getlength(text[:n] + "…")))
        text = text[: fitting - 1].rstrip() + "…"
    strip = Image.new("RGB", (width, round(1.8 * text_size)), "white")
    baseline = strip.height - round(0.5 * text_size)  # Nearer to its own row than to the last.
    ImageDraw.Draw(strip).text((margin, baseline), text, fill=(40, 40, 40), font=font, anchor="ls")
    return np.asarray(strip)
