"""python -m tav_jax.batch: sample a plan of runs, prompts and seeds with any number of workers."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tav_jax.console import command, say
from tav_jax.errors import UserError
from tav_jax.files import first_unwritable_parent
from tav_jax.runs.batch_plan import plan_jobs, read_plan
from tav_jax.runs.batch_processes import devices_here, run_workers, worker_environments
from tav_jax.runs.batch_work import missing_samples, read_manifest, work, write_manifest
from tav_jax.runs.render import warn_unused_seeds

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
    """Run the batch command with these arguments, by default the process's own."""
    args = _parser().parse_args(argv)
    numbers = {"--batch-size": args.batch_size, "--workers": args.workers}
    if wrong := [f"{name} {value}" for name, value in numbers.items() if value < 1]:
        raise UserError("\n".join(f"{one}: expected 1 or more" for one in wrong))
    jobs = plan_jobs(read_plan(args.plan))
    manifest = args.manifest or args.plan.with_suffix(".manifest.jsonl")
    if place := first_unwritable_parent(manifest.absolute().parent):
        raise UserError(f"--manifest: {place} is not writable; name another file")
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
