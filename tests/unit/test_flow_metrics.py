"""Optical flow of known motions, and its metrics against their published arithmetic in NumPy."""

import math
import subprocess
import sys

import numpy as np
import pytest

from tav_jax.errors import UserError
from tav_jax.evaluation.flow_metrics import ff_alpha, ff_beta, motion_alignment, warp_error
from tav_jax.evaluation.optical_flow import (
    dis_flow,
    farneback_flow,
    resize_as_editboard,
    resize_mask_as_editboard,
)

cv2 = pytest.importorskip("cv2")

FLOWS = pytest.mark.parametrize("flow", [dis_flow, farneback_flow], ids=lambda f: f.__name__)


def texture(height, width, seed):
    """Returns noise without the finest details, as video has none."""
    draw = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(draw.standard_normal((height, width, 3)), (0, 0), 2)
    return np.clip(128 + 50 * noise / noise.std(), 0, 255).astype(np.uint8)


def moving_texture(right, down, *, height=128, width=128, frames=3, seed=0):
    """Returns a video whose content moves by that many pixels per frame. New one comes in."""
    margin = frames * max(abs(right), abs(down))
    canvas = texture(height + 2 * margin, width + 2 * margin, seed)
    starts = [(margin - down * t, margin - right * t) for t in range(frames)]
    return np.stack([canvas[y : y + height, x : x + width] for y, x in starts])


def flows_of_both_directions(video):
    return dis_flow(video), dis_flow(video[::-1])[::-1]


@pytest.mark.parametrize(("right", "down"), [(3, -2), (-1, 4), (0, 0), (5, 5)])
def test_the_flow_is_how_far_the_content_moves_right_and_down(right, down):
    video = moving_texture(right, down)
    flow = dis_flow(video)
    assert flow.shape == (2, 128, 128, 2)
    assert flow.dtype == np.float32
    # Near the border content comes in from outside.
    errors = np.abs(flow - [right, down])[:, 20:-20, 20:-20]
    assert errors.max() < 0.1
    assert np.abs(farneback_flow(video) - [right, down])[:, 24:-24, 24:-24].mean() < 0.1


@FLOWS
def test_the_flow_does_not_depend_on_the_number_of_threads(flow):
    video = moving_texture(3, -2, height=256, width=192)
    threads = cv2.getNumThreads()
    flows = []
    try:
        for number in (1, 2, 3):
            cv2.setNumThreads(number)
            flows.append(flow(video))
    finally:
        cv2.setNumThreads(threads)
    np.testing.assert_array_equal(flows[0], flows[1])
    np.testing.assert_array_equal(flows[0], flows[2])


@FLOWS
def test_the_flow_of_one_frame_is_refused(flow):
    with pytest.raises(UserError, match="two frames at least"):
        flow(moving_texture(0, 0, frames=1))


@pytest.mark.parametrize(("height", "width"), [(15, 64), (64, 8), (4, 4), (15, 1000)])
def test_frames_for_which_dis_crashes_are_refused(height, width):
    with pytest.raises(UserError, match=f"16x16 pixels at least, the video has {width}x{height}"):
        dis_flow(np.zeros((2, height, width, 3), np.uint8))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 1500), (1500, 16), (17, 40)])
def test_the_smallest_frames_have_a_finite_flow(height, width):
    assert np.isfinite(dis_flow(moving_texture(1, 0, height=height, width=width))).all()


def test_a_missing_opencv_is_named_with_the_extra_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"needs OpenCV \(.*cv2.*\): `pip install 'tav_jax\[eval\]"):
        dis_flow(moving_texture(0, 0))


