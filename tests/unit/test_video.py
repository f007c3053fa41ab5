import base64
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import av
import IPython.display
import numpy as np
import pytest
from PIL import Image

from tav_jax.errors import UserError
from tav_jax.runs.samples import file_stem
from tav_jax.video.read import frame_indices, read_clip, read_frames, to_pixel_values
from tav_jax.video.sheets import contact_sheet, side_by_side
from tav_jax.video.write import show_video, to_frames, write_image, write_video

VIDEOS = Path(__file__).parents[2].parent / "shared" / "videos"

# Frame i of a test clip is grey of this many levels times i, so that a frame read back tells its
# index. h264 at crf 18 and a palette of 256 colours keep flat grey within 2 levels.
STEP = 10
LOSSY = 2


def grey_ramp(length, height=32, width=48):
    levels = STEP * np.arange(length, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (length, height, width, 3))


def indices_seen(frames):
    levels = frames.reshape(len(frames), -1).astype(float)
    assert np.ptp(levels, axis=1).max() <= LOSSY, "each frame is one grey"
    return np.round(levels.mean(axis=1) / STEP).astype(int).tolist()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, grey_ramp(24))
    return path


@pytest.fixture
def image_folder(tmp_path):
    for name, frame in zip(["a1.png", "a2.PNG", "a10.png", "a11.bmp"], grey_ramp(4), strict=True):
        write_image(tmp_path / "images" / name, frame)
    return tmp_path / "images"


def read_small(path, n_sample_frames=4, **kwargs):
    return read_frames(path, n_sample_frames=n_sample_frames, width=24, height=16, **kwargs)


# --- which frames


@pytest.mark.parametrize(
    ("length", "choice", "expected"),
    [
        pytest.param(24, (4,), [0, 1, 2, 3], id="from the start, one after the other"),
        pytest.param(24, (4, 5, 3), [5, 8, 11, 14], id="from a start at a rate"),
        pytest.param(10, (4, 0, 3), [0, 3, 6, 9], id="up to the very last"),
        pytest.param(1, (1,), [0], id="the only one"),
        pytest.param(91, (4, 0, 1, "uniform"), [0, 30, 60, 90], id="evenly, both ends included"),
        pytest.param(9, (3, 4, 1, "uniform"), [4, 6, 8], id="evenly from a start"),
        pytest.param(5, (5, 0, 1, "uniform"), [0, 1, 2, 3, 4], id="evenly, all of them"),
        pytest.param(5, (1, 2, 1, "uniform"), [2], id="evenly, one"),
        pytest.param(5, (3, 0, 9, "uniform"), [0, 2, 4], id="evenly, where the rate says nothing"),
    ],
)
def test_frame_indices_are(length, choice, expected):
    assert frame_indices(length, *choice) == expected


@pytest.mark.parametrize("length", [7, 24, 91])
def test_uniform_indices_never_repeat(length):
    for n in range(2, length + 1):
        indices = frame_indices(length, n, sampling="uniform")
        assert indices[0] == 0
        assert indices[-1] == length - 1
        assert min(np.diff(indices)) >= 1


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        pytest.param(
            {"n_sample_frames": 8, "sample_frame_rate": 4},
            "n_sample_frames is 8, but from frame 0 of 24 on there are 6 in steps of 4; "
            "use n_sample_frames <= 6 or sample_frame_rate <= 3",
            id="too few at this rate",
        ),
        pytest.param(
            {"n_sample_frames": 8, "sample_start_idx": 20},
            r"from frame 20 of 24 on there are 4 in steps of 1; use n_sample_frames <= 4$",
            id="too few at any rate",
        ),
        pytest.param(
            {"n_sample_frames": 25, "sampling": "uniform"},
            r"n_sample_frames is 25, but .* there are 24 .*; use n_sample_frames <= 24$",
            id="too few to spread",
        ),
        pytest.param({"n_sample_frames": 0}, "n_sample_frames is 0, .* at least 1", id="none"),
        pytest.param({"sample_frame_rate": 0}, "sample_frame_rate is 0; .* at least 1", id="rate"),
        pytest.param(
            {"sample_start_idx": 24}, "sample_start_idx is 24, but there are 24 frames", id="beyond"
        ),
        pytest.param({"sample_start_idx": -1}, "sample_start_idx is -1, but", id="before"),
        pytest.param({"sampling": "random"}, "sampling is 'random'; .* 'rate' or", id="sampling"),
        pytest.param({"fit": "pad"}, "fit is 'pad'; .* 'stretch' or 'crop'", id="fit"),
    ],
)
def test_reading_refuses(clip, choice, message):
    with pytest.raises(ValueError, match=message):
        read_small(clip, **choice)


