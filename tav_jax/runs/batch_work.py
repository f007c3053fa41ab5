"""What one of several batch workers does, and the manifest that they leave.

Workers share a plan through the runs' folders. A video that exists is done, and a claim
(`tav_jax.files`) says that somebody is making one. So workers may come and go, on one host or on
several, and what a killed worker had begun is free at once. The last worker writes the contact
sheets and the manifest, which hold nothing of who wrote a video or when.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from tav_jax.console import say
from tav_jax.errors import UserError
from tav_jax.files import (
    atomic_write,
    claim,
    remove_lock,
    remove_partials,
)
from tav_jax.parallel.sharding import on_mesh
from tav_jax.runs.metrics_log import Stages
from tav_jax.runs.overview import has_overview, renew_overview, sheet_of
from tav_jax.runs.render import write_batch
from tav_jax.runs.samples import Job, Sample, group_by_batch_key


def work(jobs: Sequence[Job], batch_size: int) -> Iterator[Path]:
    """Yield the path of each video that this process writes; at the end all jobs are done."""
    # First runs that no other worker is at, so that each loads a model of its own; its first has
    # the claim of its contact sheet.
    for job in jobs:
        if missing_samples(job):
            with claim(sheet_of(job.folder), wait=False) as is_first:
                if is_first:
                    yield from sample_free(job, batch_size)
    for job in jobs:
        yield from sample_free(job, batch_size)
    # The rest is claimed by other workers. Wait, and take over what a dead worker leaves.
    for job in jobs:
        if left := missing_samples(job):
            say(f"{job.run.folder}: {len(left)} videos are with other workers: waiting")
            yield from sample_free(job, batch_size, wait=True)
        for sample in job.samples:  # of a worker that was killed just after it had written
            remove_lock(job.video(sample))
        remove_lock(job.run.inverted_file(job.step))
        if not has_overview(job.folder):
            with claim(sheet_of(job.folder)):
                renew_overview(job.folder, job.run)


def sample_free(job: Job, batch_size: int, *, wait: bool = False) -> Iterator[Path]:
    """Yield the paths of a job's videos that were missing and claimed by no other process.

    The model is loaded only if there are any.

    Args:
        wait: Until every video is there.
    """
    run = job.run
    load = cache(lambda: run.load_model(job.step))
    for group in group_by_batch_key(job.wanted):
        size = min(batch_size, len(group))
        while group:
            with ExitStack() as claims:
                batch = claim_batch(job, group, size, claims, wait=wait)
                if batch:
                    with on_mesh(run.mesh()):
                        for path, _ in write_batch(
                            run, load(), batch, job.folder, Stages(), size=size, alone=claim
                        ):
                            yield path
                elif not wait:
                    break


def claim_batch(
    job: Job, group: list[Sample], size: int, claims: ExitStack, *, wait: bool
) -> list[Sample]:
    """Return up to `size` samples that are missing and ours until `claims` is closed.

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


def missing_samples(job: Job) -> list[Sample]:
    """Return the wanted samples whose videos are not there."""
    return [sample for sample in job.wanted if not job.is_done(sample)]


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of a manifest by their video; none if there is no such file.

    Raises:
        UserError: the file is something else.
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
    """Write a line of JSON for each video, in the plan's order; returns those that are missing.

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
