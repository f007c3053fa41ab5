"""One process tunes a run at a time."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tav_jax.errors import UserError
from tav_jax.runs.lock import lock_run

HOLD = """
import sys
from pathlib import Path
from tav_jax.runs.lock import lock_run

with lock_run(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Starts a process that has the lock of a folder until its input ends."""
    processes = []

    def start(folder: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        processes.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=600)


def test_a_run_that_another_process_tunes_is_refused_with_its_host_and_number(hold, tmp_path):
    other = hold(tmp_path / "run")
    with pytest.raises(UserError) as refused, lock_run(tmp_path / "run"):
        pass
    [line] = str(refused.value).splitlines()
    assert f"{tmp_path / 'run'} is in use by another process" in line
    assert f"process {other.pid})" in line
    other.communicate(timeout=600)
    assert not (tmp_path / "run").exists(), "nothing was written to it"
    with lock_run(tmp_path / "run"):
        pass


def test_a_lock_ends_with_its_process_and_leaves_no_run_that_is_in_the_way(hold, tmp_path):
    other = hold(tmp_path / "run")
    other.send_signal(signal.SIGKILL)
    other.wait(timeout=600)
    with lock_run(tmp_path / "run"):
        (tmp_path / "run/config.yaml").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_lock_leaves_the_folders_that_were_there_and_no_other(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(KeyError), lock_run(tmp_path / "runs/a/b"):
        raise KeyError
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]


@pytest.mark.parametrize("replaced", ["a/b", "a"])
@pytest.mark.parametrize("remove", [shutil.rmtree, lambda path: path.rename(f"{path} moved")])
def test_an_empty_folder_in_the_place_of_the_locked_one_stays(remove, replaced, tmp_path):
    with lock_run(tmp_path / "a/b"):
        remove(tmp_path / replaced)
        (tmp_path / replaced).mkdir()
    assert list((tmp_path / replaced).iterdir()) == []


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gets_a_warning_and_no_stray_file(error, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="file ?system"), lock_run(tmp_path / "run"):
        (tmp_path / "run/config.yaml").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
