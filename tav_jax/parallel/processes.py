"""Run several processes as one job: how they find each other, and how they end together.

A run of one process uses none of this. JAX's coordination service runs in process 0, connects the
processes and receives their heartbeats. When a process dies, the service ends the others, even
those that wait in a collective. This takes at most TAV_JAX_HEARTBEAT_SECONDS. If process 0 dies,
the others end at once.

    TAV_JAX_COORDINATOR        host:port of process 0, the same in all processes
    TAV_JAX_NUM_PROCESSES      number of processes; 1 means a run of its own, under any launcher
    TAV_JAX_PROCESS_ID         index of this process, from 0
    TAV_JAX_HEARTBEAT_SECONDS  a process that is silent for so long counts as dead (default 30)
    TAV_JAX_START_SECONDS      how long the first process waits for the last one (default 300)

srun, mpirun and TPU slices provide the first three. On Kubernetes and elsewhere, set them.
"""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import combinations, count
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tav_jax.errors import MissingProcessError, UserError
from tav_jax.parallel.jax_internals import distributed_state, find_tpu_cluster

COORDINATOR, NUM_PROCESSES, PROCESS_ID = EXPLICIT = (
    "TAV_JAX_COORDINATOR",
    "TAV_JAX_NUM_PROCESSES",
    "TAV_JAX_PROCESS_ID",
)

# A process that is done waits so long for the others, because process 0 may still write videos.
# Heartbeats show meanwhile whether the others are alive.
SHUTDOWN_SECONDS = 3600
# All processes find a wrong setting, but not at the same moment: they wait so long for each other.
ERROR_SECONDS = 10
STOP = "tav_jax/stop"  # the key under which a process says that it ends by a signal
SECONDS_MAIN_STAYS = 0.5


class Launcher(NamedTuple):
    """A program that starts the processes of a job, and the variables that it sets."""

    method: str  # JAX's name for it
    num_processes: str
    process_id: str
    others: tuple[str, ...]  # further variables that JAX reads


# MPI comes first: mpirun under SLURM starts its processes with SLURM's variables, too.
LAUNCHERS = (
    Launcher(
        "ompi",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_MCA_orte_hnp_uri"),  # Open MPI 5 has no such uri
    ),
    Launcher(
        "slurm",
        "SLURM_STEP_NUM_TASKS",  # srun's; a batch script, which is alone, has SLURM_NTASKS too
        "SLURM_PROCID",
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_LOCALID"),
    ),
    Launcher("mpi4py", "PMI_SIZE", "PMI_RANK", ()),
)


@dataclass(frozen=True)
class Job:
    """A run of several processes, as one of them sees it."""

    num_processes: int
    process_id: int
    method: str  # JAX's name for the way to find what is not given here
    coordinator: str | None = None
    # Of a host's GPUs, each process takes the one with its local index: JAX's default.
    one_gpu_each: bool = True
    heartbeat_seconds: int = 30
    start_seconds: int = 300


