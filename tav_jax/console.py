"""What all command lines share: how they speak, and how they end."""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from tav_jax.errors import UserError, is_machine_error
from tav_jax.parallel import processes as distributed

Main = Callable[[Sequence[str] | None], None]


def say(text: str) -> None:
    """Prints a line without tearing a progress bar; of several processes the main one does."""
    if distributed.is_main_process():
        tqdm.write(text)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)


def keep_compiled_programs() -> None:
    """Makes this process load what earlier ones compiled, from `~/.cache/tav_jax/compiled`.

    Whoever has set up JAX's own compilation cache keeps it as it is: JAX_COMPILATION_CACHE_DIR
    names another folder or, empty, none; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    chosen = jax.config.values["jax_compilation_cache_dir"]
    if chosen == "":
        # To JAX no name is a name too, and XLA would keep its choices of GPU kernels in the
        # current folder.
        jax.config.update("jax_compilation_cache_dir", None)
    if (
        chosen is not None
        or "JAX_COMPILATION_CACHE_DIR" in os.environ
        or not jax.config.values["jax_enable_compilation_cache"]
    ):
        return
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = caches / "tav_jax/compiled"
        # Programs are run as they lie there: nobody else may write to it.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a home that is read-only, or none
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Small programs too: a start has ninety of them, and all take two megabytes.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def command(main: Main) -> Callable[..., int]:
    """Returns a command line's main that gives an exit status.

    0: done. 1: something that the user can mend, said without a traceback (TAV_JAX_TRACEBACK=1
    brings it back). 130: interrupted. Any other exception is a fault of ours and ends in its
    traceback. Of several processes none waits for one that has ended so.
    """

    def run(argv: Sequence[str] | None) -> int:
        keep_compiled_programs()
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show_warning
            try:
                main(argv)
            except (UserError, OSError) as error:
                expected = isinstance(error, UserError) or is_machine_error(error)
                if not expected or os.environ.get("TAV_JAX_TRACEBACK"):
                    raise
                print(f"error: {error}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                return 130
            return 0

    @functools.wraps(main)
    def run_together(argv: Sequence[str] | None = None) -> int:
        return distributed.exit_together(lambda: run(argv))

    return run_together
