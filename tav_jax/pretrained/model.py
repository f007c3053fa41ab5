"""Load a Stable Diffusion folder or Hub id as one `Model`, and save models and tuned U-Nets."""

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Int32

from tav_jax.diffusion.schedule import NoiseSchedule
from tav_jax.errors import MissingFileError, UserError
from tav_jax.models.attention.dispatch import AttentionImplementation, AttentionScope
from tav_jax.models.clip import CLIPTextConfig, CLIPTextModel
from tav_jax.models.compute import ComputeOptions, GradientCheckpointing
from tav_jax.models.network import Network, parameter_shapes
from tav_jax.models.unet import UNet3DConditionModel, UNetConfig
from tav_jax.models.vae import AutoencoderKL, VAEConfig
from tav_jax.pretrained import configs as published_config
from tav_jax.pretrained import weights
from tav_jax.pretrained.hub import WEIGHT_STEMS, find_folder
from tav_jax.pretrained.lora import Lora, change_of, read_loras
from tav_jax.pretrained.textual_inversion import add_embeddings, read_embeddings
from tav_jax.reading import read_json, require_file
from tav_jax.text import shorten
from tav_jax.types import PRNGKey

CONFIG_NAMES = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
TOKENIZER_CONFIGS = {"tokenizer_config.json", "special_tokens_map.json"}
TOKENIZER_FILES = TOKENIZER_CONFIGS | {
    *("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
}
INDEX_NAME = "model_index.json"

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


@dataclass(frozen=True)
class Model:
    """A text-to-video model: a tokenizer, three networks with parameters, and a noise schedule.

    Args:
        tokenizer: The tokenizer.
        text_encoder: CLIP's text encoder.
        vae: The autoencoder.
        unet: The U-Net.
        schedule: The noise schedule.
        words: Token ids for which a learnt word stands in a prompt, by the word's own id.
    """

    tokenizer: "CLIPTokenizer"
    text_encoder: Network[CLIPTextModel]
    vae: Network[AutoencoderKL]
    unet: Network[UNet3DConditionModel]
    schedule: NoiseSchedule
    words: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def with_unet(self, unet: Network[UNet3DConditionModel]) -> "Model":
        """Return the same model with another U-Net."""
        return replace(self, unet=unet)


def load_model(
    pretrained_model_path: str | Path,
    *,
    dtype: str = "float32",
    float32_modules: Sequence[str] = (),
    attention_scope: AttentionScope = "sparse_causal",
    attention: AttentionImplementation = "auto",
    gradient_checkpointing: GradientCheckpointing = "none",
    key: PRNGKey | None = None,
    revision: str | None = None,
    variant: str | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    embeddings: Sequence[str | Path] = (),
) -> Model:
    """Return a Stable Diffusion model with its U-Net inflated to frames.

    Args:
        pretrained_model_path: A folder in the Hub's layout (SD 1.x, 2.x base, their DreamBooth
            exports, or a model with a tuned 3D U-Net), a Hub id such as
            "CompVis/stable-diffusion-v1-4", or "tiny-figures" or "tiny-scenes", which come with
            the package.
        dtype: "float32" or "bfloat16", the type of the computation and of the stored parameters.
        float32_modules: Modules of the U-Net that are stored in float32 in any case, such as
            those to be trained.
        attention_scope: What a frame's self-attention may see, see `UNetConfig`.
        attention: How the U-Net computes attention, see `ComputeOptions`.
        gradient_checkpointing: What the U-Net keeps for the backward pass, see `ComputeOptions`.
        key: Random key for new temporal attentions, which are added to an image U-Net. None means
            `jax.random.key(0)`.
        revision: Branch, tag or commit on the Hub.
        variant: Variant of the weight files, such as "fp16". None: the plain files or, if there
            are none, fp16.
        loras: LoRAs to add to the text encoder and the U-Net, each a file and its scale.
        embeddings: Files of words that were learnt by textual inversion.

    Raises:
        MissingFileError: there is no such folder, and no such id on the Hub or in its cache, or
            the folder is incomplete.
        UserError: a config is unsupported, or the weights do not fit it, or a LoRA or an
            embedding does not.
    """
    folder = find_folder(pretrained_model_path, revision=revision, variant=variant)
    parts = (*WEIGHT_STEMS, *CONFIG_NAMES)
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise MissingFileError(
            f"{folder}: not a Stable Diffusion folder, it has no {', no '.join(missing)}"
        )
    # All that is small is checked before weights are read.
    if (folder / INDEX_NAME).exists():
        published_config.check_index(read_json(folder / INDEX_NAME), f"{folder}/{INDEX_NAME}")
    schedule = load_schedule(folder / "scheduler")
    text_config, vae_config, unet_config = _read_configs(folder)
    for part, stem in WEIGHT_STEMS.items():
        weights.find_files(folder / part, stem, variant)
    tokenizer = load_tokenizer(folder / "tokenizer")
    _check_parts_match(folder, tokenizer, text_config, vae_config, unet_config)
    learnt = read_embeddings(embeddings, tokenizer, text_config.hidden_size)
    added = read_loras(loras, text_config, unet_config)
    text_encoder, words = add_embeddings(
        tokenizer,
        load_text_encoder(folder / "text_encoder", dtype=dtype, variant=variant, loras=added),
        learnt,
    )
    model = Model(
        tokenizer,
        text_encoder,
        load_vae(folder / "vae", dtype=dtype, variant=variant),
        load_unet(
            folder / "unet",
            dtype=dtype,
            float32_modules=float32_modules,
            key=key,
            variant=variant,
            loras=added,
        ),
        schedule,
        words,
    )
    unet = model.unet.with_config(attention_scope=attention_scope)
    unet = unet.with_compute(
        attention_implementation=attention, gradient_checkpointing=gradient_checkpointing
    )
    return model.with_unet(unet)


def model_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the files of a model's folder on which `load_model`'s result depends.

    Raises:
        MissingFileError: The folder is incomplete.
    """
    files = [folder / "scheduler" / CONFIG_NAMES["scheduler"]]
    for part, stem in WEIGHT_STEMS.items():
        files.append(folder / part / "config.json")
        files += weights.find_files(folder / part, stem, variant)
    tokenizer = folder / "tokenizer"
    return files + sorted(path for path in tokenizer.iterdir() if path.name in TOKENIZER_FILES)


def _read_configs(folder: Path) -> tuple[CLIPTextConfig, VAEConfig, UNetConfig]:
    """Return the configs of a model's networks, which are in its folder."""
    published = {part: read_json(folder / part / "config.json") for part in WEIGHT_STEMS}
    where = {part: f"{folder / part}/config.json" for part in WEIGHT_STEMS}
    return (
        published_config.read_text_config(published["text_encoder"], where["text_encoder"]),
        published_config.read_vae_config(published["vae"], where["vae"]),
        published_config.read_unet_config(published["unet"], where["unet"]),
    )


def _check_parts_match(
    folder: Path, tokenizer: Any, text: CLIPTextConfig, vae: VAEConfig, unet: UNetConfig
) -> None:
    """Raise `UserError` if the tokenizer, the text encoder, the VAE and the U-Net do not fit."""
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if tokens > text.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokens} tokens, the text encoder embeds "
            f"{text.vocab_size}"
        )
    if text.hidden_size != unet.cross_attention_dim:
        raise UserError(
            f"{folder}: the text encoder gives states {text.hidden_size} wide, the U-Net takes "
            f"{unet.cross_attention_dim}"
        )
    if vae.latent_channels != unet.in_channels:
        raise UserError(
            f"{folder}: the U-Net takes {unet.in_channels} channels, the VAE gives "
            f"{vae.latent_channels} (inpainting models are of that kind)"
        )


