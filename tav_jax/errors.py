"""Errors that a user can mend. Everything else that is raised is a bug and shows a traceback."""

import errno
import re

# Conditions of the machine: a full or read-only disk, a quota, missing rights, a broken device.
MACHINE_ERRNOS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EFBIG,
        errno.EIO,
        errno.EMFILE,
        errno.ENAMETOOLONG,
        errno.ESTALE,
    }
)


class UserError(ValueError):
    """A mistake in what the user gave, with a message that says what to do.

    Commands print the message alone, without a traceback, and exit with status 1.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist, or lacks something it needs."""


class ExistingFileError(UserError, FileExistsError):
    """A file that the user did not ask to overwrite is in the way."""


class InUseError(UserError):
    """Another process is at work on the same thing."""


class DamagedError(UserError, RuntimeError):
    """Something that was written whole has changed since, or cannot be read."""


class MissingProcessError(UserError, TimeoutError):
    """Other processes of the job did not come to the same place in time."""


class NotLearningError(UserError, RuntimeError):
    """A run whose parameters do not move as they should, or whose loss is not a number."""


def is_machine_error(error: BaseException) -> bool:
    """Tell whether the operating system refused something for a reason outside the program."""
    return machine_errno(error) is not None


def machine_errno(error: BaseException) -> int | None:
    """Return the number of the operating system's refusal, or None if the error is no such thing.

    TensorStore, by which checkpoints are written, has the number in its message only.
    """
    if isinstance(error, OSError):
        number = error.errno
    elif found := re.search(r"os_error_code='(\d+)'|\[OS error (\d+)", str(error)):
        number = int(found[1] or found[2])
    else:
        return None
    return number if number in MACHINE_ERRNOS else None
