"""Metrics of motion, as functions of frames and of optical flow.

`edit` is the edited video, `source` the video that it was made from, of the same size and length.

| metric                 | function           | frames   | flow                 | value     |
|------------------------|--------------------|----------|----------------------|-----------|
| `motion_alignment.dis` | `motion_alignment` | own size | DIS, of both         | -inf to 0 |
| `ff_alpha.editboard`   | `ff_alpha`         | 512x512  | Farneback, of source | 0 to 255  |
| `ff_beta.editboard`    | `ff_beta`          | 512x512  | Farneback, of both   | 0 to 2    |
| `warp_error.dis`       | `warp_error`       | own size | DIS, of source       | 0 to 1    |

The best value is always 0. `.editboard` follows the code of EditBoard (Chen et al. 2025,
arXiv:2409.09668), with frames by `resize_as_editboard` and their flow by `farneback_flow`. `.dis`
follows the code of V2VBench (Sun et al. 2024, arXiv:2407.07111) or of Lai et al. 2018
(arXiv:1808.00449), with the flow of `dis_flow` in place of a network's, so its values must not be
compared with published ones.
"""

import numpy as np
from jaxtyping import Bool, Float, UInt8

from tav_jax.errors import UserError
from tav_jax.evaluation.optical_flow import grey

# EditBoard judges pixels that the source's flow predicts to 5 of 255, if 70 % of all are such.
MAX_SOURCE_ERROR = 5
MIN_VALID_SHARE = 0.7


def motion_alignment(
    edit_flow: Float[np.ndarray, "g H W 2"], source_flow: Float[np.ndarray, "g H W 2"]
) -> float:
    """Return minus the mean distance of both flows, in pixels per frame.

    -mean ||v_edit - v_source||. It grows with the size of the frames.
    """
    assert edit_flow.shape == source_flow.shape, (edit_flow.shape, source_flow.shape)
    distances = [
        np.mean(_length(edit.astype(np.float64) - source))
        for edit, source in zip(edit_flow, source_flow, strict=True)
    ]
    return float(0 - np.mean(distances))  # 0 rather than -0


def ff_beta(
    edit_flow: Float[np.ndarray, "g H W 2"], source_flow: Float[np.ndarray, "g H W 2"]
) -> float:
    """Return the mean of 1 - cos(v_edit, v_source).

    As published, a pixel without motion in either video counts 1. So a video whose background
    stands still does not get 0 when it is compared with itself.
    """
    assert edit_flow.shape == source_flow.shape, (edit_flow.shape, source_flow.shape)
    values = []
    for edit, source in zip(edit_flow.astype(np.float64), source_flow, strict=True):
        lengths = (_length(edit) + 1e-7) * (_length(source.astype(np.float64)) + 1e-7)
        values.append(np.mean(1 - np.sum(edit * source, axis=-1) / lengths))
    return float(np.mean(values))


def ff_alpha(
    edit: UInt8[np.ndarray, "f H W 3"],
    source: UInt8[np.ndarray, "f H W 3"],
    source_flow: Float[np.ndarray, "f-1 H W 2"],
) -> float:
    """Return how much the edited video differs from its frames moved by the source's flow.

    A frame is compared with its predecessor, moved. A pixel's difference is the largest of its
    three colours', and counts where the source's own difference is grey 5 or less. As published,
    the value is 0, the best one, if such pixels are less than 70 % of all.

    Raises:
        UserError: Enough pixels count, but none between two of the frames. EditBoard returns NaN.
    """
    assert edit.shape == source.shape, (edit.shape, source.shape)
    counts, sums = [], []
    for before, flow in enumerate(source_flow):
        counting = grey(_difference(source, before, flow)) <= MAX_SOURCE_ERROR
        counts.append(int(np.sum(counting)))
        sums.append(int(np.sum(np.max(_difference(edit, before, flow), axis=-1)[counting])))
    if np.mean(counts) < MIN_VALID_SHARE * source[0, ..., 0].size:
        return 0.0
    if 0 in counts:
        raise UserError(
            f"ff_alpha.editboard: frame {counts.index(0) + 1} of the source (from 0) has nothing "
            "in common with the frame before it, as after a cut; take a clip without cuts"
        )
    return float(np.mean(np.divide(sums, counts)))


