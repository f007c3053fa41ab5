"""The untrained networks of a world's base model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tav_jax.models.clip import CLIPTextModel
from tav_jax.models.network import Network, init_network
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.models.vae import AutoencoderKL
from tav_jax.pretrained.configs import read_schedule
from tav_jax.pretrained.model import Model
from tav_jax.worlds.recipe import Recipe, TrainingKeys
from tav_jax.worlds.tokenizer import write_tokenizer
from tav_jax.worlds.world import World

# The schedule of Stable Diffusion v1.4. The recipe adds the prediction type.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.11.1",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def scheduler_config(recipe: Recipe) -> dict[str, Any]:
    """Return the contents of the published `scheduler_config.json`."""
    return SCHEDULER | {"prediction_type": recipe.prediction_type}


def init_autoencoder(world: World, keys: TrainingKeys) -> Network[AutoencoderKL]:
    """Return the untrained autoencoder."""
    return init_network(AutoencoderKL, world.vae, keys.autoencoder_init)


def init_model(
    world: World,
    recipe: Recipe,
    keys: TrainingKeys,
    vae: Network[AutoencoderKL],
    tokenizer_folder: Path,
) -> Model:
    """Return the model with an untrained text encoder and U-Net, and write its tokenizer.

    Args:
        world: Gives the shapes of the networks and the words of the tokenizer.
        recipe: Gives the prediction type.
        keys: Keys of the initial parameters.
        vae: The trained autoencoder.
        tokenizer_folder: Where the tokenizer's files are written.
    """
    length = world.text_encoder.max_position_embeddings
    tokenizer = write_tokenizer(tokenizer_folder, world.words, length)
    text_encoder = replace(world.text_encoder, vocab_size=len(tokenizer))
    return Model(
        tokenizer,
        init_network(CLIPTextModel, text_encoder, keys.text_encoder_init),
        vae,
        init_network(UNet3DConditionModel, world.unet, keys.unet_init),
        read_schedule(scheduler_config(recipe)),
    )
