"""Which frames of which files are read, and in which colours. Clips are made with PyAV."""

import os
import re
import socket
import struct
import warnings
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from tav_jax.errors import UserError
from tav_jax.runs.config import parse_config
from tav_jax.runs.run import DEFAULT_FPS, LOWEST_AUTO_FPS, Run
from tav_jax.video import decode, images
from tav_jax.video.read import read_clip, read_frames

HEIGHT, WIDTH = 48, 64

# x264 without loss in practice, whose colours are not subsampled.
H264 = {"codec": "libx264", "pix_fmt": "yuv444p", "options": {"crf": "1"}}


X264 = {"codec": "libx264", "options": {"crf": "1"}}
X265 = {"codec": "libx265", "options": {"x265-params": "log-level=none:crf=8"}}


def numbered(count, height=HEIGHT, width=WIDTH):
    """Return grey frames that show their number: a block for each of eight bits."""
    frames = np.full((count, height, width, 3), 128, np.uint8)
    for bit in range(8):
        block = slice(bit * width // 8, (bit + 1) * width // 8)
        on = 255 * (np.arange(count) >> bit & 1).astype(np.uint8)
        frames[:, : height // 2, block] = on[:, None, None, None]
    return frames


def numbers(frames):
    height, width = frames.shape[1:3]
    columns = (np.arange(8) * width + width // 2) // 8
    return [int(bits @ (1 << np.arange(8))) for bits in frames[:, height // 4, columns, 0] > 127]


def add_video(file, frames, *, codec="libx264", pix_fmt="yuv420p", options=None, rate=8, **fields):
    """Add a stream to an open file; return a function that yields the packets of its frames."""
    stream = file.add_stream(codec, rate=rate, options=options or {})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = pix_fmt
    times = fields.pop("times", range(len(frames)))
    for name, value in fields.items():
        setattr(stream.codec_context, name, value)

    def encode():
        source = {1: "gray", 3: "rgb24", 4: "rgba"}[frames.shape[-1]]
        for time, pixels in zip(times, frames, strict=True):
            pixels = np.ascontiguousarray(pixels[..., 0] if source == "gray" else pixels)
            frame = av.VideoFrame.from_ndarray(pixels, source).reformat(
                format=pix_fmt, dst_colorspace=fields.get("colorspace")
            )
            frame.pts, frame.time_base = time, 1 / Fraction(rate)
            yield from stream.encode(frame)
        yield from stream.encode(None)

    return stream, encode


def write(path, frames, *, format=None, container=None, **kwargs):
    with av.open(str(path), "w", format=format, options=container or {}) as file:
        _, encode = add_video(file, frames, **kwargs)
        for packet in encode():
            file.mux(packet)
    return path


def read(path, n_sample_frames=8, **kwargs):
    return read_frames(path, n_sample_frames=n_sample_frames, **SIZE | kwargs)


SIZE = {"height": HEIGHT, "width": WIDTH}


# --- containers and codecs

CONTAINERS = [
    pytest.param("a.mp4", {}, 6, id="mp4 h264"),
    pytest.param("a.mov", H264, 4, id="mov h264"),
    pytest.param("a.mkv", {"max_b_frames": 3}, 6, id="mkv h264"),
    pytest.param("a.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}, 8),
    pytest.param("a.mp4", {"codec": "libsvtav1", "options": {"preset": "12", "crf": "20"}}, 8),
    pytest.param("a.webm", {"codec": "libvpx-vp9", "options": {"crf": "8", "b": "0"}}, 8),
    pytest.param("a.webm", {"codec": "libvpx", "options": {"crf": "4", "b": "2M"}}, 8),
    pytest.param("a.mkv", {"codec": "ffv1"}, 4, id="mkv ffv1"),
    pytest.param("a.avi", {"codec": "mpeg4", "options": {"qscale": "2"}, "bit_rate": 4_000_000}, 8),
    pytest.param("a.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p", "bit_rate": 4_000_000}, 8),
    pytest.param("a.mpg", {"codec": "mpeg2video", "rate": 24, "bit_rate": 4_000_000}, 8),
    pytest.param("a.ts", {"rate": 25, "max_b_frames": 2}, 6, id="ts h264"),
    pytest.param("a.flv", {"codec": "flv", "bit_rate": 4_000_000}, 8, id="flv"),
    pytest.param("a.wmv", {"codec": "wmv2", "bit_rate": 4_000_000}, 8, id="wmv"),
    pytest.param("a.ogv", {"codec": "libvpx", "options": {"crf": "4", "b": "2M"}}, 8, id="ogv"),
    pytest.param("a.mov", {"codec": "prores_ks", "pix_fmt": "yuv422p10le"}, 8, id="mov prores"),
    pytest.param("a.mov", {"codec": "qtrle", "pix_fmt": "rgb24"}, 0, id="mov qtrle"),
    pytest.param("a.gif", {"codec": "gif", "pix_fmt": "gray"}, 0, id="gif"),
    pytest.param("a.apng", {"codec": "apng", "pix_fmt": "rgb24"}, 0, id="apng"),
    pytest.param("a.webp", {"codec": "libwebp_anim", "pix_fmt": "bgra"}, 8, id="webp"),
    pytest.param("a.h264", {}, 6, id="h264 without a container"),
]


@pytest.mark.parametrize(("name", "settings", "error"), CONTAINERS)
@pytest.mark.parametrize("sampling", ["rate", "uniform"])
def test_containers_and_codecs_read_alike(tmp_path, name, settings, error, sampling):
    frames = numbered(12)
    if settings.get("pix_fmt") == "gray":
        frames = frames[..., :1]
    path = write(tmp_path / name, frames, **settings)
    choice = {"rate": range(0, 8, 2), "uniform": [0, 4, 7, 11]}[sampling]
    seen = read(path, 4, sampling=sampling, sample_frame_rate=2)
    assert numbers(seen) == list(choice)
    # Blocks' edges ring; their middles and the grey below do not.
    difference = np.abs(seen.astype(int) - frames[list(choice)])[:, 4::8, 4::8]
    assert difference.max() <= error


# --- which stream


@pytest.mark.parametrize(
    ("name", "second", "disposition"),
    [
        pytest.param("a.mp4", {"size": (24, 32)}, None, id="a small one"),
        pytest.param("a.mp4", {"size": (96, 128)}, None, id="a large one"),
        pytest.param("a.mkv", {"size": (96, 128), "rate": 24}, Disposition.default, id="default"),
        pytest.param("a.ts", {"size": (24, 32)}, None, id="in a transport stream"),
    ],
)
def test_the_first_video_stream_is_read(tmp_path, name, second, disposition):
    path = tmp_path / name
    with av.open(str(path), "w") as file:
        stream, encode = add_video(file, numbered(8))
        other = np.full((8, *second["size"], 3), 200, np.uint8)
        extra, encode_extra = add_video(file, other, rate=second.get("rate", 8))
        if disposition is not None:
            stream.disposition, extra.disposition = 0, disposition
        for packet in (*encode_extra(), *encode()):
            file.mux(packet)
    assert numbers(read(path)) == list(range(8))
    assert numbers(read(path, 3, sampling="uniform")) == [0, 4, 7]


@pytest.mark.parametrize("first", [False, True], ids=["after the video", "before the video"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_a_cover_picture_is_not_the_video(tmp_path, name, first):
    path = tmp_path / name
    cover = np.full((1, 90, 160, 3), 77, np.uint8)
    with av.open(str(path), "w") as file:

        def add_cover():
            stream, encode = add_video(file, cover, codec="mjpeg", pix_fmt="yuvj420p")
            stream.disposition = Disposition.attached_pic
            return encode

        if first:
            encode_cover = add_cover()
        _, encode = add_video(file, numbered(8))
        if not first:
            encode_cover = add_cover()
        for packet in (*encode_cover(), *encode()):
            file.mux(packet)
    assert numbers(read(path)) == list(range(8))
    assert numbers(read(path, 3, sampling="uniform")) == [0, 4, 7]


def test_an_attachment_and_sound_are_no_obstacle(tmp_path):
    path = tmp_path / "a.mkv"
    picture = tmp_path / "cover.png"
    Image.new("RGB", (160, 90), (77, 77, 77)).save(picture)
    with av.open(str(path), "w") as file:
        sound = file.add_stream("aac", rate=8000)
        _, encode = add_video(file, numbered(8))
        file.add_attachment("cover.png", "image/png", picture.read_bytes())
        for start in range(0, 8000, 1000):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 8000, start
            file.mux(sound.encode(frame))
        for packet in (*sound.encode(None), *encode()):
            file.mux(packet)
    assert numbers(read(path)) == list(range(8))
    assert numbers(read(path, 3, sampling="uniform")) == [0, 4, 7]


@pytest.mark.parametrize("content", ["sound", "cover"])
def test_a_file_without_video_says_so(tmp_path, content):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        sound = file.add_stream("aac", rate=8000)
        encode = tuple
        if content == "cover":
            cover = np.zeros((1, 16, 16, 3), np.uint8)
            stream, encode = add_video(file, cover, codec="png", pix_fmt="rgb24")
            stream.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        for packet in (*encode(), *sound.encode(frame), *sound.encode(None)):
            file.mux(packet)
    with pytest.raises(UserError, match=r"a\.mp4: there is no video in it; give another file"):
        read(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv"])
def test_tags_in_an_unknown_encoding_are_no_obstacle(tmp_path, name):
    path = tmp_path / name
    with av.open(str(path), "w") as file:
        file.metadata["title"] = "CAFE-ON-THE-SNOW"
        _, encode = add_video(file, numbered(8), codec="mpeg4", bit_rate=4_000_000)
        for packet in encode():
            file.mux(packet)
    content = path.read_bytes()
    assert b"CAFE-ON-THE-SNOW" in content
    path.write_bytes(content.replace(b"CAFE-ON-THE-SNOW", b"CAF\xe9-ON-THE-SN\xd6W"))
    assert numbers(read(path)) == list(range(8))


# --- which frames


def spread(path, count):
    """Return frames spread over a clip, and the same ones chosen from a reading of them all."""
    all_frames = read(path, count)
    chosen = np.linspace(0, count - 1, 5).round().astype(int)
    return read(path, 5, sampling="uniform"), all_frames[chosen]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("a.mp4", {"max_b_frames": 3}, id="b frames"),
        pytest.param("a.mp4", {"options": {"x264-params": "open-gop=1:bframes=3"}}, id="open gop"),
        pytest.param("a.mkv", {"options": {"x264-params": "intra-refresh=1"}}, id="intra refresh"),
        pytest.param(
            "a.mp4",
            {"codec": "libx265", "options": {"x265-params": "keyint=10:log-level=none"}},
            id="hevc",
        ),
        pytest.param("a.webm", {"codec": "libvpx-vp9", "options": {"lag-in-frames": "16"}}),
        pytest.param("a.webm", {"codec": "libvpx", "options": {"lag-in-frames": "16"}}),
        pytest.param("a.avi", {"codec": "mpeg4", "max_b_frames": 2}, id="avi"),
        pytest.param("a.ts", {"rate": 25, "max_b_frames": 2}, id="ts"),
        pytest.param("a.mpg", {"codec": "mpeg2video", "rate": 24, "max_b_frames": 2}, id="mpg"),
    ],
)
def test_frames_spread_over_a_clip_are_those_of_decoding_it_all(tmp_path, name, settings):
    path = write(tmp_path / name, numbered(60), gop_size=10, **settings)
    seeking, decoding = spread(path, 60)
    np.testing.assert_array_equal(seeking, decoding)
    assert numbers(seeking) == [0, 15, 30, 44, 59]


@pytest.fixture
def decoded(monkeypatch):
    """The times of the frames that are decoded."""
    times = []
    decode_frames = decode._Video.decode

    def spy(self):
        for frame in decode_frames(self):
            times.append(frame.pts)
            yield frame

    monkeypatch.setattr(decode._Video, "decode", spy)
    return times


def test_only_the_first_frames_of_a_long_clip_are_decoded(tmp_path, decoded):
    path = write(tmp_path / "a.mp4", numbered(200), gop_size=20)
    assert numbers(read(path, 4, sample_frame_rate=2)) == [0, 2, 4, 6]
    assert len(decoded) == 7


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_decoding_begins_at_the_keyframe_before_a_frame(tmp_path, decoded, name):
    path = write(tmp_path / name, numbered(250), gop_size=20, options={"x264-params": "scenecut=0"})
    assert numbers(read(path, 4, sampling="uniform")) == [0, 83, 166, 249]
    assert len(decoded) == 1 + 4 + 7 + 10  # from the keyframes 0, 80, 160 and 240 on


def test_frames_far_from_the_start_are_found_by_seeking(tmp_path, decoded):
    frames = np.concatenate([numbered(250), numbered(250)])
    path = write(tmp_path / "a.mp4", frames, gop_size=20, options={"x264-params": "scenecut=0"})
    assert numbers(read(path, 3, sample_start_idx=450, sample_frame_rate=2)) == [200, 202, 204]
    assert len(decoded) == 15  # from the keyframe 440 on
    with pytest.raises(UserError, match="n_sample_frames is 9, but from frame 495 of 500 on"):
        read(path, 9, sample_start_idx=495)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_clip_of_variable_rate_has_all_its_frames(tmp_path, name):
    times = [0, 1, 2, 3, 50, 51, 200, 201, 202, 203, 400, 500]
    path = write(tmp_path / name, numbered(12), rate=100, times=times)
    assert numbers(read(path, 12)) == list(range(12))
    assert numbers(read(path, 4, sampling="uniform")) == [0, 4, 7, 11]


def test_frames_that_an_edit_list_hides_are_not_read(tmp_path):
    """A clip cut without encoding starts at a keyframe, and the player at a later frame."""
    whole = write(tmp_path / "whole.mp4", numbered(24), gop_size=8)
    cut = tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        shift = source.streams.video[0].time_base.denominator * 11 // 8
        for packet in source.demux(source.streams.video[0]):
            if packet.size and packet.pts >= shift - 3 * shift // 11:
                packet.stream = stream
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                file.mux(packet)
    shown = numbers(read(cut, 13))
    assert shown == list(range(11, 24))
    assert numbers(read(cut, 2, sampling="uniform")) == [11, 23]


# --- damaged files


def test_a_file_cut_short_is_read_as_far_as_it_goes(tmp_path):
    path = write(tmp_path / "a.ts", numbered(60), rate=25)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert numbers(read(path, 8)) == list(range(8))
        with pytest.raises(UserError, match=r"a\.ts: n_sample_frames is 60, but .* there are"):
            read(path, 60)


@pytest.mark.parametrize("keep", [0, 10, 0.1, 0.5])
def test_an_mp4_cut_short_is_refused_in_one_line(tmp_path, keep):
    path = write(tmp_path / "a.mp4", numbered(24), options={"crf": "1"})
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep in (0, 10) else int(len(content) * keep)])
    with pytest.raises(UserError, match=r"a\.mp4: no video can be read from it \(.+\)") as refusal:
        read(path)
    assert "\n" not in str(refusal.value)


def test_packets_that_cannot_be_decoded_are_left_out_with_a_warning(tmp_path):
    path = write(tmp_path / "a.mov", numbered(12), codec="png", pix_fmt="rgb24")
    content = path.read_bytes()
    images = [match.start() for match in re.finditer(b"\x89PNG", content)]
    path.write_bytes(content[: images[5]] + bytes(40) + content[images[5] + 40 :])
    with pytest.warns(UserWarning, match=r"a\.mov: 1 damaged packets were skipped; look at"):
        assert numbers(read(path, 8)) == [0, 1, 2, 3, 4, 6, 7, 8]


@pytest.mark.filterwarnings("ignore:.*damaged packets")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("a.mp4", {}, id="mp4"),
        pytest.param("a.mkv", X265, id="hevc in mkv"),
        pytest.param("a.mp4", X265, id="hevc in mp4"),
        pytest.param("a.webm", {"codec": "libvpx-vp9"}, id="webm"),
        pytest.param("a.avi", {"codec": "mpeg4"}, id="avi"),
        pytest.param("a.ts", {"rate": 25}, id="ts"),
        pytest.param("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}, id="gif"),
        pytest.param("a.apng", {"codec": "apng", "pix_fmt": "rgb24"}, id="apng"),
        pytest.param("a.webp", {"codec": "libwebp_anim", "pix_fmt": "bgra"}, id="webp"),
    ],
)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, name, settings):
    path = write(tmp_path / name, numbered(12), **settings)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    outcomes = []
    for _ in range(25):
        content = bytearray(whole)
        for place in rng.integers(0, rng.choice([64, 1024, len(whole)]), rng.choice([1, 4, 20])):
            content[place % len(whole)] = rng.integers(256)
        path.write_bytes(content)
        for sampling in ("rate", "uniform"):
            try:
                outcomes.append(str(read(path, 4, sampling=sampling).shape))
            except UserError as error:
                outcomes.append(str(error))
    assert not [outcome for outcome in outcomes if "\n" in outcome]
    assert {str((4, HEIGHT, WIDTH, 3))} < set(outcomes), "some are read and some refused"


# --- what is no clip


@pytest.mark.parametrize("suffix", ["as it is called", "mp4"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", "hello world\n" * 5000),
        ("art.ans", "\x1b[31mred\x1b[0m\n" * 500),
        ("list.ffconcat", "ffconcat version 1.0\nfile other.mp4\n"),
        ("list.m3u8", "#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n"),
        (
            "list.mpd",
            '<?xml version="1.0"?><MPD><Period><BaseURL>other.mp4</BaseURL></Period></MPD>',
        ),
        ("session.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9999 RTP/AVP 96\n"),
        ("words.srt", "1\n00:00:00,000 --> 00:00:01,000\nhello\n"),
        ("drawing.svg", '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        ("page.html", "<html><body>404</body></html>"),
        ("numbers.csv", "1,2,3\n" * 100),
        ("empty.mkv", ""),
    ],
)
def test_files_that_are_no_video_are_refused(tmp_path, name, content, suffix):
    write(tmp_path / "other.mp4", numbered(8))
    path = tmp_path / (name if suffix != "mp4" else f"{name.split('.')[0]}.mp4")
    path.write_text(content)
    with pytest.raises(UserError, match=f"{re.escape(path.name)}: no video can be read") as refusal:
        read(path)
    assert "\n" not in str(refusal.value)
    assert "give an mp4" in str(refusal.value)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "link to a fifo"])
@pytest.mark.parametrize("place", ["clip", "folder"])
def test_pipes_and_devices_are_not_opened(tmp_path, kind, place):
    path = tmp_path / "images" / ("a.png" if place == "folder" else "a.mp4")
    path.parent.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to a fifo":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    with pytest.raises(UserError, match=rf"{path.name}: not a regular file; "):
        read(path if place == "clip" else path.parent)


@pytest.mark.parametrize("name", ["http://localhost/a.mp4", "concat:a.mp4", "/dev/null/a.mp4"])
def test_addresses_are_file_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such video file or folder of images"):
        read(name)


def png_of(width, height):
    """Return a PNG of a size without its pixels."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + data + b"5\xaf\x06\x1e"


@pytest.mark.parametrize("place", ["folder", "file"])
@pytest.mark.parametrize("size", [(8001, 8000), (10000, 10000), (20000, 20000), (60000, 2000)])
def test_huge_images_are_refused_by_their_headers(tmp_path, size, place):
    path = tmp_path / "images" / "a.png"
    path.parent.mkdir()
    path.write_bytes(png_of(*size))
    with pytest.raises(UserError, match=r"a\.png: .*over 64 megapixels; scale it down"):
        read(path.parent if place == "folder" else path)


def test_a_huge_gif_is_refused_by_its_header(tmp_path):
    path = tmp_path / "a.gif"
    path.write_bytes(b"GIF89a" + struct.pack("<2H3B", 60000, 60000, 0, 0, 0) + b"\x3b" * 20)
    with pytest.raises(UserError, match=r"a\.gif: .*over 64 megapixels|a\.gif: not a readable"):
        read(path)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "size"),
    [
        pytest.param("a.mov", "qtrle", "rgb24", ">2H", id="mov qtrle"),
        pytest.param("a.mov", "rawvideo", "rgb24", ">2H", id="mov without compression"),
        pytest.param("a.avi", "huffyuv", "rgb24", "<2i", id="avi huffyuv"),
    ],
)
def test_huge_videos_are_refused_before_a_frame_is_decoded(
    tmp_path, decoded, name, codec, pix_fmt, size
):
    path = write(tmp_path / name, np.zeros((2, 40, 56, 3), np.uint8), codec=codec, pix_fmt=pix_fmt)
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack(size, 56, 40), struct.pack(size, 20000, 4000)))
    with pytest.raises(UserError, match=rf"{path.name}: .*over 64 megapixels.*; scale it down"):
        read(path, 1)
    assert not decoded


@pytest.mark.parametrize("name", ["a.mov", "a.avi", "a.mkv"])
def test_frames_that_are_huge_against_the_header_are_not_decoded(tmp_path, decoded, name):
    frames = np.zeros((2, 40, 56, 3), np.uint8)
    path = write(tmp_path / name, frames, codec="mjpeg", pix_fmt="yuvj420p")
    content = path.read_bytes()
    size, huge = b"\x08" + struct.pack(">2H", 40, 56), b"\x08" + struct.pack(">2H", 20000, 20000)
    assert content.count(size) == 2
    path.write_bytes(content.replace(size, huge))
    with pytest.raises(
        UserError, match=r"its frames are over 64 megapixels, or the file is damaged"
    ):
        read(path, 1)
    assert not decoded


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        pytest.param("a.mpg", "mpeg2video", id="mpg mpeg2"),
        pytest.param("a.mpg", "libx264", id="mpg h264"),
        pytest.param("a.ts", "libx264", id="ts h264"),
        pytest.param("a.ts", "mpeg2video", id="ts mpeg2"),
        pytest.param("a.flv", "libx264", id="flv h264"),
        pytest.param("a.flv", "flv", id="flv"),
        pytest.param("a.h264", "libx264", id="h264 without a container"),
    ],
)
def test_ffmpeg_decodes_no_huge_frame_when_it_opens_a_file(tmp_path, monkeypatch, name, codec):
    """It looks into the frames of containers whose header does not list the streams."""
    path = write(tmp_path / name, numbered(8), rate=25, codec=codec)
    assert numbers(read(path, 3, sampling="uniform"))[0] == 0
    opened = []
    open_container = decode._open_container
    monkeypatch.setattr(
        decode, "_open_container", lambda *a, **k: opened.append(k) or open_container(*a, **k)
    )
    for module in (decode, images):  # Huge is what has more than half the pixels of the clip.
        monkeypatch.setattr(module, "MAX_PIXELS", HEIGHT * WIDTH // 2)
    with pytest.raises(UserError, match=rf"{path.name}: .*over \S+ megapixels.*; scale it down"):
        read(path, 1)
    assert opened == [{"codec_whitelist": "none"}]


# --- shape: rotation, pixels, transparency


def corners(height=32, width=64):
    """Return a frame whose corners are red, green, blue and black, from the top left clockwise."""
    frame = np.full((height, width, 3), 128, np.uint8)
    frame[: height // 2, : width // 2] = 255, 0, 0
    frame[: height // 2, width // 2 :] = 0, 255, 0
    frame[height // 2 :, width // 2 :] = 0, 0, 255
    frame[height // 2 :, : width // 2] = 0
    return frame


ORIENTATIONS = {  # display rotation and flip -> the frame as it is shown
    (0, False): lambda frame: frame,
    (90, False): lambda frame: np.rot90(frame, 1),
    (180, False): lambda frame: np.rot90(frame, 2),
    (-90, False): lambda frame: np.rot90(frame, -1),
    (0, True): lambda frame: frame[:, ::-1],
}


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
@pytest.mark.parametrize(("degrees", "flip"), ORIENTATIONS)
def test_frames_are_turned_as_the_file_says(tmp_path, name, degrees, flip):
    path = tmp_path / name
    frame = corners()
    with av.open(str(path), "w") as file:
        stream, encode = add_video(file, frame[None], **H264)
        stream.set_display_rotation(degrees, hflip=flip)
        for packet in encode():
            file.mux(packet)
    expected = ORIENTATIONS[degrees, flip](frame)
    height, width = expected.shape[:2]
    [seen] = read_frames(path, n_sample_frames=1, height=height, width=width)
    np.testing.assert_allclose(seen[4::8, 4::8].astype(int), expected[4::8, 4::8], atol=6)


@pytest.mark.parametrize(("degrees", "turns"), [("90", -1), ("180", 2), ("270", 1), ("x", 0)])
def test_frames_are_turned_as_an_old_tag_says(tmp_path, degrees, turns):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        stream, encode = add_video(file, corners()[None], **H264)
        stream.metadata["rotate"] = degrees
        for packet in encode():
            file.mux(packet)
    expected = np.rot90(corners(), turns)
    height, width = expected.shape[:2]
    [seen] = read_frames(path, n_sample_frames=1, height=height, width=width)
    np.testing.assert_allclose(seen[4::8, 4::8].astype(int), expected[4::8, 4::8], atol=6)


@pytest.mark.parametrize("fit", ["crop", "stretch"])
@pytest.mark.parametrize(
    ("name", "turned"), [("a.mp4", False), ("a.mp4", True), ("a.mkv", False), ("a.avi", False)]
)
@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(16, 11)], ids=str)
def test_a_circle_stays_a_circle(tmp_path, name, aspect, fit, turned):
    shown = 192  # pixels of a square, once they are square
    height, width = int(shown * min(aspect, 1)), int(shown / max(aspect, 1))
    y, x = (np.arange(height) + 0.5) / height - 0.5, (np.arange(width) + 0.5) / width - 0.5
    disc = np.where(np.hypot(y[:, None], x) < 0.3, 255, 0).astype(np.uint8)
    frame = np.repeat(disc[..., None], 3, axis=-1)
    path = tmp_path / name
    with av.open(str(path), "w") as file:
        codec = {"codec": "mpeg4", "bit_rate": 4_000_000} if name == "a.avi" else {}
        stream, encode = add_video(file, frame[None], sample_aspect_ratio=aspect, **codec)
        if turned:
            stream.set_display_rotation(90)
        for packet in encode():
            file.mux(packet)
    [seen] = read_frames(path, n_sample_frames=1, height=192, width=192, fit=fit)
    wide, high = ((seen[..., 0] > 127).sum(axis=axis).max() for axis in (1, 0))
    assert wide == pytest.approx(high, rel=0.02)
    assert wide == pytest.approx(0.6 * 192, rel=0.02)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("a.webm", {"codec": "libvpx-vp9", "pix_fmt": "yuva420p"}, id="webm vp9"),
        pytest.param("a.webm", {"codec": "libvpx", "pix_fmt": "yuva420p"}, id="webm vp8"),
        pytest.param("a.mov", {"codec": "qtrle", "pix_fmt": "argb"}, id="mov qtrle"),
        pytest.param("a.mov", {"codec": "prores_ks", "pix_fmt": "yuva444p10le"}, id="prores4444"),
        pytest.param("a.mov", {"codec": "png", "pix_fmt": "rgba"}, id="mov png"),
        pytest.param("a.mkv", {"codec": "ffv1", "pix_fmt": "bgra"}, id="mkv ffv1"),
        pytest.param("a.apng", {"codec": "apng", "pix_fmt": "rgba"}, id="apng"),
        pytest.param("a.webp", {"codec": "libwebp_anim", "pix_fmt": "bgra"}, id="webp"),
        pytest.param("a.gif", None, id="gif"),
        pytest.param("images/a.png", None, id="png"),
        pytest.param("images/a.webp", None, id="webp image"),
    ],
)
@pytest.mark.parametrize("sampling", ["rate", "uniform"])
def test_transparency_is_laid_on_white(tmp_path, name, settings, sampling):
    frame = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    frame[:, WIDTH // 2 :] = 20, 60, 200, 255
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if settings is None:
        Image.fromarray(frame).save(path)
        path = path.parent if path.parent != tmp_path else path
        frames = read(path, 1)
    else:
        vpx = {"options": {"crf": "4", "b": "4M", "auto-alt-ref": "0"}}
        frames = np.stack([frame] * 3)
        frames[:, :, -4:, 1] = np.array([60, 90, 120])[:, None, None]  # WebP joins equal frames
        write(path, frames, **settings, **(vpx if "vpx" in settings["codec"] else {}))
        frames = read(path, 3, sampling=sampling)
    left, right = frames[:, :, 4 : WIDTH // 2 - 4], frames[:, :, WIDTH // 2 + 4 : -16]
    np.testing.assert_allclose(left.astype(int), 255, atol=3)
    np.testing.assert_allclose(
        right.astype(int), np.broadcast_to((20, 60, 200), right.shape), atol=8
    )


# --- colours

PATCHES = np.array(
    [(188, 48, 48), (255, 255, 255), (128, 128, 128), (30, 80, 200), (40, 160, 60), (0, 0, 0)],
    np.uint8,
)
MATRICES = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}


def patches(height=HEIGHT):
    return np.repeat(np.repeat(PATCHES[None], 16, axis=1), height, axis=0)


def at_patches(frame):
    return frame[len(frame) // 2, 8::16].astype(int)


def to_yuv(rgb, matrix, *, full=False, bits=8):
    """Return three planes of samples of signals from 0 to 1, by the definition of Y'CbCr."""
    red, blue = MATRICES[matrix]
    y = rgb @ np.array([red, 1 - red - blue, blue])
    cb, cr = (rgb[..., 2] - y) / (2 - 2 * blue), (rgb[..., 0] - y) / (2 - 2 * red)
    scale = 2 ** (bits - 8)
    black, luma, chroma = (0, 255, 255) if full else (16, 219, 224)
    planes = np.stack([black + luma * y, 128 + chroma * cb, 128 + chroma * cr]) * scale
    return np.rint(planes).clip(0, 2**bits - 1).astype(np.uint8 if bits == 8 else np.uint16)


def write_yuv(path, planes, *, codec="ffv1", options=None, full=None, chroma="444", **tags):
    """Write one frame of planes that are already in Y'CbCr."""
    pix_fmt = f"yuv{chroma}p" + ("" if planes.dtype == np.uint8 else "10le")
    rows, columns = {"444": (1, 1), "422": (1, 2), "420": (2, 2)}[chroma]
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=8, options=options or {})
        stream.height, stream.width = planes.shape[1:]
        stream.pix_fmt = pix_fmt
        if full is not None:
            stream.color_range = 2 if full else 1
        for name, value in tags.items():
            setattr(stream, name, value)
        frame = av.VideoFrame(planes.shape[2], planes.shape[1], pix_fmt)
        luma, *others = planes
        subsampled = [luma, *(samples[::rows, ::columns] for samples in others)]
        for plane, samples in zip(frame.planes, subsampled, strict=True):
            lines = np.zeros((plane.height, plane.line_size // samples.itemsize), samples.dtype)
            lines[:, : samples.shape[1]] = samples
            plane.update(lines.tobytes())
        frame.pts = 0  # libx265 hands on what it is given, and Matroska refuses a packet without
        frame.color_range = 0 if full is None else 2 if full else 1
        for name, value in tags.items():
            setattr(frame, name, value)
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "matrix", "height", "full", "tags"),
    [
        pytest.param("a.mp4", X264, "bt709", 48, None, {"colorspace": 1}, id="tagged bt709"),
        pytest.param("a.mp4", X264, "bt601", 720, None, {"colorspace": 6}, id="tagged bt601"),
        pytest.param("a.mkv", {}, "bt601", 720, False, {"colorspace": 5}, id="tagged bt470bg"),
        pytest.param("a.mkv", {}, "bt2020", 48, None, {"colorspace": 9}, id="bt2020's matrix"),
        pytest.param("a.mp4", X264, "bt601", 718, None, {}, id="untagged below 720 lines"),
        pytest.param("a.mp4", X264, "bt709", 720, None, {}, id="untagged from 720 lines on"),
        pytest.param("a.mkv", {}, "bt601", 48, None, {}, id="untagged ffv1"),
        pytest.param("a.mp4", X264, "bt709", 48, True, {"colorspace": 1}, id="full range"),
        pytest.param("a.mkv", X264, "bt601", 48, True, {}, id="full range, untagged matrix"),
        pytest.param("a.mkv", {}, "bt709", 48, True, {"colorspace": 1}, id="full range ffv1"),
    ],
)
@pytest.mark.parametrize("bits", [8, 10])
def test_matrix_and_range_are_those_that_the_file_names(
    tmp_path, name, codec, matrix, height, full, tags, bits
):
    planes = to_yuv(patches(height) / 255, matrix, full=bool(full), bits=bits)
    path = write_yuv(tmp_path / name, planes, full=full, **codec, **tags)
    [seen] = read_frames(path, n_sample_frames=1, height=height, width=planes.shape[2])
    np.testing.assert_allclose(at_patches(seen), PATCHES, atol=3)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "grey"),
    [
        pytest.param("a.mp4", "libx264rgb", "rgb24", False, id="h264 in rgb"),
        pytest.param("a.mkv", "ffv1", "bgra", False, id="ffv1 in rgb"),
        pytest.param("a.avi", "huffyuv", "rgb24", False, id="huffyuv"),
        pytest.param("a.mkv", "ffv1", "gray", True, id="ffv1 in grey"),
        pytest.param("a.mov", "png", "gray", True, id="png in grey"),
        pytest.param("a.mov", "png", "rgb48be", False, id="png of 16 bits"),
        pytest.param("a.mkv", "ffv1", "gbrp10le", False, id="ffv1 of 10 bits"),
    ],
)
def test_rgb_and_grey_are_read_as_they_are(tmp_path, name, codec, pix_fmt, grey):
    frame = patches()
    if grey:
        frame[..., :] = frame[..., :1]
    options = {"crf": "0"} if codec == "libx264rgb" else {}
    source = frame[..., :1] if grey else frame
    path = write(tmp_path / name, source[None], codec=codec, pix_fmt=pix_fmt, options=options)
    [seen] = read_frames(path, n_sample_frames=1, height=HEIGHT, width=frame.shape[1])
    np.testing.assert_allclose(at_patches(seen), at_patches(frame), atol=1)


