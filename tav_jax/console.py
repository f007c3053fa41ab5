"""What all commands share: arguments, log lines, exit status, and the compilation cache."""

import argparse
import functools
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax
from tqdm import tqdm

from tav_jax.errors import UserError, is_machine_error
from tav_jax.parallel import processes as distributed
from tav_jax.text import printable, shorten

Main = Callable[[Sequence[str] | None], None]


def say(text: str) -> None:
    """Print a line above any progress bar. In a job of several processes the main one prints."""
    if distributed.is_main_process():
        tqdm.write(printable(text))


class Parser(argparse.ArgumentParser):
    """A parser of a command line whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong with the arguments, and end the process with status 2."""
        self.exit(2, f"error: {shorten(message, 400)}; --help shows the arguments\n")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    tqdm.write(printable(f"warning: {message}"), file=sys.stderr)


def _print_error(error: Exception) -> None:
    where, *problems = str(error).split("\n")
    if len(problems) == 1 and where.endswith(":"):  # a list of one problem
        where, problems = f"{where} {problems[0].strip()}", []
    print(printable("\n".join([f"error: {where}", *problems])), file=sys.stderr)


def _write_in_any_locale() -> None:
    """Let characters that the terminal's encoding lacks be printed as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def keep_compiled_programs() -> None:
    """Keep compiled programs in `~/.cache/tav_jax/compiled` and load those of earlier processes.

    A cache that the user has set up for JAX stays as it is: JAX_COMPILATION_CACHE_DIR names another
    folder or, if empty, none; JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.
    """
    chosen = jax.config.values["jax_compilation_cache_dir"]
    if chosen == "":
        # JAX takes an empty name for a name, and XLA would write its autotuning results into the
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
        # Cached programs are executed unchecked, so nobody else may write to the folder.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a home that is read-only, or none
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Small programs too: a start has ninety of them, two megabytes in all.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


_interrupted = threading.Event()


@contextmanager
def _noticing_interrupts() -> Iterator[None]:
    """Remember that Ctrl-C was pressed, besides raising KeyboardInterrupt.

    An interrupt that arrives within a call of JAX may come out as another exception, and one in a
    garbage collector's callback not at all.
    """
    _interrupted.clear()
    usual = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not (in_main_thread and usual is signal.default_int_handler):
        yield
        return

    def remember(number: int, frame: Any) -> None:
        _interrupted.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed and the exception got lost.

    Long loops call this between steps.
    """
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _end_interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return 130


def command(main: Main) -> Callable[..., int]:
    """Return a command's main function with an exit status.

    0: done. 1: a mistake that the user can mend, printed as one line (TAV_JAX_TRACEBACK=1 shows
    the traceback). 130: interrupted by Ctrl-C. Any other exception is a bug and shows its
    traceback. In a job of several processes an error of one ends the others too.
    """

    def run(argv: Sequence[str] | None) -> int:
        keep_compiled_programs()
        _write_in_any_locale()
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show_warning
            try:
                with _noticing_interrupts():
                    main(argv)
                    raise_if_interrupted()
            except KeyboardInterrupt:
                pass
            except Exception as error:
                if _interrupted.is_set():  # the interrupt came out as another exception
                    return _end_interrupted()
                expected = isinstance(error, UserError) or is_machine_error(error)
                if not expected or os.environ.get("TAV_JAX_TRACEBACK"):
                    raise
                _print_error(error)
                return 1
            else:
                return 0
            return _end_interrupted()

    @functools.wraps(main)
    def run_together(argv: Sequence[str] | None = None) -> int:
        return distributed.exit_together(lambda: run(argv))

    return run_together