def test_the_largest_numbers_a_refusal_names_do_work(clip):
    assert len(read_small(clip, n_sample_frames=6, sample_frame_rate=4)) == 6
    assert len(read_small(clip, n_sample_frames=8, sample_frame_rate=3)) == 8


# --- videos


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        pytest.param({}, [0, 1, 2, 3], id="rate 1"),
        pytest.param({"sample_start_idx": 2, "sample_frame_rate": 7}, [2, 9, 16, 23], id="rate 7"),
        pytest.param({"sampling": "uniform"}, [0, 8, 15, 23], id="uniform"),
    ],
)
def test_chosen_frames_come_out_of_a_video(clip, choice, expected):
    frames = read_small(clip, **choice)
    assert frames.shape == (4, 16, 24, 3)
    assert frames.dtype == np.uint8
    assert indices_seen(frames) == expected


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.mp4: no such video file or folder"):
        read_small(tmp_path / "gone.mp4")


@pytest.mark.skipif(not VIDEOS.exists(), reason="the real clips lie beside the repository")
def test_a_real_clip_is_read_to_its_last_frame():
    path = VIDEOS / "man-skiing.mp4"  # 91 frames of 718x718
    frames = read_frames(path, n_sample_frames=91, width=32, height=32)
    spread = read_frames(path, n_sample_frames=4, width=32, height=32, sampling="uniform")
    np.testing.assert_array_equal(spread, frames[[0, 30, 60, 90]])
    assert frames.std() > 30, "an image and not a flat colour"
    with pytest.raises(ValueError, match="sample_start_idx is 91, but there are 91 frames"):
        read_frames(path, n_sample_frames=1, width=32, height=32, sample_start_idx=91)


# --- folders of images


def test_a_folder_is_read_in_natural_order(image_folder):
    (image_folder / "notes.txt").write_text("no image")
    (image_folder / "._a1.png").write_text("what macOS leaves behind")
    assert indices_seen(read_small(image_folder)) == [0, 1, 2, 3]  # a2 before a10
    assert indices_seen(read_small(image_folder, n_sample_frames=2, sample_frame_rate=3)) == [0, 3]


def test_equal_numbers_are_ordered_by_name(tmp_path):
    for name, frame in zip(["01.png", "1.png", "001.png"], grey_ramp(3), strict=True):
        write_image(tmp_path / name, frame)
    assert indices_seen(read_small(tmp_path, n_sample_frames=3)) == [2, 0, 1]


def test_stretch_keeps_the_borders_and_crop_takes_the_centre(tmp_path):
    image = np.zeros((16, 64, 3), np.uint8)
    image[:, 24:40] = 255  # The middle square of a wide image is white.
    write_image(tmp_path / "0.png", image)
    square = partial(read_frames, tmp_path, n_sample_frames=1, width=16, height=16)
    assert square(fit="crop").min() == 255
    [stretched] = square(fit="stretch")
    assert stretched[:, :5].max() == stretched[:, 11:].max() == 0
    assert stretched[:, 7:9].min() == 255


def test_frames_of_the_wanted_size_are_not_resampled(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    write_image(tmp_path / "0.png", image)
    np.testing.assert_array_equal(read_small(tmp_path, n_sample_frames=1), image[None])


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        pytest.param("L", 90, ".png", (90, 90, 90), id="grey"),
        pytest.param("1", 1, ".png", (255, 255, 255), id="black and white"),
        pytest.param("I;16", 90 * 256, ".png", (90, 90, 90), id="16-bit grey"),
        pytest.param("LA", (90, 255), ".png", (90, 90, 90), id="opaque grey"),
        pytest.param("RGBA", (10, 20, 30, 255), ".webp", (10, 20, 30), id="opaque colour"),
        pytest.param("RGBA", (10, 20, 30, 0), ".png", (255, 255, 255), id="transparent is white"),
        pytest.param("CMYK", (0, 255, 255, 0), ".jpg", (255, 0, 0), id="print colours"),
    ],
)
def test_images_of_any_mode_become_rgb(tmp_path, mode, colour, suffix, expected):
    Image.new(mode, (24, 16), colour).save(tmp_path / f"0{suffix}", lossless=True)
    [frame] = read_small(tmp_path, n_sample_frames=1)
    np.testing.assert_allclose(frame.reshape(-1, 3), [expected] * (16 * 24), atol=LOSSY)


