"""The CLIP networks of the metrics: where they are, and which files they are made of."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tav_jax.digests import sha256
from tav_jax.errors import MissingFileError, UserError
from tav_jax.pretrained.clip import CONFIG_NAME, Clip, load_clip


class Published(NamedTuple):
    """A published network.

    Args:
        repository: Its Hub id, or its folder if it is shipped.
        size: Of its weights, for a message.
        option: The option that names a folder for it.
        shape: Width, layers and patch size of its image encoder, by which it is known.
        processor: The Hub id of its tokenizer and preprocessing, if they are elsewhere.
    """

    repository: str
    size: str
    option: str
    shape: tuple[int, int, int]
    processor: str | None = None


# Trained on the drawn world of `tiny-figures` by `tav_jax.worlds.figures.train_scorer`. It knows
# that world only.
SHIPPED = Path(__file__).parents[1] / "worlds/figures/scorer"

NETWORKS = {
    "ViT-L/14": Published("openai/clip-vit-large-patch14", "1.7 GB", "--clip-l14", (1024, 24, 14)),
    "ViT-B/32": Published("openai/clip-vit-base-patch32", "0.6 GB", "--clip-b32", (768, 12, 32)),
    "PickScore": Published(
        "yuvalkirstain/PickScore_v1",
        "3.9 GB",
        "--pick-score",
        (1280, 32, 14),
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ),
    "figures": Published(str(SHIPPED), "1.1 MB", "", (96, 4, 8)),
}


class Located(NamedTuple):
    """A network that can be loaded: its name, a folder or a Hub id, and its processor's."""

    name: str
    path: str
    processor: str | None

    def load(self) -> Clip:
        """Load it.

        Raises:
            UserError: As `load_clip` does, or it is another network than its name says.
        """
        clip = load_clip(self.path, processor=self.processor)
        vision = clip.network.config.vision_config
        shape = (vision.hidden_size, vision.num_hidden_layers, vision.patch_size)
        published = NETWORKS[self.name]
        if shape != published.shape:
            what = "width {}, {} layers, patches of {} pixels".format
            raise UserError(
                f"{published.option}: {self.path} is not {self.name}: its image encoder has "
                f"{what(*shape)}; {self.name} has {what(*published.shape)}"
            )
        return clip

    def digest(self) -> str:
        """Return a digest of the files in its folder and its processor's."""
        digests = [
            f"{file.name} {sha256(file)}"
            for folder in filter(None, map(_folder_of, (self.path, self.processor)))
            for file in sorted(folder.iterdir())
            if file.suffix in (".json", ".txt", ".safetensors", ".bin")
        ]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def locate(name: str, given: Mapping[str, str], *, download: bool) -> Located:
    """Return where a network is. Nothing is downloaded here.

    Args:
        name: The network, a key of `NETWORKS`.
        given: Folders or Hub ids of networks, by their names, in place of the published ones.
        download: Whether `Located.load` may fetch it from the Hub.

    Raises:
        MissingFileError: It is not on this machine and may not be downloaded.
    """
    published = NETWORKS[name]
    if name in given:
        path = given[name]
        # PickScore's own folder has no processor; a folder with one is complete.
        complete = published.processor is None or (Path(path) / "tokenizer_config.json").exists()
        return Located(name, path, None if complete else published.processor)
    wanted = (published.repository, published.processor)
    if not download and any(_folder_of(one) is None for one in wanted if one):
        raise MissingFileError(
            f"{published.repository} ({published.size}) is not on this machine: --download fetches "
            f"it, {published.option} names a folder"
        )
    return Located(name, *wanted)


def locate_all(
    names: Iterable[str], given: Mapping[str, str], *, download: bool
) -> tuple[dict[str, Located], dict[str, str]]:
    """Return where networks are, by their names, and why others cannot be had.

    Args:
        names: The networks. One may be named repeatedly.
        given: See `locate`.
        download: See `locate`.
    """
    located, missing = {}, {}
    for name in dict.fromkeys(names):
        try:
            located[name] = locate(name, given, download=download)
        except UserError as error:
            missing[name] = str(error)
    return located, missing


def _folder_of(path: str | None) -> Path | None:
    """Return a folder, or that of a Hub id in the cache, or None if it is neither."""
    if path is None or Path(path).is_dir():
        return Path(path) if path else None
    from huggingface_hub import try_to_load_from_cache

    for file in (CONFIG_NAME, "preprocessor_config.json"):
        found = try_to_load_from_cache(path, file)
        if isinstance(found, str):
            return Path(found).parent
    return None
