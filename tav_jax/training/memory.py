"""Device memory as a promise: what a program will take, what there is, and what would fit."""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from tav_jax.errors import UserError
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
    """A compiled program, or None where the compiler refuses it, and the bytes it needs.

    Args:
        fixed: Those of them that no smaller clip would save: of the arguments.
    """

    program: Any
    bytes: float
    fixed: float = 0.0


def planned_bytes(program: jax.stages.Compiled) -> int:
    """Returns the bytes that the compiler plans on each device: arguments, results, the rest."""
    memory = _analysis(program)
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def _analysis(program: jax.stages.Compiled) -> Any:
    memory = program.memory_analysis()
    if memory is None:
        raise UserError("memory: this compiler does not say what a program needs")
    return memory


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
    fixed = float(_analysis(program).argument_size_in_bytes)
    return Plan(program, float(planned_bytes(program)), fixed)


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
    raise UserError(
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
    least = plan(thriftiest, size)
    # Memory grows about evenly with the number of pixels; where a plan says otherwise, try less.
    share = 0.5 if least.program is None else (limit - least.fixed) / (least.bytes - least.fixed)
    if share <= 0:
        return
    shares = share, 0.8 * share, 0.5 * share
    fewer = [size._replace(frames=int(size.frames * share)) for share in shares]
    sides = [
        [int(side * math.sqrt(share)) // SIDE_STEP * SIDE_STEP for side in size[1:]]
        for share in shares
    ]
    smaller = [Size(size.frames, *each) for each in sides]
    for sizes, keys in (
        (fewer, "n_sample_frames={0}"),
        (smaller, "height={1} train_data.width={2}"),
    ):
        for tried in sizes:
            if all(tried) and plan(thriftiest, tried).bytes <= limit:
                yield f"gradient_checkpointing={thriftiest} train_data.{keys.format(*tried)}"
                break
