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

STEPS = 8
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
        **{"max_train_steps": STEPS, "validation_steps": STEPS, "checkpointing_steps": STEPS // 2},
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
        np.load(run / f"inv_latents/ddim_latent-{STEPS}.npy") for run in (eight, tmp_path / "run")
    )
    np.testing.assert_allclose(ours, alone, atol=1e-3)


def test_a_run_that_began_on_eight_devices_goes_on_on_two(cli, on_eight_devices, tmp_path):
    eight, config = on_eight_devices
    run = shutil.copytree(eight, tmp_path / "run")
    shutil.rmtree(run / f"checkpoints/{STEPS}")
    shutil.rmtree(run / f"samples/sample-{STEPS}")
    ended = cli(tune, "--config", config, f"output_dir={run}", "mesh={frames: 2}")
    assert ended.status == 0, ended.err
    assert "going on from" in ended.out
    assert "mesh: data 1, frames 2, fsdp 1" in ended.out
    np.testing.assert_allclose(losses(run), losses(eight), rtol=1e-5)
    assert len(list((run / f"samples/sample-{STEPS}").glob("*.mp4"))) == 4  # and one side by side


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


def as_two_processes(start, programs):
    """Returns what starts a command as two processes of four devices each."""

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
            start("-m", *args, environment=settings | {"TAV_JAX_PROCESS_ID": str(process)})
            for process in (0, 1)
        ]

    return run


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder for what jobs of two processes compile. The first of the two alone writes to it."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def by_two_processes(start_once, programs, on_eight_devices, tmp_path_factory):
    """The run of eight devices, made by two processes, and what they have said."""
    _, config = on_eight_devices
    run = tmp_path_factory.mktemp("two") / "run"
    start = as_two_processes(start_once, programs)
    return run, end(start("tav_jax.tune", "--config", config, f"output_dir={run}"))


@pytest.fixture
def start_two(start_alone, programs):
    return as_two_processes(start_alone, programs)


def end(processes):
    """Waits for processes that end well, and returns what they have said."""
    said = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return [out for out, _ in said]


def test_two_processes_are_the_run_of_one_and_write_one_set_of_files(
    by_two_processes, on_eight_devices
):
    (run, said), (eight, _) = by_two_processes, on_eight_devices
    np.testing.assert_allclose(losses(run), losses(eight), rtol=1e-5)
    files = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if "ocdbt" not in str(path)}
        for folder in (run, eight)
    ]
    of_samples = [{name for name in names if name.startswith("samples")} for names in files]
    assert of_samples[0] == of_samples[1]
    assert "wrote" in said[0]
    assert "wrote" not in said[1]


def test_a_run_that_is_killed_and_asked_to_stop_ends_as_one_that_was_not(
    start_two, by_two_processes, on_eight_devices, tmp_path
):
    """All are asked, as by a scheduler. `test_distributed.py` asks one of them."""
    (whole, _), (_, config) = by_two_processes, on_eight_devices
    run = tmp_path / "run"
    command = ("tav_jax.tune", "--config", config, f"output_dir={run}", "checkpointing_steps=1")
    # So that it does not end before it is stopped.
    endless = (*command, "validation_data.num_inference_steps=999")

    def newest():
        names = [path.name for path in (run / "checkpoints").glob("*")]
        return max((int(name) for name in names if name.isdecimal()), default=0)

    first, second = start_two(*endless)
    wait_for(lambda: newest() > 0, [first, second])
    os.kill(second.pid, signal.SIGKILL)
    # It ends by itself, without which this waits in vain.
    _, said = first.communicate(timeout=BOUND)
    assert first.returncode != 0
    assert "JAX distributed service detected fatal errors" in said

    # On a slow machine all steps may be done: then the last one is lost.
    shutil.rmtree(run / f"checkpoints/{STEPS}", ignore_errors=True)
    step = newest()
    processes = start_two(*endless)
    wait_for(lambda: newest() > step, processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], said
    saved = run / f"checkpoints/{newest()}"
    assert said == [f"SIGTERM: saved {saved}; the same command goes on from there\n", ""]

    end(start_two(*command))
    ours, theirs = trained(run), trained(whole)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key])


def test_when_a_process_is_asked_to_stop_while_they_sample_the_step_is_saved(
    start_two, on_eight_devices, tmp_path
):
    _, config = on_eight_devices
    run = tmp_path / "run"
    # Of the samples after step 1, which is no checkpoint's, some thousand steps are still to do.
    settings = ("validation_steps=1", "validation_data.num_inference_steps=999")
    processes = start_two("tav_jax.tune", "--config", config, f"output_dir={run}", *settings)
    wait_for((run / "inv_latents/ddim_latent-1.npy").exists, processes)
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=600)[1] for process in processes]
    saved = run / "checkpoints/1"
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


def trained(folder):
    """The trained parameters of a run's last checkpoint, by name."""
    run = Run.open(folder)
    params = run.load_base().unet.params
    names = select(params, label_params(params, run.config.trainable_modules), "train")
    return restore_trained(run.checkpoint(STEPS), names)