def test_the_modules_do_not_import_opencv():
    code = "import sys, tav_jax.evaluation.flow_metrics; sys.exit('cv2' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_motion_alignment_is_minus_the_mean_distance_of_the_flows():
    draw = np.random.default_rng(0)
    edit, source = draw.standard_normal((2, 3, 5, 7, 2)).astype(np.float32)
    distances = [math.hypot(*difference) for difference in (edit - source).reshape(-1, 2)]
    assert motion_alignment(edit, source) == pytest.approx(-np.mean(distances), rel=1e-6)
    assert motion_alignment(edit + np.float32([3, 4]), edit) == pytest.approx(-5, rel=1e-6)


@FLOWS
def test_a_video_is_aligned_with_itself(flow):
    of_itself = flow(moving_texture(3, -2))
    alignment = motion_alignment(of_itself, of_itself)
    assert alignment == 0
    assert str(alignment) == "0.0"
    assert ff_beta(of_itself, of_itself) == pytest.approx(0, abs=1e-6)


def test_ff_beta_is_1_minus_the_cosine_and_1_for_pixels_without_motion():
    source = np.float32([[[[2, 0], [2, 0], [2, 0], [2, 0], [0, 0], [0, 0]]]])
    edit = np.float32([[[[9, 0], [-1, 0], [0, 5], [0, 0], [0, 0], [1, 0]]]])
    assert ff_beta(edit, source) == pytest.approx(np.mean([0, 2, 1, 1, 1, 1]), abs=1e-6)


def editboards_interpolation(frame, positions):
    """Returns what OpenCV 4 makes of positions x, y: in integers, from 1/32 of a pixel."""
    height, width = frame.shape[:2]
    x, y = np.moveaxis(np.rint(positions * 32).astype(int), -1, 0)

    def pixel(x, y):
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        found = frame[np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)].astype(int)
        return np.where(inside[..., None], found, 0)

    right, down = (x % 32)[..., None], (y % 32)[..., None]
    x, y = x // 32, y // 32
    total = (32 - right) * (32 - down) * pixel(x, y) + right * (32 - down) * pixel(x + 1, y)
    total += (32 - right) * down * pixel(x, y + 1) + right * down * pixel(x + 1, y + 1)
    return (total + 512) // 1024


def published_ff_alpha(edit, source, flow):
    # Its positions are float32, too.
    rows, columns = np.indices(flow.shape[1:3], np.float32)
    values, valid = [], []
    for t in range(len(flow)):
        positions = np.stack([columns - flow[t, ..., 0], rows - flow[t, ..., 1]], axis=-1)
        of_source = abs(source[t + 1] - editboards_interpolation(source[t], positions))
        of_edit = abs(edit[t + 1] - editboards_interpolation(edit[t], positions))
        grey = (of_source @ [9798, 19235, 3735] + 2**14) // 2**15
        mask = (grey <= 5).astype(float)
        valid.append(np.mean(mask))
        if valid[-1] > 0:
            values.append(np.sum(mask * of_edit.max(axis=-1)) / np.sum(mask))
    return (np.mean(values) if np.mean(valid) >= 0.7 else 0), np.mean(valid)


def published_ff_beta(edit, source):
    def value(a, b):
        lengths = [np.sqrt((flow.astype(float) ** 2).sum(-1)) + 1e-7 for flow in (a, b)]
        return np.mean(1 - (a.astype(float) * b).sum(-1) / lengths[0] / lengths[1])

    return np.mean([value(a, b) for a, b in zip(edit, source, strict=True)])


@pytest.mark.parametrize("speed", [(3, -2), (0, 1)])
def test_editboards_metrics_of_frames_equal_its_arithmetic(speed):
    source = moving_texture(*speed, height=160, width=200)
    draw = np.random.default_rng(1)
    noise = draw.integers(-40, 40, source.shape)
    edit = np.clip(255 - source.astype(int) + noise, 0, 255).astype(np.uint8)
    flow, edit_flow = farneback_flow(source), farneback_flow(edit)
    expected, valid = published_ff_alpha(edit, source, flow)
    assert 0.7 < valid < 1
    assert ff_alpha(edit, source, flow) == pytest.approx(expected, abs=1e-6)
    assert expected > 10
    assert ff_beta(edit_flow, flow) == pytest.approx(published_ff_beta(edit_flow, flow), abs=1e-6)
    # A video differs the least from its own motion.
    assert ff_alpha(source, source, flow) < expected / 2


