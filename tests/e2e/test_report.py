"""`python -m tav_jax.report`, and the page that every run has at its end."""

import html
import json
import os
import re
import shutil

import pytest
import yaml

from tav_jax import evaluate, report
from tav_jax.report import renew_report
from tav_jax.runs import report_page
from tav_jax.runs.run import Run

PROMPTS = ["a ball is moving", "a square is moving, cartoon style", "a cat"]


def text_of(page):
    """The words of a page, without its style, scripts and videos."""
    body = re.search(r"<main>(.*?)</main>", page.read_text(), re.DOTALL)[1]
    body = re.sub(r"\s*</?(p|td|th|tr|h\d|figcaption|figure|div|section|pre)\b[^>]*>", "\n", body)
    return html.unescape(re.sub(r"<[^>]*>", "", body))


def videos_in(page):
    return re.findall(r'<video src="data:video/mp4;base64,([^"]+)"', page.read_text())


def test_a_run_has_a_page_with_all_that_it_is(finished_run):
    page = finished_run.folder / "report.html"
    assert f"wrote {page}\n" in finished_run.out
    text, source = text_of(page), page.read_text()
    assert page.stat().st_size < 10_000_000
    assert len(videos_in(page)) == 1 + len(PROMPTS)
    order = [text.index(f"\n{prompt}\n") for prompt in ("a square is moving", *PROMPTS)]
    assert order == sorted(order), "the clip first, then the prompts as the config has them"
    assert source.count("<polyline") == 3, "each loss, their mean, the rate"
    for part in (
        "6 of 6 steps",
        "compile the step",
        "save checkpoints",
        "The compiler planned",
        f"python -m tav_jax.tune --config {finished_run.folder}/config.yaml "
        f"output_dir={finished_run.folder}-again",
        (finished_run.folder / "config.yaml").read_text(),
    ):
        assert part in text
    # Nothing is asked of a network, and the page forbids it.
    assert not re.findall(r"""(?:src|href|url\()\s*=?["']?(?!data:)[a-z]+:""", source)
    assert "default-src 'none'" in source


def log_later_than(page):
    """Makes a run's metrics newer than its page, whatever the file system's clock."""
    later = page.stat().st_mtime_ns + 10**9
    os.utime(page.parent / "metrics.jsonl", ns=(later, later))


def test_the_page_is_written_again_when_the_run_has_more_to_show(run_copy, capsys):
    page = run_copy / "report.html"
    before = page.stat().st_mtime_ns
    renew_report(Run.open(run_copy))
    assert page.stat().st_mtime_ns == before
    log_later_than(page)
    renew_report(Run.open(run_copy))
    assert page.stat().st_mtime_ns > before
    assert f"wrote {page}" in capsys.readouterr().out


def other_file(page):
    page.write_text("my own notes")


def folder_in_its_place(page):
    page.unlink()
    page.mkdir()


def damaged_settings(page):
    (page.parent / "config.yaml").write_bytes(b"\xff")


@pytest.mark.parametrize("harm", [other_file, folder_in_its_place, damaged_settings])
def test_a_page_that_cannot_be_written_is_a_line(harm, run_copy, capsys):
    run = Run.open(run_copy)
    page = run_copy / "report.html"
    harm(page)
    log_later_than(page)
    is_text = page.is_file() and page.read_bytes()
    renew_report(run)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(f"; `tav-report {run_copy}` writes the report")
    assert (page.is_file() and page.read_bytes()) == is_text


