"""The command evaluate, on runs and on videos of systems."""

import csv
import json
import re
import shutil

import numpy as np
import pytest

from tav_jax import evaluate
from tav_jax.evaluation import metrics
from tav_jax.video.write import write_video

# What needs neither a network nor OpenCV.
LIGHT = "--metrics=flicker,background"


def test_a_run_needs_no_other_argument(finished_run, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pytest.importorskip("cv2")
    done = cli(evaluate, "--run", finished_run.folder, f"--json={tmp_path / 'scores.json'}")
    assert (done.status, done.err) == (0, "")
    tree = json.loads((tmp_path / "scores.json").read_text())
    assert list(tree["systems"]) == ["run"]
    scored = tree["systems"]["run"]
    for name in ("flicker.vbench", "motion_alignment.dis", "ff_alpha.editboard", "warp_error.dis"):
        assert scored[name]["n"] == 3
        assert f"{name} " in done.out
    assert [video["prompt"] for video in tree["videos"]] == [
        "a ball is moving",
        "a cat",
        "a square is moving, cartoon style",
    ]
    assert tree["not_computed"]["background_psnr"] == "no mask is given"
    assert "is not on this machine: --download" in tree["not_computed"]["clip_text.loveu"]
    assert re.search(r"CogVideo +clip_text.paper +23.66 +Wu et al.", done.out)
    # For each video what no network was needed for, and its last scores.
    assert len(list((tmp_path / "cache/tav_jax/scores").iterdir())) == 3 * 2


def test_runs_are_systems_side_by_side(finished_run, run_copy, cli, tmp_path):
    (run_copy / "samples/sample-6/a cat.json").unlink()
    done = cli(
        evaluate,
        f"--run={finished_run.folder}",
        f"--run=with fewer={run_copy}",
        LIGHT,
        f"--csv={tmp_path / 'scores.csv'}",
        f"--scores={tmp_path / 'kept'}",
    )
    assert (done.status, done.err) == (0, "")
    assert "run, 3 videos" in done.out
    assert "with fewer, 2 videos" in done.out
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["system"] for row in rows] == ["run"] * 3 + ["with fewer"] * 2
    assert rows[0]["flicker.vbench"] == rows[3]["flicker.vbench"]


def test_scores_of_an_earlier_evaluation_join_the_table(finished_run, cli, tmp_path):
    """Its own videos are not counted twice; those of another system have no files any more."""
    kept, table = f"--scores={tmp_path / 'kept'}", tmp_path / "scores.csv"
    run = (f"--run={finished_run.folder}", "--metrics=flicker", kept)
    assert cli(evaluate, *run, f"--csv={table}").status == 0
    header, *rows = table.read_text().splitlines()
    others = [row.replace("run,", "other,", 1) for row in rows]
    table.write_text("\n".join([header, *rows, *others]))
    done = cli(evaluate, *run, f"--earlier={table}", f"--json={tmp_path / 'scores.json'}")
    assert (done.status, done.err) == (0, "")
    assert "run, 3 videos  other, 3 videos" in done.out
    systems = json.loads((tmp_path / "scores.json").read_text())["systems"]
    assert systems["run"] == systems["other"]
    for text, message in (
        ("system,video\n", "it has no column clip, prompt; take a file that --csv"),
        (header + "\nx,c,v,p,many\n", "scores.csv, line 2: a score is no number"),
        (header + "\nx,c,v,p,nan\n", "scores.csv, line 2: a score is no number"),
    ):
        table.write_text(text)
        done = cli(evaluate, *run, f"--earlier={table}")
        assert (done.status, done.out) == (1, "")
        assert message in done.err


def test_a_runs_folder_may_have_an_equals_sign_in_its_name(run_copy, cli, tmp_path):
    run_copy.rename(tmp_path / "lr=3e-5")
    options = (LIGHT, f"--scores={tmp_path / 'kept'}")
    assert "lr=3e-5, 3 videos" in cli(evaluate, f"--run={tmp_path / 'lr=3e-5'}", *options).out
    assert "a, 3 videos" in cli(evaluate, f"--run=a={tmp_path / 'lr=3e-5'}", *options).out


