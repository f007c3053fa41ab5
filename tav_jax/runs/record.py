"""Read the config.yaml of a run, which is complete."""

from dataclasses import asdict
from pathlib import Path

from tav_jax.reading import read_text, read_yaml
from tav_jax.runs.config import (
    FIRST_LINE,
    TuneConfig,
    cut_off,
    load_config,
    parse_config,
)
from tav_jax.settings import flatten

# Keys that were added since the first runs. A file without FIRST_LINE was written before that line
# was, or by another program: it must have all other keys, the last of them on a whole line.
LATER_KEYS = ("attention", "log", "memory_limit_gb", "mesh", "validation_data.sampler")


def read_record(path: Path) -> TuneConfig:
    """Return the settings in a run's config.yaml.

    Raises:
        UserError: It is cut off, or not such a file. Missing keys never get default values, unless
            the run is older than the key.
    """
    text = read_text(path)
    if not text.startswith(f"{FIRST_LINE}\n"):
        tree = read_yaml(path, "config.yaml")
        there = flatten(tree) if isinstance(tree, dict) else {}
        missing = [name for name in _first_keys() if name not in there]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise cut_off(path, f"it lacks {', '.join(missing[:3])}{more}")
        if not text.endswith("\n"):
            raise cut_off(path, "its last line has no end")
    return load_config(path)[0]


def _first_keys() -> list[str]:
    """Return the keys that every run's config.yaml has."""
    data = {"video_path": "-", "prompt": ""}
    some = {"pretrained_model_path": "-", "output_dir": "-", "train_data": data}
    return [
        name
        for name in flatten(asdict(parse_config(some)))
        if name not in LATER_KEYS and name.split(".")[0] not in LATER_KEYS
    ]
