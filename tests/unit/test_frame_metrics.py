"""Metrics of frames against their formulas, in cases whose value is known, and with masks."""

import math

import numpy as np
import pytest

from tav_jax.errors import UserError
from tav_jax.evaluation.frame_metrics import (
    background_psnr,
    background_ssim,
    five_background_psnr,
    flicker,
    semantic_score,
)

DRAW = np.random.default_rng(0)
SOURCE = DRAW.integers(0, 256, (3, 40, 48, 3), np.uint8)
EDIT = np.clip(SOURCE + DRAW.integers(-30, 30, SOURCE.shape), 0, 255).astype(np.uint8)
# The object moves right. It has a hole, which is background.
MASK = np.zeros((3, 40, 48), bool)
for t in range(3):
    MASK[t, 15:30, 10 + 4 * t : 25 + 4 * t] = True
    MASK[t, 20:23, 15 + 4 * t : 18 + 4 * t] = False
NOTHING = np.zeros_like(MASK)

MASKED = pytest.mark.parametrize(
    ("metric", "best"),
    [
        (semantic_score, 0),
        (background_psnr, 100),
        (five_background_psnr, 100),
        (background_ssim, 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)


def test_flicker_is_1_minus_the_mean_change_of_consecutive_frames():
    changes = [
        abs(int(a) - int(b))
        for pair in (EDIT[:2], EDIT[1:])
        for a, b in zip(pair[0].ravel(), pair[1].ravel(), strict=True)
    ]
    assert flicker(EDIT) == pytest.approx((255 - np.mean(changes)) / 255, rel=1e-12)
    alternating = np.zeros((4, 5, 6, 3), np.uint8)
    alternating[::2] = 51
    assert flicker(alternating) == pytest.approx(0.8)
    assert flicker(np.repeat(EDIT[:1], 4, axis=0)) == 1
    with pytest.raises(UserError, match="two frames at least"):
        flicker(EDIT[:1])


@MASKED
def test_a_copy_of_the_source_has_the_best_value(metric, best):
    for mask in (MASK, NOTHING):
        assert metric(SOURCE, SOURCE, mask) == pytest.approx(best, abs=1e-12)
        assert abs(metric(EDIT, SOURCE, mask) - best) > 0.01


@MASKED
def test_a_metric_of_the_background_is_blind_to_changes_inside_the_mask(metric, best):
    before = metric(EDIT, SOURCE, MASK)
    changed_edit, changed_source = EDIT.copy(), SOURCE.copy()
    changed_edit[MASK] = 255 - changed_edit[MASK]
    assert metric(changed_edit, SOURCE, MASK) == before
    changed_source[MASK] = DRAW.integers(0, 256, (MASK.sum(), 3))
    assert metric(changed_edit, changed_source, MASK) == before
    assert metric(changed_edit, changed_source, NOTHING) != metric(EDIT, SOURCE, NOTHING)


@MASKED
@pytest.mark.parametrize("place", [(0, 0), (39, 47), (5, 20)])
def test_a_metric_of_the_background_sees_each_change_outside_the_mask(metric, best, place):
    changed = EDIT.copy()
    changed[1][place] = 255 - changed[1][place]
    assert metric(changed, SOURCE, MASK) != metric(EDIT, SOURCE, MASK)


@pytest.mark.parametrize("metric", [semantic_score, background_psnr, five_background_psnr])
def test_pixels_beside_the_object_and_in_its_holes_count(metric):
    for place in [(1, 14, 20), (1, 21, 20)]:
        changed = SOURCE.copy()
        changed[place] ^= 128
        assert metric(changed, SOURCE, MASK) != metric(SOURCE, SOURCE, MASK)


def test_the_semantic_score_equals_editboards_arithmetic():
    expected = []
    for edit, source, mask in zip(EDIT.astype(int), SOURCE.astype(int), MASK, strict=True):
        background = (mask.astype(int) == 0).astype(float)
        change = np.max(abs(edit - source), axis=-1)
        expected.append(np.sum(background * change) / np.sum(background == 1))
    assert semantic_score(EDIT, SOURCE, MASK) == pytest.approx(np.mean(expected), abs=1e-9)
    changed = SOURCE.copy()
    changed[~MASK, 1] ^= 1
    changed[~MASK, 2] ^= 8
    assert semantic_score(changed, SOURCE, MASK) == pytest.approx(8)


def test_the_psnr_is_that_of_the_mean_squared_error_of_each_frames_background():
    def psnr(error):
        return 10 * math.log10(255**2 / error)

    squares = (EDIT.astype(float) - SOURCE) ** 2
    background = [psnr(squares[t][~MASK[t]].mean()) for t in range(3)]
    assert background_psnr(EDIT, SOURCE, MASK) == pytest.approx(np.mean(background), rel=1e-12)
    # FiVE multiplies frames by the mask of the background and takes all pixels.
    kept = (~MASK)[..., None].astype(float)
    blackened = ((EDIT * kept - SOURCE * kept) ** 2).mean(axis=(1, 2, 3))
    five = np.mean([psnr(error) for error in blackened])
    assert five_background_psnr(EDIT, SOURCE, MASK) == pytest.approx(five, rel=1e-12)


def test_the_psnr_of_five_grows_with_the_object():
    source = np.full((2, 20, 20, 3), 100, np.uint8)
    edit = source + np.uint8(10)
    mask = np.zeros((2, 20, 20), bool)
    mask[:, :18] = True
    assert background_psnr(edit, source, mask) == pytest.approx(20 * math.log10(25.5))
    assert five_background_psnr(edit, source, mask) == pytest.approx(20 * math.log10(25.5) + 10)
    assert five_background_psnr(edit, source, ~mask & False) == background_psnr(
        edit, source, ~mask & False
    )


def test_a_psnr_is_100_at_most():
    source = np.zeros((2, 1000, 800, 3), np.uint8)
    edit = source.copy()
    edit[0, 0, 0, 0] = 1
    nothing = np.zeros((2, 1000, 800), bool)
    assert background_psnr(edit, source, nothing) == 100
    edit[0, :10] = 255
    assert background_psnr(edit, source, nothing) == pytest.approx((20 + 100) / 2)


@pytest.mark.parametrize("metric", [background_psnr, five_background_psnr, background_ssim])
def test_frames_that_the_object_covers_are_left_out(metric):
    mask = MASK.copy()
    mask[1] = True
    shown = [0, 2]
    assert metric(EDIT, SOURCE, mask) == pytest.approx(
        metric(EDIT[shown], SOURCE[shown], MASK[shown])
    )


@MASKED
def test_an_object_that_covers_everything_is_refused(metric, best):
    with pytest.raises(UserError, match=metric.__name__.removeprefix("five_")):
        metric(EDIT, SOURCE, ~NOTHING)


def test_the_semantic_score_names_the_frames_without_a_background():
    mask = MASK.copy()
    mask[[0, 2]] = True
    with pytest.raises(UserError, match=r"\(from 0\) 0, 2;"):
        semantic_score(EDIT, SOURCE, mask)


def published_ssim(x, y, sigma=1.5):
    """Returns the similarity of two windows of 11x11 pixels of one colour."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    mean_x, mean_y = np.sum(weights * x), np.sum(weights * y)
    variance_x, variance_y = (
        np.sum(weights * (x - mean_x) ** 2),
        np.sum(weights * (y - mean_y) ** 2),
    )
    covariance = np.sum(weights * (x - mean_x) * (y - mean_y))
    c1, c2 = 2.55**2, 7.65**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))


@pytest.mark.parametrize("mask", [MASK, NOTHING], ids=["object", "nothing"])
def test_the_ssim_is_the_mean_over_windows_of_background_only(mask):
    frames = []
    for edit, source, hidden in zip(EDIT.astype(float), SOURCE, mask, strict=True):
        values = []
        for top, left in np.ndindex(30, 38):
            window = slice(top, top + 11), slice(left, left + 11)
            if not hidden[window].any():
                values += [
                    published_ssim(edit[window][..., colour], source[window][..., colour])
                    for colour in range(3)
                ]
        frames.append(np.mean(values))
    assert background_ssim(EDIT, SOURCE, mask) == pytest.approx(np.mean(frames), rel=1e-9)


def test_the_ssim_of_flat_frames_compares_their_luminance():
    source, edit = np.full((1, 12, 12, 3), 100, np.uint8), np.full((1, 12, 12, 3), 50, np.uint8)
    expected = (2 * 100 * 50 + 2.55**2) / (100**2 + 50**2 + 2.55**2)
    nothing = np.zeros((1, 12, 12), bool)
    assert background_ssim(edit, source, nothing) == pytest.approx(expected)
    negative = 255 - SOURCE
    assert -1 < background_ssim(negative, SOURCE, NOTHING) < -0.5


@pytest.mark.parametrize("size", [(10, 40), (40, 10), (5, 5)])
def test_frames_smaller_than_a_window_of_the_ssim_are_refused(size):
    frames = np.zeros((2, *size, 3), np.uint8)
    with pytest.raises(UserError, match="11x11 pixels outside of the object"):
        background_ssim(frames, frames, np.zeros((2, *size), bool))
