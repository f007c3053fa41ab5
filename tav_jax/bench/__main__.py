"""python -m tav_jax.bench: time and memory of the method, here or on devices that are not here."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from typing import Any

import jax

from tav_jax.bench.arguments import bench_flags, make_parser
from tav_jax.bench.measure import Setting, SettingResult, measure, measure_matmul
from tav_jax.bench.programs import Networks, load_networks, random_networks
from tav_jax.bench.tables import plot, table, to_json
from tav_jax.bench.topology import Target, assume_cudnn, find_target
from tav_jax.console import command, say
from tav_jax.errors import UserError
from tav_jax.models.compute import PRECISION_DTYPES
from tav_jax.parallel.sharding import make_mesh, on_mesh
from tav_jax.runs.config import check_pixels, parse_mesh
from tav_jax.settings import Count, check_options
from tav_jax.training.memory import DoesNotFitError, Size


def _measure_all(
    args: argparse.Namespace, networks: Networks, target: Target | None
) -> Iterator[SettingResult]:
    for side, frames, scope, preset in product(
        args.size, args.frames, args.attention_scope, args.gradient_checkpointing
    ):
        setting = Setting(Size(frames, side, side), scope, preset)
        if not args.json:
            say(f"{setting.size}, {scope}, gradient_checkpointing {preset} ...")
        try:
            yield measure(
                networks,
                setting,
                args.programs,
                repeats=args.repeats,
                target=target,
                hlo_folder=args.dump_hlo,
                profile_folder=args.profile,
            )
        except DoesNotFitError as error:
            raise error.with_advice(bench_flags) from None


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other."""
    check_options(("--repeats", Count, args.repeats), ("--chips", Count, args.chips))
    for frames, side in product(args.frames, args.size or [1]):
        check_pixels(frames, side, side)
    if args.plot and args.aot:
        raise UserError("--plot: --aot runs nothing, so there are no times to draw")
    if args.profile and args.aot:
        raise UserError("--profile: --aot runs nothing, so there is nothing to trace")
    settings = args.size or [], args.frames, args.attention_scope, args.gradient_checkpointing
    if any(len(values) > 1 for values in settings):
        if args.dump_hlo:
            raise UserError("--dump-hlo: each program has one file, so give one value to each flag")
        if args.profile:
            raise UserError("--profile: each program has one trace, so give one value to each flag")


def _load(args: argparse.Namespace, name: str, dtype: str) -> Networks:
    """Return the model or the random network that was asked for; refuse sizes it cannot take."""
    if args.model:
        networks = load_networks(args.model, dtype)
    else:
        networks = random_networks(name, dtype, only_shapes=bool(args.aot))
    factor = networks.vae.config.downsampling
    if odd := [side for side in args.size if side % factor]:
        raise UserError(f"--size {odd}: this model takes multiples of {factor}")
    return networks.with_unet_compute(attention_implementation=args.attention)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure every setting that was asked for, and print the results."""
    args = make_parser().parse_args(argv)
    _check(args)
    target = find_target(args.aot, args.chips) if args.aot else None
    devices = target.devices if target else None
    sizes = parse_mesh(args.mesh or ("frames=-1" if args.aot else "frames=1"))
    mesh = make_mesh(asdict(sizes), frames=math.gcd(*args.frames), devices=devices)
    small = not args.aot and jax.default_backend() == "cpu"
    args.size = args.size or [256 if small else 512]
    precision = args.precision or ("no" if small else "bf16")
    dtype = PRECISION_DTYPES[precision]
    name = args.network or ("small" if small else "v1-4")
    networks = _load(args, name, dtype)

    # Set even if it is one chip: the mesh tells programs which kind of device they are for.
    with ExitStack() as context:
        context.enter_context(jax.set_mesh(mesh) if target else on_mesh(mesh))
        if target and target.card:
            context.enter_context(assume_cudnn())
        results = list(_measure_all(args, networks, target))
    matmul_rate = None if target else measure_matmul(dtype)
    kind = args.aot or jax.devices()[0].device_kind
    device = f"{kind}, {mesh.size} devices" if mesh.size > 1 else kind
    common: dict[str, Any] = {
        "network": args.model or name,
        "precision": precision,
        "device": device,
        "jax": jax.__version__,
    }
    if target and target.card:
        common["floor_assumes"] = target.card.rates()
    if matmul_rate is not None:
        common["matmul_tflops"] = round(matmul_rate / 1e12, 4)
    _print(args, common, results, matmul_rate)


def _print(
    args: argparse.Namespace,
    common: dict,
    results: Sequence[SettingResult],
    matmul_rate: float | None,
) -> None:
    if args.json:
        rows = [common | to_json(result) for result in results]
        print(json.dumps(rows[0] if len(rows) == 1 else rows, indent=2))
    else:
        print(", ".join(f"{key} {value}" for key, value in common.items()))
        print(table(results, matmul_rate))
    if args.plot:
        plot(results, args.plot)
        if not args.json:
            say(f"wrote {args.plot}")


if __name__ == "__main__":
    sys.exit(main())
