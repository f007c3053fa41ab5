"""python -m tav_jax.bench: what the method costs here, or on a TPU that is not here."""

import argparse
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tav_jax.bench.hlo import collective_bytes
from tav_jax.bench.programs import (
    NETWORKS,
    Networks,
    Program,
    chosen_attention,
    load_networks,
    make_programs,
    random_networks,
)
from tav_jax.console import command, say
from tav_jax.errors import UserError
from tav_jax.models.attention.dispatch import AttentionImplementation, AttentionScope
from tav_jax.parallel.sharding import make_mesh, on_mesh
from tav_jax.runs.config import parse_mesh
from tav_jax.training.memory import (
    PRESETS,
    Plan,
    Size,
    compile_plan,
    device_bytes,
    fitting_preset,
    planned_bytes,
)

PROGRAMS = ("tune_step", "guided_step", "inversion_step", "encode", "decode")
# Both are large enough that starting them costs nothing beside them.
MATRIX_SIDE = {"cpu": 1024, "gpu": 8192, "tpu": 8192}


class Setting(NamedTuple):
    """One line of a table: what is measured."""

    size: Size
    attention_scope: AttentionScope
    gradient_checkpointing: str


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def matrix_rate(dtype: str) -> float:
    """Returns the operations a second of a large matrix product, the best of five."""
    side = MATRIX_SIDE.get(jax.default_backend(), 4096)
    square = jnp.ones((side, side), dtype)
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(square, square))
    return 2 * side**3 / min(seconds(lambda: multiply(square, square)) for _ in range(5))


def time_program(program: Program, compiled: jax.stages.Compiled, repeats: int) -> float:
    """Returns the median seconds of a run, after a first that is not counted."""
    inputs = program.inputs()
    times = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        result = jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - began)
        if program.carries:
            first = result[0] if isinstance(result, tuple) and len(result) == 2 else result
            inputs = first, *inputs[1:]
    return statistics.median(times[1:])


