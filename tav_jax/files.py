"""Files that appear whole, and claims on files that several processes might write.

A claim is a lock of the operating system (flock, by way of filelock) on a hidden file beside the
one that is claimed. It ends with the process that has it, however that ends, so that nobody waits
for a lease to run out and no clocks are compared. It reaches as far as flock does: over one host,
and over hosts whose shared file system hands it on (NFS 4, Lustre mounted with `flock`, CephFS),
not over object stores. Where there is no flock, filelock warns and takes a file's existence for the
lock; the claim of a process that died on another host then stays until that file is removed.
"""

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

POLL = 0.2  # seconds between two looks at a claim that is waited for


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Return a path to write to, and puts it in the place of `path` once that has succeeded.

    Nobody reads half a file, and each writer has a path of its own: of several at once the last
    one's file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stem, suffix = _partial_stem(path), path.suffix.lower()  # encoders go by the suffix
    partial = path.with_name(f"{stem}{secrets.token_hex(4)}{suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(path: Path) -> None:
    """Remove what writers of `path` left when they were killed; nobody may be writing it."""
    for partial in path.parent.glob(f"{_partial_stem(path)}*"):
        partial.unlink(missing_ok=True)


def _partial_stem(path: Path) -> str:
    # A digest, since a name that is as long as a file system takes could not be added to.
    return f".partial-{hashlib.sha256(path.name.encode()).hexdigest()[:16]}-"


@contextmanager
def claim(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Keep other processes from claiming `path`; tells whether that was granted.

    Whoever is granted it must look whether the file is there by now: the one before may have
    written it. It may not be granted if another process has it and `wait` is false, or if that one
    is done this very moment.
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
    """Remove the lock of a file that is there, as the end of a claim does, or a kill did not.

    Without the file it stays: two processes could come to hold two locks of one name, one of them
    removed. With it they do so for nothing, since whoever is granted a claim looks first.
    """
    if path.exists():
        _lock_path(path).unlink(missing_ok=True)


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def first_unwritable_parent(path: Path) -> Path | None:
    """Return what keeps a file or folder from being created at `path`: None, if it can be."""
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    return None if nearest.is_dir() and os.access(nearest, os.W_OK) else nearest
