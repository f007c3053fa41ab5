"""The networks of the worlds' base models: their shapes, and untrained ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tav_jax.errors import UserError
from tav_jax.models.clip import CLIPTextConfig, CLIPTextModel
from tav_jax.models.network import Network, in_modules, init_network
from tav_jax.models.unet import UNet3DConditionModel, UNetConfig
from tav_jax.models.vae import AutoencoderKL, VAEConfig
from tav_jax.pretrained.configs import read_schedule
from tav_jax.pretrained.model import Model, load_model
from tav_jax.pretrained.weights import TEMPORAL
from tav_jax.types import Params
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

TEXT_ENCODER = CLIPTextConfig(
    vocab_size=1,  # replaced by the tokenizer's
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=24,  # the longest caption of any world has 18 tokens
    layer_norm_eps=1e-5,
    hidden_act="quick_gelu",
)


def vae_config(block_out_channels: tuple[int, ...]) -> VAEConfig:
    """Return the shape of an autoencoder whose levels have these widths."""
    return VAEConfig(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=block_out_channels,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=1.0,  # the training ends with normalised latents
    )


def unet_config(block_out_channels: tuple[int, ...], sample_size: int) -> UNetConfig:
    """Return the shape of a U-Net that attends at all of its levels.

    Args:
        block_out_channels: Width of each level.
        sample_size: Side of the latents.
    """
    levels = len(block_out_channels)
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        block_out_channels=block_out_channels,
        down_attention=(True,) * levels,
        up_attention=(True,) * levels,
        num_attention_heads=(4,) * levels,
        layers_per_block=1,
        cross_attention_dim=TEXT_ENCODER.hidden_size,
        norm_num_groups=16,
        norm_eps=1e-5,
        use_linear_projection=False,
        flip_sin_to_cos=True,
        freq_shift=0.0,
        sample_size=sample_size,
        # An image model: each image attends only to itself. Tuning inflates it like any other.
        attention_scope="spatial",
        temporal_attention=False,
    )


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
    length = TEXT_ENCODER.max_position_embeddings
    tokenizer = write_tokenizer(tokenizer_folder, world.words, length)
    text_encoder = replace(TEXT_ENCODER, vocab_size=len(tokenizer))
    unet = init_network(UNet3DConditionModel, world.unet, keys.unet_init)
    return Model(
        tokenizer,
        init_network(CLIPTextModel, text_encoder, keys.text_encoder_init),
        vae,
        unet.with_params(zero_init_residuals(unet.params)),
        read_schedule(scheduler_config(recipe)),
    )


def zero_init_residuals(params: Params) -> Params:
    """Return a U-Net's parameters with the last kernel of every residual branch set to zero.

    The untrained network then predicts zero, and each branch adds to it as it learns.
    """
    last = (".conv2.kernel", ".to_out.0.kernel", ".ff.net.2.kernel", ".proj_out.kernel")
    return {
        name: value * (not (name.endswith(last) or name.startswith("conv_out.kernel")))
        for name, value in params.items()
    }


def without_temporal_attention(model: Model) -> Model:
    """Return a model without the temporal attention that loading has added."""
    params = model.unet.params.items()
    kept = {name: value for name, value in params if not in_modules(name, TEMPORAL)}
    return model.with_unet(model.unet.with_config(temporal_attention=False).with_params(kept))


def load_image_model(world: World, path: str, prediction_type: str) -> Model:
    """Return the image model that a training starts from.

    Args:
        world: The world, whose networks the model must have.
        path: Its folder or name.
        prediction_type: What its U-Net must predict.

    Raises:
        UserError: There is no such model, or it is another one.
    """
    model = without_temporal_attention(load_model(path, attention_scope="spatial"))
    found = (model.unet.config, model.vae.config, model.schedule.prediction_type)
    if found != (world.unet, world.vae, prediction_type):
        raise UserError(
            f"start_from: {path} has not the networks of {world.model}, or another prediction_type"
        )
    return model
