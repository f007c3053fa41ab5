"""Configs, batch plans and command lines have the same bounds for what decides a sample."""

import pytest
import yaml

from tav_jax import sample
from tav_jax.errors import UserError
from tav_jax.runs.batch_plan import read_plan
from tav_jax.runs.config import parse_config

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


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_config_refuses_it(name, value):
    tree = {
        "pretrained_model_path": "tiny-scenes",
        "output_dir": "out",
        "train_data": {"video_path": "a.mp4", "prompt": "a"},
        "validation_data": {name: yaml.safe_load(value)},
    }
    with pytest.raises(UserError, match=f"validation_data.{name}: "):
        parse_config(tree)


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
    assert f"error: {option} " in capsys.readouterr().err