def test_a_palette_with_a_transparent_colour_becomes_rgb(tmp_path):
    image = Image.new("P", (24, 16), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "0.png", transparency=b"\x00\xff")
    [frame] = read_small(tmp_path, n_sample_frames=1)
    assert (frame == (10, 20, 30)).all()


def test_photographs_are_turned_upright(tmp_path):
    image = Image.new("RGB", (24, 16), "black")
    image.paste("white", (0, 0, 12, 16))  # The left half, which is the top once turned.
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be shown turned by 90 degrees clockwise.
    image.save(tmp_path / "0.png", exif=exif)
    [frame] = read_frames(tmp_path, n_sample_frames=1, width=16, height=24)
    assert frame[:12].min() == 255
    assert frame[12:].max() == 0


def test_images_of_another_size_are_named(image_folder):
    write_image(image_folder / "a3.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"most are 48x32, not a3\.png \(8x8\)$"):
        read_small(image_folder)
    for i in range(20, 29):
        write_image(image_folder / f"a{i}.png", np.zeros((32, 48, 3), np.uint8))
    for i in range(30, 37):
        write_image(image_folder / f"a{i}.png", np.zeros((4, i, 3), np.uint8))
    with pytest.raises(ValueError, match=r"a3\.png \(8x8\), a30\.png \(30x4\).* and 3 more$"):
        read_small(image_folder)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=r"no images in this folder; expected \.png"):
        read_small(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda png: b"no image", id="text"),
        pytest.param(lambda png: png[: len(png) // 2], id="cut short"),
        pytest.param(lambda png: b"?".join(png.rsplit(b"IDAT", 1)), id="a chunk of no kind"),
    ],
)
def test_a_damaged_image_is_named(tmp_path, damage):
    path = tmp_path / "0.png"  # Large enough for several chunks of data.
    write_image(path, np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"0\.png: not a readable image; replace or remove"):
        read_small(tmp_path, n_sample_frames=1)


# --- pixel values


def test_pixel_values_span_minus_one_to_one_and_come_back_exactly():
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 2, 8, 16, 3)
    pixel_values = to_pixel_values(frames)
    assert pixel_values.dtype == np.float32
    assert pixel_values.min() == -1
    assert pixel_values.max() == 1
    np.testing.assert_array_equal(to_frames(pixel_values), frames)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(-3.0, 0), (3.0, 255), (np.inf, 255), (0.1 / 127.5 - 1, 0), (0.9 / 127.5 - 1, 1)],
)
def test_to_frames_clips_and_rounds(value, expected):
    assert (to_frames(np.full((2, 4, 4, 3), value, np.float32)) == expected).all()


def test_to_frames_refuses_nan():
    pixel_values = np.zeros((1, 2, 2, 3), np.float32)
    pixel_values[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="3 of 12 are NaN; try"):
        to_frames(pixel_values)


# --- writing


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "A.GIF"])
def test_a_written_video_reads_back(tmp_path, name):
    path = tmp_path / "new" / "folders" / name
    frames = grey_ramp(7, height=16, width=24)
    write_video(path, frames, fps=5)
    np.testing.assert_allclose(read_small(path, n_sample_frames=7), frames, atol=LOSSY)
    assert [file.name for file in path.parent.iterdir()] == [name]
    assert read_clip(path, n_sample_frames=7, width=24, height=16).fps == 5


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_colours_survive(tmp_path, suffix):
    frames = np.empty((2, 16, 48, 3), np.uint8)
    frames[:, :, :16], frames[:, :, 16:32], frames[:, :, 32:] = (
        (200, 30, 60),
        (20, 160, 90),
        (40, 60, 220),
    )
    path = tmp_path / f"a{suffix}"
    write_video(path, frames)
    middles = read_frames(path, n_sample_frames=2, width=48, height=16)[:, 8, 8::16]
    # Limited-range YCbCr rounds each colour by up to 3 levels.
    np.testing.assert_allclose(middles, frames[:, 8, 8::16], atol=4)


def test_an_mp4_keeps_the_detail_of_a_image(tmp_path):
    coarse = np.random.default_rng(0).integers(0, 256, (2, 12, 12), np.uint8)
    smooth = [np.asarray(Image.fromarray(frame).resize((96, 96))) for frame in coarse]
    frames = np.stack(smooth)[..., None].repeat(3, axis=-1)
    write_video(tmp_path / "a.mp4", frames)
    read = read_frames(tmp_path / "a.mp4", n_sample_frames=2, width=96, height=96)
    error = np.abs(read.astype(float) - frames).mean()
    assert error < 2.5, error  # Of 255 levels: 1.9 at crf 18, 2.8 at 23, x264's default.


