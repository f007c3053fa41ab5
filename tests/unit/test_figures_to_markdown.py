"""Tables that `launch/figures_to_markdown.py` makes of what commands print."""

import importlib.util
import json
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "launch/figures_to_markdown.py"


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures_to_markdown", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def write(tmp_path):
    """Writes a folder of one command, `NAME`, and the files given."""

    def write(name, status="0", **files):
        line = "\t".join([name, status, "7", "9", "python x"]) + "\n"
        (tmp_path / "steps.tsv").write_text(line)
        for suffix, text in files.items():
            (tmp_path / f"{name}.{suffix}").write_text(text)
        return tmp_path

    return write


def test_ratios_to_pytorch_become_a_table(figures, write):
    printed = (
        "v1-4, bfloat16, 8 frames of 64x64\n"
        "whole tuning step: ours 60.0 ms, PyTorch 150.0 ms (sdpa + compiled; tried sdpa 180.2, "
        "sdpa + compiled 150.0), ratio 0.40 (0.39 to 0.42 in 20 pairs), OVER 0.3\n"
    )
    page = figures.markdown(write("speed", out=printed))
    row = "| speed | whole tuning step | 60.0 | 150.0 | 0.40 (0.39 to 0.42 in 20 pairs) | 2.50 |"
    assert f"{row} sdpa + compiled | sdpa 180.2, sdpa + compiled 150.0 |" in page
    assert "```\nv1-4, bfloat16, 8 frames of 64x64\n```" in page


def test_stages_of_a_run_are_summed_and_steps_have_a_median(figures, write):
    lines = [
        *({"step": step, "loss": 1 / step, "seconds": step / 100} for step in (1, 2, 3, 4)),
        *({"step": 4, "stage": "tune", "seconds": seconds} for seconds in (1.5, 2.25)),
    ]
    page = figures.markdown(write("run", jsonl="\n".join(map(json.dumps, lines))))
    assert "| tune | 3.75 |" in page
    assert "- 4 steps;" in page
    assert "takes 40.0 ms" in page
    assert "Loss 1.0000 at step 1, 0.2500 at step 4" in page


def test_operations_of_a_profile_are_named(figures, write):
    operation = {"name": "a|b", "kind": "other", "runs": 3.0, "ms": 1.5, "share": 0.75}
    profile = {"ms": 2.5, "busy_ms": 2, "ms_by_kind": {"other": 2}, "largest": [operation]}
    row = {"compile_s_each": {"tune_step": 1}, "tune_step_ms": 2.4, "tune_step_profile": profile}
    page = figures.markdown(write("profile", out=json.dumps(row)))
    assert "| `a\\|b` | other | 3 | 1.500 | 75.0% |" in page
    assert "- 2.4 ms; while it was traced 2.5 ms." in page


@pytest.mark.parametrize(
    ("status", "result"),
    [
        ("3", "**failed, status 3**"),
        ("124", "**not done in 9 s**"),
        ("skipped", "no time left"),
    ],
)
def test_a_command_that_has_failed_is_named(figures, write, status, result):
    page = figures.markdown(write("golden-auto", status, out="", err="one\ntwo\n"))
    assert result in page
    assert ("### golden-auto" in page) == (status != "skipped")
    assert ("```\none\ntwo\n```" in page) == (status != "skipped")


def test_output_that_is_damaged_costs_only_its_own_section(figures, write):
    page = figures.markdown(write("run", jsonl="{"))
    assert "## A run\n\nCannot be read: " in page
    assert "## The commands in full" in page
