"""python -m tav_jax.worlds.text_to_image: measure how often a model draws what captions name."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tav_jax.console import Parser, command, say
from tav_jax.pipeline import decode_latents, random_latents, sample_latents
from tav_jax.pretrained.model import Model, load_model
from tav_jax.settings import Count, GuidanceScale, StepsFromZero, check_options
from tav_jax.video.sheets import contact_sheet
from tav_jax.video.write import to_frames, write_image
from tav_jax.worlds.world import Images, Scene, World
from tav_jax.worlds.worlds import WORLDS

BATCH_SIZE = 100  # images that are sampled at once


def draw(
    world: World, model: Model, prompts: Sequence[str], guidance_scale: float, seed: int
) -> Images:
    """Return an image for each prompt, sampled from random noise in 50 steps."""
    images = []
    for start in range(0, len(prompts), BATCH_SIZE):
        few = list(prompts[start : start + BATCH_SIZE])
        seeds = [seed * 1_000_000 + start + index for index in range(len(few))]
        latents = sample_latents(
            model,
            random_latents(model, seeds, 1, world.size, world.size),
            few,
            guidance_scale=guidance_scale,
        )
        images.append(to_frames(np.asarray(decode_latents(model, latents)))[:, 0])
    return np.concatenate(images)


def accuracy(world: World[Scene], scenes: Sequence[Scene], images: Images) -> dict[str, float]:
    """Return, for each attribute, the share of images that show their scene's value."""
    seen = world.read(images)
    return {
        name: float(np.mean([names.index(getattr(scene, name)) for scene in scenes] == seen[name]))
        for name, names in world.attributes.items()
    }


def in_words(accuracies: dict[str, float]) -> str:
    """Return accuracies as a line of text."""
    return ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items())


def draw_scenes(
    world: World[Scene],
    model: Model,
    count: int,
    guidance_scale: float,
    *,
    held_out: bool,
    seed: int,
) -> tuple[list[Scene], Images]:
    """Return random scenes, and the images that a model draws from their full prompts.

    Args:
        world: The world that the model was trained on.
        model: The model.
        count: Number of scenes.
        guidance_scale: Weight of the guidance.
        held_out: Use only pairs of attributes that were held out of training, or only the others.
        seed: Seed of the scenes and of the noise.
    """
    rng = np.random.default_rng((seed, held_out))
    scenes = world.sample_scenes(rng, count, held_out=held_out)
    prompts = [world.describe(scene) for scene in scenes]
    return scenes, draw(world, model, prompts, guidance_scale, seed)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default the process's own."""
    parser = Parser(
        prog="python -m tav_jax.worlds.text_to_image",
        description="Let a model draw random captions, and measure how often a detector finds in "
        "the images what the captions name.",
        epilog="example: python -m tav_jax.worlds.text_to_image --guidance-scale 2 3 5",
    )
    parser.add_argument("--world", choices=WORLDS, default="tiny-scenes", help="(tiny-scenes)")
    parser.add_argument("--model", help="folder or name (the world's own)")
    parser.add_argument("--count", type=int, default=500, help="captions of each kind (500)")
    parser.add_argument("--guidance-scale", type=float, nargs="+", default=[3.0], metavar="SCALE")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="some of the images")
    args = parser.parse_args(argv)
    check_options(
        ("--count", Count, args.count),
        ("--seed", StepsFromZero, args.seed),
        *(("--guidance-scale", GuidanceScale, scale) for scale in args.guidance_scale),
    )
    world = WORLDS[args.world]
    model = load_model(args.model or world.model, attention_scope="spatial")
    rows = {}
    for scale in args.guidance_scale:
        for held_out in (False, True):
            scenes, images = draw_scenes(
                world, model, args.count, scale, held_out=held_out, seed=args.seed
            )
            pairs = "held-out pairs" if held_out else "seen pairs"
            say(f"guidance {scale:g}, {pairs}: {in_words(accuracy(world, scenes, images))}")
            rows[f"guidance {scale:g}, {pairs}: {world.describe(scenes[0])} ..."] = images[:8]
    if args.sheet:
        write_image(args.sheet, contact_sheet(rows))
        say(f"wrote {args.sheet}")


if __name__ == "__main__":
    sys.exit(main())
