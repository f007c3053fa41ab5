"""python -m tav_jax.tune: one clip and its caption -> a tuned model and edited videos.

The story, top to bottom: check everything, encode clip and caption once, then step, log, save and
sample. The same command run again goes on from the last checkpoint.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from tav_jax.console import command, say
from tav_jax.errors import NotLearningError, UserError
from tav_jax.models.unet import GradientCheckpointing
from tav_jax.parallel import processes as distributed
from tav_jax.parallel.processes import broadcast_from_main, is_main_process
from tav_jax.parallel.sharding import gather_to_host, laid, on_mesh
from tav_jax.pipeline import (
    compile_train_step,
    encode_frames,
    encode_prompts,
)
from tav_jax.pretrained.model import Model, tokenize
from tav_jax.runs.config import (
    TuneConfig,
    ValidationData,
    load_clips,
    load_config,
    with_absolute_paths,
)
from tav_jax.runs.metrics_log import Stages
from tav_jax.runs.run import (
    RunFolder,
    claim_folder,
    inverted_clip,
    keep_metrics,
    load_base,
    mesh_of,
    read_clip,
    record_config,
)
from tav_jax.runs.samples import (
    Frames,
    default_sample,
    has_overview,
    is_done,
    write_overview,
    write_samples,
)
from tav_jax.training.checkpoints import latest_step, restore_state, save_checkpoint
from tav_jax.training.memory import (
    Alternative,
    DoesNotFitError,
    Plan,
    Size,
    compile_plan,
    device_bytes,
    fitting_preset,
)
from tav_jax.training.optimizer import label_params, make_lr_schedule, make_optimizer
from tav_jax.training.train_step import (
    TrainState,
    check_movement,
    fingerprints,
    init_state,
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


def tune(config: TuneConfig, programs: Programs | None = None) -> None:
    """Runs one config from wherever it stands to its end.

    Args:
        programs: Tuning steps compiled before, which a run of the same shapes takes, and to which
            it adds its own.
    """
    config = with_absolute_paths(config)
    mesh = mesh_of(config)
    if mesh.size > 1:
        say(f"mesh: {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}")
    with on_mesh(mesh):
        _tune(config, {} if programs is None else programs)


def _tune(config: TuneConfig, programs: Programs) -> None:
    stages = Stages()
    run = claim_folder(config)
    with stages("read"):
        frames = read_clip(config)
    with stages("load"):
        model = load_base(config)
    labels = label_params(model.unet.params, config.trainable_modules)
    trained_names = [name for name, label in labels.items() if label == "train"]
    tokenize(model, [config.train_data.prompt, *config.validation_data.prompts])  # warns early

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
    state = laid(init_state(model.unet, optimizer, jax.random.key(config.seed)))
    state = resume(run, config, state, trained_names)
    start, end = int(state.step), config.max_train_steps
    if start >= end and latest_step(run.checkpoints) is None:
        raise UserError(
            f"resume_from_checkpoint: {config.resume_from_checkpoint} has step {start} already; "
            f"max_train_steps is {end}, set it higher"
        )
    if start < end:
        with stages("encode"):
            moments = encode_frames(model, frames)
            context = encode_prompts(model, [config.train_data.prompt])
            moments, context = jax.block_until_ready(
                tuple(
                    jnp.repeat(one, config.train_batch_size, axis=0) for one in (moments, context)
                )
            )
        # Nothing of these is needed in the steps: they wait in the host's memory.
        model = replace(
            model, vae=gather_to_host(model.vae), text_encoder=gather_to_host(model.text_encoder)
        )
        step_fn = compile_train_step(
            model.vae.config.scaling_factor,
            optimizer=optimizer,
            labels=labels,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        )
        inputs = moments, context, model.schedule
        with stages("compile"):
            alike = step_settings(config)
            if alike not in programs:
                programs[alike] = fitting_program(config, step_fn, state, inputs)
            preset, program = programs[alike]
            state = state._replace(unet=state.unet.with_config(gradient_checkpointing=preset))
    record_config(run, config)
    if start and is_validated(config, start):
        # A run that was stopped between a checkpoint and its samples still owes them.
        validate(run, config, model.with_unet(state.unet), start, frames, stages)
    if start >= end:
        say(f"{run.folder}: done, {start} of {end} steps")
        return

    if is_main_process():
        keep_metrics(run.metrics, start)
    written = run.metrics if is_main_process() else Path(os.devnull)
    with written.open("a", buffering=1) as metrics_file:
        before = fingerprint(state.unet.params)
        check_at = min(start + STEPS_BEFORE_CHECK, end)

        count = sum(state.unet.params[name].size for name in trained_names)
        say(f"tuning {count:,} parameters on {len(frames)} frames, steps {start + 1} to {end}")
        # A log file gets a line now and then, a terminal a moving bar.
        interval = 0.1 if sys.stderr.isatty() else 30.0
        unseen: list[dict] = []
        unseen_at_most, began = 1, time.perf_counter()
        with tqdm(
            desc="tuning", initial=start, total=end, mininterval=interval, miniters=1
        ) as progress:
            for step in range(start + 1, end + 1):
                state, metrics = program(state, *inputs)
                unseen.append(metrics | {"step": step, "lr": float(learning_rate(step - 1))})
                checkpointed = step == end or step % config.checkpointing_steps == 0
                pause = step == check_at or checkpointed or is_validated(config, step)
                if not pause and len(unseen) < unseen_at_most:
                    continue
                jax.block_until_ready(metrics)
                stages.add("tune", time.perf_counter() - began)
                seconds = (time.perf_counter() - began) / len(unseen)
                log(metrics_file, unseen, seconds)
                progress.update(len(unseen))
                unseen, unseen_at_most = [], max(1, min(MOST_STEPS_UNSEEN, int(1 / seconds)))
                if step == check_at:
                    after = fingerprint(state.unet.params)
                    check_movement(before, after, labels, config.trainable_modules)
                if checkpointed:
                    with stages("checkpoint"):
                        save_checkpoint(run.checkpoints, state, trained_names)
                    say(f"wrote {run.checkpoint(step)}")
                if is_validated(config, step):
                    validate(run, config, model.with_unet(state.unet), step, frames, stages)
                if pause:
                    log_stages(metrics_file, step, stages)
                began = time.perf_counter()


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
    """Returns a config without what the tuning step's program does not depend on."""
    return replace(
        config,
        output_dir="",
        train_data=replace(config.train_data, video_path="", prompt=""),
        validation_data=ValidationData(),
        resume_from_checkpoint=None,
        seed=0,
    )


