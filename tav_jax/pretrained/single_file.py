"""Stable Diffusion models in one file, as trainers and model sites share them.

Their tensors have the names of the original release (LDM). diffusers knows how those of each
version are renamed, so it converts them, once, to a folder in the user's cache.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tav_jax.errors import MissingFileError, UserError
from tav_jax.files import atomic_folder, claim, require_space, user_cache
from tav_jax.pretrained.weights import Stored, parse_header
from tav_jax.reading import require_file
from tav_jax.text import one_line, printable

SUFFIXES = (".safetensors", ".ckpt")
INDEX_NAME = "model_index.json"
INCOMPLETE = "the file is incomplete or of another kind"

# What the names of a whole model's tensors begin with.
PARTS = {
    "U-Net": "model.diffusion_model.",
    "VAE": "first_stage_model.",
    "text encoder": "cond_stage_model.",
}
OTHER_MODELS = {
    "conditioner.embedders.": "an SDXL model, which Tune-A-Video's U-Net is not made for,",
    "double_blocks.": "a Flux model, which has no U-Net,",
    "joint_blocks.": "a Stable Diffusion 3 model, which has no U-Net,",
}
# What parts of names say about a file that is no whole model.
KINDS = {
    "lora": "a LoRA, which is added to a model,",
    "down_blocks.": "the U-Net or VAE alone",
    "text_model.": "a text encoder alone",
}


def describe_file(path: Path) -> str | None:
    """Return what a `.safetensors` file has in it, or None if it is a whole Stable Diffusion model.

    Raises:
        UserError: The file is damaged, or a whole model lacks parts.
    """
    header = parse_header(path)
    names = list(header)
    for start, kind in OTHER_MODELS.items():
        if any(start in name for name in names):
            return kind
    missing = [part for part, start in PARTS.items() if not _begins(names, start)]
    if not missing:
        return None
    if "U-Net" not in missing:
        starts = ", ".join(PARTS[part] for part in missing)
        raise UserError(
            f"{path}: a Stable Diffusion model without its {' and '.join(missing)} (no {starts}); "
            "download the file that has them"
        )
    for part, kind in KINDS.items():
        if any(part in name for name in names):
            return kind
    return "weights"


def _begins(names: Iterable[str], start: str) -> bool:
    return any(name.startswith(start) for name in names)


def converted_folder(path: Path) -> Path:
    """Return the folder of a whole model in one file, which is converted unless it was before.

    The folder is in the user's cache. It belongs to the file's path, size and time of writing.

    Raises:
        MissingFileError: The extra `interop` is not installed, or there is no cache.
        UserError: The model cannot be converted.
    """
    cache = user_cache("models")
    if cache is None:
        raise MissingFileError(
            f"{path}: there is no folder for the converted model (XDG_CACHE_HOME, ~/.cache); write "
            f"it with `python -m tav_jax.convert {path} --to diffusers FOLDER`"
        )
    stat = path.stat()
    identity = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    folder = cache / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if (folder / INDEX_NAME).is_file():
        return folder
    with claim(folder):
        if not (folder / INDEX_NAME).is_file():
            tqdm.write(printable(f"converting {path}, once, to {folder}"))
            convert_single_file(path, folder)
    return folder


def convert_single_file(path: Path, folder: Path) -> None:
    """Write a whole model in one file as a folder in the Hub's layout, in the file's own type.

    A folder that is there is replaced when the new one is complete. diffusers takes the configs and
    the tokenizer of the version that it recognises from the Hub, or from the Hub's cache.

    Raises:
        MissingFileError: The extra `interop` is not installed.
        UserError: diffusers cannot convert the file.
    """
    require_file(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a model in one file ends in {' or '.join(SUFFIXES)}")
    if path.suffix == ".safetensors" and (kind := describe_file(path)):
        raise UserError(f"{path}: {kind} in one file, not a whole Stable Diffusion model")
    torch = _import_pytorch(path)
    names, dtype = _tensor_names(path, torch), getattr(torch, _stored_type(path))
    with atomic_folder(folder) as partial, _quiet():
        require_space(folder, path.stat().st_size)
        pipeline = _read(path, dtype)
        _check_complete(path, names, pipeline)
        pipeline.save_pretrained(partial)


def _import_pytorch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise MissingFileError(
            f"{path}: to convert a model in one file, diffusers needs PyTorch: pip install "
            "'tav_jax[interop]'"
        ) from None
    return torch


def _read(path: Path, dtype: Any) -> Any:
    """Return diffusers' pipeline of the file."""
    from diffusers import StableDiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return StableDiffusionPipeline.from_single_file(
            str(path),
            torch_dtype=dtype,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"{path}: diffusers takes the model's configs and tokenizer from the Hub, once, and "
            f"cannot: {one_line(str(error), 200)}. Where there is a network: "
            "`hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --include '*.json' '*.txt'`"
        ) from None
    except Exception as error:  # of diffusers, PyTorch and transformers
        if "meta tensor" in str(error):  # where accelerate is installed
            raise UserError(f"{path}: it lacks tensors; {INCOMPLETE}") from None
        raise _refusal(path, error) from None


def _refusal(path: Path, reason: object) -> UserError:
    return UserError(f"{path}: diffusers cannot convert it: {one_line(str(reason))}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers and transformers from showing bars and warnings about types."""
    import diffusers.utils.logging as theirs
    import transformers.utils.logging as others

    before = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    others_before = others.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    others.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(before[0])
        if before[1]:
            theirs.enable_progress_bar()
        if others_before:
            others.enable_progress_bar()


def _tensor_names(path: Path, torch: Any) -> list[str]:
    if path.suffix == ".safetensors":
        return list(parse_header(path))
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive, or objects that are no tensors
        raise _refusal(path, error) from None
    return list(tensors.get("state_dict", tensors))


def _check_complete(path: Path, names: list[str], pipeline: Any) -> None:
    """Raise `UserError` if the file lacks tensors, for which diffusers silently keeps random ones.

    Names differ, but to each of the U-Net's and the VAE's tensors belongs one of the file.
    """
    inside = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    vae = tuple(PARTS["VAE"] + each for each in inside)
    for part, starts, network in (
        ("U-Net", (PARTS["U-Net"],), pipeline.unet),
        ("VAE", vae, pipeline.vae),
    ):
        there, needed = sum(name.startswith(starts) for name in names), len(network.state_dict())
        if there != needed:
            raise UserError(
                f"{path}: its {part} has {there} tensors, and {needed} in the version of Stable "
                f"Diffusion that diffusers takes it for; {INCOMPLETE}"
            )


def _stored_type(path: Path) -> str:
    """Return PyTorch's name of the type in which most of the model is stored."""
    if path.suffix != ".safetensors":
        return "float32"
    header: dict[str, Stored] = parse_header(path)
    types = [one.dtype for name, one in header.items() if name.startswith(PARTS["U-Net"])]
    return {"F16": "float16", "BF16": "bfloat16"}.get(max(types, key=types.count), "float32")
