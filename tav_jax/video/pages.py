"""Pages that need no other file and no network: their videos are in them, as data URLs."""

import base64
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tav_jax.errors import UserError
from tav_jax.files import atomic_write
from tav_jax.text import shorten
from tav_jax.video.read import read_all_frames
from tav_jax.video.write import write_video

# Plays several videos together; pages have it at this mark.
PLAYER = Path(__file__).with_name("together.js")
PLAYER_MARK = "/*together*/"

MIME = {".mp4": "video/mp4", ".gif": "image/gif"}


class Quality(NamedTuple):
    """How videos are encoded again to make them smaller.

    Args:
        divisor: Sides are divided by it.
        crf: See `write_video`.
        share: About what share of the bytes of a video written by `write_video` it leaves. Six
            more of the CRF halve a video, by x264's guide.
    """

    divisor: int
    crf: int
    share: float

    def __str__(self) -> str:
        size = {1: "in full size", 2: "in half size", 4: "in quarter size"}[self.divisor]
        return f"{size} with a CRF of {self.crf}"


QUALITIES = (
    Quality(1, 24, 0.5),
    Quality(1, 30, 0.25),
    Quality(2, 26, 0.13),
    Quality(2, 32, 0.06),
    Quality(4, 30, 0.025),
    Quality(4, 38, 0.01),
)


def data_url(video: Path, fps: float, kinds: Sequence[str] = (".mp4", ".gif")) -> str:
    """Return a video that browsers play, as the text of a URL.

    Args:
        video: A video file or a folder of images.
        fps: The rate of what is encoded here.
        kinds: Suffixes of files that are taken as they are.

    Raises:
        UserError: It cannot be read.
    """
    suffix = video.suffix.lower()
    if suffix in kinds and video.is_file():
        return _url(video.read_bytes(), suffix)
    return encode_url(read_all_frames(video), fps)


def encode_url(
    frames: UInt8[np.ndarray, "f H W 3"], fps: float, quality: Quality | None = None
) -> str:
    """Return frames as an mp4 that browsers play, as the text of a URL."""
    crf = {} if quality is None else {"crf": quality.crf}
    if quality is not None and quality.divisor > 1:
        frames = np.stack([np.asarray(Image.fromarray(f).reduce(quality.divisor)) for f in frames])
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "video.mp4"
        write_video(made, frames, fps=fps, **crf)
        return _url(made.read_bytes(), ".mp4")


def _url(content: bytes, suffix: str) -> str:
    return f"data:{MIME[suffix]};base64,{base64.b64encode(content).decode()}"


class Source(NamedTuple):
    """A video that a page is to have: a file, or frames.

    Args:
        path: The file.
        frames: The frames, if there is no file.
        fps: The rate of the frames, and of what is encoded again.
    """

    path: Path | None
    frames: UInt8[np.ndarray, "f H W 3"] | None
    fps: float

    def as_it_is(self) -> str:
        """Return it as an mp4's URL, which a file of another kind and frames become."""
        if self.path is not None:
            return data_url(self.path, self.fps, (".mp4",))
        return encode_url(self.all_frames(), self.fps)

    def all_frames(self) -> UInt8[np.ndarray, "f H W 3"]:
        """Return its frames."""
        if self.path is not None:
            return read_all_frames(self.path)
        assert self.frames is not None
        return self.frames


class Embedded(NamedTuple):
    """A video of a page: its URL, or the reason why the page has none."""

    url: str | None
    reason: str = ""


NO_ROOM = "left out: the page would be too large"


def embed_videos(videos: Sequence[Source], most: int) -> tuple[list[Embedded], str]:
    """Return videos as URLs of at most so many characters in all, and a note for the page.

    If they are too large, they are encoded again, smaller and smaller. What does not fit in the
    lowest quality either is left out from the end, and the note says so.
    """
    as_they_are = _embed(videos, most, Source.as_it_is)
    if as_they_are.fit:
        return as_they_are.videos, ""
    total = as_they_are.characters
    for quality in QUALITIES:
        if quality.share * total > most and quality is not QUALITIES[-1]:
            continue

        def again(video: Source, quality: Quality = quality) -> str:
            return encode_url(video.all_frames(), video.fps, quality)

        made = _embed(videos, most, again)
        if made.fit:
            return made.videos, f"To keep the page small, its videos are encoded again {quality}."
    left_out = sum(video.reason == NO_ROOM for video in made.videos)
    return made.videos, (
        f"To keep the page small, its videos are encoded again {quality}, and {left_out} of "
        f"{len(videos)} are left out."
    )


class _Attempt(NamedTuple):
    videos: list[Embedded]
    fit: bool
    characters: float  # of all; estimated from files once they do not fit


def _embed(videos: Sequence[Source], most: int, make: Callable[[Source], str]) -> _Attempt:
    made: list[Embedded] = []
    characters, fit = 0.0, True
    for video in videos:
        if not fit:  # the rest need not be made
            size = video.path.stat().st_size if video.path else video.all_frames().nbytes / 50
            characters += size * 4 / 3
            made.append(Embedded(None, NO_ROOM))
            continue
        try:
            url = make(video)
        except (UserError, OSError) as error:
            made.append(Embedded(None, f"cannot be read: {shorten(str(error))}"))
            continue
        characters += len(url)
        fit = characters <= most
        made.append(Embedded(url) if fit else Embedded(None, NO_ROOM))
    return _Attempt(made, fit, characters)


def fill_page(template: Path, parts: Mapping[str, str]) -> str:
    """Return a page's template with each mark replaced, and with the player if it has its mark.

    Args:
        template: The HTML file.
        parts: What to put in the place of each mark. A mark within a part stays as it is.
    """
    parts = {PLAYER_MARK: PLAYER.read_text(encoding="utf-8"), **parts}
    marks = re.compile("|".join(map(re.escape, parts)))
    return marks.sub(lambda found: parts[found.group()], template.read_text(encoding="utf-8"))


def write_page(path: Path, text: str) -> None:
    """Write a page atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
