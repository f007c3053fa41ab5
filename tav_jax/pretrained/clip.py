"""Load a CLIP folder or Hub id as one `Clip`, and save it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_jax.errors import MissingFileError, UserError
from tav_jax.models.clip_image import CLIPConfig, CLIPModel
from tav_jax.models.network import Network
from tav_jax.pretrained import clip_configs as published_config
from tav_jax.pretrained.hub import CLIP_STEMS, find_folder
from tav_jax.pretrained.model import load_network, load_tokenizer, save_network, write_json
from tav_jax.pretrained.preprocess import Preprocessing
from tav_jax.reading import read_json

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"


@dataclass(frozen=True)
class Clip:
    """A tokenizer, both encoders, and how images are prepared for them."""

    tokenizer: "CLIPTokenizer"
    network: Network[CLIPModel]
    preprocessing: Preprocessing

    @property
    def scale(self) -> float:
        """The factor of cosines in CLIP's scores, exp(logit_scale): 100 in published models."""
        return math.exp(float(self.network.params["logit_scale"]))


def load_clip(
    path: str | Path,
    *,
    processor: str | Path | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    variant: str | None = None,
) -> Clip:
    """Return a CLIP model: OpenAI's, LAION's, PickScore's or any other CLIPModel.

    Args:
        path: A folder in the Hub's layout, or a Hub id such as "openai/clip-vit-large-patch14".
        processor: Folder or Hub id of the tokenizer and the `preprocessor_config.json`, if they
            are elsewhere. PickScore is used with those of "laion/CLIP-ViT-H-14-laion2B-s32B-b79K".
        dtype: "float32" or "bfloat16", the type of the computation and of the stored parameters.
        revision: Branch, tag or commit of `path` on the Hub.
        variant: Variant of the weight files, such as "fp16". None: the plain files or, if there
            are none, fp16.

    Raises:
        MissingFileError: There is no such folder or id, or the folder is incomplete.
        UserError: A config is unsupported, or the weights or the processor do not fit it.
    """
    folder = find_folder(
        path,
        revision=revision,
        variant=variant,
        option="clip",
        stems=CLIP_STEMS,
        index=CONFIG_NAME,
    )
    processor_folder = folder
    if processor is not None:
        processor_folder = find_folder(
            processor, option="processor", stems={}, index=PREPROCESSOR_NAME
        )
    for where, name in ((folder, CONFIG_NAME), (processor_folder, PREPROCESSOR_NAME)):
        if not (where / name).exists():
            raise MissingFileError(f"{where}: not a folder of CLIP, it has no {name}")
    config = published_config.read_clip_config(
        read_json(folder / CONFIG_NAME), f"{folder}/{CONFIG_NAME}"
    )
    preprocessing = published_config.read_preprocessor_config(
        read_json(processor_folder / PREPROCESSOR_NAME), f"{processor_folder}/{PREPROCESSOR_NAME}"
    )
    tokenizer = load_tokenizer(processor_folder)
    _check_parts_match(processor_folder, tokenizer, preprocessing, config)
    network = load_network(
        CLIPModel,
        config,
        folder,
        CLIP_STEMS[""],
        variant,
        dtype,
        # The published 4.6052 gives a scale of 100. The nearest bfloat16 number gives 98.9.
        dtype_of=lambda name: "float32" if name == "logit_scale" else dtype,
    )
    return Clip(tokenizer, network, preprocessing)


def _check_parts_match(
    folder: Path, tokenizer: Any, preprocessing: Preprocessing, config: CLIPConfig
) -> None:
    """Raise `UserError` if the tokenizer or the images do not fit the encoders."""
    problems = []
    vocabulary = tokenizer.get_vocab().values()
    last, size = max(vocabulary, default=-1), config.text_config.vocab_size
    if last >= size:
        problems.append(f"the tokenizer has {last + 1} tokens, the text encoder embeds {size}")
    # See `end_of_text`: 2 stands for the largest id.
    end = last if config.eos_token_id == 2 else config.eos_token_id
    if tokenizer.eos_token_id != end:
        problems.append(
            f"the tokenizer ends a text with token {tokenizer.eos_token_id}, the text encoder's "
            f"eos_token_id means {end}"
        )
    side, expected = preprocessing.crop_size, config.vision_config.image_size
    if side != expected:
        problems.append(f"images are cut to {side} pixels, the image encoder takes {expected}")
    if problems:
        raise UserError(f"{folder}: does not fit the encoders: {'; '.join(problems)}")


def save_clip(folder: str | Path, clip: Clip) -> None:
    """Write a model to a folder that `load_clip` and transformers' `CLIPModel` can load.

    Tensors are written in the type in which they are stored.
    """
    folder = Path(folder)
    config = published_config.write_clip_config(clip.network.config)
    save_network(folder, CLIP_STEMS[""], clip.network, config)
    preprocessing = published_config.write_preprocessor_config(clip.preprocessing)
    write_json(folder / PREPROCESSOR_NAME, preprocessing)
    clip.tokenizer.save_pretrained(folder)
