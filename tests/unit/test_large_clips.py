"""Large frames: they are converted in strips, and reading them takes less than a gigabyte."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, VideoReformatter
from PIL import Image

from tav_jax.errors import UserError
from tav_jax.video import colour, decode, images
from tav_jax.video.read import read_frames

FORMATS = [
    *("yuv420p", "yuvj420p", "yuv420p10le", "yuv422p10le", "yuv444p12le", "yuv411p", "nv12"),
    *("p010le", "rgb24", "bgra", "gbrap10le", "yuva420p", "yuva444p10le", "pal8", "gray", "ya8"),
    *("monow", "yuyv422", "rgb48le"),
]


def noise(pix_fmt, height=160, width=52):
    frame = av.VideoFrame(width, height, pix_fmt)
    random = np.random.default_rng(0)
    for plane in frame.planes:
        plane.update(random.integers(0, 256, plane.buffer_size, np.uint8).tobytes())
    return frame


@pytest.mark.parametrize("pix_fmt", FORMATS)
@pytest.mark.parametrize("curve", [ColorTrc.BT709, ColorTrc.SMPTE2084])
def test_strips_are_those_of_the_whole_frame(monkeypatch, pix_fmt, curve):
    frame = noise(pix_fmt)
    frame.color_trc = curve
    if curve != ColorTrc.BT709:
        frame.color_primaries, frame.colorspace = ColorPrimaries.BT2020, Colorspace.BT2020
    whole = np.asarray(colour.to_image(frame, VideoReformatter()))
    assert len(np.unique(whole)) > 1
    converted = []
    convert = colour._convert
    monkeypatch.setattr(
        colour, "_convert", lambda frame, *rest: converted.append(frame) or convert(frame, *rest)
    )
    monkeypatch.setattr(colour, "STRIP_PIXELS", 48 * 52)
    strips = np.asarray(colour.to_image(frame, VideoReformatter()))
    # Of these FFmpeg cuts no rows.
    assert len(converted) == (1 if pix_fmt in ("monow", "yuyv422") else 4)
    np.testing.assert_array_equal(strips, whole)


def test_a_large_transparent_image_is_laid_on_white_in_strips(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 4), np.uint8)
    whole = images.lay_on_white(Image.fromarray(pixels))
    monkeypatch.setattr(images, "STRIP_PIXELS", 7 * 40)
    strips = images.lay_on_white(Image.fromarray(pixels))
    np.testing.assert_array_equal(np.asarray(strips), np.asarray(whole))
    expected = 255 - pixels[..., 3:] / 255 * (255 - pixels[..., :3].astype(float))
    np.testing.assert_allclose(np.asarray(strips), expected, atol=1)


def write_grey(path, pix_fmt, height, width, codec, frames=3, **fields):
    """Write a clip of one grey, without arrays of its size in RGB."""
    options = fields.pop("options", {})
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=8, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        for name, value in fields.items():
            setattr(stream.codec_context, name, value)
        frame = av.VideoFrame(width, height, pix_fmt)
        for plane in frame.planes:
            level = np.uint8(120) if plane.line_size < 2 * plane.width else np.uint16(480)
            plane.update(np.full(plane.buffer_size // level.itemsize, level).tobytes())
        for time in range(frames):
            frame.pts = time
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def write_images(path, height, width, suffix, *, animated=False):
    """Write two frames, half transparent, as one file or into a folder."""
    frames = [Image.new("RGBA", (width, height), (200, level, 0, 99)) for level in (0, 80)]
    quickly = {"compress_level": 1} if suffix == "png" else {"lossless": True, "method": 0}
    if animated:
        frames[0].save(path, save_all=True, append_images=frames[1:], **quickly)
    else:
        path.mkdir()
        for number, frame in enumerate(frames):
            frame.save(path / f"{number}.{suffix}", **quickly)
    return path


VP9 = {
    "codec": "libvpx-vp9",
    "options": {"cpu-used": "8", "deadline": "realtime", "auto-alt-ref": "0"},
}
X265 = {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "log-level=none"}}
PQ = {
    "color_trc": ColorTrc.SMPTE2084,
    "color_primaries": ColorPrimaries.BT2020,
    "colorspace": Colorspace.BT2020,
}

# Nearly as large as is read of each kind.
LARGE = {
    # Written by `write_grey(path, "yuva420p", 5600, 8000, **VP9)`, which takes 10 GB.
    "transparent vp9": lambda _: Path(__file__).parent / "transparent-5600x8000.webm",
    "hdr": lambda path: write_grey(path / "a.mp4", "yuv420p10le", 4320, 7680, **X265, **PQ),
    "png": lambda path: write_images(path / "a", 7000, 9000, "png"),
    "webp": lambda path: write_images(path / "a", 5000, 7000, "webp"),
    "apng": lambda path: write_images(path / "a.png", 5000, 7000, "png", animated=True),
}

READ = """
import sys
from tav_jax.video import decode, read

