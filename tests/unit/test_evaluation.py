"""What is scored, how scores are kept, and the tables of them."""

import csv
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_configs import CLIP

from tav_jax.errors import MissingFileError, UserError
from tav_jax.evaluate import MINIATURE, MINIATURE_MODEL
from tav_jax.evaluation import clip_metrics, networks
from tav_jax.evaluation.clip_features import image_features, text_features
from tav_jax.evaluation.examples import Example, examples_of_systems, read_material
from tav_jax.evaluation.intervals import bootstrap
from tav_jax.evaluation.metrics import METRICS, Metric, select_metrics
from tav_jax.evaluation.published import published_rows
from tav_jax.evaluation.score_videos import score_videos
from tav_jax.evaluation.scores import Scored, score_examples
from tav_jax.evaluation.suites import read_suite
from tav_jax.evaluation.tables import (
    Evaluation,
    csv_text,
    json_text,
    markdown_table,
    read_scores,
    text_table,
)
from tav_jax.models.clip_image import CLIPModel
from tav_jax.pretrained.clip import Clip, save_clip
from tav_jax.pretrained.model import load_tokenizer
from tav_jax.pretrained.preprocess import Preprocessing

TOKENIZER = Path(__file__).parents[1] / "golden/base/tokenizer"
SUITES = Path(__file__).parents[2] / "configs/suites"


def write_frames(folder, frames):
    folder.mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{index}.png")
    return folder


def random_frames(seed, count=3, height=24, width=20):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.fixture
def systems(tmp_path):
    """Two systems with two videos each, their sources and masks, and the table of them."""
    for number, system in enumerate(("ours", "theirs")):
        for index, name in enumerate("ab"):
            write_frames(tmp_path / system / name, random_frames(10 * number + index))
    mask = np.zeros((3, 24, 20, 3), np.uint8)
    mask[:, :, :4] = 255
    for index, name in enumerate("ab"):
        write_frames(tmp_path / f"source-{name}", random_frames(100 + index))
        write_frames(tmp_path / f"mask-{name}", mask)
    write_table(
        tmp_path / "prompts.csv",
        ("video", "prompt", "source", "source_prompt", "mask"),
        ("a", "a panda, red", "source-a", "a man", "mask-a"),
        ("b", "a bear", "source-b", "a man", "mask-b"),
    )
    return tmp_path


def write_table(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def examples(folder):
    return examples_of_systems(
        {"ours": folder / "ours", "theirs": folder / "theirs"}, folder / "prompts.csv"
    )


def test_a_table_gives_each_system_its_videos(systems):
    found = examples(systems)
    assert [(one.system, one.video.name, one.prompt) for one in found] == [
        ("ours", "a", "a panda, red"),
        ("ours", "b", "a bear"),
        ("theirs", "a", "a panda, red"),
        ("theirs", "b", "a bear"),
    ]
    assert found[0].source == systems / "source-a"
    assert found[0].clip == found[2].clip
    material = read_material(found[0])
    np.testing.assert_array_equal(material.frames, random_frames(0))
    np.testing.assert_array_equal(material.source, random_frames(100))
    assert material.mask[:, :, :4].all()
    assert not material.mask[:, :, 4:].any()


def test_lines_before_the_columns_may_be_comments(systems):
    table = systems / "prompts.csv"
    table.write_text("# Of whom, and where from\n#, too\n" + table.read_text())
    assert [one.prompt for one in examples(systems)][:2] == ["a panda, red", "a bear"]
    table.write_text("# Of whom\nvideo,prompt\n# a,x\n")
    with pytest.raises(UserError, match=r"line 3: no such video: .*# a"):
        examples(systems)


@pytest.mark.parametrize("table", sorted(SUITES.glob("*.csv")), ids=lambda path: path.stem)
def test_shipped_tables_are_read_and_say_where_their_videos_come_from(table, tmp_path):
    assert "https://" in table.read_text().split("\nvideo")[0]
    with pytest.raises(UserError, match="no such video") as refused:
        examples_of_systems({"theirs": tmp_path}, table)
    count = len(str(refused.value).splitlines())
    for name in re.findall(r"no such video: (.*)", str(refused.value)):
        Path(name).touch()
    assert len(examples_of_systems({"theirs": tmp_path}, table)) == count


def test_a_source_of_another_size_is_resized_to_the_videos(systems):
    write_frames(systems / "source-a", random_frames(100, height=48, width=60))
    assert read_material(examples(systems)[0]).source.shape == (3, 24, 20, 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("video", "text"), ("a", "x")], "no column prompt; column 'text' is unknown"),
        ([("video", "prompt", "prompt"), ("a", "x", "y")], "column prompt is there twice"),
        ([("video", "prompt")], "has no rows"),
        ([("video", "prompt"), ("", "x"), ("a", "")], "line 2: no video\n.*line 3: no prompt"),
        ([("video", "prompt"), ("a", "x", "y")], "line 2: more values than columns"),
        ([("video", "prompt"), ("c", "x"), ("d", "y")], "line 2: no such video: .*line 3"),
        ([("video", "prompt", "source"), ("a", "x", "none")], "line 2: no such source"),
        ([("video", "prompt", "mask"), ("a", "x", "none")], "line 2: no such mask"),
    ],
)
def test_a_wrong_table_is_refused(systems, rows, message):
    write_table(systems / "prompts.csv", *rows)
    with pytest.raises(UserError, match=f"(?s){message}"):
        examples(systems)


