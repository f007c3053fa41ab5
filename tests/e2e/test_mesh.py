"""`python -m tav_jax.tune` on several devices, and in two processes that are one run."""

import json
import os
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from run_lines import losses

from tav_jax import sample, tune
from tav_jax.runs.run import Run
from tav_jax.training.checkpoints import restore_trained
from tav_jax.training.optimizer import label_params, select

CLIP = {"n_sample_frames": 8, "sample_frame_rate": 1}
HEARTBEAT = 6  # seconds until a process that is gone is missed
BOUND = 180  # seconds to wait for the others to end: far more than it takes, for busy machines


@pytest.fixture(scope="module")
def on_eight_devices(material, tmp_path_factory):
    """A finished run on all of this process's devices, and its config."""
    folder = tmp_path_factory.mktemp("eight")
    settings = material.settings | {
        "train_data": material.settings["train_data"] | CLIP,
        "mesh": {"frames": -1, "fsdp": 2},
        "output_dir": str(folder / "run"),
    }
    config = folder / "run.yaml"
    config.write_text(json.dumps(settings))  # which is YAML too
    assert tune.main(["--config", str(config)]) == 0
    return folder / "run", config


def test_a_run_on_eight_devices_is_the_run_on_one(cli, on_eight_devices, tmp_path):
    eight, config = on_eight_devices
    ended = cli(tune, "--config", config, f"output_dir={tmp_path / 'run'}", "mesh={frames: 1}")
    assert ended.status == 0, ended.err
    np.testing.assert_allclose(losses(eight), losses(tmp_path / "run"), rtol=1e-5)
    ours, alone = (
        np.load(run / "inv_latents/ddim_latent-6.npy") for run in (eight, tmp_path / "run")
    )
    np.testing.assert_allclose(ours, alone, atol=1e-3)


