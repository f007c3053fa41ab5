"""A decoded frame to an sRGB image on white: matrix, range, HDR and transparency."""

from fractions import Fraction
from functools import cache

import numpy as np
from av import VideoFrame
from av.filter import Graph
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)
from jaxtyping import Float32, UInt8, UInt16
from PIL import Image

from tav_jax.video.images import STRIP_PIXELS, lay_on_white

HDR_CURVES: dict[int, str] = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}

REFERENCE_WHITE = 203.0  # cd/m2, of graphics and paper in HDR: ITU-R BT.2408

HLG_PEAK = 1000.0  # cd/m2, of the display for which BT.2100 gives the system gamma 1.2

# From BT.709's primaries to others, in linear light. ITU-R BT.2087; the second by the
# chromaticities of SMPTE EG 432-1.
FROM_BT709: dict[int, list[list[float]]] = {
    ColorPrimaries.BT2020: [
        [0.6274, 0.3293, 0.0433],
        [0.0691, 0.9195, 0.0114],
        [0.0164, 0.0880, 0.8956],
    ],
    ColorPrimaries.SMPTE432: [
        [0.8225, 0.1775, 0.0000],
        [0.0332, 0.9668, 0.0000],
        [0.0171, 0.0724, 0.9105],
    ],
}

BT2020_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # BT.2100

HD_LINES = 720  # from here on players take an untagged clip for BT.709, below it for BT.601

# Matrices by their numbers in ITU-T H.273, which are FFmpeg's. Others are taken for untagged.
READ_MATRICES = (1, 4, 5, 6, 7, 9)

OTHER_MATRICES = {
    8: "YCgCo",
    10: "BT.2020 with constant luminance",
    11: "Y'D'zD'x",
    12: "derived from the primaries",
    13: "derived from the primaries, with constant luminance",
    14: "ICtCp",
}

ROWS = 128  # of an HDR frame are converted at once, so that they stay in the cache

# Rows above and below a strip from which swscale interpolates its chroma, and a multiple of the
# height of the patterns that it adds against banding.
MARGIN = 16

# Within 2 levels of the definition; swscale's defaults are up to 4 off.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

# How chroma is enlarged. Bilinear takes half the time, but swscale 9 and 10 give wrong colours from
# 4:2:0 to 16 bits by it.
_INTERPOLATION = {
    "rgb24": Interpolation.BILINEAR,
    "rgba": Interpolation.BILINEAR,
    "rgba64le": Interpolation.BICUBIC,
}


def hdr_curve(frame: VideoFrame) -> str | None:
    """Return the name of a frame's HDR transfer function, or None if the frame is SDR."""
    return HDR_CURVES.get(frame.color_trc)


def unread_matrix(frame: VideoFrame) -> str | None:
    """Return the name of a frame's colour matrix if it is one that `to_image` does not know."""
    return None if frame.format.is_rgb else OTHER_MATRICES.get(frame.colorspace)


