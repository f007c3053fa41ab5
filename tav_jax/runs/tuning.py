"""What the tuning command does between its lines: the step that fits, resuming, checks."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from tav_jax.console import say
from tav_jax.models.unet import GradientCheckpointing
from tav_jax.runs.config import TuneConfig, ValidationData
from tav_jax.runs.run import RunFolder
from tav_jax.training.checkpoints import latest_step, restore_state
from tav_jax.training.memory import Plan, Size, compile_plan, device_bytes, fitting_preset
from tav_jax.training.train_step import (
    TrainState,
    fingerprints,
)
from tav_jax.types import Context, Moments

# Updates after which every trained group must have moved: a warm-up's first update has rate 0,
# and the temporal attention's inner projections get no gradient before its output has moved.
STEPS_BEFORE_CHECK = 3

# Steps between two looks at the metrics, which wait for the device, are at most these and else as
# many as are done in a second.
MOST_STEPS_UNSEEN = 100

# By what `step_settings` gives, tuning steps with the preset that fits.
Programs = dict[TuneConfig, tuple[GradientCheckpointing, Callable]]

# Jitted here, so that several clips compile it once.
fingerprint = jax.jit(fingerprints)


def fitting_program(
    config: TuneConfig, step: Any, state: TrainState, inputs: tuple[Moments, Context, Any]
) -> tuple[GradientCheckpointing, Callable]:
    """Returns the compiled step, with the preset that fits, of which its state is to be.

    Raises:
        ValueError: nothing that is allowed fits into memory; says what would.
    """
    moments, context, schedule = inputs
    data = config.train_data
    pixels = data.height // moments.shape[2]

    def under(preset: GradientCheckpointing) -> TrainState:
        return state._replace(unet=state.unet.with_config(gradient_checkpointing=preset))

    def plan(preset: GradientCheckpointing, size: Size) -> Plan:
        grid = size.height // pixels, size.width // pixels
        shape = (len(moments), size.frames, *grid, moments.shape[-1])
        as_asked = shape == moments.shape
        clip = moments if as_asked else jax.ShapeDtypeStruct(shape, moments.dtype)
        say(f"compiling the step for {size}, gradient_checkpointing={preset}")
        return compile_plan(lambda: step.lower(under(preset), clip, context, schedule).compile())

    wanted = config.gradient_checkpointing
    limit = config.memory_limit_gb
    return fitting_preset(
        plan,
        None if wanted == "auto" else wanted,
        Size(data.n_sample_frames, data.height, data.width),
        limit * 1e9 if limit else float(device_bytes()),
    )


def step_settings(config: TuneConfig) -> TuneConfig:
    """Returns a config without what the tuning step's program does not depend on."""
    return replace(
        config,
        output_dir="",
        train_data=replace(config.train_data, video_path="", prompt=""),
        validation_data=ValidationData(),
        resume_from_checkpoint=None,
        seed=0,
    )


def is_validated(config: TuneConfig, step: int) -> bool:
    return step == config.max_train_steps or step % config.validation_steps == 0


def draws_per_update(config: TuneConfig) -> int:
    return config.gradient_accumulation_steps * config.train_batch_size


def resume(
    run: RunFolder, config: TuneConfig, state: TrainState, trained_names: Sequence[str]
) -> TrainState:
    """Returns the state to go on from: this run's newest, another run's, or the given."""
    own = latest_step(run.checkpoints)
    if own is not None:
        path = run.checkpoint(own)
    elif config.resume_from_checkpoint is not None:
        path = Path(config.resume_from_checkpoint)
    else:
        return state
    say(f"going on from {path}")
    return restore_state(path, state, trained_names)
