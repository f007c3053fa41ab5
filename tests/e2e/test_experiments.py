"""Experiments with few steps on two clips: what is kept, what is done again, what is refused."""

import json
import shutil

import pytest
import yaml

from tav_jax.worlds import experiments

CONFIG = {
    "clips": ["circle-right", "ring-growing"],
    "seeds": [0],
    "frames": 4,
    "setting": {"num_inference_steps": 2, "num_inv_steps": 2, "max_train_steps": 2},
    "variants": {
        "full method": {},
        "no inversion": {"inversion": False},
        "longer": {"max_train_steps": 3},
        "no temporal attention": {"temporal_attention": False},
    },
}


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "trial.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    assert run(folder / "trial.yaml", folder / "out") == 0
    return folder


def run(config, folder, *overrides):
    return experiments.main(["--config", str(config), "--output-dir", str(folder), *overrides])


def results(folder):
    lines = (folder / "results.jsonl").read_text().splitlines()
    return {(r["variant"], r["clip"], r["seed"]): r for r in map(json.loads, lines)}


def test_every_variant_is_measured_on_every_clip(trial):
    records = results(trial / "out")
    assert set(records) == {(v, c, 0) for v in CONFIG["variants"] for c in CONFIG["clips"]}
    for record in records.values():
        kinds = [video["kind"] for video in record["videos"]]
        assert len(kinds) == 12
        assert kinds.count("open") == 3
        assert kinds.count("source") == 1
    sheets = {path.name for path in (trial / "out/sheets").iterdir()}
    assert sheets == {f"{c} - {v}.png" for v in CONFIG["variants"] for c in CONFIG["clips"]}
    report = (trial / "out/report.md").read_text()
    for variant in CONFIG["variants"]:
        assert report.count(f"\n| {variant} |") == 3
    assert (trial / "out/out.png").is_file()


def test_variants_differ(trial):
    records = results(trial / "out")
    of = [records[name, "circle-right", 0]["videos"] for name in CONFIG["variants"]]
    assert all(one != other for i, one in enumerate(of) for other in of[:i])


def test_what_was_measured_is_not_measured_again(trial, tmp_path, monkeypatch):
    folder = shutil.copytree(trial / "out", tmp_path / "out")
    monkeypatch.setattr(experiments, "sample_edits", None)
    assert run(trial / "trial.yaml", folder) == 0
    assert results(folder) == results(trial / "out")


def test_what_a_kill_cut_short_is_done_again_and_is_the_same(trial, tmp_path):
    folder = shutil.copytree(trial / "out", tmp_path / "out")
    file = folder / "results.jsonl"
    file.write_text(file.read_text()[:-40])
    assert run(trial / "trial.yaml", folder) == 0
    assert results(folder) == results(trial / "out")


def test_a_folder_from_before_a_setting_existed_is_the_same_experiment(trial, tmp_path):
    folder = shutil.copytree(trial / "out", tmp_path / "out")
    file = folder / "experiment.json"
    older = json.loads(file.read_text())
    del older["setting"]["sampler"], older["sweep"]
    file.write_text(json.dumps(older))
    assert run(trial / "trial.yaml", folder) == 0
    assert results(folder) == results(trial / "out")
    assert json.loads(file.read_text())["setting"]["sampler"] == "ddim"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(["frames=5"], "another experiment", id="another experiment"),
        pytest.param(["clips=[circle-right,walk]"], "there is no walk", id="no such clip"),
        pytest.param(["setting.max_steps=3"], "did you mean setting.max_train_steps", id="key"),
        pytest.param(
            ["variants.longer.guidance_scale=-1"], "variants: longer", id="value of a variant"
        ),
    ],
)
def test_wrong_settings_end_in_a_line(trial, capsys, overrides, message):
    before = (trial / "out/results.jsonl").read_bytes()
    assert run(trial / "trial.yaml", trial / "out", *overrides) == 1
    assert message in capsys.readouterr().err
    assert (trial / "out/results.jsonl").read_bytes() == before
