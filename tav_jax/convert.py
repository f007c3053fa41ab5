"""python -m tav_jax.convert: a run as one file or as a folder that other programs read."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tav_jax.console import Parser, command, say
from tav_jax.errors import UserError
from tav_jax.files import first_unwritable_parent, megabytes
from tav_jax.pretrained.model import save_unet
from tav_jax.runs.adapters import DTYPES, write_adapter
from tav_jax.runs.run import Run
from tav_jax.stopping import advise


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tav_jax.convert",
        description="Write what a run has trained in another form. adapter: the trained "
        "parameters alone, one .safetensors file for `sample --adapter`. unet: the whole U-Net, a "
        "folder for the published Tune-A-Video and for `pretrained_model_path`.",
        epilog="example: python -m tav_jax.convert outputs/man-skiing --to adapter "
        "man-skiing.safetensors",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="output_dir of tav_jax.tune")
    parser.add_argument("--to", required=True, choices=("adapter", "unet"))
    parser.add_argument("output", type=Path, metavar="OUT", help="the file or folder to write")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
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
        "--model", metavar="DIR", help="the run's base model, if it has moved (compared by digest)"
    )
    parser.add_argument(
        "--lora-dir",
        metavar="DIR",
        help="the run's LoRAs and embeddings, if they have moved (found by digest)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the convert command with these arguments, by default the process's own."""
    args = _parser().parse_args(argv)
    advise("the same command begins again")
    run = Run.open(args.run)
    step = run.find_step(args.step)
    output = args.output
    if args.to == "adapter" and output.suffix != ".safetensors":
        raise UserError(f"OUT: {output}: name a file that ends in .safetensors")
    if output.exists() and not args.overwrite:
        raise UserError(f"OUT: {output} is there already; --overwrite replaces it")
    if place := first_unwritable_parent(output.absolute()):
        raise UserError(f"OUT: {place} is not a folder that can be written to")
    if args.model is not None:
        run.use_model(args.model)
    if args.lora_dir is not None:
        run.use_lora_dir(args.lora_dir)
    if args.to == "adapter":
        count = write_adapter(run, output, step=step, dtype=args.dtype, latents=not args.no_latents)
        size = megabytes(float(output.stat().st_size))
        say(f"wrote {output}: {count:,} parameters of step {step}, {size}")
    else:
        save_unet(output, run.load_model(step).unet)
        say(f"wrote {output}: the U-Net of step {step}")
        if run.config.loras or run.config.embeddings:
            say(
                "note: it has the run's LoRAs in it, but not what they add to the text encoder, "
                "nor embeddings"
            )


if __name__ == "__main__":
    sys.exit(main())
