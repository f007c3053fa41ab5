"""python -m tav_jax.evaluate: score edited videos by the metrics of the field."""

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tav_jax.console import Parser, command, say
from tav_jax.errors import UserError
from tav_jax.files import atomic_write, first_unwritable_parent, user_cache
from tav_jax.stopping import advise, start_job

if TYPE_CHECKING:
    from tav_jax.evaluation.examples import Example
    from tav_jax.evaluation.metrics import Metric

# What `--suite configs/suites/paper.yaml --csv` has written. That suite's runs are of this model.
MINIATURE = Path(__file__).parent / "evaluation/miniature.csv"
MINIATURE_MODEL = "tiny-figures"

EPILOG = """\
A table of prompts is a CSV with the columns video and prompt, and any of source, source_prompt and
mask. Videos, sources and masks are video files or folders of images. A video's path is relative to
its system's folder, the others to the table.

examples:
    python -m tav_jax.evaluate --run outputs/quickstart
    python -m tav_jax.evaluate --system ours=videos/ours --system theirs=videos/theirs \\
        --prompts prompts.csv --metrics clip_text,motion_alignment --markdown table.md
    python -m tav_jax.evaluate --run a=outputs/a --run b=outputs/b --study study.html
    python -m tav_jax.evaluate --answers answers-*.csv
"""


def _named(text: str) -> tuple[str | None, str]:
    """Return name and path of NAME=PATH. A path that is there may have the sign in its own name."""
    name, equals, path = text.partition("=")
    return (name or None, path) if equals and not Path(text).exists() else (None, text)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tav_jax.evaluate",
        description="Score the videos of runs or of any systems. Scores are kept by the content of "
        "the videos: an interrupted evaluation goes on.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--run", action="append", default=[], metavar="[NAME=]DIR", help="a run; repeatable")
    add("--step", type=int, help="the runs' checkpoint (default: the newest with videos)")
    add("--system", action="append", default=[], metavar="NAME=DIR", help="videos; repeatable")
    add("--suite", type=Path, metavar="FILE", help="a YAML of systems that are run and scored")
    add("--output-dir", type=Path, metavar="DIR", help="the suite's runs (outputs/suites/NAME)")
    add("--prompts", type=Path, metavar="FILE", help="the table of the systems' videos")
    add(
        "--earlier", type=Path, metavar="FILE", help="a --csv, whose videos stand in the table, too"
    )
    add("--benchmark", metavar="NAME=DIR", help="loveu or v2vbench, in place of a table")
    add("--metrics", metavar="NAMES", help="names or their beginnings, with commas (all)")
    add("--clip-l14", metavar="DIR", help="folder or Hub id in place of CLIP's ViT-L/14")
    add("--clip-b32", metavar="DIR", help="folder or Hub id in place of CLIP's ViT-B/32")
    add("--pick-score", metavar="DIR", help="folder or Hub id in place of PickScore_v1")
    add("--download", action="store_true", help="fetch networks that are not on this machine")
    add("--json", type=Path, metavar="FILE", help="write means and every video's scores")
    add("--csv", type=Path, metavar="FILE", help="write every video's scores")
    add("--markdown", type=Path, metavar="FILE", help="write the tables")
    add("--scores", type=Path, metavar="DIR", help="keep scores there (~/.cache/tav_jax/scores)")
    add("--study", type=Path, metavar="FILE", help="write a page that asks people, and no scores")
    add("--study-seed", type=int, default=0, metavar="N", help="of the pairs' order (0)")
    add("--answers", type=Path, nargs="+", metavar="FILE", help="print the table of a study")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the evaluate command with these arguments, by default the process's own."""
    args = _parser().parse_args(argv)
    if args.answers:
        _print_preferences(args)
        return
    start_job()
    advise("the same command goes on")
    systems = _systems(args)
    # Imported here, so that --help and wrong arguments are quick.
    from tav_jax.evaluation.examples import examples_of_run, examples_of_systems

    if args.metrics:
        _select_metrics(args.metrics.split(","))  # refuses before anything is read
    for option, path in (
        ("--json", args.json),
        ("--csv", args.csv),
        ("--markdown", args.markdown),
        ("--study", args.study),
    ):
        if path is not None and (place := first_unwritable_parent(path.absolute().parent)):
            raise UserError(f"{option}: {place} is not a folder that can be written to")
    examples = _examples_of_suite(args) if args.suite else []
    for text in args.run:
        name, folder = _named(text)
        examples += examples_of_run(name, Path(folder), args.step)
    if systems:
        examples += (
            _examples_of_benchmark(args.benchmark, systems)
            if args.benchmark
            else examples_of_systems(systems, args.prompts)
        )
    if args.study:
        _write_study(args, examples)
    else:
        _score(args, examples)


def _examples_of_benchmark(text: str, systems: dict[str, Path]) -> "list[Example]":
    """Return what systems have made of a benchmark's clips."""
    from tav_jax.evaluation.benchmarks import BENCHMARKS, examples_of_benchmark

    name, folder = _named(text)
    if name not in BENCHMARKS:
        raise UserError(f"--benchmark: {text}: expected NAME=DIR, NAME of {', '.join(BENCHMARKS)}")
    return examples_of_benchmark(systems, BENCHMARKS[name](Path(folder)))