@pytest.mark.parametrize(
    ("folder", "frames", "message"),
    [
        ("ours/a", random_frames(0, count=2), "ours/a has 2 frames, its source .*source-a 3"),
        ("mask-b", random_frames(0, count=2), "mask-b: 2 frames of 20x24, but its video"),
        ("mask-b", random_frames(0, width=21), "mask-b: 3 frames of 21x24, but its video"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_computed(
    systems, folder, frames, message
):
    for file in (systems / folder).iterdir():
        file.unlink()
    write_frames(systems / folder, frames)

    def never(subject):
        raise AssertionError

    with pytest.raises(UserError, match=message):
        score_examples(examples(systems), [Metric("none", "more", never)], None)


def test_metrics_are_chosen_by_name_or_beginning():
    assert select_metrics(None, ["tiny-figures"]) == list(METRICS.values())
    without = [name for name in METRICS if not name.endswith(".figures")]
    assert [metric.name for metric in select_metrics(None, ["another"])] == without
    chosen = [metric.name for metric in select_metrics(["flicker.vbench", "ff_"])]
    assert sorted(chosen) == ["ff_alpha.editboard", "ff_beta.editboard", "flicker.vbench"]
    with pytest.raises(UserError, match=r"fid, lpips is no metric; there are clip_text.loveu"):
        select_metrics(["fid", "flicker", "lpips"])


def test_scores_are_kept_by_content(systems, tmp_path):
    seen = []

    def brightness(subject):
        seen.append(subject.example.video.name)
        return float(subject.frames.mean())

    metric = Metric("brightness", "more", brightness)
    first = score_examples(examples(systems), [metric], tmp_path / "kept")
    assert seen == ["a", "b", "a", "b"]
    (systems / "ours").rename(systems / "moved")
    again = examples_of_systems({"same": systems / "moved"}, systems / "prompts.csv")
    assert score_examples(again, [metric], tmp_path / "kept")[1].scores == first[1].scores
    assert len(seen) == 4, "the same content is not scored again"

    changed = random_frames(0)
    changed[0, 0, 0, 0] ^= 1
    write_frames(systems / "moved/a", changed)
    other_prompt = [
        replace(one, prompt="another") if one.video.name == "b" else one for one in again
    ]
    score_examples(other_prompt, [metric], tmp_path / "kept")
    assert seen[4:] == ["a", "b"], "another frame and another prompt are other content"

    for file in (tmp_path / "kept").iterdir():
        file.write_text(file.read_text()[:9])
    assert score_examples(again, [metric], tmp_path / "kept")[1].scores == first[1].scores
    assert len(seen) == 8, "a damaged file counts as none"


def test_what_is_not_computed_is_named_with_the_reason(systems):
    write_table(systems / "prompts.csv", ("video", "prompt", "source"), ("a", "x", "source-a"))
    plain = examples_of_systems({"ours": systems / "ours"}, systems / "prompts.csv")
    wanted = ["clip_text.loveu", "background_psnr", "flicker.vbench"]
    metrics = [METRICS[name] for name in wanted]
    (result,) = score_examples(plain, metrics, None)
    assert result.scores.keys() == {"flicker.vbench"}
    evaluation = Evaluation(metrics, [result], [])
    reasons = {names[0]: reason for reason, names in evaluation.not_computed().items()}
    assert reasons["background_psnr"] == "no mask is given"
    assert "--download fetches it, --clip-l14 names a folder" in reasons["clip_text.loveu"]
    for text in (text_table(evaluation), markdown_table(evaluation)):
        assert "not computed: background_psnr: no mask is given" in text


@pytest.fixture
def clip_folder(random_network, tmp_path, monkeypatch):
    """A small CLIP, and networks of which ViT-B/32 has its shape."""
    text = replace(CLIP.text_config, vocab_size=2014, max_position_embeddings=16)
    config = replace(CLIP, text_config=text, eos_token_id=2013)
    network = random_network(CLIPModel, config)
    folder = tmp_path / "clip"
    small = Clip(load_tokenizer(TOKENIZER), network, Preprocessing(size=13, crop_size=11))
    save_clip(folder, small)
    shape = (CLIP.vision_config.hidden_size, CLIP.vision_config.num_hidden_layers, 5)
    known = networks.NETWORKS["ViT-B/32"]._replace(shape=shape)
    monkeypatch.setitem(networks.NETWORKS, "ViT-B/32", known)
    return folder, small


def test_clip_metrics_are_those_of_the_networks_features(systems, clip_folder):
    folder, clip = clip_folder
    metrics = select_metrics(["clip_frames.fatezero", "clip_accuracy.fatezero"])
    results = score_examples(examples(systems), metrics, None, networks={"ViT-B/32": str(folder)})
    for result in results:
        frames = image_features(clip, read_material(result.example).frames).projected
        prompt, source = text_features(clip, [result.example.prompt, "a man"]).projected
        expected = {
            "clip_frames.fatezero": clip_metrics.temporal_similarity(frames),
            "clip_accuracy.fatezero": clip_metrics.prompt_accuracy(frames, source, prompt),
        }
        assert result.scores == pytest.approx(expected, abs=1e-6)


def test_another_networks_folder_is_refused_before_anything_is_computed(systems, clip_folder):
    folder, _ = clip_folder
    with pytest.raises(UserError, match=r"--clip-l14: .*is not ViT-L/14: .* width 12, 2 lay"):
        score_examples(
            examples(systems), select_metrics(None), None, networks={"ViT-L/14": str(folder)}
        )
    with pytest.raises(MissingFileError, match=r"not a folder of CLIP"):
        networks.locate("ViT-B/32", {"ViT-B/32": str(systems)}, download=False).load()


def results():
    """Scores of two systems on two clips, the first with two videos of the first clip."""
    values = {
        "ours": [("x", 1.0), ("x", 3.0), ("y", 5.0)],
        "theirs": [("x", 0.5), ("y", 0.25)],
    }
    return [
        Scored(
            Example(system, Path(f"{system}/{number}.mp4"), "a prompt, with | marks", clip=clip),
            {"flicker.vbench": value},
        )
        for system, scored in values.items()
        for number, (clip, value) in enumerate(scored)
    ]


def test_means_are_over_clips():
    metrics = [METRICS["flicker.vbench"], METRICS["background_psnr"]]
    rows = published_rows({"clip_frames.v2vbench"})
    evaluation = Evaluation(metrics, results(), rows)
    tree = json.loads(json_text(evaluation))
    mean, low, high = bootstrap([2.0, 5.0])
    assert tree["systems"]["ours"] == {
        "flicker.vbench": {"mean": mean, "low": low, "high": high, "n": 3}
    }
    assert tree["systems"]["theirs"]["flicker.vbench"]["mean"] == 0.375
    assert tree["videos"][0] == {
        "system": "ours",
        "video": "ours/0.mp4",
        "prompt": "a prompt, with | marks",
        "flicker.vbench": 1.0,
    }
    published = {(row["system"], row["metric"]): row["value"] for row in tree["published"]}
    assert published["Tune-A-Video", "clip_text.paper"] == 26.57
    assert published["Tune-A-Video", "clip_frames.v2vbench"] == 0.934
    assert not any(metric.endswith("loveu") for _, metric in published)

    lines = list(csv.DictReader(csv_text(evaluation).splitlines()))
    assert [line["flicker.vbench"] for line in lines] == ["1.0", "3.0", "5.0", "0.5", "0.25"]
    assert lines[0]["background_psnr"] == ""
    assert "flicker.vbench  more    3.5000 (2.0000 to 5.0000)" in text_table(evaluation)
    table = markdown_table(evaluation)
    assert "| metric | better | ours, 3 videos | theirs, 2 videos |" in table
    assert "| flicker.vbench | more | 3.5000 (2.0000 to 5.0000) | 0.3750" in table


def test_the_miniature_stands_beside_what_is_scored():
    metrics = [METRICS["clip_text.figures"], METRICS["flicker.vbench"]]
    miniature = [
        Scored(Example(system, Path(f"{clip}.mp4"), "a bear", clip=clip), {metrics[0].name: value})
        for system, clip, value in (("full", "x", 25.0), ("full", "y", 24.0), ("plain", "x", 20.5))
    ]
    evaluation = Evaluation(metrics, results(), [], miniature)
    assert "on other clips  clip_text.figures\nfull " in text_table(evaluation)
    assert "| full | 24.50 |\n| plain | 20.50 |" in markdown_table(evaluation)
    tree = json.loads(json_text(evaluation))
    assert tree["miniature"]["full"]["clip_text.figures"]["mean"] == 24.5
    assert tree["systems"].keys() == {"ours", "theirs"}
    assert not any(video["system"] == "full" for video in tree["videos"])
    others = evaluation._replace(metrics=metrics[1:])
    assert "miniature" not in text_table(others)


def test_the_shipped_miniature_is_of_the_papers_suite():
    scored = read_scores(MINIATURE, select_metrics(None, [MINIATURE_MODEL]))
    suite, _ = read_suite(SUITES / "paper.yaml", Path("outputs/suites/paper"))
    edits = {(clip.folder, prompt) for clip in suite.clips for prompt in clip.edits}
    for system in suite.systems:
        own = [one for one in scored if one.example.system == system]
        counts = Counter((one.example.video.parts[-5], one.example.prompt) for one in own)
        assert counts.keys() == edits
        assert len(set(counts.values())) == 1  # whole seeds
        assert all("clip_text.figures" in one.scores for one in own)


def test_arrays_get_the_scores_of_files(systems):
    names = ["flicker", "motion", "background_psnr", "clip_text.figures"]
    examples = examples_of_systems({"ours": systems / "ours"}, systems / "prompts.csv")[:1]
    [of_files] = score_examples(examples, select_metrics(names), None)
    mask = np.zeros((3, 24, 20), bool)
    mask[:, :, :4] = True
    given = {"source": random_frames(100), "source_prompt": "a man", "mask": mask}
    videos, prompts = random_frames(0)[None], ["a panda, red"]
    [of_arrays] = score_videos(videos, prompts, **given, metrics=names)
    assert of_arrays == pytest.approx(of_files.scores, rel=1e-5)  # there on all devices
    assert len(of_files.scores) == 5

    # By default what can be computed, and named ones or an error.
    alone = score_videos(videos, prompts)
    assert alone == [{"flicker.vbench": of_files.scores["flicker.vbench"]}]
    with pytest.raises(UserError, match=r"motion_alignment\.dis: no source video is given"):
        score_videos(videos, prompts, metrics=["motion", "flicker"])
    with pytest.raises(UserError, match="fid is no metric"):
        score_videos(videos, prompts, metrics=["fid"])
    with pytest.raises(ValueError, match="1 videos have 2 prompts"):
        score_videos(videos, [*prompts, "a bear"])
