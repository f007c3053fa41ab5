"""What `tiny-scenes` is made of: its networks' shapes, its tokenizer, the training's numbers."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from tav_jax.models.clip import CLIPTextConfig
from tav_jax.models.unet import UNetConfig
from tav_jax.models.vae import VAEConfig
from tav_jax.worlds.tiny_scenes.world import WORDS

TEXT_LENGTH = 24  # tokens; the longest caption has 12

# v1-4's schedule; what is predicted comes from the recipe.
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
    scaling_factor=1.0,  # the training ends with latents of that scale
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
    # An image model: each picture looks at itself. Tuning inflates it like any other.
    attention_scope="spatial",
    temporal_attention=False,
)


def text_config(vocab_size: int) -> CLIPTextConfig:
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


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Recipe:
    """Numbers of the training; the defaults made the model that ships.

    Args:
        scenes: Scenes of the training set, each drawn at `frames_per_scene` times.
        kl_weight: Of the posterior's divergence, per latent number, against a picture's error.
        silhouette_weight: Of the first latent channel's difference from the subject's silhouette.
        group_share: Share of the U-Net's steps on groups of frames of one scene, whose residual
            blocks share their statistics, as they will in the inflated network.
        probe: Pictures drawn of seen and of held-out pairs for a figure, at each checkpoint.
    """

    seed: int = 0
    scenes: int = 16_000
    frames_per_scene: int = 4
    vae_steps: int = 2_200
    vae_batch: int = 32
    vae_learning_rate: float = 2e-3
    kl_weight: float = 1e-4
    silhouette_weight: float = 0.3
    prediction_type: Literal["v_prediction", "epsilon"] = "v_prediction"
    steps: int = 7_000
    batch: int = 64
    learning_rate: float = 1.5e-3
    group_share: float = 0.33
    caption_dropout: float = 0.1
    ema: float = 0.999
    guidance_scale: float = 3.0
    probe: int = 100
    checkpointing_steps: int = 1_000


def scheduler_config(recipe: Recipe) -> dict[str, Any]:
    """Returns the scheduler's published JSON."""
    return SCHEDULER | {"prediction_type": recipe.prediction_type}


def byte_pair_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the merges that make each word one token: the most frequent pair first, and again.

    Of equally frequent ones the first in the alphabet. The tokenizers library takes any of them,
    another one each time, and then a training that goes on would spell other words than it began
    with.
    """
    merges: list[tuple[str, str]] = []
    spelt = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    while pairs := Counter(pair for parts in spelt for pair in pairwise(parts)):
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((left, right))
        for parts in spelt:
            for i in range(len(parts) - 1):
                if parts[i : i + 2] == [left, right]:
                    parts[i : i + 2] = [left + right]
    return merges


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Returns a byte-pair tokenizer, saved in CLIP's files, whose tokens are the world's words.

    Any other text is spelt out in its bytes.
    """
    merges = byte_pair_merges(WORDS)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["".join(merge) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TEXT_LENGTH,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)
