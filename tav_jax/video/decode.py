"""Read frames from video files with PyAV, which brings FFmpeg's libraries."""

import struct
import sys
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.stream import Discard, Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image

from tav_jax.errors import UserError
from tav_jax.video.colour import hdr_curve, to_image, unread_matrix
from tav_jax.video.images import MAX_PIXELS, Choose, Resize, refuse_large

# FFmpeg's demuxers of video files. It has others that read text as pictures, follow playlists to
# other files and addresses, or open devices.
FORMATS = (
    *("mov", "matroska", "avi", "mpeg", "mpegts", "mpegvideo", "ogg", "flv", "asf", "mxf", "dv"),
    *("rm", "nut", "ivf", "h264", "hevc", "obu", "m4v", "mjpeg", "jpeg_pipe", "yuv4mpegpipe"),
)

# Frames up to here are simply decoded from the start on. For others the file is searched for the
# times of its frames, and decoding begins at the keyframe before each.
FEW_FRAMES = 256

# Whose transparency in a WebM is a second stream of pictures, in side data of the packets. FFmpeg's
# decoders leave it to their caller. libvpx reads it, but has no limit of a frame's size.
CODECS_WITH_ALPHA_APART = ("vp8", "vp9")

# A decoder holds five frames or so from which it predicts others, and one for each thread that
# decodes a frame in advance. Where no frame depends on another it holds one or two.
MOST_FRAME_BYTES = 144_000_000
MOST_INTRA_FRAME_BYTES = 2 * MOST_FRAME_BYTES
THREADS = 4

# In which a stream of unknown size must show its first frame: minutes of video.
MOST_PACKETS = 10_000


# PyAV 18 raises UnicodeDecodeError for tags that are not UTF-8; 19 takes them, and no argument.
_ANY_ENCODING: Any = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)


class _NotAsIndexedError(Exception):
    """Decoding gave other frames than the file's packets promise."""


class _Index(NamedTuple):
    """Times of a clip's frames, and of its keyframes, in the order in which they are shown."""

    times: list[int]
    keyframes: list[int]


def read_video(
    path: Path, choose: Choose, resize: Resize, *, from_start: bool
) -> tuple[list[np.ndarray], float | None]:
    """Return frames of a video file in the order in which they are shown, and the clip's rate.

    Args:
        path: A regular file.
        choose: See `images.Choose`.
        resize: See `images.Resize`.
        from_start: The wanted frames are the same for every length of the clip, and near its start.

    Raises:
        UserError: The file holds no video that can be read, or there are too few frames.
    """
    if from_start:
        wanted = choose(sys.maxsize)
    else:
        with _open(path) as video:
            index = video.find_times()
        if index is not None:
            wanted = choose(len(index.times))
            with suppress(_NotAsIndexedError), _open(path) as video:
                return video.read_by_time(wanted, index, resize), video.rate(wanted)
        with _open(path) as video:
            length = sum(1 for _ in video.decode())
        if not length:
            raise _no_frame(path)
        wanted = choose(length)
    with _open(path) as video:
        frames, seen = [], 0
        for seen, frame in enumerate(islice(video.decode(), wanted[-1] + 1), start=1):
            if seen - 1 in wanted:
                frames.append(video.convert(frame, resize))
        if not seen:
            raise _no_frame(path)
        video.warn_of_damage()
        if len(frames) < len(wanted):
            choose(seen)
        return frames, video.rate(wanted)


@contextmanager
def _open(path: Path) -> Iterator["_Video"]:
    """Open a file, and report FFmpeg's errors as the user's."""
    try:
        _require_small_frames(path)
        with _open_container(path) as container:
            yield _Video(path, container)
    except av.FFmpegError as error:
        raise UserError(
            f"{path}: no video can be read from it ({error.strerror}); "
            "give an mp4, mov, mkv, webm, avi or gif, or a folder of images"
        ) from None


