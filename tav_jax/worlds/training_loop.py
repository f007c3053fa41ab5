"""The training loop that both stages of a base model share."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

from tav_jax.errors import NotLearningError
from tav_jax.files import explain_refusal
from tav_jax.progress import progress_bar
from tav_jax.runs.metrics_log import keep_metrics
from tav_jax.training.checkpoints import latest_step, remove_unfinished, restore_item, save_items
from tav_jax.types import Params, PRNGKey, Scalar

Batch = tuple[Any, ...]

CHECKPOINT_ITEM = "learner"  # the state's name in checkpoints, which older trainings have too
STEPS_PER_LOG_LINE = 50


class StageState(NamedTuple):
    """Everything that a training step changes.

    Args:
        params: Parameters of each trained network, by the network's name.
        average: Exponential moving average of the parameters.
        opt_state: State of Adam.
        step: Updates done so far.
    """

    params: dict[str, Params]
    average: dict[str, Params]
    opt_state: optax.OptState
    step: Int[jax.Array, ""]


@dataclass(frozen=True)
class Stage:
    """One stage of the training.

    Args:
        folder: Where its checkpoints and metrics are kept. Its name is the stage's name.
        steps: Number of updates.
        learning_rate: Peak learning rate.
        average_decay: Decay of the moving average of the parameters.
        checkpointing_steps: Steps between checkpoints.
        key: Key of the randomness in the loss.
    """

    folder: Path
    steps: int
    learning_rate: float
    average_decay: float
    checkpointing_steps: int
    key: PRNGKey

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def optimizer(self) -> optax.GradientTransformation:
        """Return Adam with gradient clipping, a linear warm-up and a cosine decay."""
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.learning_rate,
            warmup_steps=min(200, self.steps // 10),
            decay_steps=self.steps,
            end_value=0.02 * self.learning_rate,
        )
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b1=0.9, b2=0.99))


def init_or_restore(stage: Stage, params: dict[str, Params]) -> StageState:
    """Return the state of the newest checkpoint, or the state before the first step.

    Args:
        stage: The stage to start or to resume.
        params: Initial parameters of each network, by the network's name.
    """
    opt_state = stage.optimizer().init(params)
    state = StageState(params, jax.tree.map(jnp.copy, params), opt_state, jnp.int32(0))
    newest = latest_step(stage.checkpoints)
    if newest is None:
        return state
    return restore_item(stage.checkpoints / str(newest), CHECKPOINT_ITEM, state)


def update(
    state: StageState,
    batch: Batch,
    *,
    loss_fn: Callable[..., Scalar],
    optimizer: optax.GradientTransformation,
    average_decay: float,
    key: PRNGKey,
) -> tuple[StageState, Scalar]:
    """Return the state after one update, and the loss before it.

    Args:
        state: The state before the update.
        batch: Arguments of the loss.
        loss_fn: Loss of the parameters, a key and the parts of the batch.
        optimizer: The stage's optimiser.
        average_decay: Largest decay of the moving average.
        key: The stage's key. Each step folds its number into it.
    """
    step_key = jax.random.fold_in(key, state.step)
    loss, gradients = jax.value_and_grad(loss_fn)(state.params, step_key, *batch)
    updates, opt_state = optimizer.update(gradients, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    # With the full decay, an early average would be mostly the random initial parameters.
    decay = jnp.minimum(average_decay, (1 + state.step) / (10 + state.step))
    average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state.average, params)
    return StageState(params, average, opt_state, state.step + 1), loss


def train(
    stage: Stage,
    state: StageState,
    loss_fn: Callable[..., Scalar],
    make_batch: Callable[[int], Batch],
) -> Iterator[StageState]:
    """Train to the end of the stage, and yield the state at each checkpoint.

    A yielded state is valid until the next one is asked for, because the update donates it.
    Nothing is yielded if the stage was finished before.

    Args:
        stage: The stage to train.
        state: The state to start from.
        loss_fn: Loss of the parameters, a key and the parts of a batch.
        make_batch: Returns the batch of a step, which depends on the step's number alone.

    Raises:
        NotLearningError: The loss is not finite.
    """
    step_fn = jax.jit(
        partial(
            update,
            loss_fn=loss_fn,
            optimizer=stage.optimizer(),
            average_decay=stage.average_decay,
            key=stage.key,
        ),
        donate_argnums=0,
    )
    start, name = int(state.step), stage.folder.name
    stage.folder.mkdir(parents=True, exist_ok=True)
    metrics = stage.folder / "metrics.jsonl"
    keep_metrics(metrics, start)
    began = time.perf_counter()
    losses = []
    remove_unfinished(stage.checkpoints)
    with (
        explain_refusal(metrics),
        metrics.open("a", buffering=1, encoding="utf-8") as log,
        progress_bar(name, total=stage.steps, initial=start) as bar,
    ):
        for step in range(start + 1, stage.steps + 1):
            state, loss = step_fn(state, make_batch(step))
            bar.update(1)
            losses.append(loss)
            if step % STEPS_PER_LOG_LINE == 0 or step == stage.steps:
                line = {"step": step, "loss": float(jnp.stack(losses).mean())}
                line["seconds"] = round(time.perf_counter() - began, 1)
                if not np.isfinite(line["loss"]):
                    raise NotLearningError(f"{name}: the loss is not finite at step {step}")
                log.write(json.dumps(line) + "\n")
                losses = []
            if step % stage.checkpointing_steps == 0 or step == stage.steps:
                save_items(stage.checkpoints, step, **{CHECKPOINT_ITEM: state})
                yield state
