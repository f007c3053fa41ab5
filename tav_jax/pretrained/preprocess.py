"""Prepare images for CLIP as transformers' CLIPImageProcessor does with Pillow."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

# Means and standard deviations of the images that CLIP was trained with.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared. Fields have the names of the published config.

    Args:
        size: Length of the shorter edge after resizing, in pixels.
        crop_size: Side of the square that is cut out of the middle, in pixels.
        rescale_factor: By which values from 0 to 255 are multiplied.
        image_mean: Subtracted from red, green and blue.
        image_std: By which they are divided afterwards.
    """

    size: int = 224
    crop_size: int = 224
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = IMAGE_MEAN
    image_std: tuple[float, float, float] = IMAGE_STD


def preprocess(
    frames: UInt8[np.ndarray, "n H W 3"], preprocessing: Preprocessing
) -> Float[np.ndarray, "n side side 3"]:
    """Return images resized, cropped and normalised, float32."""
    height, width = frames.shape[1:3]
    # In this order, because the product is rounded down: the quotient may be inexact.
    longer = int(preprocessing.size * max(height, width) / min(height, width))
    resized = (longer, preprocessing.size) if width > height else (preprocessing.size, longer)
    cropped = np.stack(
        [_crop(resize(frame, *resized), preprocessing.crop_size) for frame in frames]
    )
    rescaled = (cropped * preprocessing.rescale_factor).astype(np.float32)
    mean, std = (
        np.array(values, np.float32).reshape(1, 1, 1, 3)
        for values in (preprocessing.image_mean, preprocessing.image_std)
    )
    return (rescaled - mean) / std


def resize(
    frame: UInt8[np.ndarray, "H W 3"], width: int, height: int
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Return an image resized by Pillow's bicubic filter, which antialiases."""
    image = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _crop(frame: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    top, left = ((length - side) // 2 for length in frame.shape[:2])
    return frame[top : top + side, left : left + side]
