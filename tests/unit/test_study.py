"""Preference studies: pairs, the page's data, and the table of answers."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tav_jax.errors import UserError
from tav_jax.evaluation.examples import Example
from tav_jax.evaluation.study import (
    COLUMNS,
    Answer,
    agreement,
    make_pairs,
    preference_table,
    preferences,
    read_answers,
    wilson,
    write_study,
)

ROW = ("study", "ann", "0", "a prompt", "quality", "ours", "theirs", "left")


@pytest.fixture
def examples(tmp_path):
    made = []
    for shade, system in enumerate(("ours", "theirs", "third")):
        for clip in ("a", "b", "c"):
            folder = tmp_path / system / clip
            folder.mkdir(parents=True)
            for index in range(2):
                image = np.full((32, 32, 3), 60 * shade + 9 * index, np.uint8)
                Image.fromarray(image).save(folder / f"{index}.png")
            made.append(Example(system, folder, f"prompt of {clip} </script>", clip=clip))
    return made


def write_answers(path, *rows, columns=COLUMNS):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_the_first_system_meets_each_other_one_on_all_they_share(examples):
    pairs = make_pairs([one for one in examples if one != examples[4]], seed=3)
    met = {(frozenset((p.left.system, p.right.system)), p.left.clip) for p in pairs}
    others = [("theirs", "a"), ("theirs", "c"), ("third", "a"), ("third", "b"), ("third", "c")]
    assert met == {(frozenset(("ours", system)), clip) for system, clip in others}
    assert len(pairs) == 5
    assert all((p.left.clip, p.left.prompt) == (p.right.clip, p.right.prompt) for p in pairs)


def test_order_and_sides_are_drawn_by_the_seed(examples):
    assert make_pairs(examples, 3) == make_pairs(examples, 3)
    drawn = [make_pairs(examples, seed) for seed in range(8)]
    assert len({tuple((p.left.clip, p.right.system) for p in pairs) for pairs in drawn}) > 4
    sides = [pair.left.system == "ours" for pairs in drawn for pair in pairs]
    assert 0.25 < np.mean(sides) < 0.75


def test_what_cannot_be_compared_is_refused(examples):
    with pytest.raises(UserError, match="there is one"):
        make_pairs(examples[:3], 0)
    with pytest.raises(UserError, match="no clip and prompt in common"):
        make_pairs([examples[0], replace(examples[4], prompt="another")], 0)


def test_the_page_has_all_it_needs_and_no_name_of_a_system(examples, tmp_path):
    page, pairs = tmp_path / "study.html", make_pairs(examples, 0)
    name = write_study(page, pairs, 0, 8.0)
    text = page.read_text()
    assert not re.search(r"ours|theirs|third", text)
    assert not re.search(r"""(src|href)=["']?http""", text)
    assert text.count("</script>") == 2, "the prompt's tag does not end the data"
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert (data["study"], data["seed"], len(data["pairs"])) == (name, 0, 6)
    assert [pair["prompt"] for pair in data["pairs"]] == [pair.left.prompt for pair in pairs]
    assert all(video.startswith("data:video/mp4;base64,") for video in data["videos"])
    assert len(data["videos"]) == len(examples), "each video is there once"
    assert write_study(page, make_pairs(examples, 1), 1, 8.0) != name


def test_the_table_has_a_majority_for_each_pair():
    votes = {  # raters' choices by pair, and the systems on its left and right
        0: (("ours", "theirs"), ["left", "left", "right"]),
        1: (("theirs", "ours"), ["right", "right", "right"]),
        2: (("theirs", "ours"), ["left", "left", "right"]),
        3: (("ours", "theirs"), ["left", "right"]),
    }
    answers = [
        Answer(f"rater {number}", pair, "quality", *systems, side)
        for pair, (systems, sides) in votes.items()
        for number, side in enumerate(sides)
    ]
    (row,) = preferences(answers)
    assert (row.question, row.system, row.other) == ("quality", "ours", "theirs")
    assert (row.pairs, row.ties, row.share) == (4, 1, (2 + 0.5) / 4)
    assert (row.low, row.high) == wilson(2.5, 4)
    assert row.agreement == pytest.approx((1 / 3 + 1 + 1 / 3 + 0) / 4)
    assert "| quality | ours | theirs | 62.50 % |" in preference_table([row], raters=3)
    turned = [replace(one, left=one.right, right=one.left) for one in answers]
    assert "| quality | theirs | ours | 62.50 % |" in preference_table(preferences(turned), 3)


def test_wilson_intervals_are_those_of_newcombe():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(float(successes), n) == pytest.approx((low, high), abs=5e-5)


def test_kappa_is_one_without_and_nought_with_chance_alone():
    assert agreement([(3, 0), (0, 3), (3, 0)]) == (1.0, 1.0)
    same, kappa = agreement([(1, 1), (2, 0), (0, 2), (1, 1)])
    assert (same, kappa) == (0.5, 0.0)
    assert agreement([(1, 0), (0, 1)]) == (None, None), "one rater agrees with nobody"
    assert agreement([(2, 0), (3, 0)]) == (1.0, None), "chance would agree always, too"


def test_answers_of_several_raters_are_read(tmp_path):
    ann = write_answers(tmp_path / "ann.csv", ROW, (*ROW[:4], "faithfulness", *ROW[5:]))
    bob = write_answers(tmp_path / "bob.csv", (ROW[0], "bob", *ROW[2:7], "right"))
    study, answers = read_answers([ann, bob])
    assert study == "study"
    assert [(one.rater, one.question, one.chosen) for one in answers] == [
        ("ann", "quality", "ours"),
        ("ann", "faithfulness", "ours"),
        ("bob", "quality", "theirs"),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("other", *ROW[1:])], "different studies: .*ann.csv .study study., .*bob.csv"),
        ([ROW], "line 2: this rater has answered it before"),
        ([(ROW[0], "bob", *ROW[2:5], "ours", "third", "left")], "pair 0 is of different systems"),
        ([(*ROW[:7], "both")], "line 2: no answer of a study"),
        ([(*ROW[:2], "one", *ROW[3:])], "line 2: no answer of a study"),
        ([(*ROW[:4], "beauty", *ROW[5:])], "line 2: no answer of a study"),
        ([ROW[:5]], "line 2: no answer of a study"),
        ([(*ROW, "more")], "line 2: no answer of a study"),
    ],
    ids=["study", "twice", "systems", "answer", "pair", "question", "short", "long"],
)
def test_other_answers_are_refused(tmp_path, rows, message):
    ann = write_answers(tmp_path / "ann.csv", ROW)
    with pytest.raises(UserError, match=message):
        read_answers([ann, write_answers(tmp_path / "bob.csv", *rows)])


def test_other_files_are_refused(tmp_path):
    table = write_answers(tmp_path / "table.csv", ("x", "y"), columns=("video", "prompt"))
    empty = write_answers(tmp_path / "empty.csv")
    image = tmp_path / "image.csv"
    image.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError) as error:
        read_answers([table, image, tmp_path / "none.csv"])
    assert len(str(error.value).split("\n")) == 3
    with pytest.raises(UserError, match="no answers"):
        read_answers([empty])
