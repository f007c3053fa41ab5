"""Several batch workers on this host, each a process with a GPU of its own if there are any."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from tav_jax.console import say
from tav_jax.errors import UserError

# Seconds that an interrupted worker has to end. It notices nothing while a compiled program runs.
# The next worker removes what a killed one leaves.
GRACE = 5


def devices_here() -> tuple[str, int]:
    """Return JAX's platform and how many devices it has in this host."""
    # In a process of its own, since whoever asks JAX for the devices has them from then on.
    question = "import jax; print(jax.default_backend(), jax.local_device_count())"
    asked = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    if asked.returncode:
        raise UserError(f"JAX does not start: {(asked.stderr.strip() or '?').splitlines()[-1]}")
    platform, count = asked.stdout.split()[-2:]
    return platform, int(count)


def worker_environments(workers: int, platform: str, count: int) -> list[dict[str, str]]:
    """Return what each worker's environment has beyond ours: a GPU of its own, if there are any.

    Raises:
        UserError: there are fewer of these devices than workers.
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
    """Run a worker in each environment until all have ended; says how those that failed did.

    Ctrl-C, or the end of this process by SIGTERM, ends all of them.
    """
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    workers: list[subprocess.Popen] = []
    try:
        for number, environment in enumerate(environments, start=1):
            worker = subprocess.Popen(
                [sys.executable, "-m", "tav_jax.batch", *arguments],
                env=os.environ | environment,
                process_group=0,  # a terminal's Ctrl-C comes by way of us, and once
            )
            workers.append(worker)
            say(f"worker {number} is process {worker.pid}")
        statuses = [worker.wait() for worker in workers]
    except BaseException:
        try:
            for worker in workers:
                worker.send_signal(signal.SIGINT)
            for worker in workers:
                worker.wait(GRACE)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, terminate)
    return [
        f"worker {number} (process {worker.pid}) "
        + (f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}")
        for number, (worker, status) in enumerate(zip(workers, statuses, strict=True), start=1)
        if status
    ]