@pytest.mark.parametrize("chroma", ["420", "422", "444"])
@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("primaries", [1, 9], ids=["sdr", "wide"])
def test_subsampled_chroma_keeps_its_colours(tmp_path, chroma, bits, primaries):
    light = linear(patches() / 255) @ (TO_2020.T if primaries == 9 else np.eye(3))
    signal = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    planes = to_yuv(signal, "bt709", bits=bits)
    tags = {"colorspace": 1, "color_primaries": primaries, "color_trc": 1}
    path = write_yuv(tmp_path / "a.mkv", planes, chroma=chroma, **tags)
    [seen] = read_frames(path, n_sample_frames=1, height=HEIGHT, width=planes.shape[2])
    np.testing.assert_allclose(at_patches(seen), PATCHES, atol=4)


def linear(srgb):
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


def pq(light):
    """Return PQ's signal for light of which 1 is 203 cd/m2: BT.2100's inverse EOTF."""
    power = (light * 203 / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(light):
    """Return HLG's signal for light shown at a peak of 1000 cd/m2: BT.2100's inverse OOTF, OETF."""
    shown = light * 203 / 1000
    luminance = shown @ np.array([0.2627, 0.6780, 0.0593])
    scene = shown * np.maximum(luminance, 1e-9)[..., None] ** (1 / 1.2 - 1)
    log = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)


