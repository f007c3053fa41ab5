"""python -m tav_jax.sample: new prompts from a tuned run, as videos and a contact sheet."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from tav_jax.console import Parser, command
from tav_jax.diffusion.samplers import SamplerName
from tav_jax.errors import UserError
from tav_jax.pretrained.prompts import PromptSyntax
from tav_jax.reading import read_text
from tav_jax.runs.adapters import find_adapter, unpack_adapter
from tav_jax.runs.config import LoraFile, parse_mesh
from tav_jax.runs.render import sample_run
from tav_jax.runs.samples import Sample, check_number_of_videos, plan_samples, record_loras
from tav_jax.runs.sampling_settings import SETTING_NAMES, SamplingSettings
from tav_jax.settings import (
    BatchSize,
    PathText,
    Text,
    WrongSettingsError,
    parse,
    wrong_option,
)
from tav_jax.stopping import advise, start_job
from tav_jax.text import SURROGATE, brief, shorten


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a text file, one a line.

    Raises:
        UserError: the file is missing, no text, or empty.
    """
    try:
        text = read_text(Path(path))
    except (OSError, UserError) as error:
        raise UserError(f"--prompts: {error}") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"--prompts: {path} has no prompts; write one a line")
    return prompts


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected numbers, as in 0,1,2") from None
    if not all(0 <= seed < 2**63 for seed in seeds):
        raise argparse.ArgumentTypeError(f"'{text}': expected numbers from 0 to 2^63 - 1")
    return seeds


def _lora(text: str) -> LoraFile:
    path, _, scale = text.rpartition("=")
    try:
        # A path may have the sign, too.
        tree = {"path": path, "scale": float(scale)} if path else {"path": text}
    except ValueError:
        tree = {"path": text}
    try:
        return parse(LoraFile, tree, "--lora")
    except UserError as error:
        raise argparse.ArgumentTypeError(shorten(str(error).split(":", 1)[1])) from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tav_jax.sample",
        description="Sample new prompts from a tuned run. What is not given is as the run's "
        "config.yaml has it; videos that are there already are skipped.",
        epilog='example: python -m tav_jax.sample --run outputs/man-skiing --prompt "spider man '
        'is skiing on the beach, cartoon style" --prompt "wonder woman is skiing"',
    )
    parser.add_argument("--run", metavar="RUN_DIR", help="output_dir of tav_jax.tune")
    parser.add_argument(
        "--adapter",
        metavar="FILE",
        help="an adapter's file or Hub id, from which --run is made (outputs/NAME)",
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    parser.add_argument("--prompts", metavar="FILE", help="a text file, one prompt a line")
    parser.add_argument("--seeds", type=_seeds, metavar="0,1,2", help="a video per prompt and seed")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--negative-prompt", metavar="TEXT")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--num-inference-steps", type=int, metavar="N")
    parser.add_argument("--num-inv-steps", type=int, metavar="N")
    parser.add_argument("--sampler", choices=get_args(SamplerName), help="dpm_solver: 20 steps do")
    parser.add_argument(
        "--prompt-syntax",
        choices=get_args(PromptSyntax),
        help="weighted: (word:1.3), and prompts of any length",
    )
    parser.add_argument("--eta", type=float, help="noise of each DDIM step, 0 to 1")
    parser.add_argument("--random-noise", action="store_true", help="do not start from the clip")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        type=_lora,
        metavar="FILE[=SCALE]",
        help="add a LoRA to the tuned model, repeatable",
    )
    parser.add_argument("--output-dir", metavar="DIR", help="default: RUN_DIR/samples/sample-STEP")
    parser.add_argument(
        "--model", metavar="DIR", help="the run's base model, if it has moved (compared by digest)"
    )
    parser.add_argument(
        "--lora-dir",
        metavar="DIR",
        help="the run's LoRAs and embeddings, if they have moved (found by digest)",
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="prompts at a time")
    parser.add_argument(
        "--mesh", metavar="AXES", help="devices, as in data=2,frames=4 (default: as the run has it)"
    )
    parser.add_argument("--overwrite", action="store_true", help="make existing videos again")
    return parser


def _check(args: argparse.Namespace, given: dict[str, Any]) -> None:
    problems = []
    try:
        parse(SamplingSettings, given, "options")
    except WrongSettingsError as error:
        problems = [
            f"--{name.replace('_', '-')}: {problem}" if name else problem
            for name, problem in error.problems
        ]
    for option in (
        ("--batch-size", BatchSize, args.batch_size),
        ("--model", PathText, args.model),
        ("--lora-dir", PathText, args.lora_dir),
    ):
        if problem := wrong_option(*option):
            problems.append(problem)
    if problems:
        raise UserError("\n".join(problems))


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the sample command with these arguments, by default the process's own."""
    args = _parser().parse_args(argv)
    start_job()
    advise("the same command makes the rest")
    given = {name: getattr(args, name) for name in SETTING_NAMES}
    given = {name: value for name, value in given.items() if value is not None}
    _check(args, given)
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if args.run is None and args.adapter is None:
        raise UserError("nothing to sample from: give --run RUN_DIR or --adapter FILE")
    if not prompts:
        raise UserError("no prompts: give --prompt TEXT or --prompts FILE")
    # A terminal of another encoding may give what is not text.
    if garbled := [prompt for prompt in prompts if SURROGATE.search(prompt)]:
        raise UserError("\n".join(f"--prompt: not text: {brief(one)}" for one in garbled[:5]))
    if wrong := [problem for one in prompts if (problem := wrong_option("--prompt", Text, one))]:
        raise UserError("\n".join(wrong[:5]))
    check_number_of_videos(len(prompts) * len(args.seeds or [0]), "--prompts, --seeds")

    loras = record_loras(args.lora)

    if args.adapter is not None:
        adapter = find_adapter(args.adapter)
        args.run = args.run or str(Path("outputs") / adapter.stem)
        unpack_adapter(adapter, Path(args.run))

    def make_samples(default: Sample) -> list[Sample]:
        changes = given | ({"num_inv_steps": None} if args.random_noise else {})
        settings = default.settings.with_changes(changes, f"--run {args.run}")
        name_seed = args.seeds is not None
        default = replace(default, settings=settings, name_seed=name_seed, loras=loras)
        seeds = args.seeds or [default.seed]
        return [
            replace(default, prompt=prompt, seed=seed)
            for prompt in dict.fromkeys(prompts)
            for seed in dict.fromkeys(seeds)
        ]

    job = plan_samples(
        args.run,
        make_samples,
        step=args.step,
        output_dir=args.output_dir,
        overwrite=args.overwrite,
    )
    if args.model is not None:
        job.run.use_model(args.model)
    if args.lora_dir is not None:
        job.run.use_lora_dir(args.lora_dir)
    job.run.add_loras(args.lora)
    if args.mesh:
        job.run.config = replace(job.run.config, mesh=parse_mesh(args.mesh))
    sample_run(job, batch_size=args.batch_size)


if __name__ == "__main__":
    sys.exit(main())
