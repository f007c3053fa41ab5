"""A complete Stable Diffusion folder of a few kilobytes, and a clip."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import small_configs

from tav_jax.models.clip import CLIPTextModel
from tav_jax.models.network import in_modules, init_network
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.models.vae import AutoencoderKL
from tav_jax.pretrained.configs import write_unet_config
from tav_jax.pretrained.weights import TEMPORAL, save_tensors
from tav_jax.video.write import write_video

TOKENIZER = Path(__file__).parent / "golden/base/tokenizer"

UNET = replace(small_configs.UNET, num_attention_heads=(2, 2))
VAE = replace(small_configs.VAE, block_out_channels=(8, 8, 8), scaling_factor=0.18215)
# The vocabulary is that of the tokenizer in tests/golden/base.
TEXT = replace(small_configs.TEXT, vocab_size=2014, num_hidden_layers=1, max_position_embeddings=77)
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def write_model(folder: Path) -> None:
    """Writes an image model's folder in the Hub's layout, with random weights."""
    keys = jax.random.split(jax.random.key(7), 3)
    unet = init_network(UNet3DConditionModel, UNET, keys[0]).params
    published_unet = {
        name: [kind.replace("3D", "2D") for kind in value] if name.endswith("types") else value
        for name, value in write_unet_config(UNET).items()
        if name != "mid_block_type"
    }
    networks = {
        "unet/diffusion_pytorch_model": (
            published_unet | {"_class_name": "UNet2DConditionModel"},
            {name: value for name, value in unet.items() if not in_modules(name, TEMPORAL)},
        ),
        "vae/diffusion_pytorch_model": (
            {
                "_class_name": "AutoencoderKL",
                "in_channels": VAE.in_channels,
                "out_channels": VAE.out_channels,
                "latent_channels": VAE.latent_channels,
                "block_out_channels": VAE.block_out_channels,
                "down_block_types": ["DownEncoderBlock2D"] * len(VAE.block_out_channels),
                "up_block_types": ["UpDecoderBlock2D"] * len(VAE.block_out_channels),
                "layers_per_block": VAE.layers_per_block,
                "norm_num_groups": VAE.norm_num_groups,
            },
            init_network(AutoencoderKL, VAE, keys[1]).params,
        ),
        "text_encoder/model": (
            vars(TEXT),
            init_network(CLIPTextModel, TEXT, keys[2]).params,
        ),
    }
    for stem, (config, params) in networks.items():
        save_tensors(folder / f"{stem}.safetensors", params)
        (folder / stem).with_name("config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    shutil.copytree(TOKENIZER, folder / "tokenizer")


def write_clip(path: Path, frames: int = 12, side: int = 64) -> None:
    """Writes a bright square that goes right and down over a dark gradient."""
    video = np.zeros((frames, side, side, 3), np.uint8)
    video[..., 2] = np.linspace(0, 120, side, dtype=np.uint8)
    for index, frame in enumerate(video):
        at = 4 + 3 * index
        frame[at : at + 16, at : at + 16] = (250, 200, 40)
    write_video(path, video)