def _open_container(path: Path, **options: str) -> av.container.InputContainer:
    return av.open(
        f"file:{path.absolute()}",  # FFmpeg takes `take:2.mp4` for a protocol
        container_options={"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
        | options,
        options={"max_pixels": str(MAX_PIXELS)},
        **_ANY_ENCODING,
    )


def _require_small_frames(path: Path) -> None:
    """Raise `UserError` for large frames in a file that does not list its streams in its header.

    FFmpeg decodes a frame of each such stream when it opens the file, and `max_pixels` does not
    reach it there. So the file is first opened with no decoder but ours.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if start[4:] == b"ftyp" or start[:4] in (b"\x1aE\xdf\xa3", b"RIFF"):
        return
    with _open_container(path, codec_whitelist="none") as container:
        unknown = []
        for stream in container.streams.video:
            if stream.codec_context is None:
                continue
            refuse_large(path, stream.width, stream.height, MAX_PIXELS)
            if not stream.width:
                stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
                unknown.append(stream)
        for packet in islice(container.demux(unknown), MOST_PACKETS) if unknown else ():
            if packet.stream in unknown:
                with suppress(av.FFmpegError, ValueError):
                    if packet.decode():
                        unknown.remove(packet.stream)
            if not unknown:
                break
        if unknown:
            raise _no_frame(path)


class _Video:
    """An open video file."""

    def __init__(self, path: Path, container: av.container.InputContainer):
        shown = [
            stream
            for stream in container.streams.video
            if not stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails)
        ]
        if not shown:
            raise UserError(f"{path}: there is no video in it; give another file")
        self.path = path
        self.container = container
        self.stream = stream = shown[0]
        if stream.codec_context is None:
            raise UserError(f"{path}: its video codec is unknown; convert it to an mp4")
        if not stream.width:  # FFmpeg drops a size over `max_pixels`
            raise _no_frame(path)
        refuse_large(path, stream.width, stream.height, MAX_PIXELS)
        self.decoder = stream.codec_context
        # A stream that was copied from one file to another may have them in capitals.
        self.tags = {name.lower(): value for name, value in stream.metadata.items()}
        self.alpha: av.VideoCodecContext | None = None
        if self.tags.get("alpha_mode") == "1" and self.decoder.name in CODECS_WITH_ALPHA_APART:
            alpha = av.CodecContext.create(self.decoder.name, "r")
            assert isinstance(alpha, av.VideoCodecContext)
            self.alpha = alpha
        most = _most_pixels(self.decoder, pictures=1 if self.alpha is None else 2)
        refuse_large(path, stream.width, stream.height, most)
        # Threads that decode a frame each wait for one another for ever in some damaged HEVC, and
        # give a packet's frame later, when its transparency is gone.
        frame_threads = (
            stream.width * stream.height * THREADS <= most
            and self.alpha is None
            and self.decoder.name != "hevc"
        )
        for decoder in filter(None, (self.decoder, self.alpha)):
            # Also for frames that grow against the header.
            decoder.options = {"max_pixels": str(most // THREADS if frame_threads else most)}
            decoder.thread_type = "AUTO" if frame_threads else "SLICE"
            decoder.thread_count = THREADS
        self.reformatter = VideoReformatter()
        self.damaged = 0
        self.is_hdr = False
        self.times: list[float | None] = []  # of converted frames, in seconds
        for other in container.streams:
            if other is not stream:
                other.discard = Discard["all"]

    def rate(self, wanted: Sequence[int]) -> float | None:
        """Return the frames per second between the converted frames, or None if it is unknown."""
        # FFmpeg gives a clock's frequency where it knows no better.
        rates = (self.stream.average_rate, self.stream.guessed_rate)
        named = next((float(rate) for rate in rates if rate and rate <= 1000), None)
        first, last = self.times[0], self.times[-1]
        if first is None or last is None or last <= first:
            return named
        measured = (wanted[-1] - wanted[0]) / (last - first)
        # Times are rounded, to milliseconds in Matroska. In clips of variable rate they count.
        return named if named and abs(measured / named - 1) < 0.02 else measured

    def find_times(self) -> _Index | None:
        """Return the times of all frames, found without decoding, or None if that is not exact."""
        # Some packets of VP8 hold no frame that is shown. In other containers some hold half a
        # frame, or have no time.
        if self.decoder.name == "vp8" or not self.container.format.name.startswith(
            ("mov", "matroska")
        ):
            return None
        times: list[int] = []
        keyframes: list[int] = []
        try:
            for packet in self.container.demux(self.stream):
                if packet.size and not packet.is_discard:
                    if packet.pts is None:
                        return None
                    times.append(packet.pts)
                    if packet.is_keyframe:
                        keyframes.append(packet.pts)
        except av.InvalidDataError:
            return None
        # Frames that are shown before the first keyframe may be left out by the decoder.
        if not times or keyframes[:1] != [min(times)] or len(set(times)) < len(times):
            return None
        return _Index(sorted(times), sorted(keyframes))

    def read_by_time(
        self, wanted: Sequence[int], index: _Index, resize: Resize
    ) -> list[np.ndarray]:
        """Return the wanted frames; decoding begins at the keyframe before each.

        Raises:
            _NotAsIndexedError: What is decoded does not agree with the index.
        """
        frames = []
        decoded: Iterator[av.VideoFrame] = iter(())
        frame: av.VideoFrame | None = None
        position = -1  # of the last decoded frame
        for target in wanted:
            time = index.times[target]
            keyframe = index.keyframes[bisect_right(index.keyframes, time) - 1]
            if bisect_left(index.times, keyframe) > position:
                try:
                    self.container.seek(keyframe, stream=self.stream)
                except av.FFmpegError:
                    raise _NotAsIndexedError from None
                if self.alpha is not None:  # PyAV knows of the stream's own decoder only
                    self.alpha.flush_buffers()
                decoded = self.decode()
                position = -1
            while position < target:
                frame = next(decoded, None)
                if frame is None or frame.pts is None or self.damaged:
                    raise _NotAsIndexedError
                # A seek may end at an earlier keyframe. From there on no frame may be missing.
                position = bisect_left(index.times, frame.pts) if position < 0 else position + 1
                if position > target or index.times[position] != frame.pts:
                    raise _NotAsIndexedError
            assert frame is not None
            frames.append(self.convert(frame, resize))
        return frames

    def decode(self) -> Iterator[av.VideoFrame]:
        """Yield frames in the order in which they are shown; skip what is damaged, as players."""
        for packet in self._packets():
            frames = self._decode_packet(self.decoder, packet)
            if self.alpha is not None and (alpha_packet := _alpha_packet(packet)):
                alphas = self._decode_packet(self.alpha, alpha_packet)
                if list(map(_size, frames)) != list(map(_size, alphas)):
                    self.damaged += 1
                    continue
                for frame, alpha in zip(frames, alphas, strict=True):
                    frame.opaque = alpha  # see `to_image`
            yield from frames

    def _decode_packet(
        self, decoder: av.VideoCodecContext, packet: av.Packet | None
    ) -> list[av.VideoFrame]:
        try:
            return decoder.decode(packet)
        except (av.FFmpegError, ValueError):  # PyAV 19 raises ValueError if decoding never began
            self.damaged += 1
            return []

    def _packets(self) -> Iterator[av.Packet | None]:
        try:
            yield from self.container.demux(self.stream)
        except av.InvalidDataError:
            self.damaged += 1
            yield None  # The decoder still holds frames.

    def convert(self, frame: av.VideoFrame, resize: Resize) -> np.ndarray:
        """Return a frame as it is shown: in sRGB, upright, with square pixels, and resized."""
        if (curve := hdr_curve(frame)) and not self.is_hdr:
            self.is_hdr = True
            warnings.warn(
                f"{self.path}: HDR ({curve}) is converted to SDR: 203 cd/m2 becomes white, and "
                "brighter parts are dimmed to it",
                stacklevel=2,
            )
        if matrix := unread_matrix(frame):
            raise UserError(
                f"{self.path}: its colour matrix ({matrix}) is not supported; convert it to BT.709"
            )
        self.times.append(frame.time)
        image = to_image(frame, self.reformatter)
        aspect = float(self.stream.sample_aspect_ratio or 1)
        a, b, c, d = self._orientation(frame)
        if abs(b) > abs(a):
            image = image.transpose(Image.Transpose.TRANSPOSE)
            a, d, aspect = c, b, 1 / aspect
        if a < 0:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if d < 0:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return resize(image, aspect)

    def _orientation(self, frame: av.VideoFrame) -> tuple[int, int, int, int]:
        """Return a, b, c, d: a pixel at (x, y) is shown at (a x + c y, b x + d y)."""
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
        if matrix:
            a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
            return a, b, c, d
        # Old files name the angle in a tag, in degrees clockwise.
        turns = {"90": (0, 1, -1, 0), "180": (-1, 0, 0, -1), "270": (0, -1, 1, 0)}
        return turns.get(self.tags.get("rotate", ""), (1, 0, 0, 1))

    def warn_of_damage(self) -> None:
        """Print a note if some of the file could not be decoded."""
        if self.damaged:
            warnings.warn(
                f"{self.path}: {self.damaged} damaged packets were skipped; look at the frames, "
                "or give an intact file",
                stacklevel=2,
            )


def _most_pixels(decoder: av.VideoCodecContext, pictures: int) -> int:
    """Return the pixels that a frame may have, by the bytes of each and of so many pictures."""
    most = MOST_INTRA_FRAME_BYTES if decoder.codec.intra_only else MOST_FRAME_BYTES
    bits = decoder.format.padded_bits_per_pixel if decoder.format else 8
    return min(MAX_PIXELS, 8 * most // (bits * pictures))


def _alpha_packet(packet: av.Packet | None) -> av.Packet | None:
    """Return the picture of a packet's transparency in Matroska, or None if it has none."""
    if packet is None or not packet.has_sidedata("matroska_block_additional"):
        return None
    kind_and_data = bytes(packet.get_sidedata("matroska_block_additional"))
    kind, data = kind_and_data[:8], kind_and_data[8:]
    return av.Packet(data) if int.from_bytes(kind) == 1 and data else None


def _size(frame: av.VideoFrame) -> tuple[int, int]:
    return frame.width, frame.height


def _no_frame(path: Path) -> UserError:
    return UserError(
        f"{path}: its frames are over {MAX_PIXELS // 10**6} megapixels, or the file is damaged; "
        "scale it down or give another file"
    )
