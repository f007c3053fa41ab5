"""Find the folder of a model: a path, a shipped model, or a Hub id."""

from pathlib import Path

from tav_jax.errors import MissingFileError
from tav_jax.pretrained import weights

WEIGHT_STEMS = {
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
}

# Models that come with this package, by name.
SHIPPED = {"tiny-scenes": Path(__file__).parents[1] / "worlds/tiny_scenes/weights"}


def find_folder(
    pretrained_model_path: str | Path, *, revision: str | None = None, variant: str | None = None
) -> Path:
    """Return the folder of a path, of a shipped model's name, or of a Hub id, downloaded once.

    Of each network only the weight files that would be read are fetched.
    """
    folder = Path(pretrained_model_path).expanduser()
    if folder.is_dir():
        return folder
    if str(pretrained_model_path) in SHIPPED:
        return SHIPPED[str(pretrained_model_path)]
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo = str(pretrained_model_path)
    nowhere = f"pretrained_model_path: no folder '{repo}', nor such a model on the Hub"
    try:
        names = HfApi().list_repo_files(repo, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise MissingFileError(f"{nowhere}: {_first_line(error)}") from None
    except Exception as error:  # no network, which each version of the client says in its own way
        cached = try_to_load_from_cache(repo, "model_index.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent
        raise MissingFileError(f"{nowhere}'s cache: {_first_line(error)}") from None

    wanted = [name for name in names if name.endswith(".json") or name.startswith("tokenizer/")]
    for part, stem in WEIGHT_STEMS.items():
        inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        chosen = weights.choose_weights(inside, stem, variant)
        if chosen is not None:
            wanted.append(f"{part}/{chosen}")
        if chosen is not None and chosen.endswith(".json"):
            index = hf_hub_download(repo, f"{part}/{chosen}", revision=revision)
            wanted += [f"{part}/{name}" for name in weights.shard_names(Path(index))]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
