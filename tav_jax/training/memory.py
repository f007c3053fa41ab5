"""Device memory: what a program needs, what there is, and what would fit."""

import math
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from tav_jax.errors import UserError
from tav_jax.models.compute import GradientCheckpointing

# From the fastest to the one that needs least memory.
PRESETS: tuple[GradientCheckpointing, ...] = ("none", "blocks", "full")
SIDE_STEP = 64  # pixels; every level of the published networks halves such sides evenly


class Size(NamedTuple):
    """Frames of a clip, and their height and width in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.width}x{self.height}"


class Plan(NamedTuple):
    """A compiled program and the memory it needs.

    Args:
        program: None if the compiler refuses it for lack of memory.
        bytes: What it needs on each device; infinite if the compiler refuses it.
        fixed: The part of `bytes` that its arguments take, which a smaller clip does not save.
    """

    program: Any
    bytes: float
    fixed: float = 0.0

    def fits(self, limit: float) -> bool:
        """Tell whether the compiler takes the program and it needs no more than `limit` bytes."""
        return self.program is not None and self.bytes <= limit


class Alternative(NamedTuple):
    """A preset and a size of clip that fit into memory together."""

    preset: GradientCheckpointing
    size: Size


class DoesNotFitError(UserError):
    """A program that needs more memory than there is.

    The message states the problem. Each command has its own flags or keys for presets and sizes, so
    it describes the alternatives itself, see `with_advice`.

    Attributes:
        preset: Of the presets that were allowed, the one that needs least memory.
        size: The size of clip that was asked for.
        needed: Bytes that they need, or None if the compiler refuses and does not say.
        limit: Bytes there are; infinite if only the compiler knows.
        alternatives: What would fit.
    """

    def __init__(
        self,
        preset: GradientCheckpointing,
        size: Size,
        *,
        needed: float | None,
        limit: float,
        alternatives: Sequence[Alternative],
    ):
        needs = "more" if needed is None else f"{needed / 1e9:.1f} GB"
        there = "than the device has" if math.isinf(limit) else f"there are {limit / 1e9:.1f} GB"
        joint = " " if math.isinf(limit) else ", "
        super().__init__(
            f"memory: {size} with gradient_checkpointing={preset} need {needs}{joint}{there}"
        )
        self.preset, self.size, self.needed, self.limit = preset, size, needed, limit
        self.alternatives = tuple(alternatives)

    def with_advice(self, describe: Callable[[Alternative, Size], str]) -> UserError:
        """Return the same error with the alternatives in its message.

        Args:
            describe: Returns an alternative as a command's flags or keys, given the alternative
                and the size that was asked for.
        """
        ways = [describe(alternative, self.size) for alternative in self.alternatives]
        advice = f"what fits: {', or '.join(ways)}" if ways else "no smaller clip fits either"
        return UserError(f"{self}; {advice}")


def planned_bytes(program: jax.stages.Compiled) -> int:
    """Return the bytes that the compiler plans per device: arguments, results and temporaries."""
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
    """Return the bytes that JAX may use of the first device; on a CPU, the machine's memory."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes() -> int:
    """Return the most memory used so far: of the first device or, on a CPU, of the process."""
    memory = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        return memory["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def compile_plan(compile: Callable[[], jax.stages.Compiled]) -> Plan:
    """Compile a program and return its plan, also if the compiler lacks memory for it.

    Args:
        compile: Returns the compiled program.
    """
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
    """Return the fastest preset that fits into memory, and its program.

    Args:
        plan: Compiles the program for a preset and a size of clip.
        wanted: The only preset allowed; None allows all.
        size: Size of the clip.
        limit: Bytes that a program may need; infinite if only the compiler knows.

    Raises:
        DoesNotFitError: No allowed preset fits. The error has the alternatives.
    """
    allowed = PRESETS if wanted is None else (wanted,)
    for preset in allowed:
        planned = plan(preset, size)
        if planned.fits(limit):
            return preset, planned.program
    raise DoesNotFitError(
        allowed[-1],
        size,
        needed=None if planned.program is None else planned.bytes,
        limit=limit,
        alternatives=list(_find_alternatives(plan, allowed[-1], size, limit)),
    )


def _find_alternatives(
    plan: Callable[[GradientCheckpointing, Size], Plan],
    refused: GradientCheckpointing,
    size: Size,
    limit: float,
) -> Iterator[Alternative]:
    """Yield a preset that fits at this size, or else fewer frames and smaller frames that fit."""
    for preset in PRESETS[PRESETS.index(refused) + 1 :]:
        if plan(preset, size).fits(limit):
            yield Alternative(preset, size)
            return
    preset = PRESETS[-1]
    least = plan(preset, size)
    # Memory grows roughly in proportion to the number of pixels.
    share = 0.5 if least.program is None else (limit - least.fixed) / (least.bytes - least.fixed)
    if share <= 0:
        return
    # In case memory falls more slowly than that, smaller shares are tried too.
    shares = share, 0.8 * share, 0.5 * share
    for candidates in (
        [_fewer_frames(size, share) for share in shares],
        [_smaller_sides(size, share) for share in shares],
    ):
        for candidate in candidates:
            if all(candidate) and plan(preset, candidate).fits(limit):
                yield Alternative(preset, candidate)
                break


def _fewer_frames(size: Size, share: float) -> Size:
    return size._replace(frames=int(size.frames * share))


def _smaller_sides(size: Size, share: float) -> Size:
    """Return the size with `share` of its pixels or fewer, its sides multiples of `SIDE_STEP`."""
    height, width = (
        int(side * math.sqrt(share)) // SIDE_STEP * SIDE_STEP for side in (size.height, size.width)
    )
    return Size(size.frames, height, width)
