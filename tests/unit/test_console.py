"""How commands end: errors of the user, bugs, and output that nobody reads."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tav_jax.console import command, say_if_slow
from tav_jax.errors import MissingFileError, UserError
from tav_jax.progress import progress_bar


def run(main):
    return command(lambda argv: main())([])


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


def test_a_log_file_gets_whole_lines_of_progress_and_not_too_many(capsys, monkeypatch):
    clock = iter([0.0, 29.0, 31.0, 31.0, 40.0, 99.0])
    monkeypatch.setattr("tav_jax.progress.time.monotonic", lambda: next(clock))
    with progress_bar("tuning", total=5, initial=1) as bar:
        for _ in range(4):
            bar.update(1)
    # Nothing before 30 seconds have passed, and nothing at the end, of which another line tells.
    assert capsys.readouterr().err == "tuning: 3 of 5\n"


def test_work_that_takes_long_is_said_to_and_goes_on(capsys):
    said, deadline = "", time.monotonic() + 60
    with say_if_slow("it takes long", seconds=0.01):
        while not said and time.monotonic() < deadline:
            said = capsys.readouterr().out
            time.sleep(0.01)
    assert said == "it takes long\n"


def test_work_that_ends_in_time_is_not_said_to_take_long(capsys):
    before = set(threading.enumerate())
    with say_if_slow("it takes long"):
        (timer,) = set(threading.enumerate()) - before
    timer.join()
    assert not capsys.readouterr().out


LONG = """
import sys
from pathlib import Path
from tqdm import tqdm
from tav_jax.console import command, say
from tav_jax.errors import UserError
from tav_jax.progress import LineProgress

@command
def main(argv):
    for n in range(20_000):  # more than a pipe holds
        say(f"line {n} " + "x" * 50)
        print("error stream", n, file=sys.stderr)
    with LineProgress("work", total=1) as bar:
        bar.update(1)
    Path(sys.argv[1]).write_text("done")
    if sys.argv[2:] == ["fail"]:
        raise UserError("a mistake")

sys.exit(main())
"""


@pytest.mark.parametrize(
    ("redirection", "arguments", "status"),
    [
        pytest.param("| head -1", "", 0, id="stdout"),
        pytest.param("2>&1 | head -1", "", 0, id="both"),
        pytest.param("2>&1 >/dev/null | head -1", "", 0, id="stderr"),
        pytest.param(">&-", "", 0, id="no stdout"),
        pytest.param("2>&-", "", 0, id="no stderr"),
        pytest.param(">&- 2>&-", "", 0, id="neither"),
        pytest.param("2>&1 | head -1", "fail", 1, id="a mistake that nobody reads"),
    ],
)
def test_work_goes_on_when_nobody_reads_what_it_prints(redirection, arguments, status, tmp_path):
    (tmp_path / "program.py").write_text(LONG)
    command = f"$PYTHON program.py file {arguments} {redirection}; echo ${{PIPESTATUS[0]}} >status"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (tmp_path / "file").read_text() == "done"
    assert (tmp_path / "status").read_text() == f"{status}\n"
    for text in ("Traceback", "BrokenPipe", "Exception ignored"):
        assert text not in done.stdout + done.stderr


PRINTS = """
import sys
from tav_jax.console import command
from tav_jax.errors import UserError

def main(argv):
    print("一 ü я")
    raise UserError("一 ü я")

sys.exit(command(main)([]))
"""


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", r"\u4e00 \xfc \u044f"),
        ("latin-1", r"\u4e00 ü \u044f"),
        ("koi8-r", r"\u4e00 \xfc я"),
        ("gbk", r"一 ü я"),
        ("utf-8", "一 ü я"),
    ],
)
def test_characters_that_a_terminal_lacks_are_printed_as_escapes(encoding, expected):
    done = subprocess.run(
        [sys.executable, "-c", PRINTS],
        env=os.environ
        | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        timeout=600,
    )
    assert done.stdout.decode(encoding) == f"{expected}\n"
    assert done.stderr.decode(encoding) == f"error: {expected}\n"
    assert done.returncode == 1


def test_the_standard_streams_are_put_back():
    before = sys.stdout, sys.stderr
    assert run(lambda: print("something")) == 0
    assert (sys.stdout, sys.stderr) == before
