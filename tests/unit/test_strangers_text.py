"""Text of any kind: in YAML, in `key=value`, in messages, file names and labels, in any locale."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_configs import RUN as SMALLEST

from tav_jax.files import keep_json_lines
from tav_jax.pretrained.weights import is_finite
from tav_jax.reading import Key, parse_yaml
from tav_jax.runs.config import dump_config, load_config
from tav_jax.runs.samples import file_stem
from tav_jax.text import UNPRINTABLE, brief, printable, shorten
from tav_jax.video.sheets import contact_sheet, sheet_labels

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path


@pytest.mark.parametrize(
    "text",
    [
        *("a #1 red circle", "a: b", "a:b", "#1", "- dash", "[no list]", "{no: braces}", "*star"),
        *("&and", "!bang", "null and void", "yes", "no", "3", "1e3", "2001-01-01", "'quoted'"),
        *('"quoted"', "'open", "50 % grey", "@home", "a=b=c", " spaces ", "", "~", "\\e", "一只猫"),
        *("two\nlines", "a\tb", "a, b", "|", ">"),
    ],
)
def test_a_text_is_taken_as_it_is_from_the_command_line(text, config):
    read, _ = load_config(config, [f"train_data.prompt={text}"])
    assert read.train_data.prompt == text
    # And comes back from the file that records it.
    config.write_text(dump_config(read), encoding="utf-8")
    assert load_config(config)[0].train_data.prompt == text


@pytest.mark.parametrize("key", ["output_dir", "revision", "validation_data.negative_prompt"])
def test_every_key_of_a_text_takes_it_as_it_is(key, config):
    found, _ = load_config(config, [f"{key}=a #1: b"])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == "a #1: b"


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_a_text_that_may_be_nothing_is_nothing(text, config):
    assert load_config(config, [f"revision={text}"])[0].revision is None


@pytest.mark.parametrize("given", ["seed=null", "seed=~", "seed="])
def test_no_seed_is_a_seed_of_its_own_that_the_run_keeps(given, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, notes = load_config(config, [given])
    assert f"seed: null: the run has the seed {first.seed}" in notes
    seeds = {load_config(config, [given])[0].seed for _ in range(20)}
    assert len(seeds) > 10, "a new one for each run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(dump_config(first))
    assert load_config(config, [given])[0] == first


def test_no_seed_in_a_file(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.write_text(yaml.safe_dump(SMALLEST | {"seed": None}))
    assert 0 <= load_config(config)[0].seed < 2**31


PROGRAMS = {
    "settings": "from tav_jax.runs.config import load_config as f; t = f(p)[0].train_data.prompt",
    "prompts": "from tav_jax.sample import read_prompts as f; t = f(p)[0]",
    "plan": "from tav_jax.runs.batch_plan import read_plan as f; t = f(Path(p))[0].prompt",
    "record": "from tav_jax.reading import read_json as f; t = f(Path(p))['prompt']",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_files_are_utf_8_whatever_the_locale(program, tmp_path):
    text = "一只红色的圆 über"
    content = {
        "settings": yaml.safe_dump(
            SMALLEST | {"train_data": {"video_path": "a", "prompt": text}}, allow_unicode=True
        ),
        "prompts": f"\ufeff{text}\n",
        "plan": f"runs: [run]\nprompts: [{text}]\n",
        "record": f'{{"prompt": "{text}"}}',
    }[program]
    (tmp_path / "file.yaml").write_text(content, encoding="utf-8")
    code = f"from pathlib import Path; import sys; p = sys.argv[1]; {PROGRAMS[program]}"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(ascii(t))", str(tmp_path / "file.yaml")],
        env=os.environ
        | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert done.stdout == f"{text!a}\n"


def test_keys_know_their_lines_also_under_merged_mappings():
    tree = parse_yaml("a: &a\n  x: 1\n  y: 2\nb:\n  <<: *a\n  y: 3\n", "f.yaml")
    assert tree == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}
    lines = {key: key.line for key in tree["b"] if isinstance(key, Key)}
    assert lines == {"x": 2, "y": 6}
    # An alias may stand in several places.
    assert parse_yaml("a: &a {<<: {x: 1}, y: 2}\nb: *a\nc: *a", "f.yaml")["c"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    "character", ["\x00", "\x1b", "\x7f", "\x85", "\x9b", "\u200f", "\u202e", "\u2066", "\ud800"]
)
def test_what_controls_a_terminal_reaches_neither_messages_nor_file_names(character):
    text = f"a{character}b"
    for shown in (printable(text), brief(text), brief([{text: text}]), shorten(text)):
        assert not UNPRINTABLE.search(shown)
    assert not UNPRINTABLE.search(file_stem(text))
    assert file_stem(text) != file_stem("a_b"), "and two prompts have two files"


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, ["x" * 1000] * 10**5, {i: i for i in range(10**5)}, 10**10_000, b"x" * 10**6],
    ids=["text", "list", "dictionary", "number", "bytes"],
)
def test_a_value_is_short_in_a_message_whatever_it_is(value):
    assert len(brief(value)) <= 80


@pytest.mark.parametrize(
    ("label", "is_drawn"),
    [
        ("a cat, ÄÖÜ éñ", True),
        ("кошка", True),
        ("γάτα", True),
        ("一只猫", False),
        ("ねこ", False),
        ("고양이", False),
        ("a cat 🐼", False),
    ],
)
def test_a_label_without_letters_in_the_font_is_a_number_with_a_legend(label, is_drawn):
    drawn, legend = sheet_labels(["source", label])
    assert drawn[0] == "source"
    assert (drawn[1] == label) == is_drawn
    assert legend == ("" if is_drawn else f"row 2: {label}\n")
    # What the sheet shows is what the font can write.
    video = np.zeros((2, 64, 64, 3), np.uint8)
    shown = contact_sheet({"source": video, label: video})
    same = contact_sheet({"source": video, drawn[1]: video})
    np.testing.assert_array_equal(shown, same)


@pytest.mark.parametrize("line", ["5", '{"step": 2', "[1]", '{"stop": 1}', '{"step": "x"}', "\x1b"])
def test_a_damaged_line_of_a_record_is_moved_aside(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n{{"step": 3}}\n{{"st')
    with pytest.warns(UserWarning, match=r"1 damaged lines were moved to metrics\.jsonl\.damaged"):
        kept = keep_json_lines(path, lambda value: value["step"] <= 2)
    assert kept == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == f"{line}\n"
    # Nothing that was moved is lost when more is.
    path.write_text("6\n")
    with pytest.warns(UserWarning, match="damaged"):
        keep_json_lines(path)
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == f"{line}\n6\n"


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(kind):
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    largest = float(ml_dtypes.finfo(dtype).max)
    numbers = np.zeros(600_001, dtype)
    numbers[:4] = largest, -largest, -0.0, float(ml_dtypes.finfo(dtype).tiny)
    assert is_finite(numbers)
    assert is_finite(numbers[:0])
    assert is_finite(numbers.reshape(-1, 1).T[:, ::2])
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        for index in (0, 300_000, 600_000):
            broken = numbers.copy()
            broken[index] = value
            assert not is_finite(broken)
