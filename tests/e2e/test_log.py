"""`log: tensorboard` of a run that is resumed."""

import shutil
import sys

import pytest
import yaml
from run_lines import read_metrics

from tav_jax import tune


def test_a_resumed_run_logs_its_steps_and_samples_from_where_it_goes_on(
    finished_run, run_copy, cli
):
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shutil.rmtree(run_copy / "checkpoints/6")
    shutil.rmtree(run_copy / "samples/sample-6")
    command = ("--config", finished_run.config, f"output_dir={run_copy}", "log=tensorboard")
    done = cli(tune, *command)
    assert done.status == 0, done.err
    assert "log: " not in done.out
    assert yaml.safe_load((run_copy / "config.yaml").read_text())["log"] == ["tensorboard"]

    (file,) = (run_copy / "tensorboard").iterdir()
    events = reader.EventAccumulator(str(file), {"scalars": 0, "images": 0}).Reload()
    lines = read_metrics(run_copy)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm", "lr", "seconds"):
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == pytest.approx({line["step"]: line[name] for line in lines[3:]}, rel=1e-6)
    prompts = ["a ball is moving", "a cat", "a square is moving, cartoon style"]
    assert sorted(events.Tags()["images"]) == [f"samples/{prompt}" for prompt in prompts]
    for tag in events.Tags()["images"]:
        # Those of step 4 are of the earlier start, which TensorBoard drops from there on.
        assert [image.step for image in events.Images(tag)] == [4, 6]

    again = cli(tune, *command)
    assert "done, 6 of 6 steps" in again.out
    assert list((run_copy / "tensorboard").iterdir()) == [file], "nothing was to be logged"


def test_a_logger_that_is_not_there_is_refused_before_anything_begins(
    write_config, cli, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused = cli(tune, "--config", write_config(log="wandb"))
    assert (refused.status, refused.err) == (
        1,
        "error: log: wandb needs the package wandb, which is not installed: pip install wandb\n",
    )
    assert not (tmp_path / "run").exists()