def test_ff_alpha_is_0_where_the_source_does_not_follow_its_flow():
    draw = np.random.default_rng(0)
    edit, source = draw.integers(0, 256, (2, 3, 40, 50, 3), np.uint8)
    flow = (4 * draw.standard_normal((2, 40, 50, 2))).astype(np.float32)
    expected, valid = published_ff_alpha(edit, source, flow)
    assert valid < 0.7
    assert ff_alpha(edit, source, flow) == expected == 0


def test_ff_alpha_of_a_clip_with_a_cut_is_refused():
    source = np.zeros((6, 16, 16, 3), np.uint8)
    source[4:] = 255
    with pytest.raises(UserError, match=r"frame 4 of the source .* nothing in common"):
        ff_alpha(source, source, np.zeros((5, 16, 16, 2), np.float32))


@pytest.mark.skipif(
    int(cv2.__version__.split(".")[0]) >= 5, reason="OpenCV 5 interpolates at exact positions"
)
def test_editboards_interpolation_is_opencv_4s():
    draw = np.random.default_rng(0)
    frame = draw.integers(0, 256, (40, 50, 3), np.uint8)
    positions = np.stack(np.meshgrid(np.arange(50), np.arange(40)), axis=-1)
    positions = (positions + 3 * draw.standard_normal(positions.shape)).astype(np.float32)
    published = cv2.remap(frame, positions, None, cv2.INTER_LINEAR)
    np.testing.assert_array_equal(editboards_interpolation(frame, positions), published)


@pytest.mark.parametrize(("right", "down"), [(3, -2), (-2, 1), (0, 0)])
def test_a_moving_texture_has_no_warp_error(right, down):
    video = moving_texture(right, down)
    forward, backward = flows_of_both_directions(video)
    assert warp_error(video, forward, backward) < 1e-3
    if (right, down) != (0, 0):
        # Flows of no motion, which find nothing occluded, do not explain it.
        assert warp_error(video, 0 * forward, 0 * backward) > 1e-2


def test_the_warp_error_of_flickering_colours_is_their_squared_change():
    source = moving_texture(3, -2)
    forward, backward = flows_of_both_directions(source)
    edit = np.zeros_like(source)
    edit[1] = 51
    assert warp_error(edit, forward, backward) == pytest.approx(0.2**2, rel=1e-5)


def published_warp_error(frames, forward, backward):
    """Returns the error by loops over pixels, and the share of pixels that are not occluded."""
    height, width = forward.shape[1:3]

    def at(image, x, y):
        left, top = math.floor(x), math.floor(y)
        value = 0
        for row, row_weight in ((top, 1 - (y - top)), (top + 1, y - top)):
            for column, weight in ((left, 1 - (x - left)), (left + 1, x - left)):
                inside = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
                value = value + row_weight * weight * image[inside].astype(float)
        return value

    errors, visible = [], []
    for t in range(len(forward)):
        squares = []
        for y, x in np.ndindex(height, width):
            v = forward[t, y, x].astype(float)
            back = at(backward[t], x + v[0], y + v[1])
            hidden = ((v + back) ** 2).sum() > 0.01 * ((v**2).sum() + (back**2).sum()) + 0.5
            gradient = 0.0
            if x + 1 < width:
                gradient += ((forward[t, y, x + 1] - v) ** 2).sum()
            if y + 1 < height:
                gradient += ((forward[t, y + 1, x] - v) ** 2).sum()
            if not hidden and gradient <= 0.01 * (v**2).sum() + 0.002:
                moved = at(frames[t + 1] / 255, x + v[0], y + v[1])
                squares.append((frames[t, y, x] / 255 - moved) ** 2)
        errors.append(np.mean(squares) if squares else 0)
        visible.append(len(squares) / (height * width))
    return np.mean(errors), np.mean(visible)


