"""python -m tav_jax.check: find out whether a run's files are as they were written."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tav_jax.console import Parser, command, say
from tav_jax.errors import DamagedError
from tav_jax.runs.check import Finding, check_run


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tav_jax.check",
        description="Check a run: its settings, metrics, checkpoints, inverted clips and videos. "
        "Nothing is changed. Exit status 0: all is whole; 1: something is damaged, and listed.",
        epilog="example: python -m tav_jax.check outputs/man-skiing",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="output_dir of tav_jax.tune")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the check command with these arguments, by default the process's own."""
    folder = _parser().parse_args(argv).run
    findings = list(check_run(folder))
    damaged = [found for found in findings if found.damage]
    for found in findings:
        if not found.is_verified and not found.damage:
            say(f"unverified: {found.path}: an earlier version wrote it, without a digest")
    if damaged:
        raise DamagedError(
            f"{folder}: {len(damaged)} of {len(findings)} are damaged:\n"
            + "\n".join(f"  {found.path.relative_to(folder)}: {found.damage}" for found in damaged)
        )
    say(f"{folder}: {_counted(findings, folder)}: all whole")


def _counted(findings: Sequence[Finding], folder: Path) -> str:
    """Return how many checkpoints, inverted clips and videos there are."""
    parts = [found.path.relative_to(folder).parts for found in findings]
    videos = sum(part[-1].endswith((".mp4", ".gif")) for part in parts)
    counts = {
        "checkpoint": sum(part[0] == "checkpoints" for part in parts),
        "inverted clip": sum(part[0] == "inv_latents" for part in parts),
        "video": videos,
    }
    return ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items())


if __name__ == "__main__":
    sys.exit(main())
