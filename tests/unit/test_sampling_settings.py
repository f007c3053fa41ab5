"""Configs, experiments, batch plans, command lines and records share one value and its bounds."""

import json
from dataclasses import replace

import pytest
import yaml

from tav_jax import sample
from tav_jax.errors import UserError
from tav_jax.runs.batch_plan import read_plan
from tav_jax.runs.config import parse_config
from tav_jax.runs.samples import LoraRecord, Sample, default_sample
from tav_jax.runs.sampling_settings import SETTING_NAMES, SamplingSettings
from tav_jax.worlds.experiments import Experiment

WRONG = [
    ("guidance_scale", ".inf"),
    ("guidance_scale", ".nan"),
    ("guidance_scale", "-1"),
    ("num_inference_steps", "0"),
    ("num_inference_steps", "1000"),
    ("num_inv_steps", "1000"),
    ("eta", "1.5"),
    ("eta", ".nan"),
]


def config_with(**validation):
    tree = {
        "pretrained_model_path": "tiny-scenes",
        "output_dir": "out",
        "train_data": {"video_path": "a.mp4", "prompt": "a"},
        "validation_data": validation,
    }
    return parse_config(tree)


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_config_refuses_it(name, value):
    with pytest.raises(UserError, match=f"validation_data.{name}: "):
        config_with(**{name: yaml.safe_load(value)})


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_an_experiment_refuses_it(name, value):
    config = Experiment({"method": {name: yaml.safe_load(value)}})
    with pytest.raises(UserError, match=rf"variants: method:\n  {name}: "):
        config.settings()


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_plan_refuses_it(name, value, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"runs: [run]\nprompts: [a]\n{name}: {value}\n")
    with pytest.raises(UserError, match=f"{name}: "):
        read_plan(plan)


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_the_command_line_refuses_it(name, value, capsys):
    option = f"--{name.replace('_', '-')}"
    assert (
        sample.main(
            ["--run", "none", "--prompt", "a", option, value.replace(".i", "i").replace(".n", "n")]
        )
        == 1
    )
    assert f"error: {option}: " in capsys.readouterr().err


def test_noise_from_a_sampler_that_draws_none_is_refused_everywhere(tmp_path, capsys):
    wrong = {"sampler": "dpm_solver", "eta": 0.5}
    with pytest.raises(UserError, match="only ddim draws noise"):
        config_with(**wrong)
    with pytest.raises(UserError, match="only ddim draws noise"):
        Experiment({"method": wrong}).settings()
    plan = tmp_path / "plan.yaml"
    plan.write_text("runs: [run]\nprompts: [a]\nsampler: dpm_solver\neta: 0.5\n")
    with pytest.raises(UserError, match="only ddim draws noise"):
        read_plan(plan)
    options = ["--run", "none", "--prompt", "a", "--sampler", "dpm_solver", "--eta", "0.5"]
    assert sample.main(options) == 1
    assert "only ddim draws noise" in capsys.readouterr().err


def test_a_run_of_random_noise_has_no_inversion_steps():
    assert config_with(num_inv_steps=7).validation_data.sampling_settings().num_inv_steps == 7
    settings = config_with(use_inv_latent=False).validation_data.sampling_settings()
    assert settings == SamplingSettings(num_inv_steps=None)
    with pytest.raises(UserError, match=r"validation_data\.num_inv_steps: "):
        config_with(num_inv_steps=None)


def test_a_plan_changes_what_it_names_and_nothing_else(tmp_path):
    config = config_with(guidance_scale=3.0, negative_prompt="blurry", num_inv_steps=7)
    default = default_sample(config, step=5)
    plan = tmp_path / "plan.csv"
    plan.write_text("run,prompt,seed,eta,use_inv_latent\nrun,a,,,\nrun,a,4,0.5,\nrun,b,,,false\n")
    same, changed, noise = (item.to_sample(default) for item in read_plan(plan))
    assert same == replace(default, prompt="a")
    settings = replace(default.settings, eta=0.5)
    assert changed == replace(default, prompt="a", seed=4, settings=settings, name_seed=True)
    assert noise.settings == replace(default.settings, num_inv_steps=None)


def test_a_change_that_does_not_go_with_the_runs_settings_is_refused(tmp_path):
    default = default_sample(config_with(eta=0.5), step=5)
    plan = tmp_path / "plan.yaml"
    plan.write_text("runs: [run]\nprompts: [a fish]\nsampler: dpm_solver\n")
    (item,) = read_plan(plan)
    with pytest.raises(UserError, match=r"run, a fish:\n  eta 0\.5: of the samplers only ddim"):
        item.to_sample(default)


def test_a_record_is_flat_and_gives_the_sample_back():
    settings = SamplingSettings("blurry", 7, "dpm_solver", 2.0, 0.0, None)
    made = Sample("a", 5, 3, settings, name_seed=True)
    record = made.to_record()
    new = {"prompt_syntax"}  # which is not written if it is plain
    assert set(record) == {"prompt", "step", "seed", "name_seed", *SETTING_NAMES} - new
    assert Sample.from_record(record) == made
    loras = (LoraRecord("style.safetensors", "0" * 64, -0.5),)
    other = replace(made, settings=replace(settings, prompt_syntax="weighted"), loras=loras)
    record = json.loads(json.dumps(other.to_record()))
    assert record["loras"] == [{"name": "style.safetensors", "sha256": "0" * 64, "scale": -0.5}]
    assert Sample.from_record(record) == other


def test_a_record_from_before_there_were_two_samplers_is_read():
    record = Sample("a", 5, 3, SamplingSettings(eta=0.5)).to_record()
    del record["sampler"]
    assert Sample.from_record(record).settings.sampler == "ddim"
    assert Sample.from_record(record).settings.eta == 0.5
