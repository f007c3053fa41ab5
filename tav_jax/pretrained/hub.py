"""Find the folder of a model: a path, a shipped model, a Hub id, or a whole model in one file."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

from tav_jax.errors import MissingFileError, UserError
from tav_jax.pretrained import single_file, weights
from tav_jax.reading import why_not_a_file
from tav_jax.text import shorten

# The stem of the names of weight files, by the folder of a network in a Stable Diffusion model.
WEIGHT_STEMS = {
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
}
# A CLIP model's files lie in no folder of their own.
CLIP_STEMS = {"": "model"}

# Models that come with this package, by name.
_WORLDS = Path(__file__).parents[1] / "worlds"
SHIPPED = {
    "tiny-figures": _WORLDS / "figures/weights",
    "tiny-scenes": _WORLDS / "tiny_scenes/weights",
}


def find_folder(
    path: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    option: str = "pretrained_model_path",
    stems: Mapping[str, str] = WEIGHT_STEMS,
    index: str = "model_index.json",
) -> Path:
    """Return the folder of a path, of a shipped model's name, or of a Hub id, downloaded once.

    Of each network only the weight files that would be read are fetched. A Stable Diffusion model
    in one file is converted, once.

    Args:
        path: The path, name or id.
        revision: Branch, tag or commit on the Hub.
        variant: Variant of the weight files.
        option: What messages call `path`.
        stems: Stems of the names of weight files, by the folder of their network.
        index: A file that every model of this kind has.
    """
    try:
        folder = Path(path).expanduser()
    except RuntimeError as error:
        raise MissingFileError(f"{option}: {path}: {error}") from None
    if folder.is_dir():
        return folder
    if folder.is_file() or why_not_a_file(folder) != "No such file":
        if problem := _why_no_model(folder, stems):
            raise UserError(f"{option}: {folder}: {problem}")
        return single_file.converted_folder(folder)
    if str(path) in SHIPPED:
        return SHIPPED[str(path)]
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo = str(path)
    nowhere = f"{option}: no folder '{shorten(repo, 200)}', nor such a model on the Hub"
    try:
        names = HfApi().list_repo_files(repo, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise MissingFileError(f"{nowhere}: {_first_line(error)}") from None
    except Exception as error:  # no network, which each version of the client says in its own way
        cached = try_to_load_from_cache(repo, index, revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent
        raise MissingFileError(f"{nowhere}'s cache: {_first_line(error)}") from None

    # CLIP's tokenizer may be merges.txt beside the JSON files, or in a folder of its own.
    wanted = [
        name
        for name in names
        if name.endswith(".json") or name == "merges.txt" or name.startswith("tokenizer/")
    ]
    for part, stem in stems.items():
        start = f"{part}/" if part else ""
        inside = [name.removeprefix(start) for name in names if name.startswith(start)]
        chosen = weights.choose_weights(inside, stem, variant)
        if chosen is not None:
            wanted.append(f"{start}{chosen}")
        if chosen is not None and chosen.endswith(".json"):
            shards = hf_hub_download(repo, f"{start}{chosen}", revision=revision)
            wanted += [f"{start}{name}" for name in weights.shard_names(Path(shards))]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))


def _why_no_model(path: Path, stems: Mapping[str, str]) -> str | None:
    """Return why a file is no Stable Diffusion model in one file, or None if it seems to be one."""
    if problem := why_not_a_file(path):
        return problem
    suffix = path.suffix.lower()
    kind: str | None = "a file of another kind"
    if suffix == ".safetensors":
        try:
            kind = single_file.describe_file(path)
        except UserError as error:
            return str(error).removeprefix(f"{path}: ")
    elif suffix == ".ckpt":
        if not zipfile.is_zipfile(path):
            return "no checkpoint of PyTorch 1.6 or later, or cut off"
        kind = None
    elif suffix in (".pt", ".pth", ".bin"):
        kind = "a pickled checkpoint"
    if stems is WEIGHT_STEMS and kind is None:
        return None
    return (
        f"{kind or 'a Stable Diffusion model'} in one file; a folder in the Hub's layout is needed"
    )


def _first_line(error: Exception) -> str:
    return shorten(str(error).strip().split("\n")[0], 200)
