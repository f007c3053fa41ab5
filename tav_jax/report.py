"""python -m tav_jax.report: a run as one page that needs no other file, or several compared."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tav_jax.console import Parser, command, say
from tav_jax.errors import UserError
from tav_jax.files import first_unwritable_parent, user_cache
from tav_jax.runs.report import NAME, Scores, find_samples, has_report, make_report
from tav_jax.runs.report_page import require_ours, write_report
from tav_jax.runs.run import Run
from tav_jax.stopping import advise
from tav_jax.text import shorten


def renew_report(run: Run) -> None:
    """Write the page of a run that is tuned, unless it is newer than what it shows.

    A run is finished without its page, so a failure is said in a line.
    """
    run.require_folder()  # a page alone would make it anew
    page = run.folder / NAME
    try:
        if not has_report(run):
            write_report(page, [make_report(run, run.folder.name, kept_scores(run))])
            say(f"wrote {page}")
    except Exception as error:
        say(f"{shorten(str(error) or repr(error))}; `tav-report {run.folder}` writes the report")


def kept_scores(run: Run, step: int | None = None) -> Scores:
    """Return what `evaluate` has computed of a run's videos."""
    from tav_jax.evaluation.examples import examples_of_run
    from tav_jax.evaluation.metrics import METRICS
    from tav_jax.evaluation.scores import last_scores

    step, _ = find_samples(run, step)
    store = user_cache("scores")
    if step is None or store is None:
        return Scores()
    try:
        examples = examples_of_run(None, run.folder, step)
    except UserError:  # a damaged record, of which the page speaks
        return Scores()
    scores = last_scores(examples, store)
    by_video = {example.video: one for example, one in zip(examples, scores, strict=True)}
    return Scores(by_video, {name: metric.better for name, metric in METRICS.items()})


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tav_jax.report",
        description=f"Write a run's {NAME}, which tune writes at its end: clip and edits side by "
        "side, losses, time and memory, settings, and the scores that evaluate has computed. "
        "Several runs are compared in one page.",
        epilog="example: python -m tav_jax.report outputs/man-skiing outputs/man-skiing-8-frames "
        "--output skiing.html",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"the page (of one run: its own {NAME})"
    )
    parser.add_argument("--step", type=int, help="checkpoint of the edits (default: the newest)")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the report command with these arguments, by default the process's own."""
    args = _parser().parse_args(argv)
    advise("the same command begins again")
    folders = list({folder.resolve(): folder for folder in args.runs}.values())
    if args.output is None and len(folders) > 1:
        raise UserError("--output: name the page that compares these runs, as in runs.html")
    output = args.output or folders[0] / NAME
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output: {output}: name a file that ends in .html")
    if place := first_unwritable_parent(output.absolute().parent):
        raise UserError(f"--output: {place} is not a folder that can be written to")
    require_ours(output)
    runs = [Run.open(folder) for folder in folders]
    names = _names(folders)
    reports = [
        make_report(run, name, kept_scores(run, args.step), args.step)
        for run, name in zip(runs, names, strict=True)
    ]
    note = write_report(output, reports)
    say(f"wrote {output}{f': {note}' if note else ''}")


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, or their paths where two have the same name."""
    names = [folder.resolve().name for folder in folders]
    count = Counter(names)
    return [
        str(path) if count[name] > 1 else name for path, name in zip(folders, names, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
