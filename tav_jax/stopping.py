"""Stop a command on SIGTERM, SIGHUP or Ctrl-C without losing what it has computed.

The first signal asks the command to stop, a second one ends it at once. The exit status is 128 plus
the number of the first signal.

Python runs handlers of signals between its own instructions only, and the main thread may be
inside XLA for minutes. So handlers do nothing, and a thread reads the signals from a pipe
(`signal.set_wakeup_fd`). An exception from a handler could also end up in a callback of JAX, which
would print and forget it.

`when_stopped` says what there is to be done before the process ends. By default that is nothing.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import jax

from tav_jax.files import remove_own_temporaries
from tav_jax.parallel import processes as distributed
from tav_jax.text import printable

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# A closed terminal and a batch system may send the same request twice, or SIGHUP beside SIGTERM.
SECONDS_OF_ONE_REQUEST = 1.0
SECONDS_TO_FLUSH = 1.0
SECONDS_BETWEEN_LOOKS = 0.5  # whether another process of the job was asked to stop
SECONDS_FOR_OTHERS = 10.0  # that a process waits for the others, so that all end by themselves

Finish = Callable[[], str]


class Stopped(BaseException):
    """The command has been asked to stop and has saved what there is to be saved."""

    def __init__(self, number: int, what_happened: str):
        super().__init__(what_happened)
        self.number = number


_lock = threading.Lock()  # guards what follows
_number = 0  # of the first signal
_is_ending = False  # a thread is about to end the process
_finish: Finish | None = None
_is_over = threading.Event()  # the command has ended
_advice = ""


def _say_interrupted() -> str:
    return f"interrupted{_advice}"


def advise(text: str) -> None:
    """Set what the line says that a stopped command prints, if there was nothing to save."""
    global _advice
    _advice = f"; {text}"


def received() -> int:
    """Return the number of the signal that asked this process to stop, or 0."""
    return _number


@contextmanager
def when_stopped(finish: Finish | None) -> Iterator[None]:
    """Set what is done if a signal arrives during the block, before the process ends.

    Args:
        finish: Is called in another thread, while the main thread goes on. It returns what has
            happened, as the line is to say. If it is None the block itself asks `received` now and
            then, saves, and raises `Stopped`.
    """
    outer = _set_finish(finish)
    try:
        yield
    except BaseException:
        if finish is None:
            _set_finish(outer, is_handled=True)
        else:
            _set_finish(outer)
        raise
    _set_finish(outer)


def _set_finish(finish: Finish | None, *, is_handled: bool = False) -> Finish | None:
    global _finish
    with _lock:
        outer, _finish = _finish, finish
        is_ending, was_asked = _is_ending, _number > 0
    if is_ending:
        threading.Event().wait()  # The other thread may be using what this one would change.
    if was_asked and finish is not None and not is_handled:
        _end_process(finish)
    return outer


def _ask_to_stop(number: int, finish: Finish | None) -> None:
    """Note a request to stop, and end the process in another thread if `finish` is given."""
    global _number, _is_ending
    with _lock:
        _number = _number or number
        begins = finish is not None and not _is_ending
        _is_ending = _is_ending or begins
    if begins:
        threading.Thread(target=_end_process, args=(finish,), daemon=True).start()


def _end_process(finish: Finish) -> NoReturn:
    number = _number
    try:
        distributed.tell_others_to_stop(number)
        what_happened = finish()
    except BaseException as error:
        what_happened = f"interrupted; what was not saved is lost: {error}".split("\n")[0]
    print_stopped(number, what_happened)
    remove_own_temporaries()
    distributed.wait_to_stop(SECONDS_FOR_OTHERS)
    _exit(128 + number)


def print_stopped(number: int, what_happened: str) -> None:
    """Print the line that a stopped command ends with. In a job, the main process prints it."""
    if distributed.is_main_process():
        line = printable(f"{signal.Signals(number).name}: {what_happened}")
        # Past Python's buffers, whose locks the main thread may hold.
        start = "\n" if os.isatty(2) else ""  # below a progress bar
        with suppress(OSError):
            os.write(2, f"{start}{line}\n".encode(errors="backslashreplace"))


def _exit(status: int) -> NoReturn:
    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()

    # A reader that has stopped reading must not keep the process from ending.
    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(SECONDS_TO_FLUSH)
    os._exit(status)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let signals stop the command that runs in the block.

    A signal that is ignored (`nohup`) or has a handler already keeps it. Nothing is done outside
    the main thread, which alone may have handlers.
    """
    global _number, _advice
    _is_over.clear()
    usual = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [
        number
        for number, handler in usual.items()
        if handler in (signal.SIG_DFL, signal.default_int_handler)
    ]
    if threading.current_thread() is not threading.main_thread() or not ours:
        yield
        return
    _number, _advice = 0, ""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    former = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in ours:
        signal.signal(number, _do_nothing)
    watcher = threading.Thread(target=_watch, args=(reading, ours), daemon=True)
    watcher.start()
    try:
        with when_stopped(_say_interrupted):
            yield
    finally:
        _is_over.set()
        for number in ours:
            signal.signal(number, usual[number])
        signal.set_wakeup_fd(former)
        os.close(writing)
        watcher.join()
        os.close(reading)


def _do_nothing(number: int, frame: Any) -> None:
    pass


def _watch(reading: int, ours: list[signal.Signals]) -> None:
    """Read the numbers of signals until the pipe's other end is closed."""
    asked_at = 0.0
    while received := os.read(reading, 1):
        number = received[0]
        if number not in ours:
            continue
        if not _number:
            asked_at = time.monotonic()
            _ask_to_stop(number, _finish)
        elif number == signal.SIGINT or time.monotonic() - asked_at > SECONDS_OF_ONE_REQUEST:
            _exit(128 + _number)


def start_job() -> None:
    """Connect the processes of this run, if there are several, and end when one of them ends.

    Raises:
        UserError: The environment describes a job incompletely; all problems are listed.
    """
    distributed.start()
    if jax.distributed.is_initialized():
        threading.Thread(target=_watch_others, daemon=True).start()


def _watch_others() -> None:
    while not _is_over.wait(SECONDS_BETWEEN_LOOKS):
        if number := distributed.told_to_stop():
            # That process does not compute any more, so this one cannot go on either.
            _ask_to_stop(number, _finish or _say_interrupted)
            return
