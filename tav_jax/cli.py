"""What all command lines share: how they speak, and how they end."""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from tav_jax.training import NotLearningError

Main = Callable[[Sequence[str] | None], None]


def say(text: str) -> None:
    """Prints a line without tearing a progress bar."""
    tqdm.write(text)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)


def command(main: Main) -> Callable[..., int]:
    """Returns a command line's main that gives an exit status.

    0: done. 1: something that the user can mend, said without a traceback (TAV_JAX_TRACEBACK=1
    brings it back). 130: interrupted. Any other exception is a fault of ours and ends in its
    traceback.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show_warning
            try:
                main(argv)
            except (ValueError, OSError, NotLearningError) as error:
                if os.environ.get("TAV_JAX_TRACEBACK"):
                    raise
                print(f"error: {error}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                return 130
            return 0

    return run
