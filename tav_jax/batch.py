"""python -m tav_jax.batch: sample a plan of runs, prompts and seeds with any number of workers."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tav_jax.console import Parser, command, say
from tav_jax.errors import UserError
from tav_jax.files import first_unwritable_parent
from tav_jax.runs.batch_plan import plan_jobs, read_plan
from tav_jax.runs.batch_processes import devices_here, run_workers, worker_environments
from tav_jax.runs.batch_work import missing_samples, read_manifest, work, write_manifest
from tav_jax.runs.render import warn_unused_seeds
from tav_jax.settings import BatchSize, PathText, check_options
from tav_jax.stopping import advise

PLAN_FORMAT = """\
A plan in YAML asks for every prompt and seed of every run:

    runs: [outputs/man-skiing, outputs/car-turn]
    prompts: ["a panda, cartoon style", "at sunset"]
    seeds: [0, 1]            # optional; by default each run's own seed
    guidance_scale: 12.5     # optional, like negative_prompt, num_inference_steps,
    eta: 1.0                 # num_inv_steps, sampler, prompt_syntax, and use_inv_latent:
                             # false for random noise

A plan in CSV asks for one video per line. It has the columns run and prompt, and any of seed and
the settings above.

examples:
    python -m tav_jax.batch plan.yaml                  # one process
    python -m tav_jax.batch plan.yaml --workers 8      # eight, each with its own GPU of this host
    srun --ntasks 32 --gpus-per-task 1 python -m tav_jax.batch plan.yaml       # several hosts

Each process takes one GPU, one chip of a TPU host, or the CPU, and loads each run's model once.
PLAN.manifest.jsonl has a line for each video: run, settings, path, bytes, SHA-256.
"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tav_jax.batch",
        description="Sample a plan of runs, prompts and seeds. Videos that exist are skipped.\n"
        "Several processes may share a plan, also on several hosts that share the runs' folders.",
        epilog=PLAN_FORMAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", type=Path, help="a .yaml or .csv file")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="prompts at a time")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes on this host, a GPU each"
    )
    parser.add_argument(
        "--model", metavar="DIR", help="the runs' base model, if it has moved (compared by digest)"
    )
    parser.add_argument(
        "--lora-dir",
        metavar="DIR",
        help="the runs' LoRAs and embeddings, if they have moved (found by digest)",
    )
    parser.add_argument(
        "--manifest", type=Path, metavar="FILE", help="default: PLAN.manifest.jsonl beside the plan"
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the batch command with these arguments, by default the process's own."""
    args = _parser().parse_args(argv)
    advise("the same command makes the rest")
    check_options(
        ("--batch-size", BatchSize, args.batch_size),
        ("--workers", BatchSize, args.workers),
        ("--model", PathText, args.model),
        ("--lora-dir", PathText, args.lora_dir),
    )
    jobs = plan_jobs(read_plan(args.plan), args.model, args.lora_dir)
    manifest = args.manifest or args.plan.with_suffix(".manifest.jsonl")
    if place := first_unwritable_parent(manifest.absolute().parent):
        raise UserError(f"--manifest: {place} is not writable; name another file")
    read_manifest(manifest)
    for job in jobs:
        job.run.remove_partials(job.folder)

    total, wanted = sum(len(job.samples) for job in jobs), sum(len(job.wanted) for job in jobs)
    failed, written = [], 0
    if (workers := min(args.workers, wanted)) > 1:
        arguments = [str(args.plan), "--batch-size", str(args.batch_size)]
        arguments += ["--manifest", str(manifest)]
        arguments += ["--model", args.model] if args.model is not None else []
        arguments += ["--lora-dir", args.lora_dir] if args.lora_dir is not None else []
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
