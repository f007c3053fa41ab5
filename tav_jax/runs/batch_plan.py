"""Plans of batch sampling, as YAML or CSV. `python -m tav_jax.batch --help` describes the form."""

import csv
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from tav_jax.diffusion.samplers import SamplerName
from tav_jax.errors import UserError
from tav_jax.runs.samples import Job, Sample, plan_samples
from tav_jax.runs.sampling_settings import Eta, GuidanceScale, NumSteps, Seed


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Item:
    """One video of a plan. What is None is taken from the run."""

    run: str
    prompt: str
    seed: Seed | None = None
    negative_prompt: str | None = None
    guidance_scale: GuidanceScale | None = None
    num_inference_steps: NumSteps | None = None
    num_inv_steps: NumSteps | None = None
    sampler: SamplerName | None = None
    eta: Eta | None = None
    use_inv_latent: bool = True

    def to_sample(self, default: Sample) -> Sample:
        """Return the sample that this item asks for; `default` gives what the item leaves out."""
        settings = {
            name: value
            for name, value in asdict(self).items()
            if value is not None and name not in ("run", "use_inv_latent")
        }
        sample = replace(default, **settings, name_seed=self.seed is not None)
        return sample if self.use_inv_latent else replace(sample, num_inv_steps=None)


def read_plan(path: Path) -> list[Item]:
    """Return the videos that a plan asks for.

    Raises:
        UserError: The file is not a plan; every offending line or key is listed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
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
        raise UserError(f"{path}:\n" + "\n".join(lines))
    return list(dict.fromkeys(items))


def _csv_rows(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(csv.DictReader(text.splitlines()), start=2):
        # An empty cell means the run's own setting; cells beyond the header have the key None.
        yield f"line {number}, ", {str(key): cell for key, cell in row.items() if cell}


def _yaml_rows(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        plan = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plan, dict):
        raise UserError(f"{path}: expected the keys runs and prompts")
    lists = {name: plan.pop(name, None) for name in ("runs", "prompts", "seeds")}
    wrong = [
        name
        for name, value in lists.items()
        if not isinstance(value, list) and not (name == "seeds" and value is None)
    ]
    if wrong:
        raise UserError(f"{path}: expected lists under {', '.join(wrong)}")
    seeds = lists["seeds"] or [None]
    for run, prompt, seed in itertools.product(lists["runs"], lists["prompts"], seeds):
        yield "", {**plan, "run": run, "prompt": prompt, "seed": seed}


def plan_jobs(items: Sequence[Item]) -> list[Job]:
    """Return what is to be sampled from each run. All runs are checked and nothing is written.

    Raises:
        UserError: Runs are missing, or videos with other settings exist; all are listed.
    """
    by_run: dict[Path, list[Item]] = {}
    for item in items:  # a run may be named in several ways
        by_run.setdefault(Path(item.run).resolve(), []).append(item)
    jobs, problems = [], []
    for wanted in by_run.values():

        def make_samples(default: Sample, wanted: list[Item] = wanted) -> list[Sample]:
            return [item.to_sample(default) for item in wanted]

        try:
            jobs.append(plan_samples(wanted[0].run, make_samples))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return jobs
