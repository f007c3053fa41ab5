"""mediapy with an ffmpeg that comes from PyPI, so that the machine needs none of its own."""

from functools import cache
from types import ModuleType


@cache
def load_mediapy() -> ModuleType:
    """Import mediapy and point it at the bundled ffmpeg.

    Imported at its first use, because mediapy brings matplotlib and IPython. imageio-ffmpeg stays
    at 0.7.0: mediapy 1.2.7 passes `-vsync`, which the ffmpeg of imageio-ffmpeg 0.8 refuses.
    """
    import imageio_ffmpeg
    import mediapy

    mediapy.set_ffmpeg(imageio_ffmpeg.get_ffmpeg_exe())
    return mediapy
