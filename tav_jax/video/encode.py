"""Encode videos with PyAV, which brings FFmpeg's libraries."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from jaxtyping import UInt8

CRF = 18  # x264's guide: "visually lossless or nearly so".


def encode_mp4(path: Path, frames: UInt8[np.ndarray, "f H W 3"], rate: Fraction) -> None:
    """Write an h264 that browsers play; an odd side grows by a repetition of its last line."""
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(_address(path), "w", format="mp4", options={"movflags": "+faststart"}) as file:
        stream = file.add_stream("libx264", rate=rate, options={"crf": str(CRF)})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Untagged colours are guessed from the size, by each player in its own way: say bt709.
        stream.colorspace = Colorspace.ITU709
        stream.color_range = ColorRange.MPEG
        stream.color_primaries = ColorPrimaries.BT709
        stream.color_trc = ColorTrc.BT709
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.BICUBIC,
            )
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def encode_gif(path: Path, frames: UInt8[np.ndarray, "f H W 3"], rate: Fraction) -> None:
    """Write a GIF with one palette that is made for all frames."""
    _, height, width, _ = frames.shape
    graph = Graph()
    source = graph.add_buffer(
        width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / rate
    )
    split, palette = graph.add("split"), graph.add("palettegen")
    use, sink = graph.add("paletteuse"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    with av.open(_address(path), "w", format="gif") as file:
        stream = file.add_stream("gif", rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            graph.vpush(frame)
        graph.vpush(None)
        for _ in frames:
            file.mux(stream.encode(graph.vpull()))
        file.mux(stream.encode(None))


def _address(path: Path) -> str:
    # FFmpeg would take `take:2.mp4` for a protocol.
    return f"file:{path.absolute()}"
