"""Pages: their charts, their videos, and texts that stay texts."""

import base64
import re
from html.parser import HTMLParser
from xml.etree.ElementTree import tostring

import numpy as np
import pytest

from tav_jax.errors import UserError
from tav_jax.runs.charts import MOST_POINTS, Line, line_chart, running_mean, thin, ticks
from tav_jax.runs.report_page import element, require_ours
from tav_jax.video.pages import NO_ROOM, QUALITIES, Source, embed_videos, encode_url, fill_page
from tav_jax.video.read import read_all_frames
from tav_jax.video.write import write_video


def frames_of(url, tmp_path):
    kind, content = url.split(",", 1)
    assert kind == "data:video/mp4;base64"
    file = tmp_path / "decoded.mp4"
    file.write_bytes(base64.b64decode(content))
    return read_all_frames(file)


@pytest.fixture
def noise():
    """Frames that cannot be compressed well."""
    return np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), np.uint8)


# Charts.


def test_a_running_mean_is_that_of_the_values_around_each():
    values = np.random.default_rng(0).random(100)
    mean, count = running_mean(values)
    assert count == 2 * 2 + 1, "5 % of a hundred, to both sides"
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(100)]
    np.testing.assert_allclose(mean, expected, rtol=1e-12)
    np.testing.assert_allclose(running_mean(values[:1])[0], values[:1])


def test_a_long_line_keeps_its_highest_and_lowest_values():
    values = np.random.default_rng(0).random(12_345)
    values[[3, 6000, 12_344]] = 9, -9, 5
    line = thin(Line(np.arange(12_345), values, "c0"))
    assert len(line.steps) <= MOST_POINTS
    assert (np.diff(line.steps) > 0).all()
    assert {9, -9, 5} <= set(line.values)
    np.testing.assert_array_equal(line.values, values[line.steps])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.0, 0.0021, [0, 0.0005, 0.001, 0.0015, 0.002]),
        (1.0, 150.0, [50, 100, 150]),
        (1.0, 6.0, [1, 2, 3, 4, 5, 6]),
        (7.0, 7.0, [7]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_a_chart_has_its_lines_within_its_frame():
    steps, values = np.arange(1.0, 51.0), np.linspace(0.5, 0.1, 50)
    text = tostring(line_chart("loss", [Line(steps, values, "c0")]), "unicode")
    points = re.search(r'points="([^"]+)"', text)[1]
    x, y = np.array([[float(n) for n in point.split(",")] for point in points.split()]).T
    assert (np.diff(x) > 0).all()
    assert (np.diff(y) > 0).all(), "less is lower, and y goes down"
    assert x.min() >= 0 and x.max() <= 420 and y.min() >= 0 and y.max() <= 220  # noqa: PT018
    one = tostring(line_chart("loss", [Line(steps[:1], values[:1] * 0, "c0")]), "unicode")
    assert "<circle" in one
    assert "nan" not in one


# Texts.


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "</title></main><b>",
        "a &amp; b & c",
        "/*together*/ <!--content-->",
        "x" * 10_000,
        "émoji 🎿 and 滑雪",
    ],
)
def test_a_text_stays_a_text_in_an_element_and_in_an_attribute(text):
    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.tags, self.said = [], ""

        def handle_starttag(self, tag, attributes):
            self.tags.append((tag, dict(attributes)))

        def handle_data(self, data):
            self.said += data

    reader = Reader()
    reader.feed(tostring(element("p", text, title=text), "unicode", method="html"))
    reader.close()
    assert reader.tags == [("p", {"title": text})]
    assert reader.said == text


def test_what_turns_text_around_is_written_as_an_escape():
    assert element("p", "a \u202eb").text == "a \\u202eb"


def test_a_mark_within_a_part_is_not_filled_in(tmp_path):
    template = tmp_path / "page.html"
    template.write_text("<1> <2>")
    assert fill_page(template, {"<1>": "<2>", "<2>": "two <1>"}) == "<2> two <1>"


def test_only_our_own_pages_are_replaced(tmp_path):
    page = tmp_path / "page.html"
    require_ours(page)
    page.write_text("<!doctype html><p>my thesis")
    with pytest.raises(UserError, match=r"page\.html: it is there already and no report"):
        require_ours(page)
    page.write_text('<!doctype html>\n<meta name="generator" content="tav_jax.report">')
    require_ours(page)
    with pytest.raises(UserError, match="no report of a run"):
        require_ours(tmp_path)


# Videos.


def test_videos_that_fit_are_as_they_are(noise, tmp_path):
    file, animation = tmp_path / "a.mp4", tmp_path / "b.gif"
    write_video(file, noise, fps=4)
    write_video(animation, noise, fps=4)
    sources = [Source(None, noise, 4.0), Source(file, None, 4.0), Source(animation, None, 4.0)]
    videos, note = embed_videos(sources, 10_000_000)
    assert note == ""
    assert base64.b64decode(videos[1].url.split(",")[1]) == file.read_bytes()
    for video in videos:
        assert frames_of(video.url, tmp_path).shape == noise.shape


@pytest.mark.parametrize("share", [0.7, 0.2])
def test_videos_that_do_not_fit_are_encoded_again_and_the_note_says_so(share, noise, tmp_path):
    sources = [Source(None, noise, 4.0)] * 2
    whole, _ = embed_videos(sources, 10_000_000)
    most = int(share * sum(len(video.url) for video in whole))
    videos, note = embed_videos(sources, most)
    assert sum(len(video.url) for video in videos) <= most
    assert re.match(r"To keep the page small, its videos are encoded again in \w+ size", note)
    assert len(frames_of(videos[1].url, tmp_path)) == 4


def test_what_fits_in_no_quality_is_left_out_from_the_end_and_the_note_says_so(noise):
    least = len(encode_url(noise, 4.0, QUALITIES[-1]))
    videos, note = embed_videos([Source(None, noise, 4.0)] * 3, 2 * least)
    assert [video.url is not None for video in videos] == [True, True, False]
    assert videos[2].reason == NO_ROOM
    assert note.endswith("and 1 of 3 are left out.")
    assert embed_videos([Source(None, noise, 4.0)], -1)[0][0].reason == NO_ROOM


def test_a_video_that_cannot_be_read_is_named_and_the_others_are_there(noise, tmp_path):
    damaged = tmp_path / "damaged.gif"
    damaged.write_bytes(b"GIF89a and nothing else")
    gone = Source(tmp_path / "gone.mp4", None, 4.0)
    videos, note = embed_videos([Source(damaged, None, 4.0), gone, Source(None, noise, 4.0)], 10**7)
    assert [video.url is not None for video in videos] == [False, False, True]
    assert "damaged.gif" in videos[0].reason
    assert "gone.mp4" in videos[1].reason
    assert note == ""
