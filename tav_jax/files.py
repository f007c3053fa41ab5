"""Atomic writes, and claims on files that several processes might write.

A claim is an operating system's lock (flock, through filelock) on a hidden file beside the claimed
one. It ends with its process, however that ends: there are no leases that expire, and no clocks to
compare. It works on one host, and on hosts that share a file system with flock (NFS 4, Lustre
mounted with `flock`, CephFS). It does not work on object stores. Without flock, filelock warns and
uses a file's existence as the lock. The claim of a process that died on another host then stays
until that file is removed.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tav_jax.errors import UserError, machine_errno
from tav_jax.reading import MOST_RECORD_BYTES, parse_json, read_text

POLL = 0.2  # seconds between two attempts to get a claim
PARTIALS = f".partial-{'[0-9a-f]' * 16}-{'[0-9a-f]' * 8}*"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and rename it to `path` if the block succeeds.

    So no reader ever sees half a file, not even after a power cut. If several processes write at
    once, the last one wins.

    Raises:
        UserError: The disk is full or refuses to be written.
    """
    with explain_refusal(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _creating:
            partial, descriptor = _locked_partial(path)
            own_temporaries.add(partial)
        try:
            yield partial
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
        finally:
            _remove(partial)
            own_temporaries.discard(partial)
            os.close(descriptor)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, which takes the place of `folder` if the block succeeds.

    What was there is removed when the new folder is complete.

    Raises:
        UserError: The disk is full or refuses to be written.
    """
    with explain_refusal(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(folder.parent)
        with _creating:
            partial, descriptor = _locked_partial(folder, is_folder=True)
            own_temporaries.add(partial)
        try:
            yield partial
            for path in (*partial.rglob("*"), partial):
                sync(path)
            former = partial.with_name(f"{partial.name}-former")
            if folder.exists():
                folder.rename(former)
            partial.rename(folder)
            sync(folder.parent)
            _remove(former)
        finally:
            _remove(partial)
            own_temporaries.discard(partial)
            os.close(descriptor)


# What this process removes when it is done, also if a signal ends it.
own_temporaries: set[Path] = set()
own_writers: set[subprocess.Popen] = set()  # programs that may be about to create such a file
_creating = threading.Lock()


def _locked_partial(path: Path, *, is_folder: bool = False) -> tuple[Path, int]:
    """Create a temporary file beside `path`; return it with a descriptor that has it locked.

    The lock ends with this process and tells `remove_partials` that the file is being written.
    """
    # A digest, because nothing can be added to a name of the file system's full length.
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    suffix = path.suffix.lower()  # encoders look at it
    while True:
        partial = path.with_name(f".partial-{name}-{secrets.token_hex(4)}{suffix}")
        if is_folder:
            partial.mkdir()
            descriptor = os.open(partial, os.O_RDONLY)
        else:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _lock(descriptor) is not False and partial.exists():
            return partial, descriptor
        os.close(descriptor)  # another process took it for a dead one's before it was locked


def _lock(descriptor: int) -> bool | None:
    """Lock an open file. Return whether nobody else has; None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_partials(folder: Path) -> None:
    """Remove temporary files and folders whose writers were killed, on whatever host.

    Where the file system has no locks, nothing is removed.
    """
    for partial in folder.glob(PARTIALS):
        try:
            descriptor = os.open(partial, os.O_RDONLY if partial.is_dir() else os.O_RDWR)
        except OSError:  # it is finished by now, or not ours to remove
            continue
        try:
            if _lock(descriptor):
                _remove(partial)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def remove_own_temporaries() -> None:
    """Remove the temporary files and locks of this process, and let it create no others.

    The process must end afterwards.
    """
    _creating.acquire()
    for writer in tuple(own_writers):
        writer.kill()
        writer.wait()
    for path in tuple(own_temporaries):
        _remove(path)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explain_refusal(path: Path, needed: int | None = None) -> Iterator[None]:
    """Say in one line why the operating system does not let `path` be written in the block.

    Args:
        path: What is written.
        needed: Bytes that it needs, if that is known.

    Raises:
        UserError: The disk is full or cannot be written to.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = machine_errno(error)
        named = error.filename if isinstance(error, OSError) else None
        if number is None or (named and Path(str(named)).parent != path.parent):
            raise  # no refusal, or that of another file, which the error names
        if number != errno.ENOSPC:
            raise UserError(
                f"{path}: cannot be written: {os.strerror(number)}; "
                "once that is mended the same command goes on"
            ) from error
        needs = f"it needs {megabytes(needed)}, " if needed else ""
        raise UserError(
            f"{path}: no space left on the disk: {needs}{megabytes(_free_bytes(path))} are free; "
            "once there is space the same command goes on"
        ) from error


def require_space(path: Path, needed: int) -> None:
    """Raise the operating system's error of a full disk if there is less space than `needed`."""
    # Some network file systems do not know their free space, and say 0.
    if 0 < _free_bytes(path) < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def megabytes(size: float) -> str:
    """Return a number of bytes for a message."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e6:.4f} MB"


def _free_bytes(path: Path) -> int:
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(nearest).free


def move_aside(path: Path) -> Path:
    """Rename a damaged file or folder, so that it can be written again; return the new path."""
    numbers = ("", *(f"-{number}" for number in range(2, 10_000)))
    aside = next(
        place
        for number in numbers
        if not (place := path.with_name(f"{path.name}.damaged{number}")).exists()
    )
    path.rename(aside)
    return aside


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
        with explain_refusal(aside), aside.open("a", encoding="utf-8") as file:
            file.writelines(damaged)
        warnings.warn(
            f"{path}: {len(damaged)} damaged lines were moved to {aside.name}", stacklevel=2
        )
    with atomic_write(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")
    return values


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
        remove_partials(path.parent)
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


def user_cache(name: str) -> Path | None:
    """Return a folder in the user's cache, created if need be, or None if there can be none.

    Nobody else may write to it, since what is read from there is trusted.
    """
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = caches / "tav_jax" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a home that is read-only, or none
        return None
    return folder if os.access(folder, os.W_OK) else None


def first_unwritable_parent(path: Path) -> Path | None:
    """Return the parent that keeps `path` from being created, or None if it can be created."""
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    return None if nearest.is_dir() and os.access(nearest, os.W_OK) else nearest
