"""A few inputs of each kind that `fuzz.py` makes. Run as a program it makes many."""

import subprocess
import sys

import fuzz
import pytest


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_random_inputs_are_read_or_refused(target, capsys):
    cases = {"video": 150, "weights": 40, "json": 40}.get(target, 300)
    status = fuzz.main(["--target", target, "--cases", str(cases), "--minutes", "10"])
    out = capsys.readouterr().out
    assert f"{target}: {cases} cases" in out
    assert status == 0, out


FOUND = sorted((fuzz.ROOT / "tests/campaign/found").iterdir())


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
@pytest.mark.parametrize("sampling", ["rate", "uniform"])
def test_a_clip_that_was_found_once_is_read_or_refused(path, sampling):
    """In a process of its own: the first of these made FFmpeg wait for ever, others take memory."""
    code = (
        "import sys, fuzz; from tav_jax import UserError, read_frames\n"
        "before = fuzz.memory('VmRSS')\n"
        "try: read_frames(sys.argv[1], n_sample_frames=4, width=32, height=32, "
        "sampling=sys.argv[2])\nexcept UserError: pass\n"
        "assert fuzz.memory('VmHWM') - before < fuzz.MOST_MEMORY"
    )
    command = [sys.executable, "-c", code, path, sampling]
    subprocess.run(command, timeout=300, check=True, cwd=fuzz.ROOT / "tests/campaign")


def test_what_is_not_handled_is_found(tmp_path, monkeypatch, capsys):
    """A reader that fails, one that hangs and one that ends its process are three findings."""
    program = tmp_path / "broken_fuzz.py"
    program.write_text(BROKEN.format(folder=str(fuzz.ROOT / "tests/campaign")))
    monkeypatch.setattr(fuzz, "__file__", str(program))
    monkeypatch.setattr(fuzz, "HANGS", 20)
    assert fuzz.main(["--target", "plan", "--cases", "4", "--minutes", "10"]) == 1
    out = capsys.readouterr().out
    assert "4 cases, 1 read, 0 refused, 3 not handled" in out
    for finding in ("KeyError at", "no end after 20 s", "ended with status -11"):
        assert finding in out


BROKEN = """
import sys, time, os, signal
sys.path.insert(0, {folder!r})
import fuzz

def fail(path): raise KeyError("a")
def hang(path): time.sleep(1000)
def crash(path): os.kill(os.getpid(), signal.SIGSEGV)
def read(path): pass

def broken(rng):
    done = int(sys.argv[sys.argv.index("--seed") + 1])
    for act in [fail, hang, crash, read][done:]:
        yield fuzz.Case("a.txt", b"", act)

fuzz.TARGETS["plan"] = broken
sys.exit(fuzz.main())
"""