def test_several_runs_are_compared_with_the_same_prompts_below_each_other(
    finished_run, run_copy, cli, tmp_path
):
    config = yaml.safe_load((run_copy / "config.yaml").read_text()) | {"learning_rate": 1e-4}
    (run_copy / "config.yaml").write_text(yaml.safe_dump(config))
    for suffix in ("json", "mp4"):
        (run_copy / f"samples/sample-6/{PROMPTS[0]}.{suffix}").unlink()
    both = (finished_run.folder, run_copy)
    refused = cli(report, *both)
    assert (refused.status, refused.err) == (
        1,
        "error: --output: name the page that compares these runs, as in runs.html\n",
    )
    page = tmp_path / "both.html"
    assert cli(report, *both, "--output", page).status == 0
    rows = re.findall(r"<tr>(.*?)</tr>", page.read_text(), re.DOTALL)
    head, *videos = rows[:3]
    assert re.findall(r'<div class="text">(.*?)</div>', head) == PROMPTS
    assert [row.count("<video") for row in videos] == [4, 3]
    text = text_of(page)
    for path in both:
        assert str(path) in text, "both folders are called run"
    assert "learning_rate" in text
    assert "0.003" in text and "0.0001" in text  # noqa: PT018


def test_the_scores_of_evaluate_are_shown(run_copy, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    page = run_copy / "report.html"
    assert "flicker.vbench" not in text_of(page)
    scores = tmp_path / "scores.json"
    done = cli(evaluate, "--run", run_copy, "--metrics=flicker", f"--json={scores}")
    assert done.status == 0, done.err
    assert cli(report, run_copy).status == 0
    text = text_of(page)
    assert "flicker.vbench ↑" in text
    for video in json.loads(scores.read_text())["videos"]:
        assert f"\n{video['flicker.vbench']:.4f}\n" in text


def test_an_earlier_step_is_shown_if_it_is_asked_for(finished_run, run_copy, cli, tmp_path):
    page = tmp_path / "four.html"
    assert cli(report, run_copy, "--step=4", "--output", page).status == 0
    assert videos_in(page) != videos_in(finished_run.folder / "report.html")
    refused = cli(report, run_copy, "--step=5", "--output", page)
    assert (refused.status, refused.err) == (
        1,
        f"error: --step: {run_copy} has no videos of step 5; there are 4, 6\n",
    )


def test_what_is_missing_or_damaged_is_said_on_the_page(run_copy, cli, tmp_path):
    config = yaml.safe_load((run_copy / "config.yaml").read_text())
    config["train_data"]["video_path"] = str(tmp_path / "gone.mp4")
    (run_copy / "config.yaml").write_text(yaml.safe_dump(config))
    (run_copy / f"samples/sample-6/{PROMPTS[0]}.json").write_text("{")
    (run_copy / "metrics.jsonl").write_text('{"step": 1\n[]\n{"step": 1, "loss": null}\n')
    shutil.rmtree(run_copy / "checkpoints")
    done = cli(report, run_copy)
    assert done.status == 0
    assert "the report goes without a video: " in done.out
    text = text_of(run_copy / "report.html")
    assert re.search(r"This video cannot be read: .*gone\.mp4: no such video file", text)
    assert len(videos_in(run_copy / "report.html")) == 2
    assert "0 of 6 steps" in text
    assert "Loss" not in text


def test_a_page_stays_below_its_size_and_says_what_was_done(run_copy, cli, monkeypatch):
    page = run_copy / "report.html"
    videos = sum(map(len, videos_in(page)))
    most = page.stat().st_size - videos // 2
    monkeypatch.setattr(report_page, "MOST_BYTES", most)
    done = cli(report, run_copy)
    assert "To keep the page small, its videos are encoded again" in done.out
    assert "To keep the page small, its videos are encoded again" in text_of(page)
    assert page.stat().st_size <= most
    assert len(videos_in(page)) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes.txt", "name a file that ends in .html"),
        ("mine.html", "it is there already and no report of a run"),
    ],
)
def test_other_files_are_not_written_over(name, message, run_copy, cli, tmp_path):
    (tmp_path / name).write_text("mine")
    refused = cli(report, run_copy, "--output", tmp_path / name)
    assert refused.status == 1
    assert message in refused.err
    assert (tmp_path / name).read_text() == "mine"