def to_image(frame: VideoFrame, reformatter: VideoReformatter) -> Image.Image:
    """Return a decoded frame as an RGB image.

    HDR becomes SDR: the reference white of 203 cd/m2 becomes white, and what is brighter is dimmed
    to full brightness with its hue kept. Transparent pixels are blended with white.

    Args:
        frame: The frame. If its `opaque` is another frame, then that one's luma is its opacity.
        reformatter: Keeps swscale's tables from one frame to the next.
    """
    matrix = None
    # swscale would take every untagged frame for BT.601.
    if frame.colorspace not in READ_MATRICES and not frame.format.is_rgb:
        matrix = Colorspace.ITU709 if frame.height >= HD_LINES else Colorspace.ITU601
    height = max(STRIP_PIXELS // frame.width // MARGIN, 1) * MARGIN
    # FFmpeg converts the few formats of which it cannot cut rows.
    if frame.height <= height or _crop(frame, slice(0, MARGIN)).format.name != frame.format.name:
        return _convert(frame, frame.opaque, reformatter, matrix)
    image = Image.new("RGB", (frame.width, frame.height))
    for start in range(0, frame.height, height):
        first, stop = max(start - MARGIN, 0), min(start + height, frame.height)
        rows = slice(first, min(stop + MARGIN, frame.height))
        alpha = _crop(frame.opaque, rows) if isinstance(frame.opaque, VideoFrame) else None
        strip = _convert(_crop(frame, rows), alpha, reformatter, matrix)
        image.paste(strip.crop((0, start - first, frame.width, stop - first)), (0, start))
    return image


def _crop(frame: VideoFrame, rows: slice) -> VideoFrame:
    """Return some rows of a frame, with its properties, as a view."""
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1)
    )
    crop = graph.add("crop", f"iw:{rows.stop - rows.start}:0:{rows.start}:exact=1")
    graph.link_nodes(source, crop, graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()


def _convert(
    frame: VideoFrame, alpha: object, reformatter: VideoReformatter, matrix: int | None
) -> Image.Image:
    transparent = frame.format.has_palette or any(
        component.is_alpha for component in frame.format.components
    )
    curve = hdr_curve(frame)
    if curve or frame.color_primaries in FROM_BT709:
        primaries = frame.color_primaries
        if primaries == ColorPrimaries.UNSPECIFIED:
            primaries = ColorPrimaries.BT2020
        rgba = _reformat(frame, reformatter, "rgba64le", matrix)
        pixels = (rgba >> 8).astype(np.uint8)
        for start in range(0, len(rgba), ROWS):
            rows = slice(start, start + ROWS)
            pixels[rows, :, :3] = to_srgb(rgba[rows, :, :3], curve, primaries)
        if not transparent:
            pixels = pixels[..., :3]
    else:
        pixels = _reformat(frame, reformatter, "rgba" if transparent else "rgb24", matrix)
    image = Image.fromarray(pixels)
    if isinstance(alpha, VideoFrame):
        image.putalpha(Image.fromarray(_luma(alpha)))
        transparent = True
    return lay_on_white(image) if transparent else image


def _luma(frame: VideoFrame) -> UInt8[np.ndarray, "H W"]:
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
    return rows[:, : frame.width]


def _reformat(
    frame: VideoFrame, reformatter: VideoReformatter, format: str, matrix: int | None
) -> np.ndarray:
    return reformatter.reformat(
        frame,
        format=format,
        src_colorspace=matrix,
        dst_color_range=ColorRange.JPEG,
        interpolation=_EXACT | _INTERPOLATION[format],
        threads=1,
    ).to_ndarray()


def to_srgb(
    signal: UInt16[np.ndarray, "H W 3"], curve: str | None, primaries: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Return sRGB pixels from signals of another curve and other primaries.

    Args:
        signal: R'G'B' of full range: 65535 is 1.
        curve: "PQ" or "HLG" by BT.2100, or None for sRGB's.
        primaries: A number of ITU-T H.273. Those that `FROM_BT709` lacks are taken for BT.709's.
    """
    # Channels first, which NumPy computes three times as fast. 1 is reference white.
    light = _light_table(curve)[np.moveaxis(signal, -1, 0)]
    if curve == "HLG":
        luminance = np.tensordot(BT2020_LUMINANCE, light, 1)
        light *= np.float32(HLG_PEAK / REFERENCE_WHITE) * luminance ** np.float32(0.2)
    if primaries in FROM_BT709:
        light = np.tensordot(np.linalg.inv(FROM_BT709[primaries]).astype(np.float32), light, 1)
    light /= light.max(axis=0).clip(1)
    levels = np.rint(light.clip(0, 1) * 65535).astype(np.uint16)
    return np.moveaxis(_srgb_table()[levels], 0, -1)


@cache
def _light_table(curve: str | None) -> Float32[np.ndarray, "_"]:
    """Return light for each of 65536 signals; that of HLG is the scene's, 1 at its maximum."""
    x = np.arange(65536) / 65535
    if curve == "PQ":  # BT.2100, table 4
        power = x ** (1 / 78.84375)
        y = np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)
        light = y ** (1 / 0.1593017578125) * 10000 / REFERENCE_WHITE
    elif curve == "HLG":  # BT.2100, table 5
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(x <= 0.5, x**2 / 3, (np.exp((x - c) / a) + b) / 12)
    else:  # IEC 61966-2-1
        light = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


@cache
def _srgb_table() -> UInt8[np.ndarray, "_"]:
    """Return the sRGB pixel for each of 65536 levels of light."""
    x = np.arange(65536) / 65535
    signal = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    return np.rint(signal * 255).astype(np.uint8)
