"""Tuning a run: prepare it, then step, log, check and save.

`tav_jax.tune` tells the story; here are its parts.
"""

import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tav_jax.console import say, say_if_slow
from tav_jax.errors import DamagedError, UserError
from tav_jax.files import explain_refusal, move_aside
from tav_jax.models.compute import GradientCheckpointing
from tav_jax.parallel.processes import (
    broadcast_number_from_main,
    is_main_process,
    largest_of_all,
)
from tav_jax.parallel.sharding import gather_to_host, shard
from tav_jax.pipeline import compile_train_step, encode_prompts
from tav_jax.pretrained.model import Model
from tav_jax.pretrained.prompts import count_chunks, prompt_tokens
from tav_jax.progress import progress_bar
from tav_jax.runs.changes import ENDLESS_SCHEDULES
from tav_jax.runs.config import TuneConfig, ValidationData
from tav_jax.runs.loggers import Loggers
from tav_jax.runs.metrics_log import Stages, keep_metrics, log, log_stages
from tav_jax.runs.run import Run
from tav_jax.stopping import Stopped, received, when_stopped
from tav_jax.training.checkpoints import (
    remove_unfinished,
    restore_state,
    save_checkpoint,
    saved_steps,
)
from tav_jax.training.memory import (
    Alternative,
    DoesNotFitError,
    Plan,
    Size,
    compile_plan,
    device_bytes,
    fitting_preset,
    planned_bytes,
)
from tav_jax.training.optimizer import Label, label_params, make_lr_schedule, make_optimizer
from tav_jax.training.train_step import TrainState, check_movement, fingerprints, init_state
from tav_jax.types import Context, Moments

# Updates after which every trained group must have moved. The first update of a warm-up has rate
# 0, and the temporal attention's inner projections get no gradient before its output has moved.
STEPS_BEFORE_CHECK = 3

# Reading the metrics waits for the device. They are read about once a second, and after this many
# steps at the latest: fewer than the 32 that JAX starts ahead on a CPU. There, one more for several
# devices would take the thread that a running step needs, and all would wait for ever.
MOST_STEPS_UNSEEN = 16

STANDS_STILL = (
    "step {} has not ended after 10 minutes: a process of this job may stand still. If so, end "
    "all of them; the same command goes on from the last checkpoint"
)

# Compiled train steps with the preset that fits, keyed by the settings that they depend on and the
# shape of the caption's states.
Programs = dict[
    tuple[TuneConfig, tuple[int, ...]], tuple[GradientCheckpointing, jax.stages.Compiled]
]

# Jitted here, so that several clips compile it once.
fingerprint = jax.jit(fingerprints)


@dataclass
class Tuning:
    """A run that is ready to step.

    Args:
        run: The run.
        model: Its base model; while steps run, all but the U-Net waits in the host's memory.
        state: The train state, from the newest checkpoint or new.
        labels: "train" or "freeze" for every parameter.
        learning_rate: The rate of each update.
        program: The compiled train step.
        inputs: Its other arguments: moments, context and schedule.
        stages: Where the time goes.
        loggers: Where metrics and samples go besides the run's folder.
    """

    run: Run
    model: Model
    state: TrainState
    labels: dict[str, Label]
    learning_rate: optax.Schedule
    stages: Stages
    program: jax.stages.Compiled | None = None
    inputs: tuple[Any, ...] = ()
    loggers: Loggers | None = None

    @property
    def start(self) -> int:
        """Return the number of updates that are done."""
        return int(self.state.step)

    @property
    def end(self) -> int:
        """Return the number of updates of the whole run."""
        return self.run.config.max_train_steps

    @property
    def trained_names(self) -> list[str]:
        """Return the names of the parameters that train."""
        return [name for name, label in self.labels.items() if label == "train"]

    def tuned_model(self) -> Model:
        """Return the model with the U-Net as it is now."""
        return self.model.with_unet(self.state.unet)


