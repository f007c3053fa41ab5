from collections import Counter
from dataclasses import replace
from pathlib import Path

import einops
import numpy as np
import pytest

from tav_jax.evaluation.suites import read_suite
from tav_jax.video.read import read_all_frames
from tav_jax.worlds.figures.drawing import centre, cover, draw_batch, render, truth, visible_phase
from tav_jax.worlds.figures.edits import EDITS
from tav_jax.worlds.figures.poses import LOWER_ARM, SHIN, THIGH, TORSO, UPPER_ARM, pose
from tav_jax.worlds.figures.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    CLIPS,
    CLOTHES,
    HELD_OUT,
    SIZE,
    STYLES,
    SUBJECTS,
    TRAVELLING,
    VERBS,
    WORDS,
    Scene,
    caption,
    describe,
    sample_scenes,
    values_named,
    words_of,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_the_same_scenes_are_the_same_images_in_any_batch():
    scenes = sample_scenes(np.random.default_rng(3), 30, held_out=None)
    assert scenes == sample_scenes(np.random.default_rng(3), 30, held_out=None)
    times = np.linspace(0, 1, 30)
    images, masks = draw_batch(scenes, times)
    for i, scene in enumerate(scenes):
        image, mask = draw_batch([scene], times[i : i + 1])
        np.testing.assert_array_equal(image[0], images[i])
        np.testing.assert_array_equal(mask[0], masks[i])


@pytest.mark.parametrize("verb", VERBS)
def test_a_pose_repeats_and_its_bones_keep_their_lengths(verb):
    for phase in np.linspace(0, 1, 24, endpoint=False).tolist():
        held, later = pose(verb, phase), pose(verb, phase + 1)
        np.testing.assert_allclose(held.head, later.head, atol=1e-9)
        np.testing.assert_allclose(held.arms, later.arms, atol=1e-9)
        np.testing.assert_allclose(held.legs, later.legs, atol=1e-9)
        assert np.hypot(*np.subtract(held.chest, held.hips)) == pytest.approx(TORSO)
        for limbs, (upper, lower) in (
            (held.arms, (UPPER_ARM, LOWER_ARM)),
            (held.legs, (THIGH, SHIN)),
        ):
            for limb in limbs:
                assert np.hypot(*np.subtract(limb.joint, limb.root)) == pytest.approx(upper)
                assert np.hypot(*np.subtract(limb.end, limb.joint)) == pytest.approx(lower)


@pytest.mark.parametrize("verb", VERBS)
def test_phases_of_a_verb_are_different_images(verb):
    scene = Scene("man", verb, "street")
    shown = np.stack([render(replace(scene, phase=i / 8), 1)[0] for i in range(8)]).astype(int)
    for i in range(8):
        for j in range(i):
            if visible_phase(replace(scene, phase=i / 8), 0) != visible_phase(
                replace(scene, phase=j / 8), 0
            ):
                assert (np.abs(shown[i] - shown[j]).max(-1) > 30).sum() > 15, (i, j)


def test_figures_stay_inside_the_image(rng):
    scenes = sample_scenes(rng, 300, held_out=None)
    _, masks = draw_batch(scenes, rng.random(300))
    border = np.ones((SIZE, SIZE), bool)
    border[1:-1, 1:-1] = False
    outside = masks[:, border].sum(axis=1)
    assert not [scene for scene, share in zip(scenes, outside, strict=True) if share > 0.5]
    assert (masks.sum((1, 2)) > 250).all(), "a figure is large enough to be seen"


def test_only_travelling_verbs_cross_the_image_and_in_their_direction(rng):
    for scene in sample_scenes(rng, 200, held_out=None):
        way = centre(scene, 1)[0] - centre(scene, 0)[0]
        if scene.verb in TRAVELLING:
            assert way * scene.facing > 5
        else:
            assert abs(way) < 6


