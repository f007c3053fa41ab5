"""Optical flow and EditBoard's resizing, by OpenCV of the extra `eval`.

A flow has two numbers for each pixel of a frame: how far its content moves right and down until
the next frame, in pixels. It does not depend on the number of threads. DIS of OpenCV 5 differs
from that of OpenCV 4, Farneback's flow does not.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from tav_jax.errors import UserError

EDITBOARD_SIDE = 512

# OpenCV ends the process or returns NaN for smaller frames.
MIN_DIS_SIDE = 16


def dis_flow(frames: UInt8[np.ndarray, "f H W 3"]) -> Float[np.ndarray, "f-1 H W 2"]:
    """Return the flow from each frame to the next one by dense inverse search, float32.

    Kroeger et al. 2016 (arXiv:1603.03590), preset MEDIUM. `dis_flow(frames[::-1])[::-1]` is the
    flow from each frame's successor back to it.
    """
    height, width = frames.shape[1:3]
    if min(height, width) < MIN_DIS_SIDE:
        raise UserError(
            f"optical flow needs frames of {MIN_DIS_SIDE}x{MIN_DIS_SIDE} pixels at least, "
            f"the video has {width}x{height}"
        )
    cv2 = import_opencv()
    dis = cv2.DISOpticalFlow.create(cv2.DISOpticalFlow_PRESET_MEDIUM)
    return _flow(frames, lambda frame, successor: dis.calc(frame, successor, None))


def farneback_flow(frames: UInt8[np.ndarray, "f H W 3"]) -> Float[np.ndarray, "f-1 H W 2"]:
    """Return the flow from each frame to the next one by polynomial expansion, float32.

    Farneback 2003, with EditBoard's parameters.
    """
    cv2 = import_opencv()
    return _flow(
        frames,
        lambda frame, successor: cv2.calcOpticalFlowFarneback(
            frame,
            successor,
            None,
            pyr_scale=0.5,
            levels=3,
            winsize=15,
            iterations=3,
            poly_n=5,
            poly_sigma=1.2,
            flags=0,
        ),
    )


def resize_as_editboard(
    frames: UInt8[np.ndarray, "f H W 3"],
) -> UInt8[np.ndarray, "f 512 512 3"]:
    """Return frames at 512x512, whatever their proportions, as EditBoard does for MP4 files."""
    return np.stack([_resize(frame) for frame in frames])


def resize_mask_as_editboard(mask: Bool[np.ndarray, "f H W"]) -> Bool[np.ndarray, "f 512 512"]:
    """Return masks of which no True pixel influences a False pixel of the resized frames.

    EditBoard expects masks of 512x512.
    """
    return np.stack([_resize(frame.astype(np.float32)) > 0 for frame in mask])


def grey(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W"]:
    """Return the luminance of an image."""
    cv2 = import_opencv()
    return cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)


def import_opencv() -> Any:
    """Return the module `cv2`.

    Raises:
        UserError: It is not installed, or does not work.
    """
    try:
        import cv2
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"optical flow needs OpenCV ({reason}): `pip install 'tav_jax[eval]'`"
        ) from None
    return cv2


def _flow(
    frames: UInt8[np.ndarray, "f H W 3"], flow_of_pair: Callable[..., Float[np.ndarray, "H W 2"]]
) -> Float[np.ndarray, "f-1 H W 2"]:
    if len(frames) < 2:
        raise UserError("optical flow needs two frames at least, the video has one")
    images = [grey(frame) for frame in frames]
    return np.stack([flow_of_pair(frame, successor) for frame, successor in pairwise(images)])


def _resize(image: np.ndarray) -> np.ndarray:
    cv2 = import_opencv()
    size = (EDITBOARD_SIDE, EDITBOARD_SIDE)
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_LINEAR)
