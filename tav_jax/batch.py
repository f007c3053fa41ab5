"""python -m tav_jax.batch: a plan of runs x prompts x seeds, by any number of processes at once.

Nobody hands out the work: the videos that are there are what is done, and a claim (`files.py`) on a
video says that somebody makes it. So workers come and go, on one host or on several that share the
runs' folders, and what a killed one had begun is free at once. Whoever is left at the end sees
every video, and writes the contact sheets and the manifest if no other has: they say nothing of who
or when, so that it does not matter which.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from tav_jax.console import command, say
from tav_jax.errors import UserError
from tav_jax.files import (
    atomic_write,
    claim,
    first_unwritable_parent,
    remove_lock,
    remove_partials,
)
from tav_jax.parallel.sharding import on_mesh
from tav_jax.runs.batch_plan import plan_jobs, read_plan
from tav_jax.runs.metrics_log import Stages
from tav_jax.runs.run import inverted_clip, load_tuned, mesh_of
from tav_jax.runs.samples import (
    Job,
    Sample,
    group_by_batch_key,
    has_overview,
    sheet_of,
    write_batch,
)
from tav_jax.sample import renew_overview, warn_unused_seeds

# Seconds that an interrupted worker has. It hears nothing while a program runs, and JAX's garbage
# collection swallows an interrupt; what a kill leaves, the next worker removes.
GRACE = 5

# What a worker does.


def work(jobs: Sequence[Job], batch_size: int) -> Iterator[Path]:
    """Yields the path of each video that this process writes; at the end all jobs are done."""
    # First runs that no other worker is at, so that each loads a model of its own; its first has
    # the claim of its contact sheet.
    for job in jobs:
        if _missing(job):
            with claim(sheet_of(job.folder), wait=False) as is_first:
                if is_first:
                    yield from sample_free(job, batch_size)
    for job in jobs:
        yield from sample_free(job, batch_size)
    # What is left the others have; if one of them dies, it is for those who wait.
    for job in jobs:
        if left := _missing(job):
            say(f"{job.run.folder}: {len(left)} videos are with other workers: waiting")
            yield from sample_free(job, batch_size, wait=True)
        for sample in job.samples:  # of a worker that was killed just after it had written
            remove_lock(job.video(sample))
        remove_lock(job.run.inverted(job.step))
        if not has_overview(job.folder):
            with claim(sheet_of(job.folder)):
                renew_overview(job)


def sample_free(job: Job, batch_size: int, *, wait: bool = False) -> Iterator[Path]:
    """Yields the paths of a job's videos that were missing and claimed by no other process.

    The model is loaded only if there are any.

    Args:
        wait: Until every video is there.
    """
    run, config, step = job.run, job.config, job.step
    load = cache(lambda: load_tuned(run, config, step))
    inverted = cache(lambda steps: inverted_clip(run, config, load(), step, steps, alone=claim))
    for group in group_by_batch_key(job.wanted):
        size = min(batch_size, len(group))
        while group:
            with ExitStack() as claims:
                batch = claim_batch(job, group, size, claims, wait=wait)
                if batch:
                    with on_mesh(mesh_of(config)):
                        yield from write_batch(
                            load(), config, batch, inverted, job.folder, Stages(), size=size
                        )
                elif not wait:
                    break


def claim_batch(
    job: Job, group: list[Sample], size: int, claims: ExitStack, *, wait: bool
) -> list[Sample]:
    """Returns up to `size` samples that are missing and ours until `claims` is closed.

    Takes what is done out of `group`.

    Args:
        wait: For the first of them.
    """
    batch: list[Sample] = []
    for sample in list(group):
        if len(batch) == size:
            break
        if job.is_done(sample):
            group.remove(sample)
            continue
        with ExitStack() as attempt:
            is_ours = attempt.enter_context(claim(job.video(sample), wait=wait and not batch))
            if is_ours and not job.is_done(sample):
                remove_partials(job.record(sample))
                batch.append(sample)
                claims.enter_context(attempt.pop_all())
    return batch


def _missing(job: Job) -> list[Sample]:
    return [sample for sample in job.wanted if not job.is_done(sample)]


# The manifest.


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the lines of a manifest by their video; none if there is no such file.

    Raises:
        ValueError: the file is something else.
    """
    try:
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return {row["video"]: row for row in rows if row["sha256"]}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(
            f"--manifest: {path} is there and is no manifest; name another file"
        ) from None


def write_manifest(path: Path, jobs: Sequence[Job]) -> list[Path]:
    """Writes a line of JSON for each video, in the plan's order; returns those that are missing.

    A line has the run, the settings, the video's path from the manifest's folder, its bytes and
    SHA-256, null if it is missing.
    """
    missing, lines = [], []
    with claim(path):
        old, written = read_manifest(path), path.stat().st_mtime_ns if path.exists() else 0
        for job in jobs:
            for sample in job.samples:
                video = job.video(sample)
                name = os.path.relpath(video.resolve(), path.parent.resolve())
                size = digest = None
                if job.is_done(sample):
                    size, known = video.stat().st_size, old.get(name, {})
                    # Each worker of a fleet comes here, and gigabytes are not read again by each.
                    if known.get("bytes") == size and video.stat().st_mtime_ns < written:
                        digest = known["sha256"]
                    else:
                        with video.open("rb") as file:
                            digest = hashlib.file_digest(file, "sha256").hexdigest()
                else:
                    missing.append(video)
                row = {"run": str(job.run.folder), **asdict(sample)}
                del row["name_seed"]
                row |= {"video": name, "bytes": size, "sha256": digest}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        content = "".join(lines).encode()
        if not path.exists() or path.read_bytes() != content:
            with atomic_write(path) as partial:
                partial.write_bytes(content)
            say(f"wrote {path}")
    return missing


# Several workers on this host.


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
        written = wanted - sum(len(_missing(job)) for job in jobs)
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
