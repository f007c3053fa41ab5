"""python tests/campaign/faults.py --minutes N: take the disk away while a run is tuned.

Each fault must end the run with status 1 and one line. What was written before must be whole, and
the same command must go on once the fault is mended, to the same result.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from small_run import QUICKLY, STEPS, Tally, result, write_config

from tav_jax.runs.check import check_run
from tav_jax.training.checkpoints import checkpoint_damage, saved_steps

ROOT = Path(__file__).parents[2]


def can_mount() -> bool:
    """Tells whether this process may mount a file system of its own."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        try:
            mount(Path(folder), 2**20)
        except subprocess.CalledProcessError:
            return False
        subprocess.run(["umount", folder], check=True)
        return True


def mount(folder: Path, size: int) -> None:
    arguments = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def bind(folder: Path, place: Path) -> None:
    """Shows a folder at another place, with the same right to write."""
    subprocess.run(["mount", "--bind", str(folder), str(place)], check=True)


def size_of(folder: Path) -> int:
    """Returns the bytes that a run takes on a disk of 4 KB blocks without its page.

    A run that has no room for the page alone is finished.
    """
    paths = [path for path in folder.rglob("*") if path.name != "report.html"]
    return sum(-(-path.stat().st_size // 4096) * 4096 or 4096 for path in paths)


class Campaign:
    """One finished run, and others that are disturbed on their way to the same end."""

    def __init__(self, folder: Path, draw: random.Random):
        self.folder, self.draw, self.tally = folder, draw, Tally()
        write_config(folder)
        self.whole = folder / "run"
        # By a process of its own, as the others: tests compile with options of theirs.
        process = self.start(self.whole)
        process.communicate(timeout=900)
        assert process.returncode == 0
        self.expected = result(self.whole)
        self.size = size_of(self.whole)
        self.disk = folder / "disk"
        self.disk.mkdir()

    def start(self, run: Path, limit: int | None = None) -> subprocess.Popen:
        """Starts the run's command; no file may become larger than `limit` bytes."""
        command = [sys.executable, "-m", "tav_jax.tune", "--config", str(self.folder / "run.yaml")]
        if limit is not None:
            command = ["bash", "-c", f'ulimit -f {limit // 1024}; exec "$@"', "bash", *command]
        return subprocess.Popen(
            [*command, f"output_dir={run}"],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | QUICKLY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def refused(self, process: subprocess.Popen, run: Path, says: Sequence[str]) -> str | None:
        """Returns what is wrong with how a disturbed run has ended, if anything is."""
        _, err = process.communicate(timeout=900)
        lines = [line for line in err.splitlines() if line]
        if process.returncode != 1:
            return f"status {process.returncode}: {err[-2000:]}"
        # The file may be refused to the cache of compiled programs, too, of which JAX warns.
        lines = [line for line in lines if "compilation cache" not in line]
        if len(lines) != 1 or str(run) not in lines[0] or not any(say in lines[0] for say in says):
            return f"said {err[-2000:]}"
        for step in saved_steps(run / "checkpoints"):
            if damage := checkpoint_damage(run / f"checkpoints/{step}"):
                return f"checkpoint {step} is damaged: {damage}"
        return None

    def goes_on(self, run: Path) -> str | None:
        """Returns what is wrong with the run after the same command, if anything is."""
        process = self.start(run)
        _, err = process.communicate(timeout=900)
        if process.returncode != 0:
            return f"does not go on: status {process.returncode}: {err[-2000:]}"
        if result(run) != self.expected:
            return "goes on to other results"
        if damaged := [found for found in check_run(run) if found.damage]:
            return f"ends damaged: {damaged}"
        left = [path.name for path in run.rglob("*") if "unfinished" in path.name]
        return f"leaves {left}" if left else None

    def disk_full(self) -> None:
        """Give the run a disk on which a part of it fits, and then a larger one."""
        # The same run takes 7.3 or 9.0 MB: Orbax merges what it writes as time allows.
        size = self.draw.randrange(self.size // 20, self.size * 6 // 10)
        mount(self.disk, size)
        try:
            run = self.disk / "run"
            wrong = self.refused(self.start(run), run, ["no space left"])
            remount(self.disk, f"size={4 * self.size}")
            wrong = wrong or self.goes_on(run)
        finally:
            subprocess.run(["umount", "-l", str(self.disk)], check=True)
        self.tally.add("a full disk", wrong and f"{size} of {self.size} bytes: {wrong}")

    def file_too_large(self) -> None:
        """Limit the size of files, as some quotas do, below that of a checkpoint's largest."""
        sizes = sorted(path.stat().st_size for path in self.whole.glob("checkpoints/1/**/*"))
        limit = self.draw.randrange(2**12, sizes[-1] - 1)
        run = self.folder / "limited"
        wrong = self.refused(self.start(run, limit), run, ["File too large"])
        wrong = wrong or self.goes_on(run)
        shutil.rmtree(run, ignore_errors=True)
        self.tally.add("a limit on files", wrong and f"{limit} bytes: {wrong}")

    def disturb(self, run: Path, after: int, harm: Callable[[], None]) -> subprocess.Popen:
        """Starts a run and does some harm when it has logged so many steps."""
        process = self.start(run)
        metrics = run / "metrics.jsonl"
        deadline = time.monotonic() + 900
        while process.poll() is None:
            assert time.monotonic() < deadline
            if metrics.is_file() and metrics.read_text().count('"loss"') >= after:
                break
            time.sleep(0.002)
        time.sleep(self.draw.uniform(0, 0.2))
        if process.poll() is None:
            harm()
        return process

    def read_only(self) -> None:
        """Mount the run's disk read-only in the middle of the run."""
        mount(self.disk, 4 * self.size)
        try:
            run, view = self.disk / "run", self.disk / "view"
            view.mkdir()

            def harm() -> None:
                # A file that is open for writing keeps its mount writable, so the run's folder is
                # covered by a view of itself, which is read-only before the run can meet it.
                bind(run, view)
                remount(view, "bind,ro")
                bind(view, run)

            process = self.disturb(run, self.draw.randint(1, STEPS - 2), harm)
            # Whoever meets it first: a path of the file system, or of the covered folder.
            wrong = self.refused(process, run, ["Read-only file system", "is not writable"])
            subprocess.run(["umount", "-l", str(run)], check=False)
            wrong = wrong or self.goes_on(run)
        finally:
            subprocess.run(["umount", "-l", str(self.disk)], check=True)
        self.tally.add("a folder made read-only", wrong)

    def deleted(self) -> None:
        """Delete the run's folder in the middle of the run."""
        run = self.folder / "deleted"
        process = self.disturb(
            run, self.draw.randint(1, STEPS - 1), lambda: shutil.rmtree(run, ignore_errors=True)
        )
        wrong = self.refused(process, run, ["is gone"])
        shutil.rmtree(run, ignore_errors=True)
        wrong = wrong or self.goes_on(run)
        shutil.rmtree(run, ignore_errors=True)
        self.tally.add("a deleted folder", wrong)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="default: each fault once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * (args.minutes or 0)
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), random.Random(args.seed))
        faults = [campaign.deleted, campaign.file_too_large]
        if can_mount():
            faults += [campaign.disk_full, campaign.read_only]
        else:
            print("a full disk and a read-only folder are left out: they need the right to mount")
        while True:
            for fault in faults:
                fault()
            if time.monotonic() >= end:
                return campaign.tally.report()


if __name__ == "__main__":
    # Ends as Ctrl-C does, so that nothing stays mounted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
