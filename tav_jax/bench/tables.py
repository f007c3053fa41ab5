"""Results as JSON for programs, as a table for people, and as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tav_jax.bench.cards import GpuWork
from tav_jax.bench.measure import ProgramResult, SettingResult
from tav_jax.bench.profile import LARGEST, Profile


def to_json(result: SettingResult) -> dict[str, Any]:
    """Return the metrics of a setting under the keys that `--json` prints."""
    size, scope, _ = result.setting
    row: dict[str, Any] = size._asdict() | {"attention_scope": scope, "attention": result.attention}
    for program in result.programs:
        row |= _program_to_json(program)
    compile_seconds = {program.name: program.compile_seconds for program in result.programs}
    row["compile_s"] = round(sum(compile_seconds.values()), 3)
    row["compile_s_each"] = {name: round(took, 3) for name, took in compile_seconds.items()}
    row["planned_bytes"] = max(program.planned_bytes for program in result.programs)
    if result.peak_bytes is not None:
        row["peak_bytes"] = result.peak_bytes
    return row


def _program_to_json(program: ProgramResult) -> dict[str, Any]:
    row: dict[str, Any] = {}
    if program.gradient_checkpointing is not None:
        row["gradient_checkpointing"] = program.gradient_checkpointing
    metrics: dict[str, Any] = {"planned_bytes": program.planned_bytes}
    if program.collective_bytes:
        metrics["collective_bytes"] = program.collective_bytes
    metrics["tflop"] = round(program.flops / 1e12, 4)
    if program.seconds is not None and program.flops_per_second is not None:
        metrics["ms"] = round(1000 * program.seconds, 3)
        metrics["tflops"] = round(program.flops_per_second / 1e12, 4)
    if program.gpu is not None:
        moved = program.gpu.moved_bytes
        metrics |= {"kernels": program.gpu.kernels, "moved_bytes": sum(moved.values())}
        metrics |= {f"moved_bytes_{kind}": size for kind, size in moved.items()}
        metrics["floor_ms"] = round(1000 * program.gpu.floor_seconds, 3)
    if program.profile is not None:
        metrics["profile"] = _profile_to_json(program.profile)
    return row | {f"{program.name}_{metric}": value for metric, value in metrics.items()}


def _profile_to_json(profile: Profile) -> dict[str, Any]:
    return {
        "ms": round(1000 * profile.seconds, 3),
        "busy_ms": round(1000 * profile.busy_seconds, 3),
        "ms_by_kind": {
            kind: round(1000 * seconds, 3) for kind, seconds in profile.seconds_by_kind().items()
        },
        "largest": [
            {
                "name": operation.name,
                "kind": operation.kind,
                "runs": round(operation.runs, 1),
                "ms": round(1000 * operation.seconds, 3),
                "share": round(operation.seconds / profile.busy_seconds, 4),
            }
            for operation in profile.operations[:LARGEST]
        ],
    }


def table(results: Sequence[SettingResult], matmul_rate: float | None) -> str:
    """Return a table for people: a block for each setting, a line for each program.

    Args:
        results: One for each setting.
        matmul_rate: Operations per second of a large matrix product, to compare with.
    """
    lines = []
    for result in results:
        size, scope, _ = result.setting
        attention = ", ".join(f"{grid} {name}" for grid, name in result.attention.items())
        lines.append(
            f"{size}, {scope}, gradient_checkpointing {result.gradient_checkpointing or '-'}; "
            f"attention: {attention}"
        )
        lines.append(
            f"  {'':15} {'compile s':>10} {'ms':>10} {'TFLOP':>9} {'TFLOP/s':>9} "
            f"{'of matmul':>10} {'planned GB':>11}"
        )
        lines += [_program_line(program, matmul_rate) for program in result.programs]
        for program in result.programs:
            if kinds := program.collective_bytes:
                each = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in sorted(kinds.items()))
                lines.append(f"  {program.name:15} MB from other devices: {each}")
        lines += [
            _gpu_line(program.name, program.gpu) for program in result.programs if program.gpu
        ]
        for program in result.programs:
            lines += _profile_lines(program.name, program.profile) if program.profile else []
        if result.peak_bytes is not None:
            lines.append(f"  peak so far {result.peak_bytes / 1e9:.2f} GB")
    return "\n".join(lines)


def _program_line(program: ProgramResult, matmul_rate: float | None) -> str:
    milliseconds, rate, share = "-", "-", "-"
    if program.seconds is not None and program.flops_per_second is not None:
        milliseconds = f"{1000 * program.seconds:.3f}"
        rate = f"{program.flops_per_second / 1e12:.4f}"
        if matmul_rate:
            share = f"{program.flops_per_second / matmul_rate:.0%}"
    return (
        f"  {program.name:15} {program.compile_seconds:10.1f} {milliseconds:>10} "
        f"{program.flops / 1e12:9.3f} {rate:>9} {share:>10} {program.planned_bytes / 1e9:11.2f}"
    )


def _gpu_line(name: str, work: GpuWork) -> str:
    moved = work.moved_bytes
    kinds = ", ".join(f"{kind.replace('_', ' ')} {size / 1e9:.2f}" for kind, size in moved.items())
    return (
        f"  {name:15} {work.kernels} kernels move {sum(moved.values()) / 1e9:.2f} GB "
        f"({kinds}), floor {1000 * work.floor_seconds:.2f} ms"
    )


def _profile_lines(name: str, profile: Profile) -> list[str]:
    kinds = ", ".join(
        f"{kind.replace('_', ' ')} {1000 * seconds:.2f}"
        for kind, seconds in profile.seconds_by_kind().items()
    )
    first = (
        f"  {name:15} traced: a run takes {1000 * profile.seconds:.2f} ms, its operations together "
        f"{1000 * profile.busy_seconds:.2f} ms ({kinds}); those that take longest:"
    )
    return [first] + [
        f"  {'':15} {1000 * operation.seconds:10.3f} ms "
        f"{operation.seconds / profile.busy_seconds:5.1%} {operation.runs:6.0f} x {operation.name}"
        for operation in profile.operations[:LARGEST]
    ]


def plot(results: Sequence[SettingResult], path: Path) -> None:
    """Write a plot of milliseconds against frames: a panel for each program, a line for each scope.

    Args:
        results: Of settings that were run, with the same programs.
        path: Image file to write; its folder is made.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [program.name for program in results[0].programs]
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(5 * len(names), 3.6), squeeze=False, layout="constrained"
    )
    first = results[0].setting.size
    for index, (panel, name) in enumerate(zip(panels[0], names, strict=True)):
        for scope in dict.fromkeys(result.setting.attention_scope for result in results):
            line = [result for result in results if result.setting.attention_scope == scope]
            frames = [result.setting.size.frames for result in line]
            times = [1000 * (result.programs[index].seconds or 0) for result in line]
            panel.plot(frames, times, marker="o", label=scope)
            panel.set_xticks(frames)
        panel.set_title(f"{name}, {first.width}x{first.height} pixels")
        panel.set_xlabel("frames")
        panel.set_ylabel("ms")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