BT2020 = {"color_primaries": 9, "colorspace": 9}
HDR = {"PQ": (pq, 16), "HLG": (hlg, 18)}


@pytest.mark.parametrize("curve", HDR)
@pytest.mark.parametrize("chroma", ["420", "444"])
@pytest.mark.parametrize(
    ("name", "codec"), [("a.mov", X264), ("a.mp4", X264), ("a.mkv", {}), ("a.mkv", X265)]
)
def test_hdr_becomes_the_sdr_that_it_was_made_of(tmp_path, curve, chroma, name, codec):
    signal, transfer = HDR[curve]
    planes = to_yuv(signal(linear(patches() / 255) @ TO_2020.T), "bt2020", bits=10)
    if codec is X265:
        tag = {"PQ": "smpte2084", "HLG": "arib-std-b67"}[curve]
        more = f":colorprim=bt2020:transfer={tag}:colormatrix=bt2020nc:range=limited"
        codec = X265 | {"options": {"x265-params": X265["options"]["x265-params"] + more}}
    tags = {"color_trc": transfer, **BT2020}
    path = write_yuv(tmp_path / name, planes, full=False, chroma=chroma, **tags, **codec)
    with pytest.warns(UserWarning, match=rf"a\.\w+: HDR \({curve}\) is converted to SDR") as said:
        [seen] = read_frames(path, n_sample_frames=1, height=HEIGHT, width=planes.shape[2])
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    np.testing.assert_allclose(at_patches(seen), PATCHES, atol=5)


