"""Compile and time the programs of one setting."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tav_jax.bench.attention import chosen_attention
from tav_jax.bench.cards import GpuWork
from tav_jax.bench.gpu_hlo import read_kernels
from tav_jax.bench.hlo import collective_bytes
from tav_jax.bench.profile import Profile, profile_program
from tav_jax.bench.programs import PROGRAMS, Networks, Program, tune_step_program
from tav_jax.bench.topology import Target
from tav_jax.models.attention.dispatch import AttentionScope
from tav_jax.models.compute import GradientCheckpointing
from tav_jax.training.memory import (
    Plan,
    Size,
    compile_plan,
    device_bytes,
    fitting_preset,
    peak_bytes,
    planned_bytes,
)

# Sides of a square matrix whose product takes so long that starting it costs nothing beside it.
MATRIX_SIDE = {"cpu": 1024, "gpu": 8192, "tpu": 8192}


class Setting(NamedTuple):
    """What is measured: one block of a table.

    Args:
        gradient_checkpointing: A preset, or "auto" for the fastest that fits.
    """

    size: Size
    attention_scope: AttentionScope
    gradient_checkpointing: str


@dataclass(frozen=True)
class ProgramResult:
    """Metrics of one program.

    Args:
        name: A key of `PROGRAMS`.
        compile_seconds: Time to compile it, with the presets that did not fit.
        flops: Operations of one run as the method defines it.
        planned_bytes: Memory that the compiler plans on each device.
        collective_bytes: Bytes that a device receives from others in one run, by kind.
        gradient_checkpointing: The preset it is compiled with; None without a backward pass.
        seconds: Median time of one run; None if it is only compiled.
        gpu: Work of its kernels, if it is compiled for a GPU that is not here.
        profile: Where its time goes, if it was traced.
    """

    name: str
    compile_seconds: float
    flops: int
    planned_bytes: int
    collective_bytes: dict[str, int]
    gradient_checkpointing: GradientCheckpointing | None
    seconds: float | None
    gpu: GpuWork | None = None
    profile: Profile | None = None

    @property
    def flops_per_second(self) -> float | None:
        """Return operations per second; None if the program is only compiled."""
        return None if self.seconds is None else self.flops / self.seconds


@dataclass(frozen=True)
class SettingResult:
    """Metrics of all programs of one setting.

    Args:
        setting: What was asked for.
        attention: Implementation of attention between frames, by grid of latents.
        programs: In the order in which they were asked for.
        peak_bytes: Most memory that this process has used so far; None if nothing was run.
    """

    setting: Setting
    attention: dict[str, str]
    programs: tuple[ProgramResult, ...]
    peak_bytes: int | None

    @property
    def gradient_checkpointing(self) -> GradientCheckpointing | None:
        """Return the preset of the program that has one; None if none has."""
        presets = (program.gradient_checkpointing for program in self.programs)
        return next((preset for preset in presets if preset is not None), None)


def measure(
    networks: Networks,
    setting: Setting,
    names: Sequence[str],
    *,
    repeats: int,
    target: Target | None = None,
    hlo_folder: Path | None = None,
    profile_folder: Path | None = None,
) -> SettingResult:
    """Compile the programs of one setting for the current mesh, and time them.

    Args:
        networks: What is measured; `setting` replaces their scope and preset.
        setting: Size, scope and preset.
        names: Keys of `PROGRAMS`.
        repeats: Timed runs of each program, from 1.
        target: The devices of the mesh, if they are not here; then nothing is run.
        hlo_folder: Where to write each compiled program, as `NAME.hlo`.
        profile_folder: Where to write a trace of each program, into a folder of its name.

    Raises:
        DoesNotFitError: no preset of gradient checkpointing that is allowed fits.
    """
    networks = networks.with_unet_config(attention_scope=setting.attention_scope)
    attention = chosen_attention(networks, setting.size)
    programs = [
        measure_program(
            networks,
            setting,
            name,
            repeats=repeats,
            target=target,
            hlo_folder=hlo_folder,
            profile_folder=profile_folder,
        )
        for name in names
    ]
    return SettingResult(setting, attention, tuple(programs), None if target else peak_bytes())


def measure_program(
    networks: Networks,
    setting: Setting,
    name: str,
    *,
    repeats: int,
    target: Target | None,
    hlo_folder: Path | None,
    profile_folder: Path | None,
) -> ProgramResult:
    """Compile one program, and time it if its devices are here; see `measure`."""
    began = time.perf_counter()
    preset = None
    if name == "tune_step":
        preset, program, compiled = compile_tune_step(networks, setting, target)
    else:
        # Nothing else has a backward pass to keep activations for.
        plain = networks.with_unet_compute(gradient_checkpointing="none")
        program = PROGRAMS[name](plain, setting.size)
        compiled = program.compile(target.compiler_options if target else None)
    compile_seconds = time.perf_counter() - began
    hlo = compiled.as_text() or ""  # written once: it is megabytes of text
    if hlo_folder:
        hlo_folder.mkdir(parents=True, exist_ok=True)
        (hlo_folder / f"{name}.hlo").write_text(hlo, encoding="utf-8")
    card = target.card if target else None
    return ProgramResult(
        name,
        compile_seconds=compile_seconds,
        flops=program.flops(),
        planned_bytes=planned_bytes(compiled),
        collective_bytes=collective_bytes(hlo),
        gradient_checkpointing=preset,
        seconds=None if target else time_program(program, compiled, repeats),
        gpu=card.work(read_kernels(hlo)) if card else None,
        profile=(
            profile_program(program, compiled, profile_folder / name) if profile_folder else None
        ),
    )


def compile_tune_step(
    networks: Networks, setting: Setting, target: Target | None = None
) -> tuple[GradientCheckpointing, Program, jax.stages.Compiled]:
    """Return the preset of the setting, or the fastest that fits, and the step compiled with it.

    Args:
        networks: What is measured; the preset replaces theirs.
        setting: Has the size and the preset.
        target: The devices of the mesh, if they are not here.
    """
    limit = target.memory_limit if target else float(device_bytes())
    options = target.compiler_options if target else None

    def make(preset: GradientCheckpointing, size: Size) -> Program:
        return tune_step_program(networks.with_unet_compute(gradient_checkpointing=preset), size)

    def plan(preset: GradientCheckpointing, size: Size) -> Plan:
        return compile_plan(lambda: make(preset, size).compile(options))

    asked: Any = setting.gradient_checkpointing
    preset, compiled = fitting_preset(plan, None if asked == "auto" else asked, setting.size, limit)
    return preset, make(preset, setting.size), compiled


def time_program(program: Program, compiled: jax.stages.Compiled, repeats: int) -> float:
    """Return the median seconds of `repeats` runs, after one that is not counted."""
    runs = program.runs(compiled)
    next(runs)  # not counted: it also makes the inputs
    return statistics.median(_seconds(lambda: next(runs)) for _ in range(repeats))


def measure_matmul(dtype: str) -> float:
    """Return the operations per second of a large matrix product, the best of five runs."""
    side = MATRIX_SIDE.get(jax.default_backend(), 4096)
    square = jnp.ones((side, side), dtype)
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(square, square))
    return 2 * side**3 / min(_seconds(lambda: multiply(square, square)) for _ in range(5))


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began