def test_the_warp_error_equals_the_arithmetic_of_lai_et_al():
    draw = np.random.default_rng(0)
    frames = draw.integers(0, 256, (3, 24, 30, 3), np.uint8)
    # Smooth flows that mostly undo each other.
    motion = [cv2.GaussianBlur(draw.standard_normal((24, 30, 2)), (0, 0), 4) for _ in range(4)]
    forward = np.float32([8 * motion[0] + [3, -2], 8 * motion[1] + [-2, 0]])
    backward = -forward + np.float32([6 * motion[2], 6 * motion[3]])
    expected, visible = published_warp_error(frames, forward, backward)
    assert 0.2 < visible < 0.8
    assert warp_error(frames, forward, backward) == pytest.approx(expected, abs=1e-6)


def test_the_warp_error_counts_what_is_not_occluded():
    # A square moves right over a still texture. The flows are known.
    background, square = texture(64, 64, seed=1), texture(20, 20, seed=2)
    video = np.stack([background, background])
    video[0, 20:40, 10:30] = square
    video[1, 20:40, 18:38] = square
    forward, backward = np.zeros((2, 1, 64, 64, 2), np.float32)
    forward[0, 20:40, 10:30, 0] = 8
    backward[0, 20:40, 18:38, 0] = -8
    assert warp_error(video, forward, backward) == pytest.approx(0, abs=1e-12)
    # What the square covers next is hidden, so a change there is no error.
    video[0, 22:38, 31:37] = 0
    assert warp_error(video, forward, backward) == pytest.approx(0, abs=1e-12)
    video[0, 50:60, 50:60] = 0
    assert warp_error(video, forward, backward) > 1e-3


def test_a_pair_whose_pixels_are_all_occluded_counts_0():
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    forward = np.full((1, 16, 16, 2), 5, np.float32)
    assert warp_error(frames, forward, forward) == 0


def test_editboards_size_is_reached_by_bilinear_interpolation():
    frames = np.random.default_rng(0).integers(0, 256, (1, 100, 70, 3), np.uint8)

    def axis(length):
        position = np.clip((np.arange(512) + 0.5) * length / 512 - 0.5, 0, length - 1)
        lower = np.minimum(np.floor(position).astype(int), length - 2)
        return lower, position - lower

    (top, down), (left, right) = axis(100), axis(70)
    image = frames[0].astype(float)
    rows = (1 - down)[:, None, None] * image[top] + down[:, None, None] * image[top + 1]
    expected = (1 - right)[:, None] * rows[:, left] + right[:, None] * rows[:, left + 1]
    resized = resize_as_editboard(frames)
    assert resized.shape == (1, 512, 512, 3)
    assert np.abs(resized[0] - expected).max() <= 1
    np.testing.assert_array_equal(resize_as_editboard(resized), resized)


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (512, 512), (1024, 1024), (97, 700), (720, 1280)]
)
def test_a_resized_mask_hides_all_that_a_change_inside_the_mask_reaches(height, width):
    draw = np.random.default_rng(0)
    mask = cv2.GaussianBlur(draw.standard_normal((1, height, width))[0], (0, 0), 5)[None] > 0.05
    frames = draw.integers(0, 256, (1, height, width, 3), np.uint8)
    changed = frames.copy()
    changed[mask] = 255 - changed[mask]
    outside = ~resize_mask_as_editboard(mask)
    assert 0.1 < outside.mean() < 0.9
    resized, of_changed = resize_as_editboard(frames), resize_as_editboard(changed)
    np.testing.assert_array_equal(resized[outside], of_changed[outside])
    assert (resized[~outside] != of_changed[~outside]).any()
