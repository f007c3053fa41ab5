"""A run with a LoRA and a learnt word: it goes on, samples and is passed on with them, or not."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from tav_jax import batch, sample, tune
from tav_jax.models.network import in_modules
from tav_jax.pretrained.model import load_model
from tav_jax.runs.adapters import write_adapter
from tav_jax.runs.config import LoraFile
from tav_jax.runs.run import Run
from tav_jax.runs.tuning import step_settings
from tav_jax.training.optimizer import TRAINABLE_MODULES

WORD, PROMPT = "<shape>", "a (<shape>:1.2) is moving"


def write_lora(path, params, seed=0):
    """Writes a LoRA of spatial attention, trained and frozen, and of the text encoder."""
    rng, tensors = np.random.default_rng(seed), {}
    for start, names in (
        ("lora_unet_", [n for n in params["unet"] if re.search(r"attn1\.to_.*kernel", n)]),
        ("lora_te_", [n for n in params["text_encoder"] if "fc1.kernel" in n]),
    ):
        for name in names:
            inputs, outputs = params["unet" if "unet" in start else "text_encoder"][name].shape
            layer = start + name.removesuffix(".kernel").replace(".", "_")
            for part, shape in (("down", (2, inputs)), ("up", (outputs, 2))):
                values = rng.normal(size=shape).astype(np.float32)
                tensors[f"{layer}.lora_{part}.weight"] = values
    save_file(tensors, path)
    return path


@dataclass(frozen=True)
class Additions:
    lora: Path
    more: Path
    word: Path


@pytest.fixture(scope="module")
def additions(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("additions")
    model = load_model(material.model)
    params = {name: getattr(model, name).params for name in ("unet", "text_encoder")}
    width = model.text_encoder.config.hidden_size
    vectors = np.random.default_rng(5).normal(size=(2, width)).astype(np.float32)
    save_file({WORD: vectors}, folder / "word.safetensors")
    return Additions(
        write_lora(folder / "style.safetensors", params),
        write_lora(folder / "more.safetensors", params, seed=1),
        folder / "word.safetensors",
    )


@pytest.fixture(scope="module")
def tuned(material, additions, tmp_path_factory):
    """A run with all of them that nothing has interrupted, and its config file."""
    folder = tmp_path_factory.mktemp("tuned")
    settings = material.settings | {
        "output_dir": str(folder / "run"),
        "loras": [{"path": str(additions.lora), "scale": 0.5}],
        "embeddings": [str(additions.word)],
        "prompt_syntax": "weighted",
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "validation_steps": 2,
    }
    settings["train_data"] = settings["train_data"] | {"prompt": f"a {WORD} is moving"}
    settings["validation_data"] = settings["validation_data"] | {"prompts": [PROMPT]}
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert tune.main(["--config", str(config)]) == 0
    return folder / "run", config


def video(folder):
    (path,) = (path for path in folder.glob("*.mp4") if path.stem != "side-by-side")
    return path.read_bytes()


def trained(folder, step=2):
    run = Run.open(folder)
    return {k: np.asarray(v) for k, v in run.trained_parameters(step).items()}


def copy_to(tuned, folder):
    """Copies the run, whose output_dir is then another."""
    return Path(shutil.copytree(tuned[0], folder)), ["--config", str(tuned[1])]


def test_it_resumes_as_it_would_have_gone_on(tuned, tmp_path, cli):
    run, arguments = copy_to(tuned, tmp_path / "run")
    for made in ("checkpoints/2", "samples", "inv_latents"):
        shutil.rmtree(run / made)
    assert cli(tune, *arguments, f"output_dir={run}").status == 0
    ours, theirs = trained(run), trained(tuned[0])
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    assert video(run / "samples/sample-2") == video(tuned[0] / "samples/sample-2")
    kept = "inv_latents/ddim_latent-2.npy"
    assert (run / kept).read_bytes() == (tuned[0] / kept).read_bytes()


def test_its_base_is_the_base_with_the_lora(tuned, material, additions):
    plain, run = load_model(material.model), Run.open(tuned[0])
    merged = load_model(material.model, loras=[(additions.lora, 0.5)], embeddings=[additions.word])
    base = run.load_base()
    for name, value in merged.unet.params.items():
        if not in_modules(name, ["attn_temp"]):  # which is drawn from the run's seed
            np.testing.assert_array_equal(base.unet.params[name], value)
    for name, value in merged.text_encoder.params.items():
        np.testing.assert_array_equal(base.text_encoder.params[name], value)
    name = next(name for name in plain.unet.params if "attn1.to_q" in name)
    assert (plain.unet.params[name] != base.unet.params[name]).any()
    assert base.words


def test_the_record_knows_them(tuned):
    config = yaml.safe_load((tuned[0] / "config.yaml").read_text())
    inputs = json.loads((tuned[0] / "inputs.json").read_text())
    assert [len(inputs[kind]) for kind in ("loras", "embeddings")] == [1, 1]
    assert (config["loras"][0]["scale"], config["prompt_syntax"]) == (0.5, "weighted")
    own = step_settings(Run.open(tuned[0]).config)
    assert (own.loras, own.embeddings, own.prompt_syntax) == ((), (), "plain")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("loras=[]", "loras: "),
        ("embeddings=[]", "embeddings: "),
        ("prompt_syntax=plain", "prompt_syntax: 'weighted' there, 'plain' here"),
        ("loras=[{path: LORA, scale: 0.6}]", "loras: "),
        ("loras=[LORA, LORA]", "loras: "),
    ],
)
def test_it_does_not_go_on_with_others(change, said, tuned, additions, cli):
    change = change.replace("LORA", str(additions.lora))
    done = cli(tune, "--config", tuned[1], change)
    assert done.status == 1
    assert "is a run of other settings" in done.err
    assert f"output_dir: {said}" in done.err


def test_they_may_move_and_not_change(tuned, additions, tmp_path, cli):
    run, arguments = copy_to(tuned, tmp_path / "run")
    arguments += [f"output_dir={run}"]
    moved, word = tmp_path / "else.safetensors", tmp_path / "w.safetensors"
    shutil.copy(additions.lora, moved)
    shutil.copy(additions.word, word)
    paths = [f"loras=[{{path: {moved}, scale: 0.5}}]", f"embeddings=[{word}]"]
    done = cli(tune, *arguments, *paths)
    assert (done.status, done.err) == (0, "")
    assert Run.open(run).config.loras[0].path == str(moved)
    shutil.copy(additions.more, moved)
    for command in (
        (tune, *arguments, *paths),
        (sample, "--run", run, "--prompt", "a cat"),
    ):
        done = cli(*command)
        assert done.status == 1
        assert f"was tuned with other loras than {moved}; sample with --lora-dir" in done.err
    moved.unlink()
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"runs: [{run}]\nprompts: [a cat]\n")
    done = cli(batch, plan)
    assert done.err == (
        f"error: loras: {moved}: No such file; if it has moved, sample with --lora-dir DIR\n"
    )
    # Under any name, in any folder below. Batch and sample make the same.
    there = tmp_path / "models/lora/renamed.safetensors"
    there.parent.mkdir(parents=True)
    shutil.copy(additions.lora, there)
    shutil.copy(additions.word, there.with_name("w.safetensors"))
    done = cli(batch, plan, "--lora-dir", tmp_path / "models")
    assert (done.status, done.err) == (0, "")
    folder = tmp_path / "again"
    options = ("--prompt", "a cat", "--output-dir", folder, "--lora-dir", tmp_path / "models")
    assert cli(sample, "--run", run, *options).status == 0
    assert video(folder) == (run / "samples/sample-2/a cat.mp4").read_bytes()
    done = cli(sample, "--run", run, *options[:-1], tmp_path / "none", "--overwrite")
    assert "loras: no file in " in done.err


def test_an_adapter_needs_them_and_samples_as_the_run_does(
    tuned, additions, material, tmp_path, cli, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "shape.safetensors"
    write_adapter(Run.open(tuned[0]), file)
    assert str(additions.lora.parent).encode() not in file.read_bytes()
    arguments = ("--adapter", file, "--model", material.model, "--prompt", PROMPT, "--run", "made")
    done = cli(sample, *arguments)
    assert done.status == 1
    assert "error: loras: style.safetensors: No such file; if it has moved" in done.err
    assert not list(Path("made").rglob("*.mp4"))
    # A file of that name with another content is not taken for it.
    shutil.copy(additions.more, "style.safetensors")
    done = cli(sample, *arguments)
    assert "was tuned with other loras than style.safetensors" in done.err
    assert cli(sample, *arguments, "--lora-dir", additions.lora.parent).status == 0
    assert video(Path("made/samples/sample-2")) == video(tuned[0] / "samples/sample-2")


def test_a_lora_is_added_to_what_a_run_has_trained(tuned, additions, tmp_path, cli):
    """Frozen and trained weights alike; nothing that was made without it is reused or replaced."""
    run, _ = copy_to(tuned, tmp_path / "run")
    plain, more = Run.open(run), Run.open(run)
    more.add_loras([LoraFile(str(additions.more), 0.8)])
    base, merged = (
        {k: np.asarray(v) for k, v in one.load_base().unet.params.items()} for one in (plain, more)
    )
    before, after = plain.load_model(2), more.load_model(2)
    changed = set()
    for name, value in before.unet.params.items():
        added = merged[name] - base[name]
        expected = np.asarray(value) + added
        np.testing.assert_allclose(after.unet.params[name], expected, rtol=0, atol=1e-6)
        changed |= {in_modules(name, TRAINABLE_MODULES)} if np.any(added) else set()
    assert changed == {True, False}, "of the trained weights and of the others"
    fc1 = next(name for name in after.text_encoder.params if "fc1.kernel" in name)
    assert (after.text_encoder.params[fc1] != before.text_encoder.params[fc1]).any()

    inverted = plain.inverted_file(2)
    kept = inverted.read_bytes(), inverted.stat().st_mtime_ns
    arguments = ("--run", run, "--prompt", PROMPT, "--lora", f"{additions.more}=0.8")
    done = cli(sample, *arguments)
    assert done.status == 1
    assert ".mp4 was made with other settings (loras [] there, [{'name': 'more" in done.err
    folder = tmp_path / "with lora"
    assert cli(sample, *arguments, "--output-dir", folder).status == 0
    assert (inverted.read_bytes(), inverted.stat().st_mtime_ns) == kept
    assert video(folder) != video(run / "samples/sample-2")
    (record,) = folder.glob("*.json")
    (made,) = json.loads(record.read_text())["loras"]
    assert (made["name"], made["scale"], len(made["sha256"])) == ("more.safetensors", 0.8, 64)
    # And the other way round: what was made with it is not taken for a video without it.
    done = cli(sample, *arguments[:4], "--output-dir", folder)
    assert "there, [] here" in done.err


@pytest.mark.parametrize("value", ["none.safetensors", "none.safetensors=0.5", "a=b"])
def test_a_lora_that_is_not_there_is_one_line(value, tuned, cli):
    done = cli(sample, "--run", tuned[0], "--prompt", "a cat", "--lora", value)
    path = value.removesuffix("=0.5")
    assert (done.status, done.err) == (1, f"error: --lora: {path}: No such file\n")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("x=nan", "scale: Input should be a finite number"),
        ("x=1000", "scale: Input should be less than or equal to 100"),
        ("", "path: Input should be a path"),
    ],
)
def test_a_value_that_is_no_lora_is_one_line(value, said, tuned, cli, capsys):
    with pytest.raises(SystemExit) as ended:
        cli(sample, "--run", tuned[0], "--prompt", "a cat", "--lora", value)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: argument --lora: {said}")


def test_a_prompt_of_any_length_is_sampled(tuned, tmp_path, cli):
    long = f"a {WORD} is moving " * 20
    arguments = ("--run", tuned[0], "--prompt", long, "--output-dir", tmp_path / "long")
    done = cli(sample, *arguments)
    assert done.status == 0
    assert "cut off" not in done.err
    (record,) = (tmp_path / "long").glob("*.json")
    assert json.loads(record.read_text())["prompt_syntax"] == "weighted"
    done = cli(sample, *arguments, "--prompt-syntax", "plain")
    assert "prompt_syntax 'weighted' there, 'plain' here" in done.err


def test_wrong_weights_are_refused_before_anything_is_written(write_config, cli, tmp_path):
    config = write_config(prompt_syntax="weighted", validation_data={"prompts": ["(a:1000)"]})
    done = cli(tune, "--config", config)
    assert done.status == 1
    assert "prompt '(a:1000)': 'a' has a weight of 1000; at most 100 is supported" in done.err
    assert not (tmp_path / "run").exists()


def test_a_file_for_another_model_is_refused_before_anything_is_written(
    write_config, cli, tmp_path
):
    wrong = tmp_path / "wrong.safetensors"
    save_file({"lora_unet_x.lora_up.weight": np.ones((2, 2), np.float32)}, wrong)
    for changes, said in (
        ({"loras": [str(wrong)]}, "unknown: lora_unet_x.lora_up.weight"),
        ({"embeddings": [str(wrong)]}, "wide, those of the text encoder"),
        ({"loras": ["none.safetensors"]}, "none.safetensors: No such file"),
    ):
        done = cli(tune, "--config", write_config(**changes))
        assert done.status == 1
        assert said in done.err
        assert not (tmp_path / "run").exists()
