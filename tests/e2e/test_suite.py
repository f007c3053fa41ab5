"""Suites: systems that are run on the same clips and scored, by any number of processes."""

import json
import time

import numpy as np
import pytest
import yaml

from tav_jax import evaluate, tune
from tav_jax.evaluation.suites import read_suite
from tav_jax.runs.run import Run


@pytest.fixture
def suite(material, tmp_path):
    """Writes a suite of two systems with one clip; returns its file."""
    settings = {key: value for key, value in material.settings.items() if key != "seed"}
    data = {k: v for k, v in settings["train_data"].items() if k not in ("video_path", "prompt")}
    validation = {k: v for k, v in settings["validation_data"].items() if k != "prompts"}
    settings |= {"train_data": data, "validation_data": validation, "max_train_steps": 3}
    clip = {
        "video_path": str(material.clip),
        "prompt": "a square is moving",
        "edits": ["a ball is moving", "a cat"],
        "name": "square",
    }
    tree = {
        "settings": settings,
        "systems": {
            "tuned": {},
            "plain images": {
                "settings": {
                    "max_train_steps": 0,
                    "attention_scope": "spatial",
                    "validation_data": {"use_inv_latent": False},
                },
                "seeds": [3, 4],
            },
        },
        "clips": [clip],
        "seeds": [7],
        "metrics": ["flicker"],
    }
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def arguments(suite, name="out"):
    folder = suite.parent
    return (
        f"--suite={suite}",
        f"--output-dir={folder / name}",
        f"--scores={folder / 'kept'}",
        f"--json={folder / name}.json",
    )


def test_a_suite_runs_each_system_and_scores_it(suite, cli, tmp_path):
    done = cli(evaluate, *arguments(suite))
    assert (done.status, done.err) == (0, "")
    tree = json.loads((tmp_path / "out.json").read_text())
    scored = {name: means["flicker.vbench"]["n"] for name, means in tree["systems"].items()}
    assert scored == {"tuned": 2, "plain images": 4}
    assert "tuned, 2 videos" in done.out

    untuned = Run.open(tmp_path / "out/plain-images/square/seed-3")
    assert untuned.latest_step() == 0
    base = untuned.load_base().unet.params
    kept = untuned.load_model(0).unet.params
    assert all(np.array_equal(base[name], kept[name]) for name in base), "nothing was tuned"

    again = cli(evaluate, *arguments(suite))
    assert "3 runs, 3 of them there already" in again.out
    assert "wrote" not in again.out.replace("wrote " + str(tmp_path / "out.json"), "")

    # As a kill leaves them that comes after the videos.
    sheet, page = untuned.samples(0) / "contact-sheet.png", untuned.folder / "report.html"
    for file in (sheet, page):
        file.unlink()
        assert "3 runs, 2 of them there already" in cli(evaluate, *arguments(suite)).out
        assert file.is_file()


def test_a_run_without_steps_can_be_tuned_on(suite, cli, tmp_path):
    _, runs = read_suite(suite, tmp_path / "out")
    config = next(run.config for run in runs if run.system == "plain images")
    tune.tune(config)
    more = f"{config.output_dir}/config.yaml"
    done = cli(tune, "--config", more, f"output_dir={config.output_dir}", "max_train_steps=2")
    assert done.status == 0
    assert Run.open(config.output_dir).latest_step() == 2


def test_several_processes_share_a_suite_and_a_killed_one_is_made_good(suite, start, tmp_path, cli):
    """The second of three processes is killed; the others give the table of one alone."""
    alone = start("-m", "tav_jax.evaluate", *arguments(suite, "alone"))
    assert alone.wait(timeout=600) == 0, alone.communicate()[1]
    command = ("-m", "tav_jax.evaluate", *arguments(suite, "out"))
    processes = [start(*command) for _ in range(3)]
    while not list((tmp_path / "out").rglob("config.yaml")):
        time.sleep(0.05)
        assert any(process.poll() is None for process in processes)
    processes[1].kill()
    for index in (0, 2):
        _, err = processes[index].communicate(timeout=600)
        assert processes[index].returncode == 0, err
    tables = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "out")]
    assert tables[0]["systems"] == tables[1]["systems"]
    assert not list((tmp_path / "out").rglob(".partial-*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"systems": {}}, "systems: there are none"),
        ({"clips": []}, "clips: there are none"),
        ({"seeds": []}, "seeds: there are none"),
        ({"systems": {"a b": {}, "a-b": {}}}, "systems: two have the folder a-b"),
        ({"systems": {"a": {"settings": {"seed": 3}}}}, "systems: a: seed is the suite's own"),
        ({"systems": {"a": {"seed": [3]}}}, "systems.a.seed: unknown key"),
        ({"systems": {"a": {"settings": {"max_train_step": 3}}}}, "did you mean max_train_steps?"),
        ({"seeds": list(range(9999))}, "29997 runs are asked for"),
        ({"metrics": ["fid"]}, "--metrics: fid is no metric"),
    ],
)
def test_a_wrong_suite_is_refused(suite, cli, tmp_path, change, message):
    tree = yaml.safe_load(suite.read_text())
    tree["systems"]["plain images"].pop("seeds")
    tree["systems"]["third"] = {}
    suite.write_text(yaml.safe_dump(tree | change))
    done = cli(evaluate, *arguments(suite))
    assert (done.status, done.out) == (1, "")
    assert message in done.err
    assert not (tmp_path / "out").exists()
