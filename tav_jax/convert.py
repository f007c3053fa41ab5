"""python -m tav_jax.convert: tuned models in the forms in which people pass them on."""

import re
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tav_jax.console import Parser, command, say
from tav_jax.errors import UserError
from tav_jax.files import atomic_folder, first_unwritable_parent, megabytes
from tav_jax.pretrained.model import save_unet
from tav_jax.pretrained.single_file import convert_single_file
from tav_jax.report import kept_scores
from tav_jax.runs.adapters import DTYPES, find_adapter, save_adapter, unpack_adapter, write_adapter
from tav_jax.runs.hub_upload import CARD, check_login, upload, write_publication
from tav_jax.runs.pipelines import is_pipeline, read_pipeline, write_pipeline
from tav_jax.runs.run import Run
from tav_jax.stopping import advise

FORMS = {
    "adapter": "the trained parameters alone, one .safetensors file for `sample --adapter`; of a "
    "run, or of a model folder that the published Tune-A-Video has written",
    "unet": "the whole U-Net, a folder that the published Tune-A-Video reads",
    "pipeline": "the whole model, a folder as the published Tune-A-Video writes it",
    "diffusers": "of a Stable Diffusion model in one file (.safetensors, .ckpt): its folder, which "
    "diffusers and `pretrained_model_path` read",
}


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tav_jax.convert",
        description="Write a tuned model in another form. "
        + " ".join(f"{form}: {what}." for form, what in FORMS.items()),
        epilog="example: python -m tav_jax.convert outputs/man-skiing --to adapter "
        "man-skiing.safetensors",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="output_dir of tav_jax.tune, an adapter, a model's folder, or a model in one file",
    )
    parser.add_argument("--to", choices=FORMS, help="(with --push: adapter)")
    parser.add_argument(
        "output", type=Path, nargs="?", metavar="OUT", help="the file or folder to write"
    )
    parser.add_argument("--step", type=int, help="checkpoint of a run (default: the newest)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of an adapter: float32 samples as the run does, bfloat16 takes half of the space",
    )
    parser.add_argument(
        "--no-latents", action="store_true", help="an adapter without the inverted clip"
    )
    parser.add_argument(
        "--model", metavar="DIR", help="the base model, if it has moved (compared by digest)"
    )
    parser.add_argument(
        "--lora-dir",
        metavar="DIR",
        help="the run's LoRAs and embeddings, if they have moved (found by digest)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    hub = parser.add_argument_group("instead of OUT, upload to the Hub, with a model card")
    hub.add_argument("--push", metavar="USER/NAME", help="the repository, created if there is none")
    hub.add_argument("--private", action="store_true", help="create it as a private one")
    hub.add_argument("--license", metavar="NAME", help="as the Hub names it, for the card")
    hub.add_argument(
        "--dry-run", action="store_true", help="print the card and the files, upload nothing"
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the convert command with these arguments, by default the process's own."""
    # OUT comes after --to, and may be left out.
    args = _parser().parse_intermixed_args(argv)
    advise("the same command begins again")
    if args.push is not None:
        push(args)
    else:
        write(args)


def write(args: Namespace) -> None:
    """Write what the arguments ask for.

    Raises:
        UserError: It cannot be made, or OUT cannot be written.
    """
    output = args.output
    if output is None or args.to is None:
        raise UserError("nothing to write: give --to FORM and OUT, or --push USER/NAME")
    if args.to == "adapter" and output.suffix != ".safetensors":
        raise UserError(f"OUT: {output}: name a file that ends in .safetensors")
    if output.exists() and not args.overwrite:
        raise UserError(f"OUT: {output} is there already; --overwrite replaces it")
    if place := first_unwritable_parent(output.absolute()):
        raise UserError(f"OUT: {place} is not a folder that can be written to")
    source = Path(args.source).expanduser()
    if args.to == "diffusers":
        convert_single_file(source, output)
        say(f"wrote {output}: the model in the Hub's layout")
    elif args.to == "adapter" and is_pipeline(source):
        count = save_adapter(read_pipeline(source, args.model), output, dtype=args.dtype)
        say(f"wrote {output}: {count:,} parameters, {megabytes(float(output.stat().st_size))}")
    else:
        with opened_run(args.source) as run:
            convert_run(run, args)


def push(args: Namespace) -> None:
    """Upload a run or an adapter with a model card, or show what would be uploaded.

    Raises:
        UserError: It cannot be made, or the Hub refuses it.
    """
    form = args.to or "adapter"
    if form not in ("adapter", "pipeline") or args.output is not None:
        raise UserError("--push: uploads --to adapter or --to pipeline, and writes no OUT")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push):
        raise UserError(f"--push: {args.push}: a repository is named USER/NAME")
    if not args.dry_run:
        say(f"logged in to the Hub as {check_login()}")
    with opened_run(args.source) as run, tempfile.TemporaryDirectory() as temporary:
        use_moved_files(run, args)
        folder, step = Path(temporary) / "model", run.find_step(args.step)
        folder.mkdir()
        write_publication(
            run,
            folder,
            form=form,
            step=step,
            repo=args.push,
            dtype=args.dtype,
            latents=not args.no_latents,
            license_name=args.license,
            scores=mean_scores(run, step),
        )
        if args.dry_run:
            say((folder / CARD).read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                size = megabytes(float(path.stat().st_size))
                say(f"{path.relative_to(folder)}: {size}")
        if args.dry_run:
            say(f"nothing was uploaded to {args.push}")
        else:
            say(f"uploaded to {upload(folder, args.push, is_private=args.private)}")


def mean_scores(run: Run, step: int) -> dict[str, float]:
    """Return the means over a checkpoint's videos of what `evaluate` has computed of all of them.

    There are none if `evaluate` was not run, or if there are no videos.
    """
    if not any(run.samples(step).glob("*.json")):
        return {}
    of_videos = list(kept_scores(run, step).of.values()) or [{}]
    names = [name for name in of_videos[0] if all(name in scores for scores in of_videos)]
    return {name: sum(scores[name] for scores in of_videos) / len(of_videos) for name in names}


@contextmanager
def opened_run(source: str) -> Iterator[Run]:
    """Give the run of a folder, or that of an adapter in a temporary folder."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        yield Run.open(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield unpack_adapter(find_adapter(source), Path(temporary) / "run")


def use_moved_files(run: Run, args: Namespace) -> None:
    """Let a run find its base model, LoRAs and embeddings where the arguments say."""
    if args.model is not None:
        run.use_model(args.model)
    if args.lora_dir is not None:
        run.use_lora_dir(args.lora_dir)


def convert_run(run: Run, args: Namespace) -> None:
    """Write what the arguments ask for of a run."""
    output, step = args.output, run.find_step(args.step)
    use_moved_files(run, args)
    if args.to == "adapter":
        count = write_adapter(run, output, step=step, dtype=args.dtype, latents=not args.no_latents)
        size = megabytes(float(output.stat().st_size))
        say(f"wrote {output}: {count:,} parameters of step {step}, {size}")
    elif args.to == "unet":
        run.use_float32()
        unet = run.load_model(step).unet
        with atomic_folder(output) as partial:
            save_unet(partial, unet)
        say(f"wrote {output}: the U-Net of step {step}")
        if run.config.loras or run.config.embeddings:
            say(
                "note: it has the run's LoRAs in it, but not what they add to the text encoder, "
                "nor embeddings"
            )
    else:
        write_pipeline(run, output, step)
        say(f"wrote {output}: the model of step {step} as the published Tune-A-Video writes it")


if __name__ == "__main__":
    sys.exit(main())
