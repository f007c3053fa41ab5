#!/usr/bin/env python
"""Samples a plan of runs x prompts x seeds; what exists is skipped, what was written is said.

    python launch/batch_sample.py plan.yaml

A plan is YAML, every prompt and seed for every run:

    runs: [outputs/man-skiing, outputs/car-turn]
    prompts: ["a panda, cartoon style", "at sunset"]
    seeds: [0, 1]            # optional; the run's own seed by default
    guidance_scale: 12.5     # optional, as are negative_prompt, num_inference_steps,
    eta: 1.0                 # num_inv_steps, sampler, and use_inv_latent: false for random noise

or CSV, a video a line, with the columns run,prompt and any of seed and the settings above.
One accelerator, or a CPU; each run's model is loaded once.
"""

import argparse
import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from tav_jax.cli import command, say
from tav_jax.sample import Sample, plan_samples, sample_run
from tav_jax.sampling import Sampler


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Item:
    """One video of a plan; what is None is as the run has it."""

    run: str
    prompt: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    negative_prompt: str | None = None
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    num_inference_steps: Annotated[int, Field(gt=0, lt=1000)] | None = None
    num_inv_steps: Annotated[int, Field(gt=0, lt=1000)] | None = None
    sampler: Sampler | None = None
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    use_inv_latent: bool = True

    def to_sample(self, default: Sample) -> Sample:
        settings = {
            name: value
            for name, value in asdict(self).items()
            if value is not None and name not in ("run", "use_inv_latent")
        }
        sample = replace(default, **settings, name_seed=self.seed is not None)
        return sample if self.use_inv_latent else replace(sample, num_inv_steps=None)


def read_plan(path: Path) -> list[Item]:
    """Returns the videos that a plan asks for.

    Raises:
        ValueError: the file is no plan; every offending line or key is listed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    rows = list(_csv_rows(text) if path.suffix == ".csv" else _yaml_rows(text, path))
    items, problems = [], set()
    for where, row in rows:
        try:
            items.append(TypeAdapter(Item).validate_python(row))
        except ValidationError as error:
            for problem in error.errors():
                name = ".".join(str(part) for part in problem["loc"])
                problems.add(f"  {where}{name}: {problem['msg']} (got {problem['input']!r})")
    if problems or not items:
        lines = sorted(problems) or ["  it asks for nothing: name runs and prompts"]
        raise ValueError(f"{path}:\n" + "\n".join(lines))
    return list(dict.fromkeys(items))


def _csv_rows(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(csv.DictReader(text.splitlines()), start=2):
        # An empty cell means the run's own setting; cells beyond the header have the key None.
        yield f"line {number}, ", {str(key): cell for key, cell in row.items() if cell}


def _yaml_rows(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        plan = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plan, dict):
        raise ValueError(f"{path}: expected the keys runs and prompts")
    lists = {name: plan.pop(name, None) for name in ("runs", "prompts", "seeds")}
    wrong = [
        name
        for name, value in lists.items()
        if not isinstance(value, list) and not (name == "seeds" and value is None)
    ]
    if wrong:
        raise ValueError(f"{path}: expected lists under {', '.join(wrong)}")
    seeds = lists["seeds"] or [None]
    for run, prompt, seed in itertools.product(lists["runs"], lists["prompts"], seeds):
        yield "", {**plan, "run": run, "prompt": prompt, "seed": seed}


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python launch/batch_sample.py",
        description="Sample a plan of runs x prompts x seeds, skipping the videos that exist.",
        epilog="example: python launch/batch_sample.py plan.yaml; the plan's form stands at the "
        "top of this script",
    )
    parser.add_argument("plan", type=Path, help="a .yaml or .csv file")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="prompts at a time")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: expected 1 or more")
    items = read_plan(args.plan)
    by_run = {run: [item for item in items if item.run == run] for run in {i.run: 0 for i in items}}
    jobs, problems = [], []
    for run, wanted in by_run.items():  # all are looked at before the first is sampled
        try:
            jobs.append(
                plan_samples(run, lambda default, w=wanted: [i.to_sample(default) for i in w])
            )
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    written = []
    for job in jobs:
        say(f"{job.run.folder}: {len(job.samples)} videos")
        written += sample_run(job, batch_size=args.batch_size)
    say(f"{len(written)} videos written, {len(items) - len(written)} were there already")


if __name__ == "__main__":
    sys.exit(main())
