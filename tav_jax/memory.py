"""Device memory as a promise: what a program will take, what there is, and what would fit."""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from tav_jax.models.unet import GradientCheckpointing

# From the fastest to the thriftiest.
PRESETS: tuple[GradientCheckpointing, ...] = ("none", "blocks", "full")
SIDE_STEP = 64  # pixels: sides that every level of the published networks halves evenly


class Size(NamedTuple):
    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.width}x{self.height}"


class Plan(NamedTuple):
    """A compiled program and the bytes it needs, its arguments included; None if none fits."""

    program: Any
    bytes: float


def planned_bytes(program: jax.stages.Compiled) -> int:
    """Returns the bytes that the compiler plans on each device: arguments, results, the rest."""
    memory = program.memory_analysis()
    if memory is None:
        raise ValueError("memory: this compiler does not say what a program needs")
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def device_bytes() -> int:
    """Returns the bytes that JAX may use of the first device; on a CPU, the machine's memory."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compile_plan(compile: Callable[[], jax.stages.Compiled]) -> Plan:
    """Returns the plan of what `compile` gives; of endless bytes if the compiler refuses it."""
    try:
        program = compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Plan(None, float("inf"))
    return Plan(program, planned_bytes(program))


def fitting_preset(
    plan: Callable[[GradientCheckpointing, Size], Plan],
    wanted: GradientCheckpointing | None,
    size: Size,
    limit: float,
) -> tuple[GradientCheckpointing, Any]:
    """Returns the fastest preset that fits into memory, with its program.

    Args:
        plan: Compiles for a preset and a size of clip.
        wanted: None leaves the choice open.
        limit: Bytes.

    Raises:
        ValueError: it does not fit; says what would.
    """
    asked = PRESETS if wanted is None else (wanted,)
    for preset in asked:
        planned = plan(preset, size)
        if planned.bytes <= limit:
            return preset, planned.program
    needs = "more" if planned.program is None else f"{planned.bytes / 1e9:.1f} GB"
    would = list(_what_fits(plan, asked[-1], size, limit))
    raise ValueError(
        f"memory: {size} with gradient_checkpointing={asked[-1]} need {needs}, there are "
        f"{limit / 1e9:.1f} GB; "
        + (f"what fits: {', or '.join(would)}" if would else "no smaller clip fits either")
    )


def _what_fits(
    plan: Callable[[GradientCheckpointing, Size], Plan],
    refused: GradientCheckpointing,
    size: Size,
    limit: float,
) -> Iterator[str]:
    for preset in PRESETS[PRESETS.index(refused) + 1 :]:
        if plan(preset, size).bytes <= limit:
            yield f"gradient_checkpointing={preset}"
            return
    thriftiest = PRESETS[-1]
    frames = {size.frames * n // 8 for n in range(1, 8)} - {0, size.frames}
    for fewer in sorted(frames, reverse=True):
        if plan(thriftiest, size._replace(frames=fewer)).bytes <= limit:
            yield f"gradient_checkpointing={thriftiest} train_data.n_sample_frames={fewer}"
            break
    for n in range(7, 0, -1):
        height, width = (side * n // 8 // SIDE_STEP * SIDE_STEP for side in size[1:])
        if not height or not width:
            return
        if plan(thriftiest, size._replace(height=height, width=width)).bytes <= limit:
            yield (
                f"gradient_checkpointing={thriftiest} train_data.width={width} "
                f"train_data.height={height}"
            )
            return