def memory(name):
    status = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if name in line)

before = memory("VmRSS")
read.read_frames(sys.argv[1], n_sample_frames=2, width=64, height=48)
print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize("kind", LARGE)
def test_large_frames_are_read_in_less_than_a_gigabyte(tmp_path, kind):
    """In a process of its own. `ru_maxrss` would begin with that of the process that starts it."""
    path = LARGE[kind](tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", READ, path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    assert 1e8 < int(result.stdout) < 1e9


@pytest.mark.parametrize(
    ("pix_fmt", "codec", "bytes_per_pixel"),
    [
        pytest.param("yuv420p", "libx264", 1.5, id="8 bits"),
        pytest.param("yuv420p10le", "libx264", 3, id="10 bits"),
        pytest.param("yuv444p10le", "ffv1", 6, id="10 bits, all colours"),
        pytest.param("yuv422p10le", "prores_ks", 4, id="no frame depends on another"),
        pytest.param("yuva420p", "libvpx-vp9", 3, id="transparency apart"),
    ],
)
def test_frames_are_bounded_by_their_bytes(tmp_path, monkeypatch, pix_fmt, codec, bytes_per_pixel):
    fields = VP9 if codec == VP9["codec"] else {"codec": codec}
    path = tmp_path / ("a.webm" if fields is VP9 else "a.mkv")
    write_grey(path, pix_fmt, 64, 64, **fields)
    needed = round(64 * 64 * bytes_per_pixel)
    bound = "MOST_INTRA_FRAME_BYTES" if codec == "prores_ks" else "MOST_FRAME_BYTES"
    for most in (4 * needed, needed):  # with a frame for each thread, and without
        monkeypatch.setattr(decode, bound, most)
        assert len(read_frames(path, n_sample_frames=3, width=8, height=8)) == 3
    monkeypatch.setattr(decode, bound, needed - 1)
    with pytest.raises(UserError, match=r"64x64 is over 0\.00409 megapixels; scale it down"):
        read_frames(path, n_sample_frames=1, width=8, height=8)


def test_a_frame_that_grows_beyond_what_threads_may_hold_is_not_decoded(tmp_path, monkeypatch):
    small, large = (
        write_grey(tmp_path / f"{side}.h264", "yuv420p", side, side, "libx264").read_bytes()
        for side in (64, 256)
    )
    path = tmp_path / "a.h264"
    path.write_bytes(small + large)
    assert len(read_frames(path, n_sample_frames=6, width=8, height=8)) == 6
    monkeypatch.setattr(decode, "MOST_FRAME_BYTES", 4 * 128 * 128 * 3 // 2)
    with (
        pytest.warns(UserWarning, match="damaged packets"),
        pytest.raises(UserError, match=r"n_sample_frames is 6, but from frame 0 of [123] on"),
    ):
        read_frames(path, n_sample_frames=6, width=8, height=8)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
@pytest.mark.parametrize("grows", ["colours", "transparency", "both"])
def test_transparent_frames_that_grow_against_the_header_are_not_decoded(
    tmp_path, monkeypatch, codec, grows
):
    fields = {**VP9, "codec": codec}
    sizes = {"small": 64, "large": 256}
    paths = {
        name: write_grey(tmp_path / f"{name}.webm", "yuva420p", side, side, **fields)
        for name, side in sizes.items()
    }
    path = tmp_path / "a.webm"
    with (
        av.open(str(paths["small"])) as small,
        av.open(str(paths["large"])) as large,
        av.open(str(path), "w") as joined,
    ):
        stream = joined.add_stream_from_template(small.streams.video[0])
        stream.metadata["alpha_mode"] = "1"
        for one, other in zip(small.demux(), large.demux(), strict=True):
            if one.size:
                colours, transparency = {
                    "colours": (other, one),
                    "transparency": (one, other),
                    "both": (other, other),
                }[grows]
                colours.set_sidedata(transparency.get_sidedata("matroska_block_additional"))
                colours.stream = stream
                joined.mux(colours)
    seen = []
    monkeypatch.setattr(decode, "_size", lambda frame: seen.append(frame.width) or frame.width)
    if grows == "both":
        assert len(read_frames(path, n_sample_frames=3, width=8, height=8)) == 3
        assert seen == 6 * [256]
        seen.clear()
    monkeypatch.setattr(decode, "MOST_FRAME_BYTES", 64 * 64 * 3)
    with pytest.raises(UserError, match=r"over \S+ megapixels"):
        read_frames(path, n_sample_frames=3, width=8, height=8)
    assert 256 not in seen
