"""The measures of edited videos, on videos of which every answer is known."""

from dataclasses import replace

import numpy as np
import pytest

from tav_jax.evaluation.intervals import bootstrap
from tav_jax.worlds.report import EDITS, Measure, compare, right_share, summarise, write_report
from tav_jax.worlds.tiny_scenes.drawing import render
from tav_jax.worlds.tiny_scenes.edits import edits_of
from tav_jax.worlds.tiny_scenes.metrics import measure
from tav_jax.worlds.tiny_scenes.scenes import ATTRIBUTES, CLIPS

CLIP = CLIPS["circle-right"]


@pytest.mark.parametrize("name", CLIPS)
def test_the_clip_itself_is_measured_as_perfect(name):
    clip = CLIPS[name]
    figures = measure(render(clip, 8), clip, edits_of(clip)[0].asks)
    for right in (*ATTRIBUTES, "found"):
        assert figures[right] == 1
    assert figures["correlation"] > 0.99
    assert figures["error"] < 0.2
    assert figures["flips"] == 0
    assert figures["change"] < 0.1


@pytest.mark.parametrize("name", CLIPS)
def test_a_drawing_of_each_edit_is_measured_as_perfect(name):
    clip = CLIPS[name]
    for edit in edits_of(clip):
        wanted = replace(clip, **edit.asks)
        # At the middle of the image every subject has room.
        figures = measure(
            render(replace(wanted, motion="still", x=15.0, y=17.0), 4), clip, edit.asks
        )
        assert all(figures[asked] == 1 for asked in edit.asks), edit


def test_edits_ask_for_one_change_each():
    for clip in CLIPS.values():
        edits = edits_of(clip)
        assert len(edits) == 12
        assert len({edit.prompt for edit in edits}) == 12
        for edit in edits:
            changed = {name for name, value in edit.asks.items() if value != getattr(clip, name)}
            expected = {
                "all": {"subject", "colour", "background"},
                "source": set(),
                "open": set(),
            }.get(edit.kind, {edit.kind})
            assert changed == expected
            assert edit.kind != "open" or set(edit.asks) < {"subject", "colour", "background"}


@pytest.mark.parametrize(
    ("change", "correlation", "error"),
    [
        pytest.param(lambda video: video[::-1], -1, 8.57, id="backwards"),
        pytest.param(lambda video: np.roll(video, 3, axis=2), 1, 3, id="three pixels beside"),
        pytest.param(lambda video: video[:1].repeat(8, axis=0), 0, 7.5, id="still"),
    ],
)
def test_motion_is_compared_with_the_clips(change, correlation, error):
    figures = measure(change(render(CLIP, 8)), CLIP, {})
    assert figures["correlation"] == pytest.approx(correlation, abs=0.02)
    assert figures["error"] == pytest.approx(error, abs=0.15)


def test_growth_is_a_motion():
    clip = CLIPS["ring-growing"]
    assert measure(render(clip, 8)[::-1], clip, {})["correlation"] < -0.99


def test_without_a_subject_nothing_is_said_of_its_motion():
    video = render(CLIP, 8)
    video[:3] = video[0, :, -8:].repeat(4, axis=1)  # grass alone
    figures = measure(video, CLIP, {"subject": "circle", "colour": "red", "background": "grass"})
    assert figures["found"] == figures["subject"] == figures["colour"] == 5 / 8
    assert figures["background"] == 1
    assert figures["correlation"] is None
    assert figures["error"] is None
    assert figures["flips"] == pytest.approx(1 / 7)


def test_looks_that_change_are_told_from_motion():
    calm = measure(render(CLIP, 8), CLIP, {})
    flickering = render(CLIP, 8)
    flickering[::2] = render(replace(CLIP, colour="yellow"), 8)[::2]
    restless = np.stack([render(replace(CLIP, seed=i), 8)[i] for i in range(8)])
    for video, flips in ((flickering, 1), (restless, 0)):
        figures = measure(video, CLIP, {})
        assert figures["change"] > 20 * calm["change"]
        assert figures["flips"] == flips


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [
        low <= 0 <= high
        for _, low, high in (bootstrap(rng.normal(size=30).tolist()) for _ in range(300))
    ]
    assert 0.9 < np.mean(covered) < 0.98
    assert bootstrap([0.25, 0.25]) == (0.25, 0.25, 0.25)


def records():
    def video(kind, value):
        names = ("subject", "colour", "background", "style", "found", "flips", "change")
        return {"kind": kind, "prompt": "a"} | dict.fromkeys(
            (*names, "correlation", "error"), value
        )

    return [
        {
            "variant": v,
            "clip": clip,
            "motion": motion,
            "seed": seed,
            "videos": [
                video("source", 1.0),
                video("open", 0.5),
                video("subject", value),
                video("all", None),
            ],
        }
        for v in ("one", "two")
        for clip, motion, value in (("a", "right", 0.0), ("b", "growing", 1.0))
        for seed in (0, 1)
    ]


def test_a_clip_counts_once_and_missing_figures_not_at_all():
    unequal = records()
    unequal[0]["videos"] += [unequal[0]["videos"][2]] * 5
    motion = EDITS[1]
    assert motion.metric == "correlation"
    assert summarise(unequal, right_share("subject")).mean == 0.5
    assert summarise(records(), motion).mean == 0.0, "growing does not move"
    assert (
        summarise(records(), Measure("none", "error", lambda v: v["kind"] == "x", "less")) is None
    )


def test_a_difference_is_taken_clip_by_clip():
    right = right_share("subject")

    def with_all(lift):
        of_edits = [
            r | {"videos": [v for v in r["videos"] if v["kind"] == "subject"]}
            for r in records()[:4]
        ]
        for record in of_edits:
            record["videos"] = [v | {"subject": v["subject"] + lift} for v in record["videos"]]
        return of_edits

    ours, lifted = with_all(0.0), with_all(0.25)
    assert summarise(ours, right).high > summarise(lifted, right).low, "the intervals overlap"
    assert compare(lifted, ours, right) == (0.25, 0.25, 0.25)
    assert compare(ours, lifted[:2], right).mean == -0.25, "only of clips that both have"
    assert compare(ours, [], right) is None


@pytest.mark.parametrize("sweep", [None, "max_train_steps"])
def test_a_report_has_a_row_for_each_variant_and_its_plot(tmp_path, sweep):
    folder = tmp_path / "trial"
    all_right = [r | {"videos": [v for v in r["videos"] if v["kind"] != "all"]} for r in records()]
    write_report(folder, all_right, ["one", "two"], sweep, ATTRIBUTES)
    text = (folder / "report.md").read_text()
    assert text.count("\n| two |") == (3 if sweep else 5)
    assert ("## Less one, clip by clip" in text) == (not sweep)
    assert "| subject | 0.50 (0.00 to 1.00) |" in text
    assert "![all variants](trial.png)" in text
    assert "phase" not in text, "this world has no such metric"
    assert (folder / "trial.png").stat().st_size > 5000
