"""The work of one batch worker, and the manifest.

Several workers, on one host or on several, share a plan through the runs' folders. A video that
exists is done. A claim (`tav_jax.files`) says that a worker is making one, and the claims of a
killed worker are free at once. So workers may start and stop at any time. The last one writes the
contact sheets and the manifest. Neither depends on which worker wrote a video, or when.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from tav_jax.console import say
from tav_jax.digests import sha256
from tav_jax.errors import UserError
from tav_jax.files import atomic_write, claim, remove_lock
from tav_jax.parallel.sharding import on_mesh
from tav_jax.reading import MOST_RECORD_BYTES, parse_json, read_text, why_not_a_file
from tav_jax.runs.metrics_log import Stages
from tav_jax.runs.overview import has_overview, renew_overview, sheet_of
from tav_jax.runs.render import write_batch
from tav_jax.runs.samples import Job, Sample, group_by_batch_key


def work(jobs: Sequence[Job], batch_size: int) -> Iterator[Path]:
    """Yield the path of each video that this process writes. At the end all jobs are done."""
    for job in jobs:
        yield from sample_as_first_worker(job, batch_size)
    for job in jobs:
        yield from sample_free(job, batch_size)
    for job in jobs:
        # The rest is claimed by other workers. Wait, and take over from a worker that dies.
        if left := missing_samples(job):
            say(f"{job.run.folder}: {len(left)} videos are claimed by other workers: waiting")
            yield from sample_free(job, batch_size, wait=True)
        finish(job)


def sample_as_first_worker(job: Job, batch_size: int) -> Iterator[Path]:
    """Yield as `sample_free` does, unless another worker is at this job already.

    So workers begin with different runs, and a run's model is loaded by as few as possible. The
    first worker of a job holds the claim of its contact sheet.
    """
    if missing_samples(job):
        with claim(sheet_of(job.folder), wait=False) as is_first:
            if is_first:
                yield from sample_free(job, batch_size)


def finish(job: Job) -> None:
    """Remove the locks of killed workers, and write the contact sheet if it is outdated."""
    for sample in job.samples:
        remove_lock(job.video(sample))
    remove_lock(job.run.inverted_file(job.step))
    if not has_overview(job.folder):
        with claim(sheet_of(job.folder)):
            renew_overview(job.folder, job.run)


def sample_free(job: Job, batch_size: int, *, wait: bool = False) -> Iterator[Path]:
    """Sample the missing videos that no other process has claimed, and yield their paths.

    The model is loaded only if there are any.

    Args:
        job: The samples of one run.
        batch_size: Most prompts and seeds that are sampled at once.
        wait: Wait for the claimed ones too, until every video is there.
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
    """Claim missing samples and return them.

    Args:
        job: The samples of one run.
        group: Samples of one batch key. Those that are done are removed from it.
        size: Most samples to claim.
        claims: Holds the claims until it is closed.
        wait: Wait until the first claimed sample is free.
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
    if why_not_a_file(path) == "No such file":
        return {}
    try:
        lines = read_text(path, MOST_RECORD_BYTES).split("\n")
        rows = [parse_json(line, str(path)) for line in lines if line]
        return {row["video"]: row for row in rows if row["sha256"]}
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(
            f"--manifest: {path} exists and is not a manifest; name another file"
        ) from None


def write_manifest(path: Path, jobs: Sequence[Job]) -> list[Path]:
    """Write a line of JSON for each video, in the plan's order; return the missing videos.

    The file is not touched if it would stay the same.
    """
    with claim(path):
        old, written = read_manifest(path), path.stat().st_mtime_ns if path.exists() else 0
        rows = [
            manifest_row(path, job, sample, old, written) for job in jobs for sample in job.samples
        ]
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        content = "".join(lines).encode()
        if not path.exists() or path.read_bytes() != content:
            with atomic_write(path) as partial:
                partial.write_bytes(content)
            say(f"wrote {path}")
    return [job.video(sample) for job in jobs for sample in job.samples if not job.is_done(sample)]


def manifest_row(
    path: Path, job: Job, sample: Sample, old: dict[str, dict[str, Any]], written: int
) -> dict[str, Any]:
    """Return a video's run, settings, path from the manifest's folder, bytes and SHA-256.

    The last two are null if the video is missing.

    Args:
        path: The manifest.
        job: The job that the sample is from.
        sample: The settings of the video.
        old: The rows of the manifest so far. The digest of a video that has not changed since is
            taken from there, because every worker comes here and videos may be gigabytes.
        written: When that manifest was written, in nanoseconds.
    """
    video = job.video(sample)
    name = os.path.relpath(video.resolve(), path.parent.resolve())
    size = digest = None
    if job.is_done(sample):
        size, known = video.stat().st_size, old.get(name, {})
        if known.get("bytes") == size and video.stat().st_mtime_ns < written:
            digest = known["sha256"]
        else:
            digest = sha256(video)
    settings = {name: value for name, value in sample.to_record().items() if name != "name_seed"}
    files = {"video": name, "bytes": size, "sha256": digest}
    return {"run": str(job.run.folder), **settings, **files}
