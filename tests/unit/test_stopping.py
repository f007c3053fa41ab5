"""What a signal does to a command, whatever its main thread is in."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tav_jax.console import command
from tav_jax.stopping import SIGNALS, stop_on_signals

PROGRAM = """
import gc, os, signal, sys, time
# What starts the tests may have them ignored.
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
if "NOHUP" in os.environ:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from pathlib import Path
import jax
from tav_jax.console import command
from tav_jax.stopping import Stopped, advise, received, when_stopped

forever = jax.jit(lambda x: jax.lax.while_loop(lambda x: x >= 0, lambda x: (x + 1) % 7, x))

def ready():
    print("ready", flush=True)

def compute():
    program = forever.lower(1).compile()
    ready()
    jax.block_until_ready(program(1))

def compile_all_the_time():
    for n in range(1000):
        def program(x):
            for _ in range(2000):
                x = jax.numpy.sin(x @ x + n)
            return x
        lowered = jax.jit(program).lower(jax.numpy.ones((8, 8)))
        if n == 0:
            ready()
        lowered.compile()

def collect_garbage():
    ready()
    while True:
        gc.collect()  # which calls back into JAX

def save_nothing():
    raise OSError(28, "No space left on device", "checkpoints/3")

@command
def main(argv):
    action = sys.argv[1]
    advise("the same command goes on")
    if action == "compute":
        compute()
    if action == "compile":
        compile_all_the_time()
    if action == "collect garbage":
        collect_garbage()
    if action == "sleep":
        ready()
        time.sleep(600)
    if action == "full pipe":
        ready()
        while True:
            sys.stdout.write("x" * 1000)
    if action == "saving":
        with when_stopped(lambda: f"saved {Path('file').write_text('saved')} bytes"):
            compute()
    if action == "saving fails":
        with when_stopped(save_nothing):
            compute()
    if action == "saving takes long":
        def save():
            print("saving", flush=True)
            time.sleep(600)
        with when_stopped(save):
            compute()
    if action == "leaving the block":
        def save():
            Path("file").write_text("begun")
            print("saving", flush=True)
            time.sleep(1)
            Path("file").write_text("saved")
            return "saved"
        with when_stopped(save):
            ready()
            while not Path("file").exists():
                time.sleep(0.001)
        Path("file").unlink()  # as a step would destroy the state that is being saved
    if action == "polling":
        with when_stopped(None):
            ready()
            while not received():
                gc.collect()
            raise Stopped(received(), "saved step 3")
    if action == "polling, then saving":
        with when_stopped(None):
            ready()
            while not received():
                gc.collect()
            with when_stopped(lambda: "saved in time"):
                Path("file").write_text("went on")
    if action == "polling no more":
        with when_stopped(None):
            ready()
            while not received():
                gc.collect()
        Path("file").write_text("went on")
    if action == "polling, in a step":
        with when_stopped(None):
            compute()

sys.exit(main())
"""


@pytest.fixture
def start(tmp_path):
    """Starts the program and waits until it is at work."""
    (tmp_path / "program.py").write_text(PROGRAM)
    started = []

    def run(action, **variables):
        process = subprocess.Popen(
            [sys.executable, "program.py", action],
            cwd=tmp_path,
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
            | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate(timeout=600)


def ended(process):
    """Returns the exit status and what it said to stderr."""
    _, err = process.communicate(timeout=300)
    return process.returncode, err


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("action", ["compute", "compile", "collect garbage", "sleep"])
def test_a_signal_ends_a_command_wherever_it_is(start, action, number):
    process = start(action)
    process.send_signal(number)
    line = f"{number.name}: interrupted; the same command goes on\n"
    assert ended(process) == (128 + number, line)


def test_a_reader_that_does_not_read_keeps_no_command_from_ending(start):
    process = start("full pipe")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143


def test_something_is_saved_while_the_main_thread_computes(start, tmp_path):
    process = start("saving")
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "SIGTERM: saved 5 bytes\n")
    assert (tmp_path / "file").read_text() == "saved"


def test_what_cannot_be_saved_is_said(start):
    process = start("saving fails")
    process.send_signal(signal.SIGTERM)
    status, err = ended(process)
    assert status == 143
    assert err.startswith("SIGTERM: interrupted; what was not saved is lost: ")
    assert "No space left on device" in err
    assert err.count("\n") == 1


def test_the_main_thread_changes_nothing_that_is_being_saved(start, tmp_path):
    process = start("leaving the block")
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "saving\n"
    assert ended(process) == (129, "SIGHUP: saved\n")
    assert (tmp_path / "file").read_text() == "saved"


@pytest.mark.parametrize(
    ("action", "line"),
    [
        ("polling", "saved step 3"),
        ("polling, then saving", "saved in time"),
        ("polling no more", "interrupted; the same command goes on"),
    ],
)
def test_a_loop_that_asks_is_not_cut_off(start, action, line, tmp_path):
    process = start(action)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, f"SIGINT: {line}\n")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("second", SIGNALS, ids=lambda number: number.name)
def test_a_second_signal_ends_a_step_and_a_save_at_once(start, second):
    process = start("saving takes long")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    while process.poll() is None:  # those of the first second count as the first
        process.send_signal(second)
        threading.Event().wait(0.2)
    assert ended(process) == (143, "")


def test_a_second_interrupt_ends_a_step_at_once(start):
    process = start("polling, in a step")
    process.send_signal(signal.SIGINT)
    while process.poll() is None:  # two that arrive at once are one to the system
        process.send_signal(signal.SIGINT)
        threading.Event().wait(0.05)
    assert ended(process) == (130, "")


def test_a_terminal_that_closes_may_say_so_twice(start):
    process = start("leaving the block")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    status, err = ended(process)
    assert status in (129, 143)  # the system delivers the lower number first if both wait
    assert err.endswith(": saved\n")


def test_nohup_stays_in_force(start):
    process = start("sleep", NOHUP="1")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    status, err = ended(process)
    assert (status, err.split(":")[0]) == (143, "SIGTERM")


@pytest.mark.quick
def test_handlers_are_put_back():
    def state():
        pipe = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(pipe)
        return pipe, [signal.getsignal(number) for number in SIGNALS], threading.active_count()

    def fail(argv):
        raise ValueError("a bug")

    before = state()
    for main in (lambda argv: None, lambda argv: sys.exit(2)):
        with contextlib.suppress(SystemExit):
            command(main)([])
        assert state() == before
    with pytest.raises(ValueError, match="a bug"):
        command(fail)([])
    assert state() == before


@pytest.mark.quick
def test_a_handler_of_a_program_that_runs_a_command_keeps_its_signal():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with stop_on_signals():
            signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.quick
def test_another_thread_runs_commands_without_handlers():
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(command(lambda argv: None)([])))
    thread.start()
    thread.join()
    assert statuses == [0]