def test_another_step_of_a_run(finished_run, cli, tmp_path):
    kept = f"--scores={tmp_path}"
    run = f"--run={finished_run.folder}"
    assert cli(evaluate, run, "--step=4", LIGHT, kept).status == 0
    done = cli(evaluate, run, "--step=5", LIGHT, kept)
    assert done.status == 1
    assert done.err.endswith("has no videos of step 5; there are 4, 6\n")


@pytest.fixture
def system(tmp_path):
    """Returns the arguments of a system of two videos with masks and sources."""
    rng = np.random.default_rng(1)
    for folder in ("videos", "sources", "masks"):
        (tmp_path / folder).mkdir()
    rows = [("video", "prompt", "source", "mask")]
    for name in ("a.mp4", "b.mp4"):
        source = rng.integers(0, 256, (4, 32, 48, 3), np.uint8)
        video, mask = source.copy(), np.zeros_like(source)
        video[:, 16:], mask[:, 16:] = 255 - video[:, 16:], 255
        for folder, frames in (("videos", video), ("sources", source), ("masks", mask)):
            write_video(tmp_path / folder / name, frames, fps=4)
        rows.append((name, "a prompt", f"sources/{name}", f"masks/{name}"))
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return [
        f"--system=ours={tmp_path / 'videos'}",
        f"--prompts={tmp_path / 'table.csv'}",
        f"--scores={tmp_path / 'kept'}",
    ]


def test_an_interrupted_evaluation_goes_on(system, cli, monkeypatch, tmp_path):
    """The second video's metric fails as a machine might; the first one's score is kept."""
    flicker = metrics.METRICS["flicker.vbench"]
    scored = []

    def score(subject):
        scored.append(subject.example.video.name)
        if len(scored) == 2:
            raise KeyboardInterrupt
        return flicker.score(subject)

    counted = metrics.Metric(flicker.name, flicker.better, score)
    monkeypatch.setitem(metrics.METRICS, flicker.name, counted)
    assert cli(evaluate, *system, "--metrics=flicker").status == 130
    done = cli(evaluate, *system, "--metrics=flicker", f"--json={tmp_path / 'scores.json'}")
    assert done.status == 0
    assert scored == ["a.mp4", "b.mp4", "b.mp4"]
    tree = json.loads((tmp_path / "scores.json").read_text())
    assert tree["systems"]["ours"]["flicker.vbench"]["n"] == 2


def test_masked_metrics_see_the_background_only(system, cli, tmp_path):
    assert cli(evaluate, *system, LIGHT, f"--json={tmp_path / 'x.json'}").status == 0
    means = json.loads((tmp_path / "x.json").read_text())["systems"]["ours"]
    # Above the mask source and edit differ by what the encoder has made of them.
    assert means["background_psnr"]["mean"] > means["background_psnr.five"]["mean"] - 10
    assert means["background_ssim"]["mean"] > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "videos/b.mp4").unlink(), "table.csv, line 3: no such video"),
        (lambda f: shutil.copy(f / "table.csv", f / "videos/b.mp4"), "b.mp4"),
        (lambda f: (f / "table.csv").write_text("a,b\n"), "it has no column video; "),
        (lambda f: (f / "table.csv").unlink(), "--prompts: .*table.csv: No such file"),
        (lambda f: shutil.rmtree(f / "videos"), "--system: .*videos: no such folder"),
    ],
)
def test_bad_input_is_one_line(system, cli, tmp_path, change, message):
    change(tmp_path)
    done = cli(evaluate, *system, LIGHT)
    assert done.status == 1
    assert done.out == ""
    assert re.fullmatch(f"error: .*{message}.*\n", done.err)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to score: give --run DIR, --suite FILE, or --system NAME=DIR with "),
        (["--run=none"], "--run: none is not a run of tav_jax.tune: no config.yaml"),
        (["--system=a=.", "--system=a=."], "--system: a is there twice"),
        (["--system=.", "--prompts=x.csv"], "--system: .: expected NAME=DIR"),
        (["--system=a=."], "--system: it goes with either --prompts or --benchmark, and they with"),
        (["--system=a=.", "--benchmark=x=."], "--benchmark: x=.: expected NAME=DIR, NAME of lov"),
    ],
)
def test_wrong_arguments_are_refused(cli, arguments, message):
    done = cli(evaluate, *arguments)
    assert (done.status, done.out) == (1, "")
    assert message in done.err