def load_tokenizer(folder: Path) -> Any:
    """Return a `transformers.CLIPTokenizer` from the folder of its vocabulary.

    Raises:
        MissingFileError: The vocabulary is not there.
        UserError: A file is damaged.
    """
    # Without these files transformers silently uses a vocabulary of two words.
    names = {path.name for path in folder.iterdir()}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise MissingFileError(f"{folder}: no vocab.json with merges.txt, nor tokenizer.json")
    for path in sorted(folder.iterdir()):
        if not path.is_dir():  # transformers chooses among many names
            require_file(path)
    for name in sorted(names & TOKENIZER_CONFIGS):
        where = f"{folder}/{name}"
        published_config.check_tokenizer_config(read_json(folder / name), where)
    # At its import transformers warns that PyTorch is missing, but only its models need that.
    logger = logging.getLogger("transformers")
    logger.addFilter(_is_not_about_pytorch)
    try:
        from transformers import CLIPTokenizer
    finally:
        logger.removeFilter(_is_not_about_pytorch)
    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # of many kinds, also of its libraries in Rust
        raise UserError(
            f"{folder}: transformers cannot read the tokenizer ({shorten(str(error), 150)})"
        ) from None


def _is_not_about_pytorch(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


def load_text_encoder(
    folder: Path,
    *,
    dtype: str = "float32",
    variant: str | None = None,
    loras: Sequence[Lora] = (),
) -> Network[CLIPTextModel]:
    """Return CLIP's text encoder from its folder, with LoRAs added to it."""
    config = published_config.read_text_config(_read_config(folder), f"{folder}/config.json")

    def rename(name: str) -> str:
        # transformers 5.6 and later may save names without this prefix.
        return name if name.startswith("text_model.") else f"text_model.{name}"

    stem = WEIGHT_STEMS["text_encoder"]
    return load_network(
        CLIPTextModel,
        config,
        folder,
        stem,
        variant,
        dtype,
        rename=rename,
        change_of=change_of([lora.text_encoder for lora in loras]),
    )


def load_vae(
    folder: Path, *, dtype: str = "float32", variant: str | None = None
) -> Network[AutoencoderKL]:
    """Return the autoencoder from its folder."""
    config = published_config.read_vae_config(_read_config(folder), f"{folder}/config.json")
    return load_network(AutoencoderKL, config, folder, WEIGHT_STEMS["vae"], variant, dtype)


def load_unet(
    folder: Path,
    *,
    dtype: str = "float32",
    float32_modules: Sequence[str] = (),
    key: PRNGKey | None = None,
    variant: str | None = None,
    loras: Sequence[Lora] = (),
) -> Network[UNet3DConditionModel]:
    """Return the U-Net from its folder. An image U-Net is inflated to a 3D one.

    Args:
        folder: Folder with `config.json` and weights.
        dtype: See `load_model`.
        float32_modules: See `load_model`.
        key: See `load_model`.
        variant: See `load_model`.
        loras: What is added to it, as `read_loras` gives it.
    """
    published = _read_config(folder)
    config = published_config.read_unet_config(published, f"{folder}/config.json")
    dtype_of = _storage_dtype(dtype, float32_modules)
    is_image_unet = published.get("_class_name") != "UNet3DConditionModel"
    unet = load_network(
        UNet3DConditionModel,
        config,
        folder,
        WEIGHT_STEMS["unet"],
        variant,
        dtype,
        dtype_of=dtype_of,
        may_lack=weights.TEMPORAL if is_image_unet else (),
        change_of=change_of([lora.unet for lora in loras]),
    )
    shapes = parameter_shapes(UNet3DConditionModel, unet.config)
    key = jax.random.key(0) if key is None else key
    return unet.with_params(weights.inflate(unet.params, shapes, key, dtype_of=dtype_of))


def load_schedule(folder: Path) -> NoiseSchedule:
    """Return the noise schedule from the folder of a scheduler of any class."""
    where = f"{folder}/{CONFIG_NAMES['scheduler']}"
    return published_config.read_schedule(_read_config(folder, CONFIG_NAMES["scheduler"]), where)


def save_unet(folder: str | Path, unet: Network[UNet3DConditionModel]) -> None:
    """Write a U-Net to a folder that the published Tune-A-Video and `load_unet` can load.

    It will contain `config.json` and `diffusion_pytorch_model.safetensors`. Tensors are written in
    the type in which they are stored.
    """
    config = published_config.write_unet_config(unet.config)
    save_network(Path(folder), WEIGHT_STEMS["unet"], unet, config)


def save_model(
    folder: str | Path, model: Model, scheduler: Mapping[str, Any], *, is_tuned: bool = False
) -> None:
    """Write a model to a folder in the Hub's layout, each tensor in the type it is stored in.

    The vocabulary has learnt words, but of a word of several vectors it has separate tokens.

    Args:
        folder: Folder to write. It need not exist.
        model: The model.
        scheduler: Contents of `scheduler_config.json`.
        is_tuned: Write the index of the published Tune-A-Video, whose U-Net is its own. Otherwise
            write that of an image model.
    """
    folder = Path(folder)
    save_unet(folder / "unet", model.unet)
    vae, text_encoder = model.vae, model.text_encoder
    vae_config = published_config.write_vae_config(vae.config)
    save_network(folder / "vae", WEIGHT_STEMS["vae"], vae, vae_config)
    text_config = published_config.write_text_config(text_encoder.config)
    stem = WEIGHT_STEMS["text_encoder"]
    save_network(folder / "text_encoder", stem, text_encoder, text_config)
    # How the last texts were padded and cut is no part of the model.
    model.tokenizer.backend_tokenizer.no_padding()
    model.tokenizer.backend_tokenizer.no_truncation()
    model.tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / "scheduler" / CONFIG_NAMES["scheduler"], scheduler)
    classes = {
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if is_tuned:
        name, unet_class = "TuneAVideoPipeline", ["models", "UNet3DConditionModel"]
        absent = {}
    else:
        name, unet_class = "StableDiffusionPipeline", ["diffusers", "UNet2DConditionModel"]
        absent = {"feature_extractor": [None, None], "safety_checker": [None, None]}
    index = {"_class_name": name, "_diffusers_version": "0.11.1"}
    parts = dict(sorted((classes | {"unet": unet_class}).items()))
    write_json(folder / INDEX_NAME, index | parts | absent)


def tokenize(model: Model, prompts: Sequence[str]) -> Int32[np.ndarray, "b s"]:
    """Return token ids, padded to the text encoder's length (77 for CLIP).

    Longer prompts are cut, with a warning that quotes the lost part.
    """
    length = model.text_encoder.config.max_position_embeddings
    if not model.words:
        return pad_tokens(model.tokenizer, prompts, length)
    rows = []
    for prompt in prompts:
        ids = token_ids(model, prompt)
        if len(ids) + 2 > length:
            _warn_of_cut(model.tokenizer, len(ids) + 2, length, ids[length - 2 :])
        rows.append(frame_tokens(model.tokenizer, ids[: length - 2], length))
    return np.asarray(rows, np.int32)


def token_ids(model: Model, text: str) -> list[int]:
    """Return the ids of a text's tokens, without its beginning and end."""
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return [token for one in ids for token in model.words.get(one, (one,))]


def frame_tokens(tokenizer: Any, ids: Sequence[int], length: int) -> list[int]:
    """Return a row of ids with beginning and end, padded to `length`."""
    row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return row + [tokenizer.pad_token_id] * (length - len(row))


def _warn_of_cut(tokenizer: Any, count: int, length: int, lost: Sequence[int]) -> None:
    text = shorten(tokenizer.decode(lost))
    warnings.warn(f"prompt of {count} tokens, {length} are read; cut off: '{text}'", stacklevel=4)


def pad_tokens(tokenizer: Any, prompts: Sequence[str], length: int) -> Int32[np.ndarray, "b s"]:
    """Return token ids, padded to `length`. Longer prompts are cut, with a warning."""
    for ids in tokenizer(list(prompts), verbose=False).input_ids:
        if len(ids) > length:
            _warn_of_cut(tokenizer, len(ids), length, ids[length - 1 : -1])
    padded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
    return np.asarray(padded.input_ids, np.int32)


def load_network(
    module_class: type,
    config: Any,
    folder: Path,
    stem: str,
    variant: str | None,
    dtype: str,
    *,
    dtype_of: Callable[[str], str] | None = None,
    may_lack: tuple[str, ...] = (),
    rename: Callable[[str], str] = str,
    change_of: Callable[[str], np.ndarray | None] = lambda name: None,
) -> Network:
    """Return a network with the weights of a folder.

    The names and shapes in the files' headers are compared with the config before any tensor is
    read. PyTorch's pickled files have no header.

    Args:
        module_class: Its class.
        config: Its config.
        folder: Its folder.
        stem: See `weights.read_tensors`.
        variant: See `weights.read_tensors`.
        dtype: See `load_model`.
        dtype_of: The type in which a parameter of that name is stored. None: `dtype` for all.
        may_lack: Modules whose weights may be missing.
        rename: Gives the published name of a tensor of the files.
        change_of: See `weights.merge`.
    """
    where = str(folder)
    shapes = parameter_shapes(module_class, config)
    files = weights.find_files(folder, stem, variant)
    if all(path.suffix == ".safetensors" for path in files):
        stored = ((rename(name), shape) for name, shape in weights.stored_shapes(files))
        weights.check_shapes(shapes, stored, where=where, may_lack=may_lack)
    tensors = weights.read_tensors(folder, stem, variant)
    params = weights.merge(
        shapes,
        ((rename(name), tensor) for name, tensor in tensors),
        dtype_of=dtype_of or (lambda name: dtype),
        where=where,
        may_lack=may_lack,
        change_of=change_of,
    )
    return Network(module_class, config, params, ComputeOptions(dtype=dtype))


def _storage_dtype(dtype: str, float32_modules: Sequence[str]) -> Callable[[str], str]:
    return lambda name: "float32" if weights.in_modules(name, float32_modules) else dtype


def save_network(folder: Path, stem: str, network: Network, config: Mapping[str, Any]) -> None:
    """Write a network's weights and config to its folder.

    Args:
        folder: Its folder.
        stem: See `weights.read_tensors`.
        network: The network.
        config: The contents of `config.json`.
    """
    weights.save_tensors(folder / f"{stem}.safetensors", network.params)
    write_json(folder / "config.json", config)


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a JSON file, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return read_json(folder / name)
