"""The measures of edited clips of figures, on videos of which every answer is known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tav_jax.evaluation.examples import Example, Material
from tav_jax.evaluation.metrics import Subject, compute
from tav_jax.worlds.figures.drawing import render
from tav_jax.worlds.figures.edits import EDITS
from tav_jax.worlds.figures.metrics import measure
from tav_jax.worlds.figures.scenes import (
    ATTRIBUTES,
    CLIPS,
    HELD_OUT,
    STEPS_PER_PERIOD,
    describe,
    words_of,
)
from tav_jax.worlds.figures.video_metrics import METRICS
from tav_jax.worlds.figures.world import FIGURES

MOVING = {"man-skiing", "astronaut-walking", "man-running", "panda-jumping", "woman-push-ups"}
SKIING = CLIPS["man-skiing"]
FRAMES = 5
EACH_CLIP = pytest.mark.parametrize("name", CLIPS)


@EACH_CLIP
def test_edits_ask_for_one_change_each(name):
    clip, edits = CLIPS[name], EDITS[name]
    assert [edit.kind for edit in edits] == [
        *("source", "subject", "subject", "clothes", "clothes", "background", "background"),
        *("style", "all", "open", "open", "open"),
    ]
    assert edits[0].prompt == FIGURES.describe(clip)
    assert len({edit.prompt for edit in edits}) == len(edits)
    for edit in edits:
        changed = {key for key, value in edit.asks.items() if value != getattr(clip, key)}
        several = {"all": {"subject", "clothes", "background"}, "source": set(), "open": set()}
        assert changed == several.get(edit.kind, {edit.kind})
        if edit.kind == "open":
            assert set(edit.asks) < {"subject", "verb", "background"}
        else:
            assert set(edit.asks) == set(ATTRIBUTES)
        assert set(words_of(edit.prompt)) <= set(FIGURES.words)


def test_edits_ask_for_all_that_the_world_has_and_for_what_was_never_drawn():
    edits = [edit for edits in EDITS.values() for edit in edits]
    for name, values in ATTRIBUTES.items():
        assert {edit.asks[name] for edit in edits if name in edit.asks} == set(values)
    pairs = {(e.asks["subject"], e.asks["verb"]) for e in edits if e.kind == "subject"}
    assert len(pairs & HELD_OUT) > 4
    assert len(pairs - HELD_OUT) > 4


def test_the_papers_prompts_are_among_the_edits():
    prompts = {edit.prompt for edits in EDITS.values() for edit in edits}
    assert prompts > {
        "a panda is skiing on snow",
        "an astronaut is skiing on snow",
        "a man wearing red clothes is skiing on snow",
        "a man is skiing on the beach",
        "a man is skiing on snow, cartoon style",
        "an astronaut wearing blue clothes is skiing on the moon",
        "a panda is playing guitar in the forest",
        "a bear is playing guitar on the beach",
    }


@EACH_CLIP
def test_a_drawing_of_each_edit_is_measured_as_perfect(name):
    clip, phases = CLIPS[name], []
    for edit in EDITS[name]:
        if edit.kind == "open":
            continue
        figures = measure(render(replace(clip, **edit.asks), FRAMES), clip, edit.asks)
        # The detector may be wrong about one frame.
        for asked in (*edit.asks, "found"):
            assert figures[asked] >= 1 - 1 / FRAMES, (edit.prompt, asked)
        assert figures["error"] < 1.5
        if name in MOVING:
            assert figures["correlation"] > 0.9
        else:
            assert figures["correlation"] is None
        assert figures["flips"] <= 2 / (FRAMES - 1)
        assert figures["change"] < 2
        phases.append(figures["phase"])
    assert np.mean(phases) > 0.75


@pytest.mark.parametrize(
    "wrong",
    [
        {"subject": "robot"},
        {"verb": "waving"},
        {"clothes": "purple"},
        {"background": "street"},
        {"style": "sketch"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_video_of_something_else_is_wrong_in_just_that(wrong):
    asks = {name: getattr(SKIING, name) for name in ATTRIBUTES}
    figures = measure(render(replace(SKIING, **wrong), 8), SKIING, asks)
    for name in ATTRIBUTES:
        assert figures[name] == pytest.approx(float(name not in wrong), abs=1 / 8), name
    if "verb" in wrong:
        assert figures["phase"] <= 1 / 8


@EACH_CLIP
def test_a_clip_played_backwards_is_out_of_phase(name):
    figures = measure(render(CLIPS[name], 8)[::-1], CLIPS[name], {})
    assert figures["phase"] <= 0.5
    if CLIPS[name].travel:
        assert figures["correlation"] < -0.9


@pytest.mark.parametrize("name", ["man-skiing", "bear-guitar", "robot-walking"])
@pytest.mark.parametrize(("late", "in_phase"), [(0.05, 1), (0.25, 0), (-0.25, 0), (0.5, 0)])
def test_a_video_may_be_late_by_an_eighth_of_what_is_visible(name, late, in_phase):
    clip = CLIPS[name]
    phase = clip.phase + late / STEPS_PER_PERIOD.get(clip.verb, 1)
    figures = measure(render(replace(clip, phase=phase), 8), clip, {})
    assert figures["phase"] == pytest.approx(in_phase, abs=1 / 4)


@pytest.mark.parametrize(
    ("change", "correlation", "error"),
    [
        pytest.param(lambda video: np.roll(video, 3, axis=2), 1, 3, id="three pixels beside"),
        pytest.param(lambda video: video[:1].repeat(8, axis=0), 0, 9.4, id="still"),
    ],
)
def test_motion_is_compared_with_the_clips(change, correlation, error):
    figures = measure(change(render(SKIING, 8)), SKIING, {})
    assert figures["correlation"] == pytest.approx(correlation, abs=0.1)
    assert figures["error"] == pytest.approx(error, abs=1)


def test_what_a_prompt_leaves_open_is_not_measured():
    for edit in EDITS["man-skiing"]:
        figures = measure(render(SKIING, 2), SKIING, edit.asks)
        assert {name for name in ATTRIBUTES if figures[name] is not None} == set(edit.asks)


def test_without_a_figure_nothing_is_said_of_its_motion():
    video = render(SKIING, 8)
    video[:3] = video[0, :, :8].repeat(8, axis=1)  # snow and sky alone
    figures = measure(video, SKIING, {"subject": "man"})
    assert figures["found"] == figures["subject"] == 5 / 8
    assert figures["phase"] <= 5 / 8
    assert figures["correlation"] is None
    assert figures["error"] is None


def test_looks_that_change_are_told_from_motion():
    calm = measure(render(SKIING, 8), SKIING, {})
    flickering = render(SKIING, 8)
    flickering[::2] = render(replace(SKIING, clothes="yellow"), 8)[::2]
    restless = np.stack([render(replace(SKIING, view=i), 8)[i] for i in range(8)])
    for video, flips in ((flickering, 1), (restless, 0)):
        figures = measure(video, SKIING, {})
        assert figures["change"] > 10 * calm["change"]
        assert figures["flips"] == pytest.approx(flips, abs=2 / 7)


def test_a_background_that_pans_with_the_clips_camera_does_not_change():
    clip = CLIPS["robot-walking"]
    assert clip.pan
    changes = {
        pan: measure(render(replace(clip, pan=pan), 8), clip, {})["change"]
        for pan in (clip.pan, 0.0, -clip.pan)
    }
    assert changes[clip.pan] < 1
    assert changes[0.0] > 5
    assert changes[-clip.pan] > 5


def scores_of(video, prompt, source=None):
    video = video.repeat(4, axis=1).repeat(4, axis=2)  # as the videos of runs are enlarged
    if source is not None:
        source = source.repeat(4, axis=1).repeat(4, axis=2)
    subject = Subject(Example("", Path(), prompt, ""), Material(video, source))
    return compute(list(METRICS.values()), subject)


def test_evaluate_measures_videos_of_figures_as_experiments_do():
    red = replace(SKIING, clothes="red")
    video, source = render(red, 8), render(SKIING, 8)
    scores, reasons = scores_of(video, describe(red), source)
    assert scores.keys() == METRICS.keys()
    assert scores.pop("trajectory.figures") == pytest.approx(1, abs=0.01)
    assert set(scores.values()) == {1}
    assert not reasons

    panda = replace(red, subject="panda", clothes="own")
    scores, _ = scores_of(video[::-1], describe(panda), source)
    assert scores["trajectory.figures"] < -0.9
    assert scores["phase.figures"] <= 0.5
    asked = measure(video[::-1], SKIING, {name: getattr(panda, name) for name in ATTRIBUTES})
    assert {name: scores[f"{name}.figures"] for name in ATTRIBUTES} == {
        name: asked[name] for name in ATTRIBUTES
    }
    assert scores["attributes.figures"] == pytest.approx(3 / 5)

    scores, _ = scores_of(np.zeros_like(video), describe(red), source)
    assert scores["trajectory.figures"] == scores["phase.figures"] == scores["verb.figures"] == 0


@pytest.mark.parametrize(
    ("prompt", "source", "metric", "reason"),
    [
        ("a cat in a hat", SKIING, "attributes.figures", "names nothing of the figures' world"),
        ("a man", SKIING, "verb.figures", "the prompt names no verb"),
        ("a man", None, "trajectory.figures", "no source video"),
        ("a man", None, "phase.figures", "no source video"),
        ("a man", CLIPS["woman-waving"], "trajectory.figures", "stays where it is"),
    ],
)
def test_what_cannot_be_measured_has_a_reason(prompt, source, metric, reason):
    source = None if source is None else render(source, 8)
    scores, reasons = scores_of(render(SKIING, 8), prompt, source)
    assert metric not in scores
    assert reason in reasons[metric]
