"""A suite: systems that edit the same clips, all by this package, to be compared.

Each system is a set of settings of `tune`. Each system, clip and seed is a run of its own.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from tav_jax.console import say
from tav_jax.errors import InUseError, UserError
from tav_jax.evaluation.benchmarks import BENCHMARKS
from tav_jax.evaluation.examples import Example, examples_of_run
from tav_jax.reading import read_yaml
from tav_jax.runs.config import TuneConfig, parse_config
from tav_jax.runs.tuning import Programs
from tav_jax.settings import STRICT, PathText, Seed, Text, merge_trees, parse
from tav_jax.text import shorten

MOST_RUNS = 10_000
SECONDS_TO_WAIT = 5  # between two looks at runs that other processes make


@dataclass(frozen=True, config=STRICT)
class SuiteClip:
    """A clip and the prompts that it is edited to.

    Args:
        video_path: The clip. A relative path is relative to the suite's file.
        prompt: What the clip shows.
        edits: What its edits are to show.
        name: The name of its runs' folders; by default the file's, without suffix.
    """

    video_path: PathText
    prompt: Text
    edits: tuple[Text, ...]
    name: Text = ""

    @property
    def folder(self) -> str:
        """Return the name of its runs' folders."""
        return self.name or Path(self.video_path).stem


@dataclass(frozen=True, config=STRICT)
class System:
    """One way to edit.

    Args:
        settings: Keys of `tune`'s configs in which it differs from the suite's.
        seeds: Its seeds, if they are not the suite's.
    """

    settings: dict[str, Any] = Field(default_factory=dict)
    seeds: tuple[Seed, ...] = ()


@dataclass(frozen=True, config=STRICT)
class Suite:
    """What is compared.

    Args:
        systems: The systems, by name.
        clips: What they edit.
        settings: Keys of `tune`'s configs that all systems share.
        seeds: Each system edits each clip once with each seed.
        metrics: Names of metrics, or their beginnings; by default all.
        benchmark: The folder of a published benchmark by its name, whose clips are edited as well:
            `{loveu: DIR}` or `{v2vbench: DIR}`.
    """

    systems: dict[str, System]
    clips: tuple[SuiteClip, ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)
    seeds: tuple[Seed, ...] = (0,)
    metrics: tuple[Text, ...] = ()
    benchmark: dict[str, PathText] = Field(default_factory=dict)


@plain_dataclass(frozen=True)
class SuiteRun:
    """One run of a suite."""

    system: str
    config: TuneConfig

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return Path(self.config.output_dir)


def read_suite(path: Path, output_dir: Path) -> tuple[Suite, list[SuiteRun]]:
    """Return a suite and its runs, in the order in which they are made.

    Args:
        path: The suite's YAML.
        output_dir: Takes the runs, as SYSTEM/CLIP/seed-SEED.

    Raises:
        UserError: Keys or values are wrong, which all are listed.
    """
    tree = read_yaml(path, "--suite")
    if not isinstance(tree, dict):
        raise UserError(f"--suite: {path}: expected the keys systems and clips")
    suite = parse(Suite, tree, str(path))
    suite = replace(suite, clips=(*suite.clips, *_benchmark_clips(suite, path)))
    problems = _problems(suite)
    seeds = {name: system.seeds or suite.seeds for name, system in suite.systems.items()}
    count = len(suite.clips) * sum(map(len, seeds.values()))
    if count > MOST_RUNS:
        problems.append(f"{count} runs are asked for; at most {MOST_RUNS} at a time")
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    runs = []
    for name, system in suite.systems.items():
        for clip in suite.clips:
            for seed in seeds[name]:
                folder = output_dir / _folder_name(name) / _folder_name(clip.folder)
                own = {
                    "output_dir": str(folder / f"seed-{seed}"),
                    "train_data": {
                        "video_path": str(path.parent / clip.video_path),
                        "prompt": clip.prompt,
                    },
                    "validation_data": {"prompts": list(clip.edits)},
                    "seed": seed,
                }
                settings = merge_trees(merge_trees(suite.settings, system.settings), own)
                where = f"{path}: settings of {name}"
                runs.append(SuiteRun(name, parse_config(settings, where)))
    return suite, runs


def _benchmark_clips(suite: Suite, path: Path) -> Iterator[SuiteClip]:
    """Yield the clips of a suite's benchmarks."""
    for name, folder in suite.benchmark.items():
        if name not in BENCHMARKS:
            raise UserError(f"{path}: benchmark: {name} is none of {', '.join(BENCHMARKS)}")
        clips = BENCHMARKS[name](path.parent / folder)
        if silent := [clip.name for clip in clips if clip.prompt is None]:
            raise UserError(
                f"{folder}: nothing says what these clips show, and tuning needs it: "
                f"{shorten(', '.join(silent))}; add a key prompt to their entries"
            )
        for clip in clips:
            edits = tuple(dict.fromkeys(clip.edits.values()))
            yield SuiteClip(str(clip.source.absolute()), clip.prompt or "", edits, clip.name)


def _problems(suite: Suite) -> list[str]:
    parts = {"systems": suite.systems, "clips": suite.clips, "seeds": suite.seeds}
    problems = [f"{name}: there are none" for name, part in parts.items() if not part]
    problems += [f"clips: {clip.folder} has no edits" for clip in suite.clips if not clip.edits]
    for kind, names in (
        ("systems", suite.systems),
        ("clips", [clip.folder for clip in suite.clips]),
    ):
        folders = Counter(map(_folder_name, names))
        problems += [f"{kind}: two have the folder {name}" for name, n in folders.items() if n > 1]
    own = ("output_dir", "seed")
    for name, settings in [("settings", suite.settings)] + [
        (f"systems: {name}", system.settings) for name, system in suite.systems.items()
    ]:
        problems += [f"{name}: {key} is the suite's own" for key in own if key in settings]
    return problems


def make_runs(
    runs: Sequence[SuiteRun],
    is_made: Callable[[TuneConfig], bool],
    make: Callable[[TuneConfig, Programs], None],
) -> None:
    """Make the runs that are missing.

    Several processes, also on several machines that share the folder, may do so at once: each
    takes the runs that no other one is at.

    Args:
        runs: All runs of the suite.
        is_made: Tells whether a run is complete.
        make: Tunes and samples a run, and raises `InUseError` if another process is at it.
    """
    left = [run for run in runs if not is_made(run.config)]
    say(f"{len(runs)} runs, {len(runs) - len(left)} of them there already")
    programs: Programs = {}
    while left:
        in_use = []
        for number, run in enumerate(left, 1):
            say(f"run {number} of {len(left)}: {run.folder}")
            try:
                make(run.config, programs)
            except InUseError:
                in_use.append(run)
        if len(in_use) == len(left):
            say(f"{len(left)} runs are being made by other processes: waiting")
            time.sleep(SECONDS_TO_WAIT)
        left = [run for run in in_use if not is_made(run.config)]


def examples_of_runs(runs: Sequence[SuiteRun]) -> list[Example]:
    """Return the videos of a suite's runs."""
    return [
        example
        for run in runs
        for example in examples_of_run(run.system, run.folder, run.config.max_train_steps)
    ]


def _folder_name(name: str) -> str:
    """Return a name that any file system takes."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"
