"""A run of a few seconds for campaigns, and what its result is."""

import contextlib
import io
import json
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import optax
import yaml
from PIL import Image

from tav_jax import tune
from tav_jax.runs.run import Run
from tav_jax.training.checkpoints import restore_state
from tav_jax.training.optimizer import label_params, make_optimizer, select
from tav_jax.training.train_step import TrainState, init_state

sys.path.append(str(Path(__file__).parents[1]))  # as pytest does
from small_model import write_model

# Compiling well takes longest, and makes no difference to what is tried here.
QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}

STEPS = 4


def settings_of_a_run(folder: Path, model: Path) -> dict:
    """Writes a clip of two frames to `folder/clip`; returns settings of a run in `folder/run`."""
    (folder / "clip").mkdir(parents=True)
    for index in range(2):
        image = Image.fromarray(np.full((32, 32, 3), 40 + 80 * index, np.uint8))
        image.save(folder / f"clip/{index}.png")
    return {
        "pretrained_model_path": str(model),
        "output_dir": str(folder / "run"),
        "train_data": {
            "video_path": str(folder / "clip"),
            "prompt": "a square",
            "n_sample_frames": 2,
            "width": 32,
            "height": 32,
        },
        "validation_data": {"num_inference_steps": 2, "num_inv_steps": 2},
    }


def write_config(folder: Path) -> Path:
    """Writes a model, a clip and the config of a run in `folder/run`; returns the config."""
    write_model(folder / "model")
    settings = settings_of_a_run(folder, folder / "model")
    settings["validation_data"]["prompts"] = ["a circle"]
    settings |= {
        "max_train_steps": STEPS,
        "checkpointing_steps": 1,
        "validation_steps": STEPS,
        "learning_rate": 1e-3,
        "gradient_checkpointing": "none",
        "mesh": {"frames": 1},
        "seed": 33,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def command(main, *arguments: object) -> tuple[int, str, str]:
    """Runs a command in this process; returns its status and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def make_run(folder: Path) -> Path:
    """Tunes the small run and returns its folder."""
    status, _, err = command(tune.main, "--config", write_config(folder))
    assert status == 0, err
    return folder / "run"


def new_state(run: Run) -> tuple[TrainState, list[str]]:
    """Returns a run's state before the first step, and the names of what trains."""
    config, model = run.config, run.load_base()
    labels = label_params(model.unet.params, config.trainable_modules)
    # Checkpoints hold the state of a schedule too, so that a number would not fit.
    optimizer = make_optimizer(labels, optax.constant_schedule(config.learning_rate))
    names = list(select(model.unet.params, labels, "train"))
    return init_state(model.unet, optimizer, jax.random.key(0)), names


def result(folder: Path) -> list[bytes]:
    """Returns every number of a finished run: the last checkpoint's, the metrics', the video's."""
    run = Run.open(folder)
    state, names = new_state(run)
    state = restore_state(run.checkpoint(STEPS), state, names)
    arrays = [
        *(state.unet.params[name] for name in names),
        *jax.tree.leaves(state.opt_state),
        state.step,
        jax.random.key_data(state.key),
    ]
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == list(range(1, STEPS + 1)), "a line for each step"
    return [
        *(np.asarray(array).tobytes() for array in arrays),
        json.dumps(losses).encode(),
        run.inverted_file(STEPS).read_bytes(),
        *(path.read_bytes() for path in sorted(run.samples(STEPS).glob("a circle.*"))),
    ]


class Tally:
    """Counts what went as it should, by kind, and keeps what did not."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def add(self, kind: str, wrong: str | None) -> None:
        """Counts one case; `wrong` says what went wrong, if anything did."""
        self.counts[kind] += 1
        if wrong:
            self.wrong.append(f"{kind}: {wrong}")

    def report(self) -> int:
        """Prints a line for each kind and all that went wrong; returns the exit status."""
        for kind, count in self.counts.items():
            bad = sum(line.startswith(f"{kind}: ") for line in self.wrong)
            print(f"{kind}: {count - bad} of {count} as they should be")
        print("\n".join(self.wrong))
        return 1 if self.wrong else 0
