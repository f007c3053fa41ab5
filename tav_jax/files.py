"""Atomic writes, and claims on files that several processes might write.

A claim is an operating system's lock (flock, through filelock) on a hidden file beside the claimed
one. It ends with its process, however that ends: there are no leases that expire, and no clocks to
compare. It works on one host, and on hosts that share a file system with flock (NFS 4, Lustre
mounted with `flock`, CephFS). It does not work on object stores. Without flock, filelock warns and
uses a file's existence as the lock. The claim of a process that died on another host then stays
until that file is removed.
"""

import errno
import hashlib
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tav_jax.errors import UserError
from tav_jax.reading import MOST_RECORD_BYTES, parse_json, read_text

POLL = 0.2  # seconds between two attempts to get a claim


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and rename it to `path` if the block succeeds.

    So no reader ever sees half a file. If several processes write at once, the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stem, suffix = _partial_stem(path), path.suffix.lower()  # encoders look at the suffix
    partial = path.with_name(f"{stem}{secrets.token_hex(4)}{suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def keep_json_lines(
    path: Path, keep: Callable[[dict[str, Any]], bool] = lambda value: True
) -> list[dict[str, Any]]:
    """Drop lines from a file of JSON objects, one a line, and return the objects of the others.

    A last line without a newline is dropped too: a killed process left it half-written. Any other
    line that is no object is moved to a file beside this one, with `.damaged` after its name.

    Args:
        path: The file. If it does not exist, nothing is written.
        keep: Tells whether to keep an object's line.

    Raises:
        UserError: The path is no file, or not UTF-8.
    """
    if not path.exists():
        return []
    complete = [f"{line}\n" for line in read_text(path, MOST_RECORD_BYTES).split("\n")[:-1]]
    kept, damaged, values = [], [], []
    for line in complete:
        try:
            value = parse_json(line, str(path))
            is_kept = keep(value)
        except (UserError, LookupError, TypeError, ValueError):
            damaged.append(line)
        else:
            if is_kept:
                kept.append(line)
                values.append(value)
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        with aside.open("a", encoding="utf-8") as file:
            file.writelines(damaged)
        warnings.warn(
            f"{path}: {len(damaged)} damaged lines were moved to {aside.name}", stacklevel=2
        )
    with atomic_write(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")
    return values


def remove_partials(path: Path) -> None:
    """Remove temporary files of killed writers of `path`. No other process may be writing it."""
    for partial in path.parent.glob(f"{_partial_stem(path)}*"):
        partial.unlink(missing_ok=True)


def _partial_stem(path: Path) -> str:
    # A digest, because nothing can be added to a name of the file system's full length.
    return f".partial-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


@contextmanager
def claim(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Keep other processes from claiming `path` during the block. Give True if that succeeded.

    Then look whether the file exists by now: the process that had the claim before may have written
    it. The claim fails if another process has it and `wait` is false, or if that process releases
    it at this very moment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_lock_path(path))
    try:
        lock.acquire(blocking=wait, poll_interval=POLL)
    except Timeout:
        yield False
        return
    except OSError as error:
        if error.errno != errno.ESTALE:  # so NFS says that the file has just been removed
            raise
        yield False
        return
    try:
        remove_partials(path)
        yield True
    finally:
        remove_lock(path)
        lock.release()


def remove_lock(path: Path) -> None:
    """Remove the lock file of `path` if `path` exists. A killed process may have left it.

    If `path` does not exist the lock file stays. Otherwise two processes could hold the claim at
    once: one on the removed lock file, one on a new one. If `path` exists that does no harm, since
    each looks for the file first.
    """
    if path.exists():
        _lock_path(path).unlink(missing_ok=True)


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def first_unwritable_parent(path: Path) -> Path | None:
    """Return the parent that keeps `path` from being created, or None if it can be created."""
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    return None if nearest.is_dir() and os.access(nearest, os.W_OK) else nearest
