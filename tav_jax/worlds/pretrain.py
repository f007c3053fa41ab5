"""python -m tav_jax.worlds.pretrain: train the base model of a drawn world from nothing.

First the autoencoder is trained, then its decoder alone, then the text encoder and the U-Net
together. The result is a Stable Diffusion folder. Each stage resumes from its newest checkpoint and
writes its training curve to `metrics.jsonl`. `start_from=MODEL` goes on with a model's text encoder
and U-Net.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tav_jax.console import Parser, command, say
from tav_jax.errors import UserError
from tav_jax.models.network import Network
from tav_jax.models.vae import AutoencoderKL
from tav_jax.pretrained.model import Model, save_model
from tav_jax.settings import override, parse
from tav_jax.video.sheets import contact_sheet
from tav_jax.video.write import write_image
from tav_jax.worlds.autoencoder import Evaluation, train_autoencoder
from tav_jax.worlds.decoder import refine_decoder
from tav_jax.worlds.diffusion import train_diffusion
from tav_jax.worlds.networks import init_autoencoder, init_model, load_image_model, scheduler_config
from tav_jax.worlds.recipe import Recipe, Stream, TrainingKeys, generator, training_keys
from tav_jax.worlds.recorded_settings import differ_from_recorded, record_settings
from tav_jax.worlds.text_to_image import accuracy, draw_scenes, in_words
from tav_jax.worlds.training_set import TrainingSet, make_training_set
from tav_jax.worlds.world import World
from tav_jax.worlds.worlds import WORLDS

NUM_RECONSTRUCTED = 512  # images that the autoencoder is judged on


def pretrain(recipe: Recipe, output_dir: Path) -> None:
    """Run all stages, and write the model in float16 to a folder of its name in `output_dir`.

    Raises:
        UserError: The folder holds a training of another recipe.
    """
    claim_folder(output_dir, recipe)
    world, keys = WORLDS[recipe.world], training_keys(recipe.seed)
    start = None
    if recipe.start_from is not None:
        start = load_image_model(world, recipe.start_from, recipe.prediction_type)
    training_set = make_training_set(world, recipe)
    folder = output_dir / "diffusion"
    if start is None:
        vae = train_vae(world, recipe, keys, training_set, output_dir)
        start = init_model(world, recipe, keys, vae, folder / "tokenizer")
    model = train_diffusion(
        recipe,
        start,
        training_set,
        partial(evaluate_drawing, world=world, recipe=recipe, sheet=folder / "pictures.png"),
        folder,
        keys.diffusion_steps,
    )
    save_model(output_dir / world.model, to_float16(model), scheduler_config(recipe))
    say(f"wrote {output_dir / world.model}")


def train_vae(
    world: World, recipe: Recipe, keys: TrainingKeys, training_set: TrainingSet, output_dir: Path
) -> Network[AutoencoderKL]:
    """Train an autoencoder from nothing, then its decoder alone, each in its own folder."""
    evaluation = reconstruction_evaluation(world, recipe)
    vae = train_autoencoder(
        world,
        recipe,
        init_autoencoder(world, keys),
        training_set,
        evaluation,
        output_dir / "autoencoder",
        keys.autoencoder_steps,
    )
    folder = output_dir / "decoder"
    return refine_decoder(world, recipe, vae, training_set, evaluation, folder, keys.decoder_steps)


def claim_folder(output_dir: Path, recipe: Recipe) -> None:
    """Write the recipe to the folder.

    Raises:
        UserError: The folder holds a training of another recipe.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    record = output_dir / "recipe.json"
    if differ_from_recorded(record, recipe):
        raise UserError(f"--output-dir: {output_dir} holds a training of another recipe")
    record_settings(record, recipe)


def reconstruction_evaluation(world: World, recipe: Recipe) -> Evaluation:
    """Return images of any scenes, and how detectors judge their reconstructions."""
    rng = generator(recipe.seed, Stream.AUTOENCODER_EVALUATION)
    scenes = world.sample_scenes(rng, NUM_RECONSTRUCTED, held_out=None)
    images, _ = world.draw(scenes, rng.random(NUM_RECONSTRUCTED))
    return Evaluation(images, lambda decoded: in_words(accuracy(world, scenes, decoded)))


def evaluate_drawing(model: Model, *, world: World, recipe: Recipe, sheet: Path) -> str:
    """Return how often a model draws what prompts name, and write some images to a sheet.

    Args:
        model: The model to judge.
        world: The world that it was trained on.
        recipe: Gives the number of images, the guidance scale and the seed.
        sheet: The image file of the sheet.
    """
    lines: list[str] = []
    rows: dict[str, np.ndarray] = {}
    for pairs in ("seen", "held-out"):
        scenes, images = draw_scenes(
            world,
            model,
            recipe.probe,
            recipe.guidance_scale,
            held_out=pairs == "held-out",
            seed=recipe.seed,
        )
        lines.append(f"{pairs} pairs: {in_words(accuracy(world, scenes, images))}")
        rows |= {
            f"{pairs} pairs: {world.describe(scenes[start])} ...": images[start : start + 8]
            for start in range(0, min(len(scenes), 24), 8)
        }
    write_image(sheet, contact_sheet(rows))
    return "; ".join(lines)


def to_float16(model: Model) -> Model:
    """Return the model with all parameters in float16."""

    def halve(network: Network) -> Network:
        return network.with_params({k: v.astype(jnp.float16) for k, v in network.params.items()})

    return replace(
        model,
        text_encoder=halve(model.text_encoder),
        vae=halve(model.vae),
        unet=halve(model.unet),
    )


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(
        prog="python -m tav_jax.worlds.pretrain",
        description="Train a small base model from nothing. Run the same command again to "
        "resume an interrupted training.",
        epilog="example: python -m tav_jax.worlds.pretrain --output-dir outputs/pretrain seed=1",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/pretrain"), metavar="DIR")
    parser.add_argument("--world", choices=WORLDS, default="tiny-scenes", help="(tiny-scenes)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values of the recipe")
    args = parser.parse_args(argv)
    numbers = asdict(WORLDS[args.world].recipe)
    recipe = parse(Recipe, override(numbers, args.overrides, Recipe), "recipe")
    if recipe.world != args.world:
        raise UserError(f"world: --world {recipe.world} chooses it with its own numbers")
    pretrain(recipe, args.output_dir)


if __name__ == "__main__":
    sys.exit(main())