def start() -> None:
    """Connect the processes of this run, if there are several. Call it before JAX computes.

    Raises:
        UserError: The environment describes a job incompletely; all problems are listed.
    """
    job = read_job(os.environ)
    if job is None:
        return
    # That service would take SIGTERM from `tav_jax.stopping`, and knows no other signal.
    jax.config.update("jax_enable_preemption_service", False)
    # With None JAX chooses: by JAX_LOCAL_DEVICE_IDS, or one GPU each. An empty list means all.
    chosen = job.one_gpu_each or "JAX_LOCAL_DEVICE_IDS" in os.environ
    jax.distributed.initialize(
        coordinator_address=job.coordinator,
        num_processes=job.num_processes if job.coordinator else None,
        process_id=job.process_id if job.coordinator else None,
        local_device_ids=None if chosen else [],
        cluster_detection_method=job.method,
        initialization_timeout=job.start_seconds,
        heartbeat_timeout_seconds=job.heartbeat_seconds,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    # The processes connect at their first collective, see `connect`.
    wait_for_all("start", job.start_seconds)
    broadcast_from_main([True])


@cache
def connect(mesh: Mesh) -> None:
    """Connect the processes of a mesh along every combination of its axes. Do so once per mesh.

    On CPUs, gloo connects a group of devices at the group's first collective, and gives up if one
    of them is 30 seconds late. That happens while a slow process still loads or compiles. So the
    processes meet here and connect at once. Later collectives wait much longer, except gloo's
    reduce-scatter, which no program of ours uses (`frame_collectives`).

    Raises:
        MissingProcessError: Some process has not come here in time.
    """
    job = read_job(os.environ)
    if job is None or jax.process_count() == 1:
        return
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    groups = [group for size in range(len(axes)) for group in combinations(axes, size + 1)]

    def add_up(x: Array) -> Array:
        for group in groups:
            x = x + jax.lax.psum(x, group)
        return x

    spec = PartitionSpec(tuple(axes))
    ones = jax.jit(lambda: jnp.ones(mesh.size), out_shardings=NamedSharding(mesh, spec))()
    program = jax.jit(jax.shard_map(add_up, mesh=mesh, in_specs=spec, out_specs=spec))
    compiled = program.lower(ones).compile()
    wait_for_all(f"mesh {next(_meshes)}", job.start_seconds)
    compiled(ones).block_until_ready()


_meshes = count()  # JAX refuses a barrier's name that was used before


class _Variables:
    """Environment variables, and the problems that were found in them."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = environment
        self.problems: list[str] = []

    def text(self, name: str) -> str:
        return self.environment.get(name, "").strip()

    def number(self, name: str, default: int = 0, least: int = 0) -> int:
        text = self.text(name) or str(default)
        if not text.isdecimal() or int(text) < least:
            self.problems.append(f"{name}: expected a whole number from {least} on, got {text!r}")
            return least
        return int(text)

    def need(self, *names: str, why: str) -> None:
        self.problems += [f"{name}: not set, {why}" for name in names if not self.text(name)]


def read_job(environment: Mapping[str, str]) -> Job | None:
    """Return the job of several processes that this one belongs to, or None if it is alone.

    Raises:
        UserError: The environment describes a job incompletely; all problems are listed.
    """
    variables = _Variables(environment)
    if variables.text(NUM_PROCESSES) == "1":
        job = None
    elif any(variables.text(name) for name in EXPLICIT):
        job = _explicit_job(variables)
    else:
        job = _launched_job(variables) or _tpu_job()
    heartbeat = variables.number("TAV_JAX_HEARTBEAT_SECONDS", Job.heartbeat_seconds, least=1)
    start = variables.number("TAV_JAX_START_SECONDS", Job.start_seconds, least=1)
    if variables.problems:
        raise UserError("\n".join(variables.problems))
    return job and replace(job, heartbeat_seconds=heartbeat, start_seconds=start)


def _explicit_job(variables: _Variables) -> Job:
    variables.need(*EXPLICIT, why=f"set all of {', '.join(EXPLICIT)}, or none")
    address = variables.text(COORDINATOR)
    if address and not re.fullmatch(r"\S+:\d+", address):
        variables.problems.append(f"{COORDINATOR}: expected host:port, got {address!r}")
    count = variables.number(NUM_PROCESSES, default=1, least=1)
    index = variables.number(PROCESS_ID)
    if index >= count and not variables.problems:
        variables.problems.append(f"{PROCESS_ID}: expected 0 to {count - 1}, got '{index}'")
    return Job(count, index, "deactivate", coordinator=address)


def _launched_job(variables: _Variables) -> Job | None:
    for launcher in LAUNCHERS:
        count = variables.number(launcher.num_processes)
        if count < 2:
            continue
        of_ours = f"though {launcher.num_processes} is {count}; set {', '.join(EXPLICIT)} instead"
        variables.need(launcher.process_id, *launcher.others, why=of_ours)
        if launcher.method == "mpi4py" and find_spec("mpi4py") is None:
            variables.problems.append(
                f"{launcher.num_processes}: {count} processes of MPI; install mpi4py, by which JAX "
                f"joins them, or set {', '.join(EXPLICIT)}"
            )
        index = variables.number(launcher.process_id)
        one_gpu_each = _one_gpu_each(variables, launcher, count)
        return Job(count, index, launcher.method, one_gpu_each=one_gpu_each)
    return None


def _one_gpu_each(variables: _Variables, launcher: Launcher, count: int) -> bool:
    """Return whether the processes of a host see all its GPUs, so that each must take one."""
    if launcher.method == "slurm":
        sees_its_own = ("SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU")
        one_a_node = variables.number("SLURM_STEP_NUM_NODES") == count
        return not one_a_node and not any(variables.text(name) for name in sees_its_own)
    return variables.number("OMPI_COMM_WORLD_LOCAL_SIZE") != 1


def _tpu_job() -> Job | None:
    # JAX sets this on import if there are TPU chips. Without them no metadata server is asked.
    if "tpu" not in (jax.config.values["jax_platforms"] or ""):
        return None
    if cluster := find_tpu_cluster():
        name, num_processes, process_id = cluster
        return Job(num_processes, process_id, name)
    return None


def is_main_process() -> bool:
    """Return whether this is process 0, which does all the writing."""
    # Not `jax.process_index`, which would first exchange the processes' devices.
    return distributed_state().process_id == 0


def wait_for_all(name: str, seconds: float) -> None:
    """Wait until all processes have called this with the same name.

    Raises:
        MissingProcessError: Some process has not, after that many seconds.
    """
    state = distributed_state()
    if state.client is None:
        return
    try:
        state.client.wait_at_barrier(f"tav_jax/{name}", timeout_in_ms=round(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise MissingProcessError(
            f"{name}: after {seconds:g} seconds not all of {state.num_processes} "
            "processes are there; see what the others say"
        ) from None


def broadcast_from_main(flags: Sequence[bool]) -> list[bool]:
    """Return the flags of process 0 in all processes. All of them must call this.

    Processes may look for a file at different moments and find different answers. They must agree
    all the same, or they would run different programs.
    """
    if jax.process_count() == 1 or not flags:
        return list(flags)
    found = multihost_utils.broadcast_one_to_all(np.asarray(flags, np.int32))
    return [bool(flag) for flag in found]


def broadcast_number_from_main(number: int) -> int:
    """Return process 0's number, below 2^31, in all processes. All of them must call this."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.asarray(number, np.int32)))


def largest_of_all(numbers: Sequence[int]) -> list[int]:
    """Return the largest of each of these numbers, below 2^31, over all processes.

    All processes must call this.
    """
    if jax.process_count() == 1:
        return list(numbers)
    gathered = multihost_utils.process_allgather(np.asarray(numbers, np.int32))
    return [int(number) for number in gathered.max(axis=0)]


def tell_others_to_stop(number: int) -> None:
    """Let `told_to_stop` of the other processes return the number of a signal."""
    if client := distributed_state().client:
        client.key_value_set(STOP, str(number), allow_overwrite=True)


def told_to_stop() -> int:
    """Return the number of the signal by which another process ends, or 0."""
    try:
        return int(distributed_state().client.key_value_try_get(STOP))
    except jax.errors.JaxRuntimeError:  # no process has said so
        return 0


def wait_to_stop(seconds: float) -> None:
    """Wait until all processes are about to end, but no longer than so many seconds.

    Process 0 waits a little more, because JAX ends the others with an error when it is gone.
    """
    if distributed_state().client is None:
        return
    try:
        wait_for_all("stop", seconds)
    except (TimeoutError, jax.errors.JaxRuntimeError):
        return
    if is_main_process():
        time.sleep(SECONDS_MAIN_STAYS)


def exit_together(run: Callable[[], int]) -> int:
    """Return the exit status of `run`. In a job of several processes, end one that fails.

    A failed process must not exit in the ordinary way: it would wait for the others, while they may
    wait for it in a collective.
    """
    try:
        status = run()
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            _wait_for_verdict()
        traceback.print_exc()
        status = 1
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            wait_for_all("error", ERROR_SECONDS)
        except (TimeoutError, jax.errors.JaxRuntimeError):
            os._exit(status)
    return status


def _wait_for_verdict() -> None:
    """Wait for JAX to notice that another process has died, and to end this one with a message.

    A collective may fail before that, with an error that says less.
    """
    if job := read_job(os.environ):
        time.sleep(1.5 * job.heartbeat_seconds)
