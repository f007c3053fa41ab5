"""`tune --dry-run`: what a run would do, said before anything is written."""

import json
import re

import pytest

from tav_jax import tune
from tav_jax.runs.run import Run


def test_it_says_what_the_run_then_does_and_writes_nothing(cli, write_config, tmp_path):
    config = write_config()
    before = set(tmp_path.rglob("*"))
    said = cli(tune, "--config", config, "--dry-run")
    assert said.status == 0, said.err
    assert set(tmp_path.rglob("*")) == before
    run = Run.create(tune.with_absolute_paths(tune.load_config(config)[0]))
    indices = ", ".join(map(str, run.frame_indices()))
    assert f"frames {indices}, as 32x32 (stretch)" in said.out
    memory = re.search(r"a step needs [\d.]+ of ([\d.]+) GB", said.out)
    assert memory
    assert float(memory[1]) > 1
    assert re.search(r"time of tuning: [\d.:]+( s)?: 6 steps of", said.out)
    assert "time of sampling: about" in said.out

    done = cli(tune, "--config", config)
    assert done.status == 0, done.err
    count = re.search(r"trained: ([\d,]+) of", said.out)
    assert count
    assert f"tuning {count[1]} parameters" in done.out
    saved, validated = re.findall(r"STEP for ([\d, ]+)", said.out)
    steps = {path.name for path in run.checkpoints.iterdir()}
    assert steps == set(saved.split(", "))
    folders = {path.name for path in (run.folder / "samples").iterdir()}
    assert folders == {f"sample-{step}" for step in validated.split(", ")}

    files = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    again = cli(tune, "--config", config, "--dry-run")
    assert again.status == 0, again.err
    assert "time: all 6 steps are done" in again.out
    manifest = run.checkpoint(6) / "trained/manifest.ocdbt"
    manifest.write_bytes(b"x")
    damaged = cli(tune, "--config", config, "--dry-run")
    assert damaged.status == 1
    assert f"damaged: {run.checkpoint(6)}" in damaged.err
    now = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    assert {path for path in files if files[path] != now.get(path)} == {manifest}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_limit_gb": 0.001, "gradient_checkpointing": "none"}, "memory: "),
        ({"trainable_modules": ["attn1.to_query"]}, "matches no parameter"),
        ({"max_train_step": 3}, "max_train_step"),
    ],
)
def test_what_could_not_begin_is_refused(cli, write_config, tmp_path, change, message):
    said = cli(tune, "--config", write_config(**change), "--dry-run")
    assert said.status == 1
    assert message in said.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("schedule", "programs"), [("constant", 1), ("cosine", 2)])
def test_clips_are_described_one_after_another_and_share_a_program_if_they_can(
    cli, write_config, material, tmp_path, schedule, programs
):
    runs = {"first": 3, "second": 9}
    clips = [
        {"output_dir": str(tmp_path / name), "max_train_steps": steps, "validation_steps": steps}
        for name, steps in runs.items()
    ]
    (tmp_path / "clips.yaml").write_text(json.dumps(clips))
    config = write_config(lr_scheduler=schedule)
    said = cli(tune, "--config", config, "--clips", tmp_path / "clips.yaml", "--dry-run")
    assert said.status == 0, said.err
    assert said.out.count("trained: ") == 2
    assert said.out.count("compiling the step") == programs
    assert not list(tmp_path.glob("*/config.yaml"))
