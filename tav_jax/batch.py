"""python -m tav_jax.batch: sample a plan of runs, prompts and seeds with any number of workers."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tav_jax.console import command, say
from tav_jax.errors import UserError
from tav_jax.files import (
    first_unwritable_parent,
)
from tav_jax.runs.batch_plan import plan_jobs, read_plan
from tav_jax.runs.batch_work import missing_samples, read_manifest, work, write_manifest
from tav_jax.runs.render import warn_unused_seeds

# Seconds that an interrupted worker has to end. It notices nothing while a compiled program runs.
# The next worker removes what a killed one leaves.
GRACE = 5


def devices_here() -> tuple[str, int]:
    """Returns JAX's platform and how many devices it has in this host."""
    # In a process of its own, since whoever asks JAX for the devices has them from then on.
    question = "import jax; print(jax.default_backend(), jax.local_device_count())"
    asked = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    if asked.returncode:
        raise UserError(f"JAX does not start: {(asked.stderr.strip() or '?').splitlines()[-1]}")
    platform, count = asked.stdout.split()[-2:]
    return platform, int(count)


def worker_environments(workers: int, platform: str, count: int) -> list[dict[str, str]]:
    """Returns what each worker's environment has beyond ours: a GPU of its own, if there are any.

    Raises:
        ValueError: there are fewer of these devices than workers.
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
    """Runs a worker in each environment until all have ended; says how those that failed did.

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


# The command line.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python launch/batch_sample.py",
        description="Sample a plan of runs x prompts x seeds, skipping the videos that exist. Any "
        "number of processes may do so at once, also on several hosts that share the runs.",
        epilog="example: python launch/batch_sample.py plan.yaml; the plan's form stands at the "
        "top of this script",
    )
    parser.add_argument("plan", type=Path, help="a .yaml or .csv file")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="prompts at a time")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes on this host, a GPU each"
    )
    parser.add_argument(
        "--manifest", type=Path, metavar="FILE", help="default: PLAN.manifest.jsonl beside the plan"
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    numbers = {"--batch-size": args.batch_size, "--workers": args.workers}
    if wrong := [f"{name} {value}" for name, value in numbers.items() if value < 1]:
        raise UserError("\n".join(f"{one}: expected 1 or more" for one in wrong))
    jobs = plan_jobs(read_plan(args.plan))
    manifest = args.manifest or args.plan.with_suffix(".manifest.jsonl")
    if place := first_unwritable_parent(manifest.absolute().parent):
        raise UserError(f"--manifest: nothing can be written in {place}; name another file")
    read_manifest(manifest)

    total, wanted = sum(len(job.samples) for job in jobs), sum(len(job.wanted) for job in jobs)
    failed, written = [], 0
    if (workers := min(args.workers, wanted)) > 1:
        arguments = [str(args.plan), "--batch-size", str(args.batch_size)]
        arguments += ["--manifest", str(manifest)]
        failed = run_workers(arguments, worker_environments(workers, *devices_here()))
        written = wanted - sum(len(missing_samples(job)) for job in jobs)
    else:
        for job in jobs:
            there = len(job.samples) - len(job.wanted)
            say(f"{job.run.folder}: {len(job.samples)} videos, {there} of them there already")
            warn_unused_seeds(job.wanted)
        for path in work(jobs, args.batch_size):
            say(f"wrote {path}")
            written += 1
    missing = write_manifest(manifest, jobs)
    failed += [f"{path} is missing" for path in missing]
    others = wanted - written - len(missing)
    say(
        f"{written} videos written, {total - wanted} were there already"
        + (f", {others} by other workers" if others else "")
    )
    if failed:
        rest = "the same command makes what is missing" if missing else "yet no video is missing"
        raise UserError("\n".join([*failed, rest]))


if __name__ == "__main__":
    sys.exit(main())
