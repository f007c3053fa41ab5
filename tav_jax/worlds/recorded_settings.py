"""The settings that a folder of results was made with."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tav_jax.errors import UserError
from tav_jax.files import atomic_write
from tav_jax.reading import read_json
from tav_jax.settings import parse


def differ_from_recorded(file: Path, settings: Any) -> bool:
    """Return whether a file holds other settings than these.

    The file is parsed, so a setting that it lacks has its default. A file written before the
    setting existed is therefore equal to settings that leave the default.

    Args:
        file: A JSON file written by `record_settings`. It may not exist.
        settings: A pydantic dataclass.
    """
    if not file.is_file():
        return False
    try:
        return parse(type(settings), read_json(file), str(file)) != settings
    except UserError:
        return True


def record_settings(file: Path, settings: Any) -> None:
    """Write settings, a pydantic dataclass, to a JSON file."""
    with atomic_write(file) as path:
        path.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
