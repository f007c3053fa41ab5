"""Metrics of frames without motion or a network: flicker, and what changed outside of the object.

`edit` is the edited video, `source` the video that it was made from, of the same size and length.
`mask` is True where the object is that was to be edited.

| metric                     | function               | frames   | value    | best |
|----------------------------|------------------------|----------|----------|------|
| `flicker.vbench`           | `flicker`              | own size | 0 to 1   | 1    |
| `semantic_score.editboard` | `semantic_score`       | 512x512  | 0 to 255 | 0    |
| `background_psnr`          | `background_psnr`      | own size | 0 to 100 | 100  |
| `background_ssim`          | `background_ssim`      | own size | -1 to 1  | 1    |
| `background_psnr.five`     | `five_background_psnr` | own size | 0 to 100 | 100  |

VBench is Huang et al. 2024 (arXiv:2311.17982), EditBoard is Chen et al. 2025 (arXiv:2409.09668; its
frames are made by `resize_as_editboard`, the masks by `resize_mask_as_editboard`), FiVE is Li et
al. 2025 (arXiv:2503.13684). `background_psnr` and `background_ssim` are our own. Values are means
over frames, or over pairs of consecutive frames. PSNRs are in dB, and above 100 they count 100:
equal frames would have an infinite one.
"""

from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy.lib.stride_tricks import sliding_window_view

from tav_jax.errors import UserError

# The smallest error of a frame of 512x512 pixels has 107 dB.
MAX_PSNR = 100.0

# Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03


def flicker(frames: UInt8[np.ndarray, "f H W 3"]) -> float:
    """Return 1 - mean |I_t - I_t+1| / 255.

    VBench's `temporal_flickering`. It is meant for scenes that stand still: motion lowers it, and
    a still image has 1.
    """
    if len(frames) < 2:
        raise UserError("flicker needs two frames at least, the video has one")
    means = [np.mean(_difference(frame, successor)) for frame, successor in pairwise(frames)]
    return float(1 - np.mean(means) / 255)


def semantic_score(
    edit: UInt8[np.ndarray, "f H W 3"],
    source: UInt8[np.ndarray, "f H W 3"],
    mask: Bool[np.ndarray, "f H W"],
) -> float:
    """Return the mean change outside of the object, of the colour that changes most.

    Raises:
        UserError: The object covers a whole frame, for which EditBoard returns NaN.
    """
    _assert_same_size(edit, source, mask)
    if covered := np.flatnonzero(mask.all(axis=(1, 2))).tolist():
        raise UserError(
            "semantic_score.editboard: the mask covers all of the frames (from 0) "
            f"{', '.join(map(str, covered))}; take a clip whose background is always visible"
        )
    means = [
        np.mean(np.max(_difference(edited, original), axis=-1)[outside])
        for edited, original, outside in zip(edit, source, ~mask, strict=True)
    ]
    return float(np.mean(means))


def background_psnr(
    edit: UInt8[np.ndarray, "f H W 3"],
    source: UInt8[np.ndarray, "f H W 3"],
    mask: Bool[np.ndarray, "f H W"],
) -> float:
    """Return the peak signal-to-noise ratio of the background's pixels.

    10 log10(255^2 / MSE), with the mean over colours and over pixels outside of the object. Frames
    that the object covers are left out.

    Raises:
        UserError: The object covers all frames.
    """
    errors = _background_errors(edit, source, mask)
    return _mean_psnr([np.mean(squares) for squares in errors])


def five_background_psnr(
    edit: UInt8[np.ndarray, "f H W 3"],
    source: UInt8[np.ndarray, "f H W 3"],
    mask: Bool[np.ndarray, "f H W"],
) -> float:
    """Return FiVE's peak signal-to-noise ratio of the background, larger than `background_psnr`.

    The object is made black in both videos, and then counts as equal: an object that covers 90 % of
    the frame adds 10 dB. FiVE takes every eighth frame.

    Raises:
        UserError: The object covers all frames.
    """
    errors = _background_errors(edit, source, mask)
    return _mean_psnr([np.sum(squares) / source[0].size for squares in errors])


