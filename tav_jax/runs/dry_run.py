"""What a run would do, found out without writing anything: `tune --dry-run`."""

import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import jax

from tav_jax.errors import DamagedError
from tav_jax.models.compute import GradientCheckpointing
from tav_jax.runs.config import TuneConfig
from tav_jax.runs.run import Run
from tav_jax.runs.tuning import Programs, Tuning, draws_per_update, is_validated, prepare
from tav_jax.text import shorten
from tav_jax.training.checkpoints import checkpoint_damage, saved_steps
from tav_jax.training.memory import device_bytes, planned_bytes
from tav_jax.training.optimizer import select

MEASURED_STEPS = 2
MOST_NAMED = 10  # frames or steps that are listed before the list is cut
# Of a training step, in passes through the U-Net. The backward pass takes twice a forward pass's
# work, and gradient checkpointing computes most of the forward pass again.
PASSES_OF_STEP = {"none": 3, "blocks": 4, "full": 4}


def describe_plan(run: Run, programs: Programs) -> Iterator[str]:
    """Yield lines about what `tune` would do with a run. Nothing is written.

    The step is compiled, and runs `MEASURED_STEPS` times on the clip.

    Args:
        run: New, or to be resumed. Its mesh must be in use, see `on_mesh`.
        programs: See `prepare`.

    Raises:
        UserError: The run could not begin, for the reasons that `tune` would give.
    """
    check_checkpoints(run)
    yield describe_clip(run)
    tuning = prepare(run, programs)
    start = tuning.start
    yield describe_parameters(tuning)
    if start < tuning.end:
        yield describe_memory(tuning)
        yield from describe_time(run.config, start, measure_step(tuning), used_preset(tuning))
    else:
        yield f"time: all {tuning.end} steps are done"
    yield from describe_files(run, start)


def check_checkpoints(run: Run) -> None:
    """Raise `DamagedError` if a checkpoint is damaged, which `tune` would move aside."""
    damaged = {
        step: damage
        for step in saved_steps(run.checkpoints)
        if (damage := checkpoint_damage(run.checkpoint(step)))
    }
    if damaged:
        listed = "; ".join(f"{run.checkpoint(step)} ({why})" for step, why in damaged.items())
        raise DamagedError(f"damaged: {listed}. Without --dry-run they are moved aside")


def describe_clip(run: Run) -> str:
    """Return which frames of the clip are used."""
    data = run.config.train_data
    return (
        f"clip: {data.video_path}: frames {_list(run.frame_indices())}, as {data.width}x"
        f"{data.height} ({data.fit}), {run.fps:g} a second; caption: "
        f"{shorten(data.prompt, 200)}"
    )


def describe_parameters(tuning: Tuning) -> str:
    """Return how many parameters train, of each of the modules that the config names."""
    params = tuning.state.unet.params
    trained = select(params, tuning.labels, "train")
    sizes: Counter[str] = Counter()
    for name, value in trained.items():
        module = next(m for m in tuning.run.config.trainable_modules if f".{m}." in f".{name}.")
        sizes[module] += value.size
    total = sum(value.size for value in params.values())
    parts = ", ".join(f"{module} {size:,}" for module, size in sizes.items())
    return f"trained: {sum(sizes.values()):,} of the U-Net's {total:,} parameters: {parts}"


def used_preset(tuning: Tuning) -> GradientCheckpointing:
    """Return what the compiled step keeps for its backward pass."""
    return tuning.state.unet.compute.gradient_checkpointing


def describe_memory(tuning: Tuning) -> str:
    """Return what the compiled step needs of each device's memory, and what there is."""
    assert tuning.program is not None
    needed, limit = planned_bytes(tuning.program), device_bytes()
    kind = jax.local_devices()[0].device_kind
    return (
        f"memory: a step needs {needed / 1e9:.2f} of {limit / 1e9:.0f} GB ({kind}), with "
        f"gradient_checkpointing={used_preset(tuning)}"
    )


def describe_time(
    config: TuneConfig, start: int, seconds: float, preset: GradientCheckpointing
) -> Iterator[str]:
    """Yield how long tuning will take, as measured, and sampling, as concluded from it.

    Args:
        config: The run's settings.
        start: Steps that are done.
        seconds: Time of a step.
        preset: What a step keeps for its backward pass.
    """
    end, validation = config.max_train_steps, config.validation_data
    yield (
        f"time of tuning: {_duration((end - start) * seconds)}: {end - start} steps of "
        f"{seconds:.2g} s (the mean of {MEASURED_STEPS})"
    )
    if not validation.prompts:
        return
    one_pass = seconds / PASSES_OF_STEP[preset] / draws_per_update(config)
    guided = 2 if validation.guidance_scale > 1 else 1
    passes = len(validation.prompts) * validation.num_inference_steps * guided
    passes += validation.num_inv_steps if validation.use_inv_latent else 0
    times = sum(is_validated(config, step) for step in range(start + 1, end + 1))
    yield (
        f"time of sampling: about {_duration(times * passes * one_pass)}, concluded from that: "
        f"{times} times {passes} passes through the U-Net for {len(validation.prompts)} prompts"
    )


def measure_step(tuning: Tuning) -> float:
    """Return the seconds of a training step. `tuning` goes on by `MEASURED_STEPS` + 1 steps."""
    assert tuning.program is not None
    for step in range(MEASURED_STEPS + 1):
        if step == 1:  # the first may still be loading the program
            began = time.perf_counter()
        tuning.state, _ = jax.block_until_ready(tuning.program(tuning.state, *tuning.inputs))
    return (time.perf_counter() - began) / MEASURED_STEPS


def describe_files(run: Run, start: int) -> Iterator[str]:
    """Yield what would be written."""
    config, steps = run.config, range(start + 1, run.config.max_train_steps + 1)
    saved = [
        step
        for step in steps
        if step == config.max_train_steps or step % config.checkpointing_steps == 0
    ]
    validated = [step for step in steps if is_validated(config, step)]
    yield f"writes: {run.config_file}, inputs.json and metrics.jsonl beside it"
    if saved:
        yield f"writes: {run.checkpoints}/STEP for {_list(saved)}"
    if config.validation_data.prompts and validated:
        folder = Path(run.samples(0)).with_name("sample-STEP")
        count, kind = len(config.validation_data.prompts), config.validation_data.video_format
        yield f"writes: {folder} for {_list(validated)}: {count} {kind} videos and contact sheets"
    if config.validation_data.use_inv_latent and config.validation_data.prompts and validated:
        yield f"writes: {run.inverted_file(0).parent}: the inverted clip of each of these steps"


def _list(numbers: list[int]) -> str:
    if len(numbers) <= MOST_NAMED:
        return ", ".join(map(str, numbers))
    first = ", ".join(map(str, numbers[: MOST_NAMED - 2]))
    return f"{first}, ... {numbers[-1]} ({len(numbers)} in all)"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else str(timedelta(seconds=round(seconds)))