def test_a_run_that_began_on_eight_devices_goes_on_on_two(cli, on_eight_devices, tmp_path):
    eight, config = on_eight_devices
    run = shutil.copytree(eight, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/6")
    shutil.rmtree(run / "samples/sample-6")
    ended = cli(tune, "--config", config, f"output_dir={run}", "mesh={frames: 2}")
    assert ended.status == 0, ended.err
    assert "going on from" in ended.out
    assert "mesh: data 1, frames 2, fsdp 1" in ended.out
    np.testing.assert_allclose(losses(run), losses(eight), rtol=1e-5)
    assert len(list((run / "samples/sample-6").glob("*.mp4"))) == 4  # and one side by side


def test_prompts_are_sampled_side_by_side_along_data(cli, on_eight_devices, tmp_path):
    eight, _ = on_eight_devices
    prompts = [f"--prompt={subject} is moving" for subject in ("a ball", "a cat")]
    ended = cli(
        *(sample, "--run", eight, *prompts, "--output-dir", tmp_path),
        *("--batch-size", 2, "--mesh", "data=2,frames=4"),
    )
    assert ended.status == 0, ended.err
    assert len(list(tmp_path.glob("*is moving.mp4"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["mesh.frames=3"], "8 frames do not divide over 3 devices", id="three"),
        pytest.param(["mesh.frames=16"], "takes 16 devices, there are 8", id="too many"),
        pytest.param(["mesh={data: -1, fsdp: -1, frames: 1}"], "only one of them", id="two rests"),
        pytest.param(["mesh.frames=0"], "mesh.frames", id="none"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_before_anything(
    cli, write_config, tmp_path, arguments, message
):
    ended = cli(tune, "--config", write_config(train_data=CLIP), *arguments)
    assert ended.status == 1
    assert message in ended.err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder for what jobs of two processes compile. The first of the two alone writes to it."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def start_two(start, programs):
    """Starts a command as two processes of four devices each."""

    def run(*args):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = {
            "JAX_NUM_CPU_DEVICES": "4",
            "JAX_PLATFORMS": "cpu",
            "TAV_JAX_COORDINATOR": f"127.0.0.1:{port}",
            "TAV_JAX_NUM_PROCESSES": "2",
            "TAV_JAX_HEARTBEAT_SECONDS": str(HEARTBEAT),
            # No test kills the process that writes programs.
            "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        return [
            start(*args, environment=settings | {"TAV_JAX_PROCESS_ID": str(process)})
            for process in (0, 1)
        ]

    return run


def test_two_processes_are_the_run_of_one_and_write_one_set_of_files(
    start_two, on_eight_devices, tmp_path
):
    eight, config = on_eight_devices
    run = tmp_path / "run"
    processes = start_two("-m", "tav_jax.tune", "--config", config, f"output_dir={run}")
    said = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    np.testing.assert_allclose(losses(run), losses(eight), rtol=1e-5)
    files = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if "ocdbt" not in str(path)}
        for folder in (run, eight)
    ]
    of_samples = [{name for name in names if name.startswith("samples")} for names in files]
    assert of_samples[0] == of_samples[1]
    assert "wrote" in said[0][0]
    assert "wrote" not in said[1][0]


def test_when_a_process_is_killed_the_other_ends_with_an_error_and_both_go_on_later(
    start_two, on_eight_devices, tmp_path
):
    _, config = on_eight_devices
    run = tmp_path / "run"
    command = ("-m", "tav_jax.tune", "--config", config, f"output_dir={run}")
    command += ("max_train_steps=100000", "validation_steps=100000")

    def newest():
        names = [path.name for path in (run / "checkpoints").glob("*")]
        return max((int(name) for name in names if name.isdecimal()), default=0)

    first, second = start_two(*command)
    wait_for(lambda: newest() > 3, [first, second])
    os.kill(second.pid, signal.SIGKILL)
    # It ends by itself, without which this waits in vain.
    _, said = first.communicate(timeout=BOUND)
    assert first.returncode != 0
    assert "JAX distributed service detected fatal errors" in said
    step = newest()
    wait_for(lambda: newest() > step, start_two(*command))
    assert len(losses(run)) >= step


def test_when_a_process_is_asked_to_stop_while_they_sample_the_step_is_saved(
    start_two, on_eight_devices, tmp_path
):
    _, config = on_eight_devices
    run = tmp_path / "run"
    command = ("-m", "tav_jax.tune", "--config", config, f"output_dir={run}")
    # Of the samples after step 4, which is no checkpoint's, some thousand steps are still to do.
    command += ("validation_data.num_inference_steps=999",)
    processes = start_two(*command)
    wait_for((run / "inv_latents/ddim_latent-4.npy").exists, processes)
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=600)[1] for process in processes]
    saved = run / "checkpoints/4"
    assert said == [f"SIGTERM: saved {saved}; the same command goes on from there\n", ""]
    assert [process.returncode for process in processes] == [143, 143]
    assert saved.is_dir()
    assert not list(run.rglob(".*"))


def wait_for(condition, processes):
    deadline = time.monotonic() + 600
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate(timeout=600)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_that_are_asked_to_stop_save_one_step_and_go_on_from_it(
    start_two, on_eight_devices, tmp_path
):
    """All are asked, as by a scheduler. `test_distributed.py` asks one of them."""
    _, config = on_eight_devices
    steps = 32

    def start(run):
        command = ("-m", "tav_jax.tune", "--config", config, f"output_dir={run}")
        command += (f"max_train_steps={steps}", "checkpointing_steps=99", "validation_steps=99")
        return start_two(*command, "validation_data.prompts=[]")

    def end(processes):
        said = [process.communicate(timeout=600) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said

    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    processes = start(stopped)
    wait_for(lambda: count_steps(stopped) > 0, processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], said
    saved = stopped / f"checkpoints/{count_steps(stopped)}"
    assert said == [f"SIGTERM: saved {saved}; the same command goes on from there\n", ""]
    assert int(saved.name) < steps
    end(start(stopped))
    end(start(whole))
    ours, theirs = trained(stopped, steps), trained(whole, steps)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key])


def count_steps(run):
    return len(losses(run)) if (run / "metrics.jsonl").is_file() else 0


def trained(folder, step):
    """The trained parameters of a checkpoint, by name."""
    run = Run.open(folder)
    params = run.load_base().unet.params
    names = select(params, label_params(params, run.config.trainable_modules), "train")
    return restore_trained(run.checkpoint(step), names)