def used_bytes() -> int:
    """Returns the peak of memory so far, as the device says it; on a CPU, the process's."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(
    networks: Networks,
    setting: Setting,
    names: Sequence[str],
    *,
    repeats: int,
    absent: Mesh | None = None,
) -> dict[str, Any]:
    """Returns the figures of one setting, by the names that `--json` prints.

    Args:
        absent: Devices that are not here: programs are compiled for them and not run.

    Raises:
        ValueError: no preset of gradient checkpointing fits; says what would.
    """
    size = setting.size
    figures: dict[str, Any] = {
        "frames": size.frames,
        "height": size.height,
        "width": size.width,
        "attention_scope": setting.attention_scope,
    }
    factor = networks.vae.config.downsampling
    preset = setting.gradient_checkpointing
    networks = networks.with_unet_config(attention_scope=setting.attention_scope)
    figures["attention"] = chosen_attention(
        networks.unet.config, size.frames, size.height // factor, size.width // factor
    )

    def programs(preset: str, size: Size) -> dict[str, Program]:
        under = networks.with_unet_config(gradient_checkpointing=preset)
        return make_programs(under, **size._asdict(), mesh=absent)

    def plan(preset: str, size: Size) -> Plan:
        return compile_plan(programs(preset, size)["tune_step"].compile)

    # Only gradients keep anything, so only the tuning step has a preset.
    others = programs("none", size)
    compile_seconds = {}
    for name in names:
        began = time.perf_counter()
        if name == "tune_step":
            preset, compiled = fitting_preset(
                plan,
                None if preset == "auto" else preset,  # type: ignore[arg-type]
                size,
                # The compiler of a device that is not here knows its memory, and refuses by itself.
                float(device_bytes()) if absent is None else float("inf"),
            )
            figures["gradient_checkpointing"] = preset
            program = programs(preset, size)[name]
        else:
            program = others[name]
            compiled = program.compile()
        compile_seconds[name] = round(time.perf_counter() - began, 3)
        figures[f"{name}_planned_bytes"] = planned_bytes(compiled)
        if sent := collective_bytes(compiled):
            figures[f"{name}_collective_bytes"] = sent
        flops = program.flops()
        figures[f"{name}_tflop"] = round(flops / 1e12, 4)
        if absent is None:
            took = time_program(program, compiled, repeats)
            figures[f"{name}_ms"] = round(1000 * took, 3)
            figures[f"{name}_tflops"] = round(flops / took / 1e12, 4)
        del compiled  # or its memory on the device would count with the next one's
    figures["compile_s"] = round(sum(compile_seconds.values()), 3)
    figures["compile_s_each"] = compile_seconds
    figures["planned_bytes"] = max(figures[f"{name}_planned_bytes"] for name in names)
    if absent is None:
        figures["peak_bytes"] = used_bytes()
    return figures


def topology_devices(topology: str, chips: int) -> list[jax.Device]:
    """Returns the first chips of a TPU slice that is not here, to compile for.

    Args:
        topology: As in "v5e:2x2".

    Raises:
        ValueError: libtpu, which has the compiler, is not installed, or knows no such slice.
    """
    # No TPU is asked for its neighbours, and other processes may compile at the same time.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # of as many kinds as there are reasons
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--aot {topology}: {reason}; it needs pip install '.[tpu]', and a name like v5e:2x2"
        ) from None
    devices = slice_.devices
    if not 1 <= chips <= len(devices):
        raise UserError(f"--chips {chips}: {topology} has {len(devices)}")
    return devices[:chips]


def table(rows: Sequence[dict[str, Any]], names: Sequence[str], rate: float | None) -> str:
    """Returns what was measured for people: a block a setting, a line a program."""
    lines = []
    for row in rows:
        attention = ", ".join(f"{grid} {how}" for grid, how in row["attention"].items())
        lines.append(
            f"{Size(row['frames'], row['height'], row['width'])}, {row['attention_scope']}, "
            f"gradient_checkpointing {row.get('gradient_checkpointing', '-')}; "
            f"attention: {attention}"
        )
        lines.append(
            f"  {'':15} {'compile s':>10} {'ms':>10} {'TFLOP':>9} {'TFLOP/s':>9} "
            f"{'of matmul':>10} {'planned GB':>11}"
        )
        for name in names:
            speed = row.get(f"{name}_tflops")
            share = f"{1e12 * speed / rate:.0%}" if speed is not None and rate else "-"
            lines.append(
                f"  {name:15} {row['compile_s_each'][name]:10.1f} {row.get(f'{name}_ms', '-'):>10} "
                f"{row[f'{name}_tflop']:9.3f} {'-' if speed is None else speed:>9} {share:>10} "
                f"{row[f'{name}_planned_bytes'] / 1e9:11.2f}"
            )
        for name in names:
            if kinds := row.get(f"{name}_collective_bytes"):
                each = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in sorted(kinds.items()))
                lines.append(f"  {name:15} MB from other devices: {each}")
        if "peak_bytes" in row:
            lines.append(f"  peak so far {row['peak_bytes'] / 1e9:.2f} GB")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """Writes milliseconds against frames, a line a scope, a panel a program."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(names), figsize=(5 * len(names), 3.6), squeeze=False, layout="constrained"
    )
    first = rows[0]
    for panel, name in zip(panels[0], names, strict=True):
        for scope in dict.fromkeys(row["attention_scope"] for row in rows):
            line = [row for row in rows if row["attention_scope"] == scope]
            frames = [row["frames"] for row in line]
            panel.plot(frames, [row[f"{name}_ms"] for row in line], marker="o", label=scope)
            panel.set_xticks(frames)
        panel.set_title(f"{name}, {first['width']}x{first['height']} pixels")
        panel.set_xlabel("frames")
        panel.set_ylabel("ms")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected numbers from 1, as in 8,16")
    return numbers