def test_what_is_brighter_than_white_keeps_its_hue(tmp_path):
    light = np.array([[8.0, 8.0, 8.0], [4.0, 2.0, 1.0], [1.0, 0.5, 0.25]]) @ TO_2020.T
    planes = to_yuv(np.repeat(np.repeat(pq(light)[None], 16, 1), 16, 0), "bt2020", bits=10)
    path = write_yuv(tmp_path / "a.mkv", planes, color_trc=16, full=False, **BT2020)
    with pytest.warns(UserWarning, match="HDR"):
        [seen] = read_frames(path, n_sample_frames=1, height=16, width=48)
    white, bright, dim = at_patches(seen)
    np.testing.assert_allclose(white, 255, atol=1)
    np.testing.assert_allclose(bright, dim, atol=3)


def test_the_wide_colours_of_sdr_in_bt2020_become_srgb_without_a_note(tmp_path):
    light = linear(patches() / 255) @ TO_2020.T
    signal = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    planes = to_yuv(signal, "bt2020", bits=10)
    path = write_yuv(tmp_path / "a.mkv", planes, color_trc=14, full=False, **BT2020)
    [seen] = read_frames(path, n_sample_frames=1, height=HEIGHT, width=planes.shape[2])
    np.testing.assert_allclose(at_patches(seen), PATCHES, atol=4)


