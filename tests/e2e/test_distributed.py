"""Two processes of four devices each: what they do together, and when one of them is gone."""

import json
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

HEARTBEAT_SECONDS = 6
# On top, until the others have ended: for cores that do much else.
MARGIN_SECONDS = 120
# How JAX's coordination service begins when it ends a process.
VERDICT = "JAX distributed service detected fatal errors"

# A step sums over all devices, so that no process can do one alone.
PROGRAM = """
import json, sys, time
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from tav_jax.parallel import processes as distributed
from tav_jax.console import command
from tav_jax.errors import UserError
from tav_jax.models.frame_collectives import all_frames
from tav_jax.parallel.sharding import make_mesh
from tav_jax.stopping import start_job

@command
def main(argv):
    start_job()
    action = sys.argv[1]
    if action == "fail":
        raise UserError("none can go on")
    mesh = make_mesh({"data": 1, "frames": 8, "fsdp": 1}, frames=8)
    sharding = NamedSharding(mesh, PartitionSpec("frames"))
    numbers = jax.make_array_from_callback((8,), sharding, lambda at: jnp.arange(8.0)[at])
    process = jax.process_index()
    if action == "be slow":
        distributed.connect(mesh)
        # Longer than the 30 seconds after which some of gloo gives up, as if it still compiled.
        time.sleep(40 * process)
    # Every device has all numbers, and a weight for each.
    copies = jax.shard_map(
        lambda x: all_frames(x[None]), mesh=mesh, in_specs=PartitionSpec("frames"),
        out_specs=PartitionSpec("frames"), check_vma=False,
    )
    weights = jnp.arange(64.0).reshape(8, 8)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(copies(x) * weights)))(numbers)
    step = jax.jit(lambda x: x + jnp.sum(x), out_shardings=sharding)
    print(json.dumps({
        "process": process,
        "gradient": float(jax.jit(lambda x: jnp.sum(x * jnp.arange(8)))(gradient)),
        "main": distributed.is_main_process(),
        "sum": float(jax.jit(jnp.sum)(step(numbers))),
        "agreed": distributed.broadcast_from_main([process == 0]),
    }), flush=True)
    distributed.wait_for_all("said", 300)
    while action == "step":
        numbers = step(numbers).block_until_ready()
    if action == "wait" and process == 0:
        distributed.wait_for_all("never", 600)
    if action == "lose patience" and process == 0:
        distributed.wait_for_all("never", 1)
    if action not in ("end", "be slow"):
        time.sleep(600)

sys.exit(main())
"""


Start = Callable[..., list[subprocess.Popen]]


@pytest.fixture
def start(start_alone: Callable, tmp_path: Path) -> Start:
    """Starts the program as the processes of a job of two: `start("step", processes=(0, 1))`."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def run(action: str, processes: Sequence[int] = (0, 1)) -> list[subprocess.Popen]:
        environment = {
            "TAV_JAX_COORDINATOR": address,
            "TAV_JAX_NUM_PROCESSES": "2",
            "TAV_JAX_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS),
            "TAV_JAX_START_SECONDS": "300" if len(processes) == 2 else "3",
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "4",
        }
        return [
            start_alone(program, action, environment=environment | {"TAV_JAX_PROCESS_ID": str(i)})
            for i in processes
        ]

    return run


def said(process: subprocess.Popen) -> dict:
    """Returns what the program prints once it has computed with the others."""
    for line in process.stdout:
        if line.startswith("{"):  # Gloo says something, too
            return json.loads(line)
    pytest.fail(process.stderr.read())


def ended(process: subprocess.Popen, seconds: float) -> tuple[bool, str]:
    """Returns whether it said that all is well, and what it said to stderr."""
    _, err = process.communicate(timeout=seconds)
    return process.returncode == 0, err


def test_processes_compute_together_and_know_who_writes(start):
    processes = start("end")
    both = {
        "sum": sum(range(8)) * 9,
        "gradient": sum(j * (8 * i + j) for i in range(8) for j in range(8)),
        "agreed": [True],
    }
    assert [said(process) for process in processes] == [
        both | {"process": 0, "main": True},
        both | {"process": 1, "main": False},
    ]
    assert [ended(process, MARGIN_SECONDS) for process in processes] == [(True, "")] * 2


def test_a_process_that_is_slower_than_gloo_waits_is_waited_for(start):
    processes = start("be slow")
    assert [said(process)["process"] for process in processes] == [0, 1]
    assert [ended(process, MARGIN_SECONDS) for process in processes] == [(True, "")] * 2


@pytest.mark.parametrize(
    ("action", "victim", "blow", "seconds"),
    [
        pytest.param("step", 0, signal.SIGKILL, 0, id="the coordinator in a collective"),
        pytest.param("step", 0, signal.SIGSTOP, HEARTBEAT_SECONDS, id="the coordinator's machine"),
        pytest.param("step", 1, signal.SIGKILL, HEARTBEAT_SECONDS, id="another in a collective"),
        pytest.param("wait", 1, signal.SIGKILL, HEARTBEAT_SECONDS, id="another in a barrier"),
        pytest.param("sleep", 0, signal.SIGKILL, 0, id="the coordinator between steps"),
    ],
)
def test_when_a_process_is_gone_the_other_ends_with_an_error(start, action, victim, blow, seconds):
    processes = start(action)
    for process in processes:
        said(process)
    processes[victim].send_signal(blow)
    survivor = 1 - victim
    well, err = ended(processes[survivor], seconds + MARGIN_SECONDS)
    assert not well
    assert VERDICT in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("action", ["sleep", "step"])
def test_when_a_process_is_asked_to_stop_all_do_and_one_says_so(start, action, victim, number):
    processes = start(action)
    for process in processes:
        said(process)
    processes[victim].send_signal(number)
    lines = [f"{number.name}: interrupted\n", ""]
    for process, line in zip(processes, lines, strict=True):
        assert ended(process, MARGIN_SECONDS)[1] == line
        assert process.returncode == 128 + number


@pytest.mark.parametrize("there", [0, 1])
def test_a_process_that_never_comes_is_not_waited_for_longer_than_allowed(start, there):
    (process,) = start("end", processes=(there,))
    well, err = ended(process, 3 + MARGIN_SECONDS)
    assert not well
    assert "DEADLINE_EXCEEDED" in err


def test_an_error_of_all_processes_is_said_by_each_and_nothing_else(start):
    processes = start("fail")
    assert [ended(process, 2 * MARGIN_SECONDS) for process in processes] == [
        (False, "error: none can go on\n")
    ] * 2


def test_an_error_of_one_process_ends_the_other(start):
    processes = start("lose patience")
    for process in processes:
        said(process)
    well, err = ended(processes[0], MARGIN_SECONDS)
    assert not well
    assert err == (
        "error: never: after 1 seconds not all of 2 processes are there; see what the others say\n"
    )
    well, err = ended(processes[1], MARGIN_SECONDS)
    assert not well
    assert VERDICT in err