def test_nobody_reads_half_a_file(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, grey_ramp(2))
    old = path.read_bytes()
    with path.open("rb") as reader:
        write_video(path, grey_ramp(3))
        assert reader.read() == old
    assert path.read_bytes() != old


def test_an_mp4_of_odd_size_grows_to_one_that_browsers_play(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, grey_ramp(3, height=17, width=25))
    with av.open(str(path)) as file:
        [stream] = file.streams
        assert (stream.codec.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (26, 18)
        bt709, limited = 1, 1
        assert (stream.colorspace, stream.color_primaries, stream.color_trc) == (bt709,) * 3
        assert stream.color_range == limited
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "playing begins before the end is there"
    video = read_frames(path, n_sample_frames=3, width=26, height=18)
    assert indices_seen(video) == [0, 1, 2]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("fps", [0.117, 1, 7.493, 23.976, 29.97, 50, 60])
def test_any_rate_is_written(tmp_path, suffix, fps):
    path = tmp_path / f"a{suffix}"
    write_video(path, grey_ramp(5), fps=fps)
    read = read_clip(path, n_sample_frames=5, width=48, height=32)
    assert indices_seen(read.frames) == [0, 1, 2, 3, 4]
    # A GIF counts in hundredths of a second.
    assert 1 / read.fps == pytest.approx(1 / fps, rel=0.001, abs=0.005 if suffix == ".gif" else 0)


@pytest.mark.parametrize(
    ("suffix", "shape"),
    [
        pytest.param(".mp4", (1, 2, 20000), id="mp4 too wide for its codec"),
        pytest.param(".gif", (1, 1, 70000), id="gif too wide for its format"),
    ],
)
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, suffix, shape):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=r"a\.\w+: ffmpeg could not write it \(.+\)$"):
        write_video(path, np.zeros((*shape, 3), np.uint8))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


MANY_FRAMES = """
import signal, sys
import numpy as np
from tav_jax.video.write import write_video
signal.signal(signal.SIGTERM, lambda *_: None)
print("writes", flush=True)
write_video(sys.argv[1], np.zeros((int(sys.argv[2]), 256, 256, 3), np.uint8))
"""


@contextmanager
def writer_of_many_frames(path, count):
    """Starts a process that writes a video; gives it when it has begun the file."""
    command = [sys.executable, "-c", MANY_FRAMES, path, str(count)]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        while not list(path.parent.iterdir()) and process.poll() is None:
            time.sleep(0.01)
        yield process