def test_the_mask_is_what_the_figure_changes(rng):
    for scene in sample_scenes(rng, 20):
        frame, mask = render(scene, 1)[0], truth(scene, 1).mask[0]
        other = render(replace(scene, background="moon", style="plain", pan=0.0), 1)[0]
        if scene.style == "plain":
            np.testing.assert_array_equal(frame[mask == 1], other[mask == 1])
    assert cover(truth(scene, 2).mask, 4).shape == (2, SIZE // 4, SIZE // 4)


def test_a_camera_that_pans_moves_the_background_and_not_the_figure():
    scene = Scene("robot", "waving", "street", periods=0.0, pan=20.0)
    frames, (_, _, mask) = render(scene, 3), truth(scene, 3)
    np.testing.assert_array_equal(mask[0], mask[2])
    np.testing.assert_array_equal(frames[0][mask[0] == 1], frames[2][mask[0] == 1])
    assert (np.abs(frames[0].astype(int) - frames[2])[mask[0] == 0].max(-1) > 30).mean() > 0.1


def test_held_out_pairs_never_appear_unless_asked_for(rng):
    def pairs(held_out):
        scenes = sample_scenes(rng, 3000, held_out=held_out)
        return {(scene.subject, scene.verb) for scene in scenes}

    assert not pairs(False) & HELD_OUT
    assert pairs(True) == HELD_OUT
    assert pairs(None) == {(subject, verb) for subject in SUBJECTS for verb in VERBS}
    assert {("panda", "skiing"), ("astronaut", "skiing")} < HELD_OUT
    assert {subject for subject, _ in HELD_OUT} == set(SUBJECTS)
    assert {verb for _, verb in HELD_OUT} == set(VERBS)
    assert not {(clip.subject, clip.verb) for clip in CLIPS.values()} & HELD_OUT


def test_captions_say_what_is_drawn_in_words_of_the_world(rng):
    seen = Counter()
    for scene in sample_scenes(rng, 3000, held_out=None):
        text = caption(scene, rng)
        words = set(words_of(text))
        assert words <= set(WORDS)
        seen.update(words)
        assert words & {*SUBJECTS, "someone"} <= {scene.subject, "someone"}
        assert words & set(CLOTHES[1:]) == {scene.clothes} - {"own"}
        assert text.endswith(f", {scene.style} style") == (scene.style != "plain")
        for said, known in ((scene.verb, VERBS), (scene.background, BACKGROUNDS)):
            named = {
                name for name, phrases in known.items() for phrase in phrases if phrase in text
            }
            assert named <= {said}
    assert set(seen) == set(WORDS)


def test_what_a_caption_names_is_read_from_it(rng):
    named = Counter()
    for scene in sample_scenes(rng, 500, held_out=None):
        values = values_named(caption(scene, rng))
        assert all(getattr(scene, name) == value for name, value in values.items())
        named.update(values.keys())
        assert values_named(describe(scene)) == {name: getattr(scene, name) for name in ATTRIBUTES}
    assert named["style"] == 500
    assert named["clothes"] > named["subject"] > named["background"] > 380
    assert values_named("a cat wearing a hat is swimming") == {"style": "plain"}


def test_prompts_have_the_grammar_of_the_paper():
    scene = CLIPS["man-skiing"]
    assert describe(scene) == "a man is skiing on snow"
    red = replace(scene, clothes="red", background="street")
    assert describe(red) == "a man wearing red clothes is skiing in the street"
    walker = replace(CLIPS["astronaut-walking"], style="cartoon")
    assert describe(walker) == "an astronaut is walking on the moon, cartoon style"
    assert describe(scene, subject=False, background=False) == "someone is skiing"


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_clips_stand_where_scenes_of_the_training_set_do(clip):
    scenes = [s for s in sample_scenes(np.random.default_rng(0), 5000) if s.verb == clip.verb]
    grounds = [scene.ground for scene in scenes]
    assert min(grounds) <= clip.ground <= max(grounds)
    assert min(scene.scale for scene in scenes) <= clip.scale <= max(s.scale for s in scenes)
    places = [x for scene in scenes for x in (scene.x, scene.x + scene.facing * scene.travel)]
    for x in (clip.x, clip.x + clip.facing * clip.travel):
        assert min(places) <= x <= max(places)


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_clips_stay_inside_the_image(clip):
    mask = truth(clip, 8).mask
    border = np.ones((SIZE, SIZE), bool)
    border[1:-1, 1:-1] = False
    assert mask[:, border].sum(axis=1).max() < 0.5


@pytest.mark.parametrize("name", CLIPS)
def test_a_shipped_clip_is_the_worlds_drawing(name):
    shown = read_all_frames(ROOT / f"configs/clips/figures/{name}.mp4")
    drawn = render(CLIPS[name], len(shown))
    reduced = einops.reduce(
        shown.astype(np.float32), "f (h a) (w b) c -> f h w c", "mean", a=4, b=4
    )
    assert np.abs(reduced - drawn).mean() < 2.5


def test_the_papers_suite_edits_the_shipped_clips_as_the_experiments_do(tmp_path):
    suite, runs = read_suite(ROOT / "configs/suites/paper.yaml", tmp_path)
    made = Counter()
    for run in runs:
        made[run.system] += len(run.config.validation_data.prompts)
    assert sorted(made.values()) == [64] + [256] * 3 + [1024] * 2
    edits = {clip.folder: [clip.prompt, *clip.edits] for clip in suite.clips}
    assert edits == {
        name: [edit.prompt for edit in EDITS[name] if edit.kind != "open"] for name in CLIPS
    }


def test_every_style_is_drawn_differently():
    shown = [render(Scene("man", "waving", "beach", style=style), 1)[0] for style in STYLES]
    for i in range(len(STYLES)):
        for j in range(i):
            assert np.abs(shown[i].astype(int) - shown[j]).mean() > 8
