"""python tests/campaign/damage.py --minutes N: damage a run's files at random.

Every flipped bit must be noticed, and a run whose newest checkpoints are damaged must end as one of
which nothing was.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from small_run import STEPS, Tally, command, make_run, new_state, result

from tav_jax import check, sample, tune
from tav_jax.errors import DamagedError
from tav_jax.runs.inversions import read_inversion
from tav_jax.runs.run import Run
from tav_jax.training.checkpoints import checkpoint_damage, restore_state, restore_trained


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_a_bit(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


class Campaign:
    """One finished run, and copies of it that are damaged."""

    def __init__(self, folder: Path, draw: random.Random):
        self.folder, self.draw, self.tally = folder, draw, Tally()
        self.whole = make_run(folder)
        self.config = folder / "run.yaml"
        self.expected = result(self.whole)
        self.run = Run.open(self.whole)
        self.state, self.names = new_state(self.run)

    def copy(self) -> Path:
        target = self.folder / "copy"
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(self.whole, target))

    def flip_in_checkpoint(self) -> None:
        """Flip one bit of any file; try to restore what has it."""
        checkpoint = self.run.checkpoint(self.draw.randint(1, STEPS))
        path = self.draw.choice(files_of(checkpoint))
        kept = path.read_bytes()
        flip_a_bit(path, self.draw)
        wrong = None
        if checkpoint_damage(checkpoint) is None:
            wrong = f"{path}: not noticed by check"
        trained = {name: self.state.unet.params[name] for name in self.names}
        restores = [lambda: restore_state(checkpoint, self.state, self.names)]
        if "progress" not in path.relative_to(checkpoint).parts:
            restores.append(lambda: restore_trained(checkpoint, trained))
        for restore in restores:
            try:
                restore()
            except DamagedError:
                continue
            wrong = f"{path}: not noticed when it was restored"
        path.write_bytes(kept)
        self.tally.add("a flipped bit in a checkpoint", wrong)

    def flip_in_latents(self) -> None:
        """Flip one bit of the inverted clip and read it."""
        path = self.run.inverted_file(STEPS)
        kept = path.read_bytes()
        flip_a_bit(path, self.draw)
        wrong = None
        try:
            read_inversion(path)
            wrong = f"{path}: not noticed"
        except DamagedError:
            pass
        path.write_bytes(kept)
        self.tally.add("a flipped bit in inverted latents", wrong)

    def invert_again(self) -> None:
        """Flip one bit of the inverted clip; the run inverts again, to the same numbers."""
        folder = self.copy()
        run = Run(folder, self.run.config)
        path = run.inverted_file(STEPS)
        flip_a_bit(path, self.draw)
        damaged = path.read_bytes()
        run.inverted_latents(run.load_model(STEPS), STEPS, run.config.validation_data.num_inv_steps)
        aside = path.with_name(f"{path.name}.damaged")
        ours, theirs = (np.load(one.inverted_file(STEPS)) for one in (run, self.run))
        wrong = None
        if not aside.is_file() or aside.read_bytes() != damaged:
            wrong = "the damaged file is gone"
        elif not np.array_equal(ours, theirs):
            wrong = "inverted to other numbers"
        self.tally.add("an inversion made again", wrong)

    def damage_newest(self) -> None:
        """Damage the newest one to three checkpoints; the same command ends in the same run."""
        folder = self.copy()
        shutil.rmtree(folder / f"samples/sample-{STEPS}")
        count = self.draw.choice([1, 1, 1, 2, 3])
        harms = [
            self.harm(folder / f"checkpoints/{step}") for step in range(STEPS, STEPS - count, -1)
        ]
        status, out, err = command(tune.main, "--config", self.config, f"output_dir={folder}")
        wrong = None
        if status != 0:
            wrong = err
        elif out.count(" is damaged (") != count:
            wrong = f"said {out.count(' is damaged (')} times that one is damaged, not {count}"
        elif result(folder) != self.expected:
            wrong = "other results"
        elif len(list((folder / "checkpoints").glob("*.damaged"))) != count:
            wrong = "a damaged checkpoint is gone"
        elif command(check.main, folder)[0] != 0:
            wrong = "the run is not whole in the end"
        self.tally.add("damaged newest checkpoints", wrong and f"{', '.join(harms)}: {wrong}")

    def harm(self, checkpoint: Path) -> str:
        path = self.draw.choice(files_of(checkpoint))
        if path.name == "digests.json":  # alone it may be missing, as an earlier version has none
            path.write_bytes(path.read_bytes()[:-1])
            return "truncated digests"
        kind = self.draw.choice(["truncated", "emptied", "removed", "flipped", "no item", "empty"])
        if kind == "truncated":
            path.write_bytes(path.read_bytes()[: self.draw.randrange(path.stat().st_size)])
        elif kind == "emptied":
            path.write_bytes(b"")
        elif kind == "removed":
            path.unlink()
        elif kind == "flipped":
            flip_a_bit(path, self.draw)
        elif kind == "no item":
            shutil.rmtree(checkpoint / self.draw.choice(["trained", "progress"]))
        else:
            shutil.rmtree(checkpoint)
            checkpoint.mkdir()
        return f"{kind} {path.relative_to(checkpoint)}"

    def use_commands(self) -> None:
        """Sample from a run whose newest checkpoint is damaged, with and without --step."""
        folder = self.copy()
        path = self.draw.choice(files_of(folder / f"checkpoints/{STEPS}/trained"))
        flip_a_bit(path, self.draw)
        before = {path: path.read_bytes() for path in files_of(folder / "checkpoints")}
        asked = ("--run", folder, "--prompt", "a cat", "--num-inv-steps", 1)
        output = ("--num-inference-steps", 1, "--output-dir", self.folder / "videos", "--overwrite")
        refused = command(sample.main, *asked, *output, "--step", STEPS)
        fallen_back = command(sample.main, *asked, *output)
        checked = command(check.main, folder)
        wrong = None
        if refused[0] != 1 or len(refused[2].splitlines()) != 1 or "damaged" not in refused[2]:
            wrong = f"--step {STEPS}: {refused}"
        elif fallen_back[0] != 0 or f"sampling from {STEPS - 1}" not in fallen_back[1]:
            wrong = f"{fallen_back}"
        elif checked[0] != 1 or path.name not in checked[2]:
            wrong = f"check: {checked}"
        elif before != {path: path.read_bytes() for path in files_of(folder / "checkpoints")}:
            wrong = "sample has changed a checkpoint"
        self.tally.add("commands on a damaged checkpoint", wrong)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="default: each kind once, flips thirty times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flips", type=int, default=30, help="between two of the other kinds")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * (args.minutes or 0)
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), random.Random(args.seed))
        while True:
            for _ in range(args.flips):
                campaign.flip_in_checkpoint()
                campaign.flip_in_latents()
            campaign.damage_newest()
            campaign.invert_again()
            campaign.use_commands()
            if time.monotonic() >= end:
                return campaign.tally.report()


if __name__ == "__main__":
    sys.exit(main())
