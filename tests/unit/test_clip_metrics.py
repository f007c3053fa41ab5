"""The CLIP metrics against their published formulas, and in cases whose value is known."""

import numpy as np
import pytest
from PIL import Image

from tav_jax.evaluation.clip_metrics import (
    clamped_similarity,
    pairwise_similarity,
    prompt_accuracy,
    resize_as_loveu,
    temporal_similarity,
    text_alignment,
)

X, Y, Z = np.eye(3, dtype=np.float32)
DRAW = np.random.default_rng(0)
# As CLIP's: all features of a video in one cone, of any length.
FRAMES = (3 * DRAW.standard_normal((5, 16)) + 4).astype(np.float32)
PROMPT, SOURCE = (DRAW.standard_normal((2, 16)) + 0.5).astype(np.float32)


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b))


def test_frames_of_loveu_are_compared_in_all_ordered_pairs():
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    expected = 100 * sum(cosine(FRAMES[i], FRAMES[j]) for i, j in pairs) / (5 * 4)
    assert pairwise_similarity(FRAMES) == pytest.approx(expected, rel=1e-12)
    # One of six pairs is equal, another one opposite; the rest is orthogonal.
    assert pairwise_similarity(np.stack([X, 2 * X, Y, -Y])) == pytest.approx(0, abs=1e-12)
    assert pairwise_similarity(np.stack([X, 2 * X, Y])) == pytest.approx(100 / 3)


def test_frames_of_fatezero_are_compared_with_the_next_one():
    expected = np.mean([cosine(FRAMES[i], FRAMES[i + 1]) for i in range(4)])
    assert temporal_similarity(FRAMES) == pytest.approx(expected, rel=1e-12)
    assert temporal_similarity(np.stack([X, -3 * X, Y, 2 * Y, Z])) == pytest.approx(0, abs=1e-12)


def test_frames_of_v2vbench_are_compared_with_the_next_one_and_clamped_pair_by_pair():
    expected = np.mean([max(0, cosine(FRAMES[i], FRAMES[i + 1])) for i in range(4)])
    assert clamped_similarity(FRAMES) == pytest.approx(expected, rel=1e-12)
    assert clamped_similarity(np.stack([X, -3 * X, Y, 2 * Y, Z])) == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    "metric",
    [pairwise_similarity, temporal_similarity, clamped_similarity],
    ids=lambda f: f.__name__,
)
def test_a_frozen_video_is_as_similar_as_can_be_and_one_frame_is_none(metric):
    most = 100 if metric is pairwise_similarity else 1
    assert metric(np.repeat(FRAMES[:1], 3, axis=0)) == pytest.approx(most, rel=1e-12)
    with pytest.raises(ValueError, match="two frames at least"):
        metric(FRAMES[:1])


def test_the_alignment_with_a_text_is_the_mean_of_the_scores_of_the_frames():
    expected = np.mean([100 * cosine(frame, PROMPT) for frame in FRAMES])
    assert text_alignment(FRAMES, PROMPT, 100.0) == pytest.approx(expected, rel=1e-12)
    # Neither clamped, nor dependent on the lengths.
    assert text_alignment(np.stack([X, -5 * X, -X]), 7 * X, 30.0) == pytest.approx(-10)


def test_the_accuracy_is_the_share_of_frames_with_the_larger_probability_for_the_prompt():
    def is_success(frame):
        logits = 100 * np.array([cosine(frame, SOURCE), cosine(frame, PROMPT)])
        of_source, of_prompt = np.exp(logits) / np.exp(logits).sum()
        return of_prompt >= of_source

    frames = DRAW.standard_normal((40, 16)).astype(np.float32)
    expected = np.mean([is_success(frame) for frame in frames])
    assert 0 < expected < 1
    assert prompt_accuracy(frames, SOURCE, PROMPT) == pytest.approx(expected)
    # A tie counts as a success.
    assert prompt_accuracy(np.stack([X, Y, X + Y, Z]), source_prompt=X, prompt=Y) == 0.75
    assert prompt_accuracy(FRAMES, SOURCE, SOURCE) == 1


def test_frames_of_loveu_are_resized_to_a_square_by_pillows_default():
    frames = DRAW.integers(0, 256, (2, 20, 33, 3), np.uint8)
    expected = [Image.fromarray(frame).resize((480, 480)) for frame in frames]
    np.testing.assert_array_equal(resize_as_loveu(frames), np.stack(expected))