def test_a_signal_to_all_processes_does_not_cut_a_video_short(tmp_path):
    path = tmp_path / "a.mp4"
    with writer_of_many_frames(path, 1000) as process:
        os.killpg(process.pid, signal.SIGTERM)
    assert list(tmp_path.iterdir()) == [path]
    assert len(read_small(path, n_sample_frames=1000)) == 1000


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_file_that_may_not_grow_is_named(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    noise = np.random.default_rng(0).integers(0, 256, (8, 256, 256, 3), np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(UserError, match=r"a\.\w+: cannot be written: File too large"):
            write_video(path, noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf"), 1e-9])
def test_a_rate_that_is_none_is_refused(tmp_path, fps):
    with pytest.raises(ValueError, match=r"a\.mp4: fps is .+; it must be above 0"):
        write_video(tmp_path / "a.mp4", grey_ramp(2), fps=fps)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_at_its_end_leaves_no_temporary_file(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(OSError, match=r"a\.mp4"):
        write_video(tmp_path / "a.mp4", grey_ramp(2))
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("folder", ["take:2", 'it\'s "so"', "100% %d", "-y", "caf\udce9", "a b\\n"])
@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_relative_path_may_hold_any_letters(tmp_path, monkeypatch, folder, suffix):
    monkeypatch.chdir(tmp_path)  # ffmpeg would take what stands before the colon for a protocol.
    path = Path(folder, f"{folder}{suffix}")
    write_video(path, grey_ramp(4))
    assert indices_seen(read_small(path)) == [0, 1, 2, 3]


def test_a_program_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "no-such-ffmpeg")
    with pytest.raises(OSError, match=r"a\.mp4: .*Program 'no-such-ffmpeg' is not found"):
        write_video(tmp_path / "a.mp4", grey_ramp(2))
    assert not list(tmp_path.iterdir())


# --- showing


def test_a_notebook_shows_the_video_that_would_be_written(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    frames = grey_ramp(3, height=17, width=25)
    show_video(frames, fps=12.5, title="<b>a & b</b>")
    [html] = shown
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in html.data
    assert 'width="25" height="17"' in html.data
    path = tmp_path / "shown.mp4"
    path.write_bytes(base64.b64decode(re.search(r"base64,([^\"]+)", html.data)[1]))
    clip = read_clip(path, n_sample_frames=3, width=26, height=18)
    assert (indices_seen(clip.frames), clip.fps) == ([0, 1, 2], 12.5)


def test_a_written_image_reads_back_and_a_failing_one_leaves_the_old(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = tmp_path / "new" / "a.png"
    write_image(path, image)
    with pytest.raises(ValueError, match=r"a\.png: an image of 7x0 cannot be written"):
        write_image(path, image[:0])
    with pytest.raises(ValueError, match=r"unknown file extension: \.what"):
        write_image(path.with_suffix(".what"), image)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [("a.avi", 1, r"written as \.mp4 or \.gif, not '\.avi'"), ("a.mp4", 0, "no frames to write")],
)
def test_writing_refuses(tmp_path, name, length, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, np.zeros((length, 16, 16, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_floats_are_not_written_as_frames(tmp_path):
    # Our own TypeError, or that of the type checker where the tests switch it on.
    with pytest.raises(TypeError, match=r"(?i)uint8"):
        write_video(tmp_path / "a.mp4", np.zeros((1, 16, 16, 3), np.float32))
    with pytest.raises(TypeError, match=r"(?i)uint8"):
        write_image(tmp_path / "a.png", np.zeros((16, 16, 3), np.float32))


# --- images of several videos


def test_side_by_side_joins_left_to_right():
    source, edit = grey_ramp(3, 16, 24), 255 - grey_ramp(3, 16, 8)
    joined = side_by_side(source, edit)
    np.testing.assert_array_equal(joined[:, :, :24], source)
    np.testing.assert_array_equal(joined[:, :, 24:], edit)


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        pytest.param([(3, 16), (2, 16)], "3 frames of height 16, 2 frames of", id="frames"),
        pytest.param([(3, 16), (3, 8)], "of height 16, 3 frames of height 8", id="height"),
        pytest.param([], "not none", id="none"),
    ],
)
def test_side_by_side_refuses_videos_that_do_not_fit(videos, message):
    with pytest.raises(ValueError, match=message):
        side_by_side(*(grey_ramp(length, height) for length, height in videos))


def bands(sheet):
    """Heights of the alternating strips, labels first, that a sheet of black frames is made of."""
    is_image = (sheet[:, :, 0] < 5).mean(axis=1) > 0.5
    edges = np.flatnonzero(np.diff(is_image)) + 1
    return np.diff(np.concatenate([[0], edges, [len(sheet)]])).tolist()


def test_a_contact_sheet_has_a_labelled_row_for_each_video():
    black = np.zeros((3, 96, 128, 3), np.uint8)
    sheet = contact_sheet({"source: a man is skiing": black, "Spider Man": black})
    label, image, between, second_image, below = bands(sheet)
    assert image == second_image == 96
    assert between == label + below
    assert (sheet[:label].min(axis=(1, 2)) < 100).any(), "there is text above the row"
    second = sheet[label + 96 + below :]
    inked = [
        np.flatnonzero((strip[:label] < 100).any(axis=(0, 2)))[-1] for strip in (sheet, second)
    ]
    assert inked[0] > inked[1], "the longer label takes more room"
    columns = (sheet[label + 48, :, 0] < 5).astype(int)
    assert columns.sum() == 3 * 128
    assert (np.diff(columns) == 1).sum() == 3, "white between the frames"


@pytest.mark.parametrize(
    ("length", "columns", "expected"),
    [
        pytest.param(24, 8, [0, 3, 7, 10, 13, 16, 20, 23], id="evenly"),
        pytest.param(3, 8, [0, 1, 2], id="fewer frames than columns"),
        pytest.param(24, 1, [0], id="one column"),
    ],
)
def test_a_contact_sheet_shows_frames_evenly_chosen(length, columns, expected):
    sheet = contact_sheet({"": grey_ramp(length, 96, 96)}, columns=columns)
    gap = 4
    tiles = [sheet[-gap - 96 : -gap, gap + i * 100 :][:, :96] for i in range(len(expected))]
    assert sheet.shape[1] == gap + len(expected) * 100
    assert indices_seen(np.stack(tiles)) == expected


def test_small_frames_are_enlarged_without_blur():
    frames = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), np.uint8)
    sheet = contact_sheet({"tiny": frames})  # 96 / 20, rounded up, is 5.
    tile = sheet[-4 - 100 : -4, 4 : 4 + 120]
    np.testing.assert_array_equal(tile, np.kron(frames[0], np.ones((5, 5, 1), np.uint8)))


@pytest.mark.parametrize(
    "label",
    [
        pytest.param("人在滑雪 🎿", id="chinese and a symbol"),
        pytest.param("رجل يتزلج", id="arabic"),
        pytest.param("a\nb\tc", id="line break"),
        pytest.param("", id="empty"),
        pytest.param("word " * 2000, id="long"),
        pytest.param("人" * 300, id="long without spaces"),
    ],
)
def test_any_label_fits_its_row(label):
    black = np.zeros((2, 64, 64, 3), np.uint8)
    sheet = contact_sheet({label: black})
    assert sheet.shape == contact_sheet({"short": black}).shape
    assert (sheet[:, -4:] == 255).all(), "nothing reaches into the margin"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("café", "cafe", id="accents"),
        pytest.param("кот", "кит", id="cyrillic"),
        pytest.param("Ελλάδα", "Ελλαδα", id="greek"),
    ],
)
def test_letters_outside_ascii_are_drawn(one, other):
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    assert (contact_sheet({one: frames}) != contact_sheet({other: frames})).any()


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        pytest.param({}, 8, "needs rows of one frame size", id="no rows"),
        pytest.param({"a": 16, "b": 24}, 8, "not {'a': '48x16', 'b': '48x24'}", id="sizes"),
        pytest.param({"a": 16}, 0, "columns >= 1, not .*, 0$", id="no columns"),
    ],
)
def test_a_contact_sheet_refuses(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet({label: grey_ramp(2, height) for label, height in rows.items()}, columns)


# --- file names


@pytest.mark.parametrize(
    "prompt",
    [
        "a man is skiing",
        "Spider-Man, cartoon style!",
        "人在滑雪",
        "un café",
        "v1.5 (new)",
        "x" * 120,
    ],
)
def test_a_prompt_that_can_be_a_file_name_is_one(prompt):
    assert file_stem(prompt) == prompt


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        pytest.param("a/b\\c", r"a_b_c-[0-9a-f]{8}", id="separators"),
        pytest.param('is it? <"so">: a|b*', r"is it_ __so___ a_b_-[0-9a-f]{8}", id="windows"),
        pytest.param("a\nb\0c", r"a_b_c-[0-9a-f]{8}", id="control characters"),
        pytest.param("a man is skiing. ", r"a man is skiing-[0-9a-f]{8}", id="trailing dot"),
        pytest.param("..", r"prompt-[0-9a-f]{8}", id="parent folder"),
        pytest.param("", r"prompt-[0-9a-f]{8}", id="empty"),
        pytest.param("nul", r"_nul-[0-9a-f]{8}", id="device"),
        pytest.param("Com1.old.txt", r"_Com1\.old\.txt-[0-9a-f]{8}", id="device with a suffix"),
        pytest.param("caf\udce9", r"caf_-[0-9a-f]{8}", id="undecodable argument"),
        pytest.param("word " * 60, r"(word )+w?o?r?d?-[0-9a-f]{8}", id="long"),
        pytest.param("雪" * 99, r"雪{37}-[0-9a-f]{8}", id="long, three bytes a letter"),
    ],
)
def test_other_prompts_stay_readable_and_get_a_hash(tmp_path, prompt, expected):
    stem = file_stem(prompt)
    assert stem == file_stem(prompt)
    assert len(stem.encode()) <= 120
    (tmp_path / f"{stem}.mp4").touch()

    assert re.fullmatch(expected, stem)


@pytest.mark.parametrize(
    "prompts",
    [
        pytest.param(["a/b", "a:b", "a_b"], id="refused characters"),
        pytest.param(["a", "a.", "a ", " a", ". a"], id="dots and spaces"),
        pytest.param(["", ".", " "], id="nothing left"),
        pytest.param(["x" * 121, "x" * 122, "x" * 120], id="cut"),
        pytest.param(["caf\u00e9", "cafe\u0301"], id="one letter written in two ways"),
    ],
)
def test_different_prompts_get_different_names(prompts):
    assert len({file_stem(prompt) for prompt in prompts}) == len(prompts)