def warp_error(
    frames: UInt8[np.ndarray, "f H W 3"],
    forward: Float[np.ndarray, "f-1 H W 2"],
    backward: Float[np.ndarray, "f-1 H W 2"],
) -> float:
    """Return the mean squared difference of frames and their successors moved back.

    E = mean of (I_t(x) - I_t+1(x + v_t(x)))^2 over colours from 0 to 1 and pixels that are not
    occluded in the source, then over t. As published, a pair without such pixels counts 0.

    Args:
        frames: The edited video, or the source itself.
        forward: The source's flow from each frame to the next one.
        backward: The source's flow back: `dis_flow(source[::-1])[::-1]`.
    """
    errors = []
    for before, (to_next, back) in enumerate(zip(forward, backward, strict=True)):
        frame, successor = frames[before : before + 2].astype(np.float32) / 255
        visible = ~_occluded(to_next, back)
        squares = np.square(frame - _sample(successor, _grid(to_next) + to_next))[visible]
        errors.append(np.mean(squares, dtype=np.float64) if len(squares) else 0.0)
    return float(np.mean(errors))


def _occluded(
    forward: Float[np.ndarray, "H W 2"], backward: Float[np.ndarray, "H W 2"]
) -> Bool[np.ndarray, "H W"]:
    """Return where a frame's content is hidden in the next frame, or moves unlike its neighbour.

    Thresholds are those of Sundaram et al. 2010, as in the code of Lai et al.
    """
    back = _sample(backward, _grid(forward) + forward)
    energy = _square(forward)
    hidden = _square(forward + back) > 0.01 * (energy + _square(back)) + 0.5
    right, down = np.zeros_like(forward), np.zeros_like(forward)
    right[:, :-1] = np.diff(forward, axis=1)
    down[:-1] = np.diff(forward, axis=0)
    return hidden | (_square(right) + _square(down) > 0.01 * energy + 0.002)


def _difference(
    frames: UInt8[np.ndarray, "f H W 3"], before: int, flow: Float[np.ndarray, "H W 2"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Return |I_t+1(x) - I_t(x - v_t(x))| with EditBoard's interpolation."""
    # Black surrounds the frame. OpenCV 4 rounds positions to 1/32 of a pixel and colours to
    # integers; OpenCV 5 has exact positions, so we do not leave it to OpenCV.
    surrounded = np.pad(frames[before].astype(np.float32), ((1, 1), (1, 1), (0, 0)))
    positions = np.rint((_grid(flow) - flow) * 32) / 32
    moved = np.floor(_sample(surrounded, positions + 1) + 0.5)
    return np.abs(frames[before + 1] - moved).astype(np.uint8)


def _sample(
    image: Float[np.ndarray, "H W c"], positions: Float[np.ndarray, "h w 2"]
) -> Float[np.ndarray, "h w c"]:
    """Return an image at positions x, y, bilinear. Outside it has the values of its border."""
    height, width, channels = image.shape
    lower = np.floor(positions)
    across, along = np.moveaxis((positions - lower)[..., None], 2, 0)
    left, top = np.moveaxis(lower.astype(int), -1, 0)
    columns = [np.clip(left + step, 0, width - 1) for step in (0, 1)]
    starts = [np.clip(top + step, 0, height - 1) * width for step in (0, 1)]
    pixels = image.reshape(height * width, channels)
    upper, below = (
        (1 - across) * pixels.take(start + columns[0], axis=0)
        + across * pixels.take(start + columns[1], axis=0)
        for start in starts
    )
    return (1 - along) * upper + along * below


def _grid(flow: Float[np.ndarray, "H W 2"]) -> Float[np.ndarray, "H W 2"]:
    """Return each pixel's own position x, y."""
    height, width = flow.shape[:2]
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)


def _length(vectors: Float[np.ndarray, "H W 2"]) -> Float[np.ndarray, "H W"]:
    return np.sqrt(_square(vectors))


def _square(vectors: Float[np.ndarray, "H W 2"]) -> Float[np.ndarray, "H W"]:
    return np.sum(np.square(vectors), axis=-1)
