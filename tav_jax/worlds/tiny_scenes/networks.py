"""The shapes of `tiny-scenes`' networks, and the untrained model."""

from pathlib import Path
from typing import Any

from tav_jax.models.clip import CLIPTextConfig, CLIPTextModel
from tav_jax.models.network import Network, init_network
from tav_jax.models.unet import UNet3DConditionModel, UNetConfig
from tav_jax.models.vae import AutoencoderKL, VAEConfig
from tav_jax.pretrained.configs import read_schedule
from tav_jax.pretrained.model import Model
from tav_jax.worlds.recipe import Recipe, TrainingKeys
from tav_jax.worlds.tiny_scenes.world import WORDS
from tav_jax.worlds.tokenizer import write_tokenizer

TEXT_LENGTH = 24  # tokens; the longest caption has 12

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

VAE = VAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(24, 48, 64),
    layers_per_block=1,
    norm_num_groups=8,
    scaling_factor=1.0,  # the training ends with normalised latents
)

UNET = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(48, 96),
    down_attention=(True, True),
    up_attention=(True, True),
    num_attention_heads=(4, 4),
    layers_per_block=1,
    cross_attention_dim=64,
    norm_num_groups=16,
    norm_eps=1e-5,
    use_linear_projection=False,
    flip_sin_to_cos=True,
    freq_shift=0.0,
    sample_size=8,
    # An image model: each image attends only to itself. Tuning inflates it like any other.
    attention_scope="spatial",
    temporal_attention=False,
)


def text_config(vocab_size: int) -> CLIPTextConfig:
    """Return the shape of the text encoder for a vocabulary of `vocab_size` tokens."""
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        layer_norm_eps=1e-5,
        hidden_act="quick_gelu",
    )


def scheduler_config(recipe: Recipe) -> dict[str, Any]:
    """Return the contents of the published `scheduler_config.json`."""
    return SCHEDULER | {"prediction_type": recipe.prediction_type}


def init_autoencoder(keys: TrainingKeys) -> Network[AutoencoderKL]:
    """Return the untrained autoencoder."""
    return init_network(AutoencoderKL, VAE, keys.autoencoder_init)


def init_model(
    recipe: Recipe, keys: TrainingKeys, vae: Network[AutoencoderKL], tokenizer_folder: Path
) -> Model:
    """Return the model with an untrained text encoder and U-Net, and write its tokenizer.

    Args:
        recipe: Gives the prediction type.
        keys: Keys of the initial parameters.
        vae: The trained autoencoder.
        tokenizer_folder: Where the tokenizer's files are written.
    """
    tokenizer = write_tokenizer(tokenizer_folder, WORDS, TEXT_LENGTH)
    return Model(
        tokenizer,
        init_network(CLIPTextModel, text_config(len(tokenizer)), keys.text_encoder_init),
        vae,
        init_network(UNet3DConditionModel, UNET, keys.unet_init),
        read_schedule(scheduler_config(recipe)),
    )
