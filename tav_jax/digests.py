"""SHA-256 digests of a folder's files, so that what has changed since is noticed.

They are in the folder's `digests.json`. A folder without it, as earlier versions wrote them, is
unverified, which is not damaged.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tav_jax.errors import UserError
from tav_jax.files import sync
from tav_jax.reading import parse_json, read_text

DIGESTS = "digests.json"
# Bytes that are digested at once. After each this thread waits for its turn among Python's, for up
# to 5 ms: with small pieces it would take minutes while the main thread traces programs.
CHUNK = 2**25


def sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(CHUNK, max(1, path.stat().st_size))))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def write_folder_digests(folder: Path) -> None:
    """Write the size and digest of each file below a folder into its `digests.json`.

    All files and folders are then on the disk, too: a rename that follows survives a power cut.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    def describe(path: Path) -> dict[str, int | str]:
        sync(path)
        return {"bytes": path.stat().st_size, "sha256": sha256(path)}

    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        entries = list(pool.map(describe, files))
    names = [path.relative_to(folder).as_posix() for path in files]
    record = folder / DIGESTS
    record.write_text(_render(dict(zip(names, entries, strict=True))), encoding="utf-8")
    sync(record)
    for below in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync(below)


def has_digests(folder: Path) -> bool:
    """Tell whether a folder's files have digests."""
    return (folder / DIGESTS).exists()


def folder_damage(folder: Path, item: str | None = None) -> str | None:
    """Return which files of a folder are not as they were written, or None.

    Args:
        folder: The folder with `digests.json`.
        item: Check the files directly in the folder and those of this folder in it only.
    """
    record = folder / DIGESTS
    try:
        text = read_text(record)
        files = parse_json(text, DIGESTS)["files"]
        if text != _render(files):
            raise ValueError
        checked = {
            folder / name: entry
            for name, entry in files.items()
            if item is None or "/" not in name or name.startswith(f"{item}/")
        }
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(_difference, checked, checked.values()))
    except (UserError, OSError, LookupError, TypeError, ValueError, AttributeError):
        return f"{DIGESTS} is damaged"
    wrong = [
        f"{path.relative_to(folder).as_posix()} {difference}"
        for path, difference in zip(checked, found, strict=True)
        if difference
    ]
    return _some(wrong) if wrong else None


def _difference(path: Path, entry: dict) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"has {size:,} bytes instead of {entry['bytes']:,}"
        return None if sha256(path) == entry["sha256"] else "has another SHA-256 digest"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _render(files: dict[str, dict]) -> str:
    # With a digest of its own, so that a damaged record is told from damaged files.
    own = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, indent=1) + "\n"


def _some(wrong: list[str]) -> str:
    return wrong[0] if len(wrong) == 1 else f"{wrong[0]}, and {len(wrong) - 1} more files"
