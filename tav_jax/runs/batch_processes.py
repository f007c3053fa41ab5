"""Run several batch workers on this host. Each is a process, with its own GPU if there are any."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from tav_jax.console import say
from tav_jax.errors import UserError
from tav_jax.stopping import when_stopped

# Seconds that a worker has to end. Then it is killed.
GRACE = 5


def devices_here() -> tuple[str, int]:
    """Return JAX's platform and its number of devices on this host."""
    # In another process, because the process that asks JAX for the devices also takes them.
    question = "import jax; print(jax.default_backend(), jax.local_device_count())"
    asked = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    if asked.returncode:
        raise UserError(f"JAX does not start: {(asked.stderr.strip() or '?').splitlines()[-1]}")
    platform, count = asked.stdout.split()[-2:]
    return platform, int(count)


def worker_environments(workers: int, platform: str, count: int) -> list[dict[str, str]]:
    """Return the variables that give each worker its own GPU, if there are any.

    Raises:
        UserError: There are fewer devices than workers, or they cannot be shared.
    """
    if platform == "cpu":
        return [{}] * workers
    if platform != "gpu":
        raise UserError(
            f"--workers {workers}: a host's {platform} chips belong to one process; leave it out, "
            "and start one process on each host"
        )
    if workers > count:
        raise UserError(f"--workers {workers}: each needs a GPU, and this host has {count}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return [{"CUDA_VISIBLE_DEVICES": name} for name in visible.split(",")[:workers]]


def run_workers(arguments: Sequence[str], environments: Sequence[dict[str, str]]) -> list[str]:
    """Run a worker in each environment until all have ended. Return how the failed ones ended.

    A signal that stops this process ends all workers.
    """
    workers: list[subprocess.Popen] = []
    starting = threading.Lock()

    def end_workers() -> str:
        starting.acquire()  # for good: no more workers
        for worker in workers:
            worker.terminate()
        try:
            for worker in workers:
                worker.wait(GRACE)
        except subprocess.TimeoutExpired:
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.wait()
        return "interrupted; the same command makes the rest"

    with when_stopped(end_workers):
        try:
            for number, environment in enumerate(environments, start=1):
                with starting:
                    worker = subprocess.Popen(
                        [sys.executable, "-m", "tav_jax.batch", *arguments],
                        env=os.environ | environment,
                        process_group=0,  # so a terminal's Ctrl-C reaches it once, through us
                    )
                    workers.append(worker)
                say(f"worker {number} is process {worker.pid}")
            statuses = [worker.wait() for worker in workers]
        except BaseException:
            end_workers()
            raise
    return [
        f"worker {number} (process {worker.pid}) "
        + (f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}")
        for number, (worker, status) in enumerate(zip(workers, statuses, strict=True), start=1)
        if status
    ]
