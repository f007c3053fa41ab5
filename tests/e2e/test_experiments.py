"""Experiments with few steps on two clips: what is kept, what is done again, what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import yaml
from small_configs import UNET, VAE

from tav_jax.pretrained.model import save_model
from tav_jax.worlds import experiments
from tav_jax.worlds.figures.scenes import ATTRIBUTES, CLIPS
from tav_jax.worlds.figures.world import FIGURES
from tav_jax.worlds.networks import init_autoencoder, init_model, scheduler_config
from tav_jax.worlds.recipe import training_keys

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
        assert report.count(f"\n| {variant} |") == (3 if variant == "full method" else 5)
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
    del older["setting"]["sampler"], older["sweep"], older["world"]
    file.write_text(json.dumps(older))
    assert run(trial / "trial.yaml", folder) == 0
    assert results(folder) == results(trial / "out")
    assert json.loads(file.read_text())["setting"]["sampler"] == "ddim"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(["frames=5"], "another experiment", id="another experiment"),
        pytest.param(["clips=[circle-right,walk]"], "there is no walk", id="no such clip"),
        pytest.param(["world=figures"], "there is no circle-right, ring", id="other clips"),
        pytest.param(["world=moon"], "Input should be 'tiny-scenes' or 'figures'", id="world"),
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


def test_a_world_brings_its_own_clips_and_model():
    figures = experiments.Experiment({"method": {}}, world="figures")
    assert figures.clips == tuple(CLIPS)
    assert figures.pretrained_model_path == FIGURES.model
    assert experiments.Experiment({"method": {}}).pretrained_model_path == "tiny-scenes"
    named = experiments.Experiment({"method": {}}, world="figures", clips=("bear-guitar",))
    assert named.clips == ("bear-guitar",)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    folder, keys = tmp_path_factory.mktemp("untrained"), training_keys(0)
    width = FIGURES.unet.cross_attention_dim
    unet = replace(UNET, cross_attention_dim=width, temporal_attention=False)
    small = replace(FIGURES, unet=unet, vae=replace(VAE, block_out_channels=(8, 8, 16)))
    model = init_model(
        small, small.recipe, keys, init_autoencoder(small, keys), folder / "tokenizer"
    )
    save_model(folder / small.model, model, scheduler_config(small.recipe))
    return folder / small.model


def test_another_world_is_measured_by_what_it_has(untrained, tmp_path):
    (tmp_path / "trial.yaml").write_text(
        yaml.safe_dump(
            CONFIG
            | {"world": "figures", "clips": ["robot-walking"], "variants": {"full method": {}}}
        )
    )
    overrides = [f"pretrained_model_path={untrained}", "frames=2"]
    assert run(tmp_path / "trial.yaml", tmp_path / "out", *overrides) == 0
    (record,) = results(tmp_path / "out").values()
    assert record["motion"] == "walking"
    assert len(record["videos"]) == 12
    for video in record["videos"]:
        assert video.keys() > {*ATTRIBUTES, "found", "phase", "change"}
        assert all(video[name] is not None for name in ATTRIBUTES) == (video["kind"] != "open")
    report = (tmp_path / "out/report.md").read_text()
    assert "| subject right | verb right | clothes right | background right |" in report
    assert report.count("motion: in phase") == 4
    assert (tmp_path / "out/sheets/robot-walking - full method.png").is_file()
