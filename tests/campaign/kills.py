"""Kill commands at random moments, and compare what the same command makes of it.

    python tests/campaign/kills.py --kills 50 --terms 20
    python tests/campaign/kills.py --minutes 60 --seed 3
    python tests/campaign/kills.py --kinds suite --kills 10 --terms 0

A command is started, ended by SIGKILL or SIGTERM, and started again, some times in turn. Then it
runs to its end. What trains, the latents, the videos and a suite's scores must be those of a run
that nothing has stopped, bit for bit, and no temporary file may be left.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tav_jax.runs.run import Run
from tav_jax.training.checkpoints import restore_trained
from tav_jax.training.optimizer import label_params, select

ROOT = Path(__file__).parents[2]
STEPS = 12
TUNE = (
    f"max_train_steps={STEPS}",
    "checkpointing_steps=4",
    "validation_steps=6",
    "validation_data.prompts=[a red square, a yellow circle]",
    "validation_data.num_inference_steps=4",
    "validation_data.num_inv_steps=4",
)
SAMPLE = ("--prompt=a red square on sand", "--prompt=a circle", "--seeds=1,2,3", "--eta=1")
KINDS = ("tune", "sample", "suite")
# A suite of two runs with two videos each, scored by a network and without one.
SUITE = {
    "settings": {
        "pretrained_model_path": "tiny-scenes",
        "train_data": {"n_sample_frames": 4, "width": 32, "height": 32},
        "validation_data": {"num_inference_steps": 4, "num_inv_steps": 4},
        "learning_rate": 2e-3,
        "checkpointing_steps": 2,
    },
    "systems": {
        "tuned": {"settings": {"max_train_steps": 4}},
        "untuned": {"settings": {"max_train_steps": 0}},
    },
    "clips": [
        {
            "video_path": str(ROOT / "configs/clips/red-circle-moving-right.mp4"),
            "prompt": "a red circle is moving right on grass",
            "edits": ["a red square is moving right on grass", "a ring"],
        }
    ],
    "metrics": ["flicker", "clip_text.figures"],
}
MOST_STOPS = 4  # in turn, before a command runs to its end


class Bench:
    """What nothing has stopped, and the commands that make it.

    Args:
        folder: Takes all that is written.
        seed: Of the moments.
        kinds: Kinds of commands. "sample" needs "tune" before it.
    """

    def __init__(self, folder: Path, seed: int, kinds: Sequence[str]):
        self.folder, self.random = folder, random.Random(seed)
        self.count: Counter[str] = Counter()
        self.faults: list[str] = []
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            # As fast as its entries are small.
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.seconds = {}
        (folder / "suite.yaml").write_text(json.dumps(SUITE))
        for kind in kinds:
            for _ in range(2):  # the second time programs are loaded, as in the runs to be killed
                shutil.rmtree(self.output(kind, "whole"), ignore_errors=True)
                process = self.start(kind, "whole")
                self.wait_for_output(process)
                began = time.monotonic()
                if process.wait(timeout=900):
                    raise RuntimeError(self.log.read_text())
                self.seconds[kind] = time.monotonic() - began
        self.trained = self.trained_parameters("whole") if "tune" in kinds else {}

    @property
    def log(self) -> Path:
        """Return the file with what the last process has printed."""
        return self.folder / "log"

    def output(self, kind: str, name: str) -> Path:
        """Return the folder that a command writes to."""
        return self.folder / f"{kind}-{name}"

    def start(self, kind: str, name: str) -> subprocess.Popen:
        """Start a command."""
        output = self.output(kind, name)
        arguments = {
            "tune": ("--config", ROOT / "configs/tiny-scenes.yaml", f"output_dir={output}", *TUNE),
            "sample": ("--run", self.output("tune", "whole"), "--output-dir", output, *SAMPLE),
            "suite": (
                *("--suite", self.folder / "suite.yaml", "--output-dir", output),
                *("--scores", output / "scores", "--json", output / "table.json"),
            ),
        }[kind]
        program = "evaluate" if kind == "suite" else kind
        with self.log.open("w") as log:
            command = [sys.executable, "-m", f"tav_jax.{program}", *map(str, arguments)]
            return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)

    def wait_for_output(self, process: subprocess.Popen) -> None:
        """Wait until a process has printed something, or ended."""
        deadline = time.monotonic() + 900
        while process.poll() is None and not self.log.stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def stop(self, kind: str, name: str, number: signal.Signals) -> None:
        """Start a command and end it at a random moment, mostly after its imports."""
        partials = set(self.output(kind, name).rglob(".partial-*"))  # of an earlier SIGKILL
        process = self.start(kind, name)
        if self.random.random() < 0.9:
            self.wait_for_output(process)
        time.sleep(self.random.uniform(0, self.seconds[kind]))
        process.send_signal(number)
        status, said = process.wait(timeout=900), self.log.read_text()
        if status == 0:
            self.count["ended before the signal"] += 1
            self.seconds[kind] *= 0.9  # the machine has become faster
            return
        self.count[f"{number.name} in {kind}"] += 1
        # Before the command begins, a signal does what it does to any program.
        expected = {-number} if number == signal.SIGKILL else {128 + number, -number}
        if status not in expected or "Traceback" in said:
            self.faults.append(f"{kind} {name}: {number.name} gave status {status}: {said}")
        if number == signal.SIGTERM:
            self.count["SIGTERMs that saved a step"] += "SIGTERM: saved" in said
            if new := set(self.output(kind, name).rglob(".partial-*")) - partials:
                self.faults.append(f"{kind} {name}: SIGTERM left {new}")

    def finish(self, kind: str, name: str) -> None:
        """Run a command to its end and compare what it has made."""
        status = self.start(kind, name).wait(timeout=900)
        output = self.output(kind, name)
        if status:
            self.faults.append(f"{kind} {name}: status {status}: {self.log.read_text()}")
            return
        self.count[f"{kind}: ran to the end"] += 1
        self.faults += [f"{kind} {name}: {fault}" for fault in self.differences(kind, name)]
        self.count["temporary folders of Orbax"] += len(
            list(output.rglob("*.orbax-checkpoint-tmp*"))
        )
        shutil.rmtree(output)

    def differences(self, kind: str, name: str) -> Iterator[str]:
        """Yield what differs from the command that nothing has stopped."""
        whole, output = self.output(kind, "whole"), self.output(kind, name)
        if stray := list(output.rglob(".*")):
            yield f"stray files: {stray}"
        suffixes = {".mp4", ".gif", ".png", ".npy", ".json"}
        names = [
            {
                path.relative_to(folder)
                for path in folder.rglob("*")
                if path.suffix in suffixes and "checkpoints" not in path.parts
            }
            for folder in (whole, output)
        ]
        for file in names[0] ^ names[1]:
            yield f"{file}: is in one of them only"
        for file in names[0] & names[1]:
            # Overviews show some edits as they were sampled and some as read from their videos.
            if file.stem in ("contact-sheet", "side-by-side"):
                continue
            contents = [
                (folder / file).read_bytes().replace(str(folder).encode(), b"")
                for folder in (whole, output)
            ]
            if contents[0] != contents[1]:
                yield f"{file}: differs"
        if kind == "tune":
            ours = self.trained_parameters(name)
            for parameter, value in self.trained.items():
                if not np.array_equal(value, ours[parameter]):
                    yield f"{parameter}: differs"

    def trained_parameters(self, name: str) -> dict[str, np.ndarray]:
        """Return what a run has trained."""
        run = Run.open(self.output("tune", name))
        params = run.load_base().unet.params
        like = select(params, label_params(params, run.config.trainable_modules), "train")
        trained = restore_trained(run.checkpoint(STEPS), like)
        return {key: np.asarray(value) for key, value in trained.items()}


def run_campaign(
    folder: Path,
    *,
    kills: int,
    terms: int,
    minutes: float,
    seed: int,
    kinds: Sequence[str] = ("tune", "sample"),
) -> tuple[Counter[str], list[str]]:
    """Stop commands until there were so many SIGKILLs and SIGTERMs, or the time is over.

    Returns:
        How often what has happened, and what is wrong.
    """
    deadline = time.monotonic() + 60 * minutes
    bench = Bench(folder, seed, kinds)
    left = {signal.SIGKILL: kills, signal.SIGTERM: terms}
    turn = 0
    while sum(left.values()) and time.monotonic() < deadline:
        kind = kinds[turn % len(kinds)]
        for _ in range(bench.random.randint(1, MOST_STOPS)):
            numbers = [number for number, count in left.items() for _ in range(count)]
            if not numbers:
                break
            number = bench.random.choice(numbers)
            before = bench.count["ended before the signal"]
            bench.stop(kind, str(turn), number)
            left[number] -= bench.count["ended before the signal"] == before
        bench.finish(kind, str(turn))
        turn += 1
    return bench.count, bench.faults


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=1_000_000)
    parser.add_argument("--terms", type=int, default=400_000)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=["tune", "sample"])
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        count, faults = run_campaign(Path(folder), **vars(args))
    for what, times in sorted(count.items()):
        print(f"{what}: {times}")
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"kills: {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
