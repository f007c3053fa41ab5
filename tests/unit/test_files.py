"""Files that appear whole, and claims that end with the process that has them."""

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest

from tav_jax.files import (
    atomic_write,
    claim,
    first_unwritable_parent,
    keep_json_lines,
    remove_lock,
    remove_own_temporaries,
    remove_partials,
)

HOLDER = """
import sys, time
from pathlib import Path
from tav_jax.files import claim, atomic_write
path = Path(sys.argv[1])
with claim(path) as ours, atomic_write(path) as partial:
    partial.write_text("half")
    print(ours, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has claimed `a file` and is writing it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "a file"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate(timeout=600)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_the_claim_of_a_living_process_holds_and_that_of_a_dead_one_is_free(holder, tmp_path):
    path = tmp_path / "a file"
    with claim(path, wait=False) as ours:
        assert not ours
    with claim(tmp_path / "another", wait=False) as ours:
        assert ours, "claims are for each file alone"

    holder.kill()
    with claim(path) as ours:
        assert ours
        # What it had half written went with its claim.
        assert names(tmp_path) == {".a file.lock", ".another.lock"}
        path.write_text("whole")
    assert names(tmp_path) == {"a file", ".another.lock"}, "nothing is left of a finished file"


def test_a_claim_within_a_process_keeps_the_same_process_out(tmp_path):
    with claim(tmp_path / "a", wait=False) as first:
        with claim(tmp_path / "a", wait=False) as second:
            assert (first, second) == (True, False)
        with claim(tmp_path / "a", wait=False) as third:
            assert not third, "who was refused has not released it"
    with claim(tmp_path / "a", wait=False) as again:
        assert again


def test_a_claim_ends_with_a_failure_and_its_lock_stays_for_those_who_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt), claim(tmp_path / "a"):
        raise KeyboardInterrupt
    assert names(tmp_path) == {".a.lock"}
    with claim(tmp_path / "a", wait=False) as ours:
        assert ours


def test_a_lock_that_a_kill_left_is_removed_once_its_file_is_there(tmp_path):
    (tmp_path / ".a.lock").touch()
    remove_lock(tmp_path / "a")
    assert names(tmp_path) == {".a.lock"}
    (tmp_path / "a").touch()
    remove_lock(tmp_path / "a")
    assert names(tmp_path) == {"a"}


def test_two_writers_at_once_leave_the_whole_file_of_the_last(tmp_path):
    path = tmp_path / "new" / "a.json"
    with atomic_write(path) as first:
        first.write_text("first")
        with atomic_write(path) as second:
            assert second != first
            assert second.suffix == first.suffix == ".json"
            second.write_text("second")
        assert path.read_text() == "second"
        assert first.read_text() == "first", "untouched by the other's end"
    assert path.read_text() == "first"
    assert names(path.parent) == {"a.json"}


def test_a_name_as_long_as_the_file_system_takes_can_be_written(tmp_path):
    path = tmp_path / ("a" * (os.pathconf(tmp_path, "PC_NAME_MAX") - 4) + ".mp4")
    with atomic_write(path) as partial:
        partial.write_text("whole")
    assert path.read_text() == "whole"


def test_what_a_dead_process_was_writing_is_removed_and_nothing_else(holder, tmp_path):
    others = {".partial-mine", ".partial-0123456789abcdef-mine", "partial-a.mp4"}
    for name in others:
        (tmp_path / name).touch()
    (partial_of_holder,) = names(tmp_path) - others - {".a file.lock"}
    with atomic_write(tmp_path / "a.b.mp4") as mine:
        mine.write_text("half")
        remove_partials(tmp_path)
        assert names(tmp_path) == others | {".a file.lock", partial_of_holder, mine.name}
        holder.kill()
        holder.wait(timeout=600)
        remove_partials(tmp_path)
        assert names(tmp_path) == others | {".a file.lock", mine.name}
    assert (tmp_path / "a.b.mp4").read_text() == "half"
    remove_partials(tmp_path / "not there")


def test_without_locks_nothing_is_removed(holder, tmp_path, monkeypatch):
    before = names(tmp_path)
    holder.kill()
    holder.wait(timeout=600)

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    remove_partials(tmp_path)
    assert names(tmp_path) == before
    with atomic_write(tmp_path / "b") as partial:
        partial.write_text("whole")
    assert (tmp_path / "b").read_text() == "whole"


def test_a_process_that_ends_at_once_leaves_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tav_jax.files._creating", threading.Lock())  # which stays locked
    writer = atomic_write(tmp_path / "a")
    writer.__enter__().write_text("half")
    remove_own_temporaries()
    assert names(tmp_path) == set()
    with pytest.raises(FileNotFoundError):
        writer.__exit__(None, None, None)
    late = threading.Thread(target=atomic_write(tmp_path / "b").__enter__, daemon=True)
    late.start()
    late.join(0.2)
    assert late.is_alive()
    assert names(tmp_path) == set()


def test_what_keeps_a_file_from_being_created_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.touch()
    assert first_unwritable_parent(tmp_path / "new/folder") is None
    assert first_unwritable_parent(tmp_path) is None
    assert first_unwritable_parent(file / "below") == file
    assert first_unwritable_parent(file.relative_to(tmp_path) / "new/folder") == file


def test_a_half_written_line_is_dropped_and_others_are_kept_as_asked(tmp_path):
    file = tmp_path / "lines.jsonl"
    assert keep_json_lines(file) == []
    assert not file.exists()
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert keep_json_lines(file) == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert keep_json_lines(file, lambda line: line["step"] != 2) == [{"step": 1}, {"step": 3}]
    assert file.read_text() == '{"step": 1}\n{"step": 3}\n'
