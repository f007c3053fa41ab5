"""The flags of the command line."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from tav_jax.bench.programs import NETWORKS, PROGRAMS
from tav_jax.console import Parser
from tav_jax.models.attention.dispatch import AttentionImplementation, AttentionScope
from tav_jax.settings import Frames, Side, wrong_option
from tav_jax.text import shorten
from tav_jax.training.memory import PRESETS, Alternative, Size


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags."""
    parser = Parser(
        prog="python -m tav_jax.bench",
        description="Time and memory of the programs that a run consists of: a tuning step, a "
        "guided DDIM step, an inversion step, the autoencoder. By default v1-4's networks with "
        "random weights on an accelerator, and a small network of their layout on a CPU, where it "
        "takes two minutes. Where several values are given, separated by commas, each is measured.",
        epilog="examples: python -m tav_jax.bench --model DIR --frames 8 --size 256 --json; "
        "python -m tav_jax.bench --aot v5e:2x2 --frames 8,24 --gradient-checkpointing full; "
        "python -m tav_jax.bench --aot h100 --programs guided_step --dump-hlo hlo",
    )
    networks = parser.add_mutually_exclusive_group()
    networks.add_argument("--model", metavar="DIR", help="a model's folder, id or name")
    networks.add_argument(
        "--network", choices=list(NETWORKS), help="random weights of these shapes"
    )
    parser.add_argument("--frames", type=_numbers(Frames), default=[8], metavar="N", help="8")
    parser.add_argument("--size", type=_numbers(Side), metavar="PIXELS", help="512; on a CPU 256")
    parser.add_argument("--precision", choices=["no", "bf16"], help="bf16; on a CPU no")
    parser.add_argument("--attention", choices=get_args(AttentionImplementation), default="auto")
    parser.add_argument(
        "--attention-scope",
        type=_choices(*get_args(AttentionScope)),
        default=["sparse_causal"],
        metavar="SCOPE",
        help=", ".join(get_args(AttentionScope)),
    )
    parser.add_argument(
        "--gradient-checkpointing",
        type=_choices("auto", *PRESETS),
        default=["auto"],
        metavar="PRESET",
        help=", ".join(("auto", *PRESETS)),
    )
    parser.add_argument(
        "--programs",
        type=_choices(*PROGRAMS),
        default=list(PROGRAMS),
        metavar="NAME",
        help=", ".join(PROGRAMS),
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each (5)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw milliseconds against frames")
    parser.add_argument(
        "--dump-hlo", type=Path, metavar="DIR", help="write each compiled program as NAME.hlo"
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="trace each program into DIR/NAME, and print the operations that take longest",
    )
    parser.add_argument(
        "--aot",
        metavar="TARGET",
        help="compile for a GPU or a TPU slice that is not here: h100, h200, v5e:2x2",
    )
    parser.add_argument(
        "--chips", type=int, default=1, metavar="N", help="devices of that target (1); up to 8 GPUs"
    )
    parser.add_argument(
        "--mesh", metavar="AXES", help="as in frames=4,fsdp=2; one device, with --aot its chips"
    )
    return parser


def bench_flags(alternative: Alternative, asked: Size) -> str:
    """Return the flags that would measure an alternative that fits; clips here are square."""
    preset, size = alternative
    flags = [f"--gradient-checkpointing {preset}"]
    if size.frames != asked.frames:
        flags.append(f"--frames {size.frames}")
    if size[1:] != asked[1:]:
        flags.append(f"--size {size.height}")
    return " ".join(flags)


def _numbers(kind: Any) -> Callable[[str], list[int]]:
    """Return a reader of numbers, separated by commas, that have the bounds of a type."""

    def read(text: str) -> list[int]:
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            numbers = [0]
        if min(numbers) < 1:
            expected = "expected numbers from 1, as in 8,16"
            raise argparse.ArgumentTypeError(f"'{shorten(text, 60)}': {expected}")
        if wrong := [problem for one in numbers if (problem := wrong_option("", kind, one))]:
            raise argparse.ArgumentTypeError(wrong[0].strip())
        return numbers

    return read


def _choices(*allowed: str) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)}: expected some of {', '.join(allowed)}"
            )
        return chosen

    return read