def rgb_to_xyz(*chromaticities):
    """Return the matrix of primaries that are given as (x, y) of red, green, blue and white."""
    xyz = np.array([(x / y, 1, (1 - x - y) / y) for x, y in chromaticities]).T
    return xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])


D65 = (0.3127, 0.3290)
BT709 = rgb_to_xyz((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), D65)
PRIMARIES = {  # by their numbers in ITU-T H.273
    1: BT709,
    9: rgb_to_xyz((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65),
    12: rgb_to_xyz((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65),
}


@pytest.mark.parametrize("curve", ["PQ", None])
@pytest.mark.parametrize("primaries", PRIMARIES)
def test_primaries_become_those_of_bt709(tmp_path, curve, primaries):
    light = linear(patches() / 255) @ np.linalg.solve(PRIMARIES[primaries], BT709).T
    light = light.clip(0)
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    planes = to_yuv(pq(light) if curve else srgb, "bt709", bits=10)
    tags = {"color_trc": 16 if curve else 13, "color_primaries": primaries, "colorspace": 1}
    path = write_yuv(tmp_path / "a.mkv", planes, full=False, **tags)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if curve else "error")
        [seen] = read_frames(path, n_sample_frames=1, height=HEIGHT, width=planes.shape[2])
    np.testing.assert_allclose(at_patches(seen), PATCHES, atol=4)


@pytest.mark.parametrize("matrix", [0, 3, 15, 200])
def test_odd_matrices_are_taken_for_untagged(tmp_path, matrix):
    path = write_yuv(tmp_path / "a.mkv", to_yuv(patches() / 255, "bt601"), colorspace=matrix)
    [seen] = read_frames(path, n_sample_frames=1, height=HEIGHT, width=96)
    np.testing.assert_allclose(at_patches(seen), PATCHES, atol=3)


@pytest.mark.parametrize("matrix", [8, 10, 14])
def test_matrices_that_are_not_known_are_named(tmp_path, matrix):
    path = write_yuv(tmp_path / "a.mkv", to_yuv(patches() / 255, "bt601"), colorspace=matrix)
    with pytest.raises(UserError, match=r"a\.mkv: its colour matrix \(.+\) is not supported; conv"):
        read(path, 1)


# --- rate


@pytest.mark.parametrize(
    ("name", "settings", "choice", "expected"),
    [
        pytest.param("a.mp4", {"rate": 24}, {}, 24, id="all frames"),
        pytest.param("a.mp4", {"rate": 24}, {"sample_frame_rate": 3}, 8, id="every third"),
        pytest.param("a.mp4", {"rate": 24}, {"sampling": "uniform"}, 24 * 3 / 23, id="spread"),
        pytest.param("a.mkv", {"rate": Fraction(30000, 1001)}, {}, 29.97, id="ntsc"),
        pytest.param("a.webm", {"codec": "libvpx-vp9", "rate": 30}, {}, 30, id="webm"),
        pytest.param("a.gif", {"codec": "gif", "pix_fmt": "rgb8", "rate": 10}, {}, 10, id="gif"),
        pytest.param("a.apng", {"codec": "apng", "pix_fmt": "rgb24", "rate": 4}, {}, 4, id="apng"),
        pytest.param(
            "a.webp", {"codec": "libwebp_anim", "pix_fmt": "bgra", "rate": 5}, {}, 5, id="webp"
        ),
    ],
)
def test_the_rate_is_that_of_the_chosen_frames(tmp_path, name, settings, choice, expected):
    path = write(tmp_path / name, numbered(24), **settings)
    clip = read_clip(path, n_sample_frames=4, **SIZE, **choice)
    assert clip.fps == pytest.approx(expected, rel=0.01)


def test_the_still_image_of_an_apng_is_no_frame(tmp_path):
    images = [Image.fromarray(frame) for frame in numbered(4)]
    path = tmp_path / "a.png"
    still = Image.new("RGB", images[0].size, "white")
    still.save(path, save_all=True, append_images=images, default_image=True, duration=250)
    clip = read_clip(path, n_sample_frames=4, **SIZE)
    assert (numbers(clip.frames), clip.fps) == ([0, 1, 2, 3], 4)
    assert numbers(read(path, 2, sampling="uniform")) == [0, 3]


def test_a_clip_of_variable_rate_has_the_mean_rate_of_its_frames(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(5), rate=100, times=[0, 10, 20, 100, 200])
    assert read_clip(path, n_sample_frames=5, **SIZE).fps == 2


def test_one_frame_has_the_rate_of_the_steps_that_would_follow(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(24), rate=24)
    assert read_clip(path, n_sample_frames=1, sample_frame_rate=4, **SIZE).fps == 6


@pytest.mark.parametrize("source", ["folder", "image", "gif without delays"])
def test_sources_without_a_rate_have_none(tmp_path, source):
    images = [Image.fromarray(frame) for frame in numbered(2)]
    path = tmp_path / {"folder": "a.png", "image": "a.png"}.get(source, "a.gif")
    images[0].save(path, save_all=source == "gif without delays", append_images=images[1:])
    clip = read_clip(tmp_path if source == "folder" else path, n_sample_frames=1, **SIZE)
    assert clip.fps is None
    assert numbers(clip.frames) == [0]


@pytest.mark.parametrize(
    ("source", "choice", "fps", "expected"),
    [
        pytest.param("a.mp4", {"sample_frame_rate": 3}, "auto", 8.0, id="every third at 24"),
        pytest.param("a.mp4", {"sampling": "uniform"}, "auto", 24.0, id="all frames at 24"),
        pytest.param("a.mp4", {"sample_frame_rate": 3}, 12, 12.0, id="as the user says"),
        pytest.param("images", {}, "auto", DEFAULT_FPS, id="a folder of images"),
        pytest.param("slow.mkv", {}, "auto", LOWEST_AUTO_FPS, id="ten seconds a frame"),
    ],
)
def test_a_run_writes_its_videos_at_the_rate_of_the_clip(tmp_path, source, choice, fps, expected):
    write(tmp_path / "a.mp4", numbered(24), rate=24)
    write(tmp_path / "slow.mkv", numbered(24), rate=Fraction(1, 10))
    (tmp_path / "images").mkdir()
    for number, frame in enumerate(numbered(24)):
        Image.fromarray(frame).save(tmp_path / f"images/{number}.png")
    count = 24 if choice.get("sampling") else 8
    data = {"video_path": str(tmp_path / source), "prompt": "", "n_sample_frames": count, **choice}
    config = parse_config(
        {
            "pretrained_model_path": "tiny-scenes",
            "output_dir": str(tmp_path / "run"),
            "train_data": data | SIZE,
            "validation_data": {"fps": fps},
        }
    )
    run = Run.create(config)
    run.record_config()
    assert run.fps == expected
    assert Run.open(tmp_path / "run").config.validation_data.fps == expected
    assert Run.create(config).fps == expected