def tune_all(configs: Sequence[TuneConfig]) -> None:
    """Runs configs one after another; those of the same shapes share one compiled step.

    Raises:
        ValueError: some cannot begin, in which case none does; lists all.
        NotLearningError: some have not learnt; the others are done.
    """
    problems = []
    for config in configs:
        try:
            claim_folder(with_absolute_paths(config))
            read_clip(config)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    programs: Programs = {}
    failures = []
    for number, config in enumerate(configs, 1):
        say(f"clip {number} of {len(configs)}: {config.train_data.prompt} -> {config.output_dir}")
        try:
            tune(config, programs)
        except NotLearningError as error:
            failures.append(f"{config.output_dir}: {error}")
    if failures:
        raise NotLearningError("\n".join(failures))


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


def log(file: TextIO, steps: Sequence[dict], seconds: float) -> None:
    """Writes a line a step, their mean time with each; raises NotLearningError at no number."""
    for metrics in steps:
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        line = {"step": metrics["step"], "loss": loss, "grad_norm": grad_norm}
        line |= {"lr": metrics["lr"], "seconds": round(seconds, 4)}
        broken = [name for name, value in line.items() if not np.isfinite(value)]
        file.write(json.dumps(line | dict.fromkeys(broken)) + "\n")  # JSON has no NaN
        if broken:
            raise NotLearningError(
                f"step {line['step']}: loss {loss}, grad_norm {grad_norm}; lower learning_rate, or "
                "mixed_precision: no, and start from the last checkpoint"
            )


def log_stages(file: TextIO, step: int, stages: Stages) -> None:
    """Writes where the time went since this was last written, a line a stage."""
    for stage, seconds in stages.taken().items():
        file.write(json.dumps({"step": step, "stage": stage, "seconds": seconds}) + "\n")


def validate(
    run: RunFolder, config: TuneConfig, model: Model, step: int, source: Frames, stages: Stages
) -> None:
    """Samples the validation prompts with the model as it is now."""
    default = default_sample(config, step)
    folder, suffix = run.samples(step), config.validation_data.video_format
    samples = [replace(default, prompt=prompt) for prompt in config.validation_data.prompts]
    done = broadcast_from_main([is_done(sample, folder, suffix) for sample in samples])
    samples = [sample for sample, is_there in zip(samples, done, strict=True) if not is_there]
    if not samples and (has_overview(folder) or not config.validation_data.prompts):
        return
    paths = write_samples(
        model,
        config,
        samples,
        lambda num_inv_steps: inverted_clip(run, config, model, step, num_inv_steps),
        folder,
        stages,
    )
    for path in paths:
        say(f"wrote {path}")
    if is_main_process():
        with stages("write"):
            overview = write_overview(folder, config, source)
        for path in overview:
            say(f"wrote {path}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tav_jax.tune",
        description="Tune a text-to-image model on one captioned clip and sample edits of it. "
        "Run again, the same command goes on from the last checkpoint.",
        epilog="example: python -m tav_jax.tune --config configs/man-skiing.yaml "
        "max_train_steps=300 train_data.n_sample_frames=8",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML; see configs/")
    parser.add_argument(
        "--clips", metavar="FILE", help="YAML: a list of runs, each of the keys in which it differs"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the file's values")
    args = parser.parse_args(argv)
    distributed.start()
    if args.clips:
        configs, notes = load_clips(args.config, args.clips, args.overrides)
    else:
        config, notes = load_config(args.config, args.overrides)
    for note in notes:
        say(f"note: {note}")
    if args.clips:
        tune_all(configs)
    else:
        tune(config)


if __name__ == "__main__":
    sys.exit(main())