def _choices(*allowed: str) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)}: expected some of {', '.join(allowed)}"
            )
        return chosen

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tav_jax.bench",
        description="Time and memory of the programs that a run consists of: a tuning step, a "
        "guided DDIM step, an inversion step, the autoencoder. By default v1-4's networks with "
        "random weights on an accelerator, and a small network of their layout on a CPU, where it "
        "takes two minutes. Where several values are given, separated by commas, each is measured.",
        epilog="examples: python -m tav_jax.bench --model DIR --frames 8 --size 256 --json; "
        "python -m tav_jax.bench --aot v5e:2x2 --frames 8,24 --gradient-checkpointing full",
    )
    networks = parser.add_mutually_exclusive_group()
    networks.add_argument("--model", metavar="DIR", help="a model's folder, id or name")
    networks.add_argument(
        "--network", choices=list(NETWORKS), help="random weights of these shapes"
    )
    parser.add_argument("--frames", type=_numbers, default=[8], metavar="N", help="8")
    parser.add_argument("--size", type=_numbers, metavar="PIXELS", help="512; on a CPU 256")
    parser.add_argument("--precision", choices=["no", "bf16"], help="bf16; on a CPU no")
    parser.add_argument("--attention", choices=get_args(AttentionImplementation), default="auto")
    parser.add_argument(
        "--attention-scope",
        type=_choices(*get_args(AttentionScope)),
        default=["sparse_causal"],
        metavar="SCOPE",
        help=", ".join(get_args(AttentionScope)),
    )
    parser.add_argument(
        "--gradient-checkpointing",
        type=_choices("auto", *PRESETS),
        default=["auto"],
        metavar="PRESET",
        help=", ".join(("auto", *PRESETS)),
    )
    parser.add_argument(
        "--programs",
        type=_choices(*PROGRAMS),
        default=list(PROGRAMS),
        metavar="NAME",
        help=", ".join(PROGRAMS),
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each (5)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw milliseconds against frames")
    parser.add_argument("--aot", metavar="SLICE", help="compile for a TPU slice, as in v5e:2x2")
    parser.add_argument("--chips", type=int, default=1, metavar="N", help="of that slice (1)")
    parser.add_argument(
        "--mesh", metavar="AXES", help="as in frames=4,fsdp=2; one device, with --aot its chips"
    )
    return parser


def _rows(
    args: argparse.Namespace, networks: Networks, absent: Mesh | None
) -> Iterator[dict[str, Any]]:
    for size, frames, scope, preset in product(
        args.size, args.frames, args.attention_scope, args.gradient_checkpointing
    ):
        setting = Setting(Size(frames, size, size), scope, preset)
        if not args.json:
            say(f"{setting.size}, {scope}, gradient_checkpointing {preset} ...")
        yield measure(networks, setting, args.programs, repeats=args.repeats, absent=absent)


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    devices = topology_devices(args.aot, args.chips) if args.aot else None
    sizes = parse_mesh(args.mesh or ("frames=-1" if args.aot else "frames=1"))
    mesh = make_mesh(asdict(sizes), frames=math.gcd(*args.frames), devices=devices)
    absent = mesh if args.aot else None
    platform = "tpu" if args.aot else jax.default_backend()
    small = platform == "cpu"
    args.size = args.size or [256 if small else 512]
    precision = args.precision or ("no" if small else "bf16")
    dtype = "float32" if precision == "no" else "bfloat16"
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: expected 1 or more")
    if args.plot and absent:
        raise UserError("--plot: --aot runs nothing, so there are no times to draw")
    name = args.network or ("small" if small else "v1-4")
    if args.model:
        networks, name = load_networks(args.model, dtype), args.model
    else:
        networks = random_networks(name, dtype, only_shapes=absent is not None)
    factor = networks.vae.config.downsampling
    if odd := [size for size in args.size if size % factor]:
        raise UserError(f"--size {odd}: this model takes multiples of {factor}")
    networks = networks.with_unet_config(attention=args.attention)

    # What is not here says by the mesh in force what it is, one chip too.
    with jax.set_mesh(mesh) if absent else on_mesh(mesh):
        rows = list(_rows(args, networks, absent))
    rate = matrix_rate(dtype) if absent is None else None
    kind = jax.devices()[0].device_kind if absent is None else args.aot
    device = f"{kind}, {mesh.size} devices" if mesh.size > 1 else kind
    common = {"network": name, "precision": precision, "device": device, "jax": jax.__version__}
    if rate is not None:
        common["matmul_tflops"] = round(rate / 1e12, 4)
    if args.json:
        lines = [common | row for row in rows]
        print(json.dumps(lines[0] if len(lines) == 1 else lines, indent=2))
    else:
        print(", ".join(f"{key} {value}" for key, value in common.items()))
        print(table(rows, args.programs, rate))
    if args.plot:
        plot(rows, args.programs, args.plot)
        if not args.json:
            say(f"wrote {args.plot}")


if __name__ == "__main__":
    sys.exit(main())