@contextmanager
def begun(run: Run) -> Iterator[None]:
    """Record the run's config, and remove what a killed process has left, before the block.

    Raises:
        MissingFileError: The run's folder is removed during the block.
    """
    run.record_config()
    run.remove_partials()
    remove_unfinished(run.checkpoints)
    with run.kept():
        yield


def prepare(run: Run, programs: Programs) -> Tuning:
    """Return a run with its model loaded, its state restored and its step compiled.

    Args:
        run: New, or to be resumed.
        programs: Train steps compiled before. A run of the same shapes takes its step from here,
            and a new one is added.

    Raises:
        UserError: the clip, the model or the settings do not fit; nothing has been written yet.
    """
    config, stages = run.config, Stages()
    with stages("read"):
        run.clip()
        run.check_additions()
    with stages("load"):
        model = run.load_base()
    run.begin_digests()
    check_num_steps(config.validation_data, len(model.schedule.alphas_cumprod))
    labels = label_params(model.unet.params, config.trainable_modules)
    # Before anything takes long: warns of plain prompts that are too long, refuses wrong weights.
    validation = config.validation_data
    syntax = validation.prompt_syntax or config.prompt_syntax
    prompt_tokens(model, [config.train_data.prompt], config.prompt_syntax)
    if validation.prompts:
        prompt_tokens(model, validation.prompts, syntax)
        count_chunks(model, [validation.negative_prompt], syntax)
    learning_rate = make_lr_schedule(
        config.lr_scheduler,
        config.learning_rate * (draws_per_update(config) if config.scale_lr else 1),
        warmup_steps=config.lr_warmup_steps,
        total_steps=config.max_train_steps,
    )
    optimizer = make_optimizer(
        labels,
        learning_rate,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        adam_weight_decay=config.adam_weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    state = shard(init_state(model.unet, optimizer, jax.random.key(config.seed)))
    tuning = Tuning(run, model, state, labels, learning_rate, stages)
    tuning.state = resume(tuning)
    from_another = config.resume_from_checkpoint and run.latest_step() is None
    if tuning.start >= tuning.end and from_another:
        raise UserError(
            f"resume_from_checkpoint: {config.resume_from_checkpoint} has step {tuning.start} "
            f"already; max_train_steps is {tuning.end}, set it higher"
        )
    if tuning.start < tuning.end:
        prepare_step(tuning, optimizer, programs)
    return tuning


def check_num_steps(validation: ValidationData, timesteps: int) -> None:
    """Raise `UserError` if samplers are to take more steps than the model has timesteps."""
    names = ["num_inference_steps", *(["num_inv_steps"] if validation.use_inv_latent else [])]
    for name in names if validation.prompts else []:
        if (steps := getattr(validation, name)) >= timesteps:
            raise UserError(
                f"validation_data.{name}: {steps} steps; the model has {timesteps} timesteps, so "
                f"at most {timesteps - 1}"
            )


def prepare_step(
    tuning: Tuning, optimizer: optax.GradientTransformation, programs: Programs
) -> None:
    """Encode the clip and its prompt once, and compile the train step unless it is known."""
    config, model, stages = tuning.run.config, tuning.model, tuning.stages
    with stages("encode"):
        prompt, syntax = config.train_data.prompt, config.prompt_syntax
        encoded = tuning.run.encoded_clip(model), encode_prompts(model, [prompt], syntax=syntax)
        moments, context = jax.block_until_ready(
            tuple(jnp.repeat(one, config.train_batch_size, axis=0) for one in encoded)
        )
    tuning.model = replace(
        model, vae=gather_to_host(model.vae), text_encoder=gather_to_host(model.text_encoder)
    )
    tuning.inputs = moments, context, model.schedule
    train_step = compile_train_step(
        model.vae.config.scaling_factor,
        optimizer=optimizer,
        labels=tuning.labels,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    with stages("compile"):
        key = step_settings(config), context.shape
        if key not in programs:
            programs[key] = fitting_program(config, train_step, tuning.state, tuning.inputs)
        preset, tuning.program = programs[key]
    stages.note("compile", planned_bytes=planned_bytes(tuning.program))
    unet = tuning.state.unet.with_compute(gradient_checkpointing=preset)
    tuning.state = tuning.state._replace(unet=unet)


def fit(tuning: Tuning) -> Generator[int, None, None]:
    """Run all remaining updates, log them, and save checkpoints; yield each step to validate.

    `tuning.state` is then the state after that step.

    Raises:
        NotLearningError: the loss is not a number, or parameters do not move as they should.
        Stopped: a signal has asked this process, or another of the job, to stop. The last step is
            saved.
    """
    run, config, stages = tuning.run, tuning.run.config, tuning.stages
    assert tuning.program is not None
    start, end, loggers = tuning.start, tuning.end, tuning.loggers
    if is_main_process():
        keep_metrics(run.metrics, start)
    metrics_path = run.metrics if is_main_process() else Path(os.devnull)
    before = fingerprint(tuning.state.unet.params)
    check_at = min(start + STEPS_BEFORE_CHECK, end)
    unseen: list[dict] = []
    unseen_at_most, began = 1, time.perf_counter()
    in_job = jax.process_count() > 1

    def save() -> str:
        with stages("checkpoint"):
            save_checkpoint(run.checkpoints, tuning.state, tuning.trained_names)
        return f"saved {run.checkpoint(tuning.start)}; the same command goes on from there"

    with (
        explain_refusal(run.metrics),
        when_stopped(None),
        metrics_path.open("a", buffering=1, encoding="utf-8") as metrics_file,
        progress_bar("tuning", total=end, initial=start) as bar,
    ):
        for step in range(start + 1, end + 1):
            tuning.state, metrics = tuning.program(tuning.state, *tuning.inputs)
            unseen.append(metrics | {"step": step, "lr": float(tuning.learning_rate(step - 1))})
            saves = step == end or step % config.checkpointing_steps == 0
            pause = step == check_at or saves or is_validated(config, step)
            if not pause and len(unseen) < unseen_at_most:
                continue
            # JAX ends a job if a process dies, but not if one of them stands still.
            with say_if_slow(STANDS_STILL.format(step)) if in_job else nullcontext():
                jax.block_until_ready(metrics)
            stages.add("tune", time.perf_counter() - began)
            seconds = (time.perf_counter() - began) / len(unseen)
            run.require_folder()
            log(metrics_file, unseen, seconds, loggers.scalars if loggers else None)
            if loggers:
                loggers.flush()
            bar.update(len(unseen))
            # All processes of a job read their metrics and stop at the same steps.
            a_second = max(1, min(MOST_STEPS_UNSEEN, int(1 / seconds)))
            signal, unseen_at_most = largest_of_all([received(), a_second])
            unseen = []
            if step == check_at:
                after = fingerprint(tuning.state.unet.params)
                check_movement(before, after, tuning.labels, config.trainable_modules)
            if signal:
                raise Stopped(signal, save())
            if saves:
                save()
                say(f"wrote {run.checkpoint(step)}")
            if is_validated(config, step):
                # A job saves now, because its processes cannot save together while they sample.
                with when_stopped(partial(str, save()) if in_job else save):
                    yield step
            if pause:
                log_stages(metrics_file, step, stages)
            began = time.perf_counter()


def fitting_program(
    config: TuneConfig, step: Any, state: TrainState, inputs: tuple[Moments, Context, Any]
) -> tuple[GradientCheckpointing, jax.stages.Compiled]:
    """Return the compiled step, with the preset that fits, of which its state is to be.

    Raises:
        UserError: nothing that is allowed fits into memory; says what would.
    """
    moments, context, schedule = inputs
    data = config.train_data
    pixels = data.height // moments.shape[2]

    def under(preset: GradientCheckpointing) -> TrainState:
        return state._replace(unet=state.unet.with_compute(gradient_checkpointing=preset))

    def plan(preset: GradientCheckpointing, size: Size) -> Plan:
        grid = size.height // pixels, size.width // pixels
        shape = (len(moments), size.frames, *grid, moments.shape[-1])
        as_asked = shape == moments.shape
        clip = moments if as_asked else jax.ShapeDtypeStruct(shape, moments.dtype)
        say(f"compiling the step for {size}, gradient_checkpointing={preset}")
        return compile_plan(lambda: step.lower(under(preset), clip, context, schedule).compile())

    wanted = config.gradient_checkpointing
    limit = config.memory_limit_gb
    try:
        return fitting_preset(
            plan,
            None if wanted == "auto" else wanted,
            Size(data.n_sample_frames, data.height, data.width),
            limit * 1e9 if limit else float(device_bytes()),
        )
    except DoesNotFitError as error:
        raise error.with_advice(config_keys) from None


def config_keys(alternative: Alternative, asked: Size) -> str:
    """Return the config keys, with values, by which a run becomes an alternative that fits."""
    preset, size = alternative
    keys = [f"gradient_checkpointing={preset}"]
    if size.frames != asked.frames:
        keys += [f"train_data.n_sample_frames={size.frames}"]
    if size[1:] != asked[1:]:
        keys += [f"train_data.height={size.height}", f"train_data.width={size.width}"]
    return " ".join(keys)


def step_settings(config: TuneConfig) -> TuneConfig:
    """Return a config without what the tuning step's program does not depend on."""
    is_endless = config.lr_scheduler in ENDLESS_SCHEDULES
    return replace(
        config,
        max_train_steps=1 if is_endless else config.max_train_steps,
        validation_steps=1,
        checkpointing_steps=1,
        output_dir="-",
        train_data=replace(config.train_data, video_path="-", prompt=""),
        validation_data=ValidationData(),
        resume_from_checkpoint=None,
        seed=0,
        loras=(),
        embeddings=(),
        prompt_syntax="plain",
        log=(),
    )


def is_validated(config: TuneConfig, step: int) -> bool:
    """Tell whether the validation prompts are sampled after a step."""
    return step == config.max_train_steps or step % config.validation_steps == 0


def draws_per_update(config: TuneConfig) -> int:
    """Return how many draws of noise and timestep one update sees."""
    return config.gradient_accumulation_steps * config.train_batch_size


def resume(tuning: Tuning) -> TrainState:
    """Return the state of the newest whole checkpoint, of another run's, or the new one.

    Damaged checkpoints that are newer are moved aside, since their steps will be saved again.

    Raises:
        DamagedError: All checkpoints are damaged.
    """
    run, names = tuning.run, tuning.trained_names
    damaged: dict[int, str] = {}
    for step in saved_steps(run.checkpoints):
        path = run.checkpoint(step)
        try:
            state = restore_state(path, tuning.state, names)
        except DamagedError as error:
            damaged[step] = str(error).removeprefix(f"{path}: ")
            continue
        # Also waits until no process reads the damaged ones.
        if broadcast_number_from_main(step) != step:
            raise DamagedError(f"{run.checkpoints}: not all processes can read the same checkpoint")
        for newer, why in damaged.items() if is_main_process() else ():
            path = run.checkpoint(newer)
            say(f"{path} is damaged ({why}); it is moved to {move_aside(path).name}")
        say(f"going on from {run.checkpoint(step)}")
        return state
    if damaged:
        raise run.all_damaged(damaged)
    if run.config.resume_from_checkpoint is None:
        return tuning.state
    other = Path(run.config.resume_from_checkpoint)
    say(f"going on from {other}")
    return restore_state(other, tuning.state, names)
