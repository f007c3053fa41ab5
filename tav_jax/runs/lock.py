"""One process, or job of several, tunes a run at a time."""

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tav_jax.errors import InUseError
from tav_jax.files import own_temporaries
from tav_jax.parallel.processes import broadcast_from_main, is_main_process
from tav_jax.text import shorten

LOCK, HOLDER = ".lock", ".lock-holder"

# What file systems without locks answer.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


def is_empty(folder: Path) -> bool:
    """Tell whether a folder has nothing but what a killed process left of its first start."""
    return all(
        path.name in (LOCK, HOLDER) or path.name.startswith(".partial-")
        for path in folder.iterdir()
    )


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Keep other jobs from tuning the run in a folder during the block.

    The lock is the operating system's, and ends with its process, however that ends. Folders are
    created, and removed again if the block leaves them empty. A folder that has been put in the
    place of the locked one stays.

    Raises:
        InUseError: Another process has the lock.
    """
    files = (folder / HOLDER).absolute(), (folder / LOCK).absolute()
    # Without locks we warn; a file in their place would outlive a killed process.
    lock = FileLock(folder / LOCK, fallback_to_soft=False)
    created: list[Path] = []
    is_ours = True
    if is_main_process():
        created = _create(folder)
        is_ours = _acquire(lock, folder)
    try:
        if not broadcast_from_main([is_ours])[0]:
            raise InUseError(
                f"output_dir: {shorten(str(folder), 200)} is in use by another process"
                f"{_holder(folder)}; wait until it has ended, or name another output_dir"
            )
        if lock.is_locked:
            own_temporaries.update(files)
            with suppress(OSError):  # of a full disk, as will be said where it matters
                (folder / HOLDER).write_text(f"{socket.gethostname()}, process {os.getpid()}\n")
        yield
    finally:
        if lock.is_locked:
            # A folder without the lock's file is another, which the user has put there. An inode
            # number would not tell: it may be that of the removed folder.
            is_same = os.path.exists(files[1])
            # While the lock is held, or another process's would be removed.
            for file in files:
                with suppress(OSError):
                    file.unlink()
            own_temporaries.difference_update(files)
            lock.release()
            for path in created if is_same else ():
                with suppress(OSError):  # not empty
                    path.rmdir()


def _create(folder: Path) -> list[Path]:
    """Create a folder, and return what has been created, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _acquire(lock: FileLock, folder: Path) -> bool:
    try:
        lock.acquire(blocking=False)
    except (Timeout, FileNotFoundError):  # or it has just removed the folder that it created
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        (folder / LOCK).unlink(missing_ok=True)
        warnings.warn(
            f"{folder}: its file system has no locks; let no other process tune this run",
            stacklevel=2,
        )
    return True


def _holder(folder: Path) -> str:
    try:
        return f" ({shorten((folder / HOLDER).read_text(), 100)})"
    except (OSError, ValueError):
        return ""
