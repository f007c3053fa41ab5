"""Plans of batch sampling, as YAML or CSV. `python -m tav_jax.batch --help` describes the form."""

import csv
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.dataclasses import dataclass

from tav_jax.errors import UserError
from tav_jax.reading import Key, parse_yaml, read_text
from tav_jax.runs.samples import Job, Sample, check_number_of_videos, plan_samples
from tav_jax.runs.sampling_settings import SETTING_NAMES, SamplingSettings
from tav_jax.settings import STRICT, PathText, Seed, Text, WrongSettingsError, parse
from tav_jax.text import brief

MOST_LINES = 20  # of what is wrong with a plan


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Row(SamplingSettings):
    """The keys that a row of a plan may have, with their bounds."""

    run: PathText
    prompt: Text
    seed: Seed | None = None
    use_inv_latent: bool = True


class Item(NamedTuple):
    """One video of a plan.

    Args:
        run: Folder of the run.
        prompt: What the video is to show.
        seed: Seed of the noise, or None for the run's.
        settings: Names and values of the settings that are not the run's.
    """

    run: str
    prompt: str
    seed: int | None
    settings: tuple[tuple[str, Any], ...]

    @classmethod
    def from_row(cls, given: dict[str, Any], where: str) -> "Item":
        """Return the item of a row.

        Args:
            given: The row.
            where: The plan's file.

        Raises:
            WrongSettingsError: keys or values are wrong.
        """
        row = parse(Row, given, where)
        settings = {name: getattr(row, name) for name in SETTING_NAMES if name in given}
        if not row.use_inv_latent:
            settings["num_inv_steps"] = None
        return cls(row.run, row.prompt, row.seed, tuple(settings.items()))

    def to_sample(self, default: Sample) -> Sample:
        """Return the sample that this item asks for; `default` gives what the item leaves out."""
        return replace(
            default,
            prompt=self.prompt,
            seed=default.seed if self.seed is None else self.seed,
            settings=default.settings.with_changes(
                dict(self.settings), f"{self.run}, {self.prompt}"
            ),
            name_seed=self.seed is not None,
        )


def read_plan(path: Path) -> list[Item]:
    """Return the videos that a plan asks for.

    Raises:
        UserError: The file is not a plan; every offending line or key is listed.
    """
    try:
        text = read_text(path)
    except (OSError, UserError) as error:
        why = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: cannot be read: {why}") from None
    rows = list(_csv_rows(text, path) if path.suffix == ".csv" else _yaml_rows(text, path))
    items, problems = [], set()
    for where, row in rows:
        try:
            items.append(Item.from_row(row, str(path)))
        except WrongSettingsError as error:
            problems |= {
                f"  {where}{name}: {problem}" if name else f"  {where}{problem}"
                for name, problem in error.problems
            }
    if problems or not rows:
        lines = sorted(problems) or ["  it asks for nothing: name runs and prompts"]
        if len(lines) > MOST_LINES:
            lines = [*lines[:MOST_LINES], f"  and {len(lines) - MOST_LINES} more"]
        raise UserError(f"{path}:\n" + "\n".join(lines))
    return list(dict.fromkeys(items))


def _csv_rows(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(text.splitlines())
    try:
        if repeated := [name for name, n in Counter(reader.fieldnames or []).items() if n > 1]:
            raise UserError(f"{path}: line 1: the column {brief(repeated[0])} is there twice")
        for number, row in enumerate(reader, start=2):
            # An empty cell means the run's own setting; cells beyond the header have the key None.
            yield f"line {number}, ", {str(key): cell for key, cell in row.items() if cell}
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num + 1}: not CSV ({error})") from None


def _yaml_rows(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    plan = parse_yaml(text, str(path))
    if not isinstance(plan, dict):
        raise UserError(f"{path}: expected the keys runs and prompts")
    keys = {name: _singular(plan, name) for name in ("runs", "prompts", "seeds")}
    lists = {name: plan.pop(name, None) for name in keys}
    wrong = [
        name
        for name, value in lists.items()
        if not isinstance(value, list) and not (name == "seeds" and value is None)
    ]
    if wrong:
        raise UserError(f"{path}: expected lists under {', '.join(wrong)}")
    seeds = lists["seeds"] or [None]
    number = len(lists["runs"]) * len(lists["prompts"]) * len(seeds)
    check_number_of_videos(number, f"{path}: runs, prompts, seeds")
    for values in itertools.product(lists["runs"], lists["prompts"], seeds):
        row = plan | dict(zip(keys.values(), values, strict=True))
        yield (
            "",
            {
                key if isinstance(key, str) else str(key): value
                for key, value in row.items()
                if value is not None
            },
        )


def _singular(plan: dict[Any, Any], name: str) -> str:
    """Return the key of one item of a list, which knows the line of the list."""
    singular = Key(name.removesuffix("s"))
    for key in plan:
        if key == name and isinstance(key, Key):
            singular.file, singular.line = key.file, key.line
            return singular
    return str(singular)


def plan_jobs(
    items: Sequence[Item], model: str | None = None, lora_dir: str | None = None
) -> list[Job]:
    """Return what is to be sampled from each run. All runs are checked and nothing is written.

    Args:
        items: The videos of the plan.
        model: Where the runs' base model is now, or None: where they have recorded it.
        lora_dir: Where the runs' LoRAs and embeddings are now, or None: where they have recorded
            them.

    Raises:
        UserError: Runs are missing, or videos with other settings exist, or a run's clip is another
            now; all are listed.
    """
    by_run: dict[Path, list[Item]] = {}
    for item in items:  # a run may be named in several ways
        by_run.setdefault(Path(item.run).resolve(), []).append(item)
    jobs, problems = [], []
    for wanted in by_run.values():

        def make_samples(default: Sample, wanted: list[Item] = wanted) -> list[Sample]:
            return [item.to_sample(default) for item in wanted]

        try:
            job = plan_samples(wanted[0].run, make_samples)
            if model is not None:
                job.run.use_model(model)
            if lora_dir is not None:
                job.run.use_lora_dir(lora_dir)
            if job.wanted:
                job.run.check_clip()
                job.run.check_additions()
            jobs.append(job)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return jobs
