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
from typing import Any, NoReturn

import jax
from tqdm import tqdm

from tav_jax.errors import UserError, is_machine_error
from tav_jax.files import user_cache
from tav_jax.parallel import processes as distributed
from tav_jax.stopping import Stopped, print_stopped, stop_on_signals
from tav_jax.text import printable, shorten

Main = Callable[[Sequence[str] | None], None]


def say(text: str) -> None:
    """Print a line above any progress bar. In a job of several processes the main one prints."""
    if distributed.is_main_process():
        tqdm.write(printable(text))


@contextmanager
def say_if_slow(text: str, seconds: float = 600) -> Iterator[None]:
    """Print a line if what is done meanwhile takes longer than so many seconds. It goes on."""
    timer = threading.Timer(seconds, say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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


class _Descriptor(io.FileIO):
    """Standard output or error. What is written after its reader has gone is dropped."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            return len(data)


@contextmanager
def _standard_streams() -> Iterator[None]:
    """Let work go on if nobody reads what it prints, in any locale, as in `| head -1`.

    Characters that the terminal's encoding lacks are printed as escapes.
    """
    usual = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in usual.items():
        if stream is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            if stream is getattr(sys, f"__{name}__"):
                stream.flush()
                raw = _Descriptor(stream.fileno(), "w", closefd=False)
                is_unbuffered = isinstance(stream.buffer, io.RawIOBase)
                descriptor = io.TextIOWrapper(
                    raw if is_unbuffered else io.BufferedWriter(raw),
                    encoding=stream.encoding,
                    errors="backslashreplace",
                    line_buffering=stream.line_buffering,
                    write_through=stream.write_through,
                )
                setattr(sys, name, descriptor)
    try:
        yield
    finally:
        for name, stream in usual.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


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
    if folder := user_cache("compiled"):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Small programs too: a start has ninety of them, two megabytes in all.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def command(main: Main) -> Callable[..., int]:
    """Return a command's main function with an exit status.

    0: done. 1: a mistake that the user can mend, printed as one line (TAV_JAX_TRACEBACK=1 shows
    the traceback). 129, 130, 143: stopped by SIGHUP, Ctrl-C or SIGTERM, see `tav_jax.stopping`. Any
    other exception is a bug and shows its traceback. In a job of several processes an error of one
    ends the others too.
    """

    def run(argv: Sequence[str] | None) -> int:
        keep_compiled_programs()
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            # A process that was killed has left half a program there. It is compiled again.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
            warnings.showwarning = _show_warning
            try:
                with stop_on_signals():
                    main(argv)
            except Stopped as stopped:
                print_stopped(stopped.number, str(stopped))
                return 128 + stopped.number
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                return 128 + signal.SIGINT
            except Exception as error:
                expected = isinstance(error, UserError) or is_machine_error(error)
                if not expected or os.environ.get("TAV_JAX_TRACEBACK"):
                    raise
                _print_error(error)
                return 1
            return 0

    @functools.wraps(main)
    def run_together(argv: Sequence[str] | None = None) -> int:
        with _standard_streams():
            return distributed.exit_together(lambda: run(argv))

    return run_together