def _examples_of_suite(args: argparse.Namespace) -> "list[Example]":
    """Make what is missing of a suite, and return its videos."""
    from tav_jax.evaluation.suites import examples_of_runs, make_runs, read_suite
    from tav_jax.runs.validation import is_made
    from tav_jax.tune import tune

    suite, runs = read_suite(
        args.suite, args.output_dir or Path("outputs/suites") / args.suite.stem
    )
    if args.metrics is None and suite.metrics:
        args.metrics = ",".join(suite.metrics)
        _select_metrics(suite.metrics)  # refuses before hours of work
    make_runs(runs, is_made, tune)
    return examples_of_runs(runs)


def _select_metrics(names: Sequence[str] | None, models: Collection[str] = ()) -> "list[Metric]":
    """Return the metrics that are asked for, of all that the package has."""
    from tav_jax.evaluation.metrics import METRICS, select_metrics
    from tav_jax.worlds.figures.video_metrics import METRICS as OF_FIGURES

    return select_metrics(names, models, METRICS | OF_FIGURES)


def _score(args: argparse.Namespace, examples: "Sequence[Example]") -> None:
    """Print and write the tables of the examples' scores."""
    from tav_jax.evaluation import tables
    from tav_jax.evaluation.published import published_rows
    from tav_jax.evaluation.scores import score_examples

    models = {example.made_by for example in examples if example.made_by}
    metrics = _select_metrics(args.metrics.split(",") if args.metrics else None, models)
    earlier = tables.read_scores(args.earlier, metrics) if args.earlier else []
    networks = {
        "ViT-L/14": args.clip_l14,
        "ViT-B/32": args.clip_b32,
        "PickScore": args.pick_score,
    }
    results = score_examples(
        examples,
        metrics,
        args.scores or user_cache("scores"),
        networks={name: path for name, path in networks.items() if path is not None},
        download=args.download,
    )
    now = {(result.example.system, result.example.video) for result in results}
    results += [one for one in earlier if (one.example.system, one.example.video) not in now]
    # Beside what nothing was measured by, a published figure would say nothing.
    published = published_rows({name for result in results for name in result.scores})
    # A suite makes such a table itself.
    in_miniature = MINIATURE_MODEL in models and args.suite is None
    miniature = tables.read_scores(MINIATURE, metrics) if in_miniature else []
    evaluation = tables.Evaluation(metrics, results, published, miniature)
    say(tables.text_table(evaluation))
    outputs: tuple[tuple[Path | None, Callable[[tables.Evaluation], str]], ...] = (
        (args.json, tables.json_text),
        (args.csv, tables.csv_text),
        (args.markdown, tables.markdown_table),
    )
    for path, render in outputs:
        if path is not None:
            with atomic_write(path) as partial:
                partial.write_text(render(evaluation), encoding="utf-8")
            say(f"wrote {path}")
    if not any(result.scores for result in results):
        raise UserError("none of the metrics could be computed")


def _write_study(args: argparse.Namespace, examples: "Sequence[Example]") -> None:
    from tav_jax.evaluation.study import make_pairs, write_study
    from tav_jax.runs.run import DEFAULT_FPS

    pairs = make_pairs(examples, args.study_seed)
    name = write_study(args.study, pairs, args.study_seed, DEFAULT_FPS)
    say(
        f"wrote {args.study}: study {name} of {len(pairs)} pairs. Give the page to those who rate; "
        "each saves a file of answers, for --answers"
    )


def _print_preferences(args: argparse.Namespace) -> None:
    """Print the table of a study, and write it with `--markdown`."""
    from tav_jax.evaluation.study import preference_table, preferences, read_answers

    _, answers = read_answers(args.answers)
    raters = len({one.rater for one in answers})
    table = preference_table(preferences(answers), raters)
    say(table)
    if args.markdown:
        with atomic_write(args.markdown) as partial:
            partial.write_text(table, encoding="utf-8")
        say(f"wrote {args.markdown}")


def _systems(args: argparse.Namespace) -> dict[str, Path]:
    """Return the folders of the systems by name.

    Raises:
        UserError: Options are missing, or do not go together.
    """
    problems = []
    named = [_named(text) for text in args.system]
    names = [name for name, _ in named]
    problems += [f"--system: {path}: expected NAME=DIR" for name, path in named if not name]
    problems += [f"--system: {name} is there twice" for name in set(names) if names.count(name) > 1]
    problems += [
        f"--system: {path}: no such folder" for _, path in named if not Path(path).is_dir()
    ]
    if not (args.run or args.system or args.suite):
        problems.append(
            "nothing to score: give --run DIR, --suite FILE, or --system NAME=DIR with --prompts"
        )
    if bool(args.system) != (bool(args.prompts) + bool(args.benchmark)):
        problems.append("--system: it goes with either --prompts or --benchmark, and they with it")
    if problems:
        raise UserError("\n".join(problems))
    return {name: Path(path) for name, path in named if name}


if __name__ == "__main__":
    sys.exit(main())
