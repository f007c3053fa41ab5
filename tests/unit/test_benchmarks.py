"""Published benchmarks, in small copies of their layouts."""

import csv
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from tav_jax.errors import UserError
from tav_jax.evaluation.benchmarks import examples_of_benchmark, loveu_clips, v2vbench_clips
from tav_jax.evaluation.examples import read_material
from tav_jax.evaluation.suites import read_suite

COLUMNS = (
    "Video name",
    "Our GT caption",
    "Style Change Caption",
    "Object Change Caption",
    "Background Change Caption ",  # with a space at its end, as it is published
    "Multiple Changes Caption",
)
KINDS = ("style", "object", "background", "multiple")


def write_frames(folder, suffix="jpg"):
    folder.mkdir(parents=True)
    for index in range(2):
        Image.fromarray(np.full((16, 16, 3), 90 * index, np.uint8)).save(
            folder / f"{index:05}.{suffix}"
        )


def captions(name):
    return tuple(f"{name}, {kind}" for kind in ("source", *KINDS))


@pytest.fixture
def loveu(tmp_path):
    folder = tmp_path / "loveu-tgve-2023"
    write_frames(folder / "DAVIS_480p/480p_frames/judo")
    write_frames(folder / "youtube_480p/480p_frames/salsa")
    write_frames(folder / "videvo_480p/480p_videos/swans.mp4")  # what it is does not matter here
    rows = [
        ("DAVIS Videos:", *[""] * 5),
        ("judo", *captions("judo")),
        ("", *[""] * 5),
        ("Youtube Videos:", *[""] * 5),
        ("salsa ", *captions("salsa")),
        ("Videvo Videos:", *[""] * 5),
        ("swans", *captions("swans")),
    ]
    with (folder / "LOVEU-TGVE-2023_Dataset.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return folder


@pytest.fixture
def v2vbench(tmp_path):
    folder = tmp_path / "v2vbench"
    write_frames(folder / "videos/hike")
    write_frames(folder / "videos/bear")
    entries = [
        {"video_id": "hike", "prompt": "a man hikes", "edit": [{"prompt": "a superman hikes"}]},
        {"video_id": "bear", "edit": [{"prompt": "a panda"}, {"prompt": "a bear, pixel art"}]},
    ]
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": entries}))
    return folder


def test_loveu_has_four_edits_a_clip(loveu):
    clips = loveu_clips(loveu)
    assert [clip.name for clip in clips] == [
        "DAVIS_480p/judo",
        "youtube_480p/salsa",
        "videvo_480p/swans",
    ]
    assert clips[1].prompt == "salsa, source"
    assert clips[1].edits == {kind: f"salsa, {kind}" for kind in KINDS}
    assert clips[1].source == loveu / "youtube_480p/480p_frames/salsa"


def test_edits_of_loveu_are_read_as_they_are_handed_in(loveu, tmp_path):
    for clip in ("DAVIS_480p/judo", "youtube_480p/salsa", "videvo_480p/swans"):
        for kind in KINDS:
            write_frames(tmp_path / "ours" / clip / kind)
    examples = examples_of_benchmark({"ours": tmp_path / "ours"}, loveu_clips(loveu))
    assert len(examples) == 12
    assert examples[1].prompt == "judo, object"
    assert examples[1].source_prompt == "judo, source"
    assert read_material(examples[1]).source.shape == (2, 16, 16, 3)
    assert {one.clip for one in examples[:4]} == {"DAVIS_480p/judo"}

    (tmp_path / "ours/DAVIS_480p/judo/style").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"ours: no video .*judo/style"):
        examples_of_benchmark({"ours": tmp_path / "ours"}, loveu_clips(loveu))


def test_edits_of_v2vbench_have_the_prompts_numbers(v2vbench, tmp_path):
    for video in ("hike/0", "bear/0", "bear/1"):
        write_frames(tmp_path / "ours" / video, "png")
    examples = examples_of_benchmark({"ours": tmp_path / "ours"}, v2vbench_clips(v2vbench))
    assert [(one.clip, one.prompt) for one in examples] == [
        ("hike", "a superman hikes"),
        ("bear", "a panda"),
        ("bear", "a bear, pixel art"),
    ]
    assert examples[0].source_prompt == "a man hikes"
    assert examples[1].source_prompt is None


def test_a_suite_edits_a_benchmarks_clips(loveu, tmp_path):
    size = {"n_sample_frames": 2, "width": 32, "height": 32}
    tree = {
        "benchmark": {"loveu": loveu.name},
        "systems": {"ours": {}},
        "settings": {"pretrained_model_path": "tiny-scenes", "train_data": size},
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(tree))
    suite, runs = read_suite(tmp_path / "suite.yaml", tmp_path / "out")
    assert len(suite.clips) == len(runs) == 3
    assert runs[0].folder == tmp_path / "out/ours/DAVIS_480p-judo/seed-0"
    assert runs[0].config.train_data.prompt == "judo, source"
    assert list(runs[0].config.validation_data.prompts) == [f"judo, {kind}" for kind in KINDS]


def test_a_suite_cannot_tune_on_a_clip_without_a_caption(v2vbench, tmp_path):
    tree = {"benchmark": {"v2vbench": v2vbench.name}, "systems": {"ours": {}}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"nothing says what these clips show.*: bear; add a key"):
        read_suite(tmp_path / "suite.yaml", tmp_path / "out")


def test_what_is_missing_of_loveu_is_listed(loveu):
    (loveu / "DAVIS_480p/480p_frames/judo").rename(loveu / "judo")
    (loveu / "youtube_480p").rename(loveu / "youtube")
    with pytest.raises(UserError) as error:
        loveu_clips(loveu)
    assert re.findall(r"line (\d+): no frames", str(error.value)) == ["3", "6"]
    table = loveu / "LOVEU-TGVE-2023_Dataset.csv"
    table.write_text("Video name,Caption\n")
    with pytest.raises(UserError, match="no column Our GT caption, Style Change Caption"):
        loveu_clips(loveu)
    table.write_text(",".join(COLUMNS))
    with pytest.raises(UserError, match="has no clips"):
        loveu_clips(loveu)
    table.unlink()
    with pytest.raises(UserError, match="No such file"):
        loveu_clips(loveu)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"videos": []}, "expected a list under data"),
        ({"data": []}, "expected a list under data"),
        ([3], "entry 1: expected video_id, and prompts under edit"),
        ({"data": [{"video_id": "hike"}]}, "entry 1: expected video_id"),
        ({"data": [{"video_id": "hike", "edit": []}]}, "entry 1: expected video_id"),
        ({"data": [{"video_id": "hike", "edit": [{"prompt": 3}]}]}, "entry 1: expected video_id"),
        ({"data": [{"video_id": "fox", "edit": [{"prompt": "a"}]}]}, "entry 1: no video of 'fox'"),
    ],
)
def test_another_table_than_v2vbenchs_is_refused(v2vbench, tree, message):
    (v2vbench / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=message):
        v2vbench_clips(v2vbench)
