"""How commands end: errors of the user, bugs, and Ctrl-C wherever it arrives."""

import contextlib
import signal

import pytest

from tav_jax.console import command, raise_if_interrupted
from tav_jax.errors import MissingFileError, UserError
from tav_jax.progress import progress_bar


@pytest.fixture(autouse=True)
def usual_interrupts():
    """Ctrl-C as in a terminal, whatever the tests were started by."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def run(main):
    return command(lambda argv: main())([])


def interrupt():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("error", [UserError("a mistake"), MissingFileError("a mistake")])
def test_a_mistake_of_the_user_is_one_line(error, capsys):
    def main():
        raise error

    assert run(main) == 1
    assert capsys.readouterr().err == "error: a mistake\n"


@pytest.mark.parametrize("error", [OSError(28, "disk full"), PermissionError(13, "no")])
def test_what_the_machine_refuses_is_one_line(error, capsys):
    def main():
        raise error

    assert run(main) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("error", [ValueError, KeyError, OSError, ZeroDivisionError])
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error("a bug")

    with pytest.raises(error, match="a bug"):
        run(main)


def test_an_interrupt_ends_with_its_own_status(capsys):
    assert run(interrupt) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interrupt_that_comes_out_as_another_exception_is_an_interrupt(capsys):
    def main():
        try:
            interrupt()
        except KeyboardInterrupt:
            raise RuntimeError("INTERNAL: a callback failed") from None

    assert run(main) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interrupt_that_was_swallowed_ends_the_next_step(capsys):
    steps = []

    def main():
        # As Python does with what a garbage collector's callback raises.
        with contextlib.suppress(KeyboardInterrupt):
            interrupt()
        for step in range(10):
            raise_if_interrupted()
            steps.append(step)

    assert run(main) == 130
    assert steps == []
    assert capsys.readouterr().err == "interrupted\n"


def test_a_log_file_gets_whole_lines_of_progress_and_not_too_many(capsys, monkeypatch):
    clock = iter([0.0, 29.0, 31.0, 31.0, 40.0, 99.0])
    monkeypatch.setattr("tav_jax.progress.time.monotonic", lambda: next(clock))
    with progress_bar("tuning", total=5, initial=1) as bar:
        for _ in range(4):
            bar.update(1)
    # Nothing before 30 seconds have passed, and nothing at the end, of which another line tells.
    assert capsys.readouterr().err == "tuning: 3 of 5\n"


def test_an_interrupt_is_forgotten_with_its_command():
    assert run(interrupt) == 130
    assert run(raise_if_interrupted) == 0