def background_ssim(
    edit: UInt8[np.ndarray, "f H W 3"],
    source: UInt8[np.ndarray, "f H W 3"],
    mask: Bool[np.ndarray, "f H W"],
) -> float:
    """Return the structural similarity of the background.

    Wang et al. 2004: Gaussian windows of 11x11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, for
    each colour. Only windows count that hold no pixel of the object and lie within the frame.
    Frames without such a window are left out.

    Raises:
        UserError: No frame has such a window.
    """
    _assert_same_size(edit, source, mask)
    means = []
    for edited, original, outside in zip(edit, source, ~mask, strict=True):
        if min(outside.shape) < SSIM_WINDOW:
            continue
        rows = sliding_window_view(outside, SSIM_WINDOW, axis=0).all(axis=-1)
        windows = sliding_window_view(rows, SSIM_WINDOW, axis=1).all(axis=-1)
        if windows.any():
            means.append(np.mean(_ssim(edited, original)[windows]))
    if not means:
        raise UserError(
            f"background_ssim: no frame has {SSIM_WINDOW}x{SSIM_WINDOW} pixels outside of the "
            "object; give smaller masks or larger frames"
        )
    return float(np.mean(means))


def _ssim(
    x: UInt8[np.ndarray, "H W 3"], y: UInt8[np.ndarray, "H W 3"]
) -> Float[np.ndarray, "H-10 W-10 3"]:
    """Return the structural similarity of all windows within two frames."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    c1, c2 = (255 * SSIM_K1) ** 2, (255 * SSIM_K2) ** 2
    mean_x, mean_y = _window_means(x), _window_means(y)
    variances = _window_means(x * x) - mean_x**2 + _window_means(y * y) - mean_y**2
    covariance = _window_means(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)


def _window_means(image: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H-10 W-10 3"]:
    steps = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-(steps**2) / (2 * SSIM_SIGMA**2))
    weights /= weights.sum()
    height, width = (length - SSIM_WINDOW + 1 for length in image.shape[:2])
    rows = sum(weight * image[start : start + height] for start, weight in enumerate(weights))
    return sum(weight * rows[:, start : start + width] for start, weight in enumerate(weights))


def _background_errors(
    edit: UInt8[np.ndarray, "f H W 3"],
    source: UInt8[np.ndarray, "f H W 3"],
    mask: Bool[np.ndarray, "f H W"],
) -> list[Float[np.ndarray, "n 3"]]:
    """Return the squared errors outside of the object, of each frame that it does not cover."""
    _assert_same_size(edit, source, mask)
    errors = [
        np.square(_difference(edited, original)[outside])
        for edited, original, outside in zip(edit, source, ~mask, strict=True)
        if outside.any()
    ]
    if not errors:
        raise UserError("background_psnr: the mask covers all frames; give smaller masks")
    return errors


def _mean_psnr(mean_squared_errors: list[float]) -> float:
    # Errors are raised to the one that has the largest ratio admitted.
    smallest = 255**2 / 10 ** (MAX_PSNR / 10)
    return float(np.mean(10 * np.log10(255**2 / np.maximum(mean_squared_errors, smallest))))


def _difference(
    a: UInt8[np.ndarray, "H W 3"], b: UInt8[np.ndarray, "H W 3"]
) -> Float[np.ndarray, "H W 3"]:
    return np.abs(a.astype(np.float64) - b)


def _assert_same_size(
    edit: UInt8[np.ndarray, "f H W 3"],
    source: UInt8[np.ndarray, "f H W 3"],
    mask: Bool[np.ndarray, "f H W"],
) -> None:
    assert edit.shape == source.shape == (*mask.shape, 3), (edit.shape, source.shape, mask.shape)
