"""Runs one tuning step and one guided step of a network of v1-4's size, and weighs them.

    python tests/full_size.py full-size --steps

Writes a Stable Diffusion folder with v1-4's tensors and configs and random weights (4.3 GB with
`--tensors float32`, 2.1 GB as float16; once, an existing one is used), then a child process loads
it and takes each step once: about 5 minutes on two cores. Exit status 1 if the child's peak memory
is over `--max-gb`, or if a number is not finite.
"""

import argparse
import json
import math
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import tav_jax as tav
from tav_jax.pretrained.hub import WEIGHT_STEMS
from tav_jax.pretrained.model import CONFIG_NAMES
from tav_jax.pretrained.sd_v1_4 import CONFIGS

HERE = Path(__file__).parent
FRAMES, SIDE = 2, 256
GUIDANCE_SCALE = 12.5


def random_tensor(rng: np.random.Generator, name: str, shape: list[int], dtype: str) -> np.ndarray:
    """Returns a tensor that keeps activations near unit size: kernels by fan-in, norms plain."""
    if name.endswith("position_ids"):
        return np.arange(math.prod(shape)).reshape(shape)
    if len(shape) == 1:
        return np.full(shape, name.endswith(".weight"), dtype)
    deviation = 0.02 if "embedding.weight" in name else math.prod(shape[1:]) ** -0.5
    return (deviation * rng.standard_normal(shape, np.float32)).astype(dtype)


def write_model(folder: Path, tensors: Path, tokenizer: Path, dtype: str) -> None:
    """Writes a whole Stable Diffusion folder, one network after another."""
    rng = np.random.default_rng(0)
    shapes = json.loads(tensors.read_text())
    for part, config in CONFIGS.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        path = folder / part / CONFIG_NAMES.get(part, "config.json")
        path.write_text(json.dumps(config, indent=2) + "\n")
    for part, stem in WEIGHT_STEMS.items():
        network = {
            name: random_tensor(rng, name, shape, dtype) for name, shape in shapes[part].items()
        }
        save_file(network, folder / part / f"{stem}.safetensors", metadata={"format": "pt"})
        del network  # the next is made before the name would be bound anew
    # Last, since a folder that has it is taken for whole.
    shutil.copytree(tokenizer, folder / "tokenizer")


def gigabytes(who: int) -> float:
    """Returns the peak of memory so far; Linux counts it in KiB."""
    return resource.getrusage(who).ru_maxrss * 1024 / 1e9


def take_steps(folder: Path, dtype: str) -> None:
    """Loads the model, takes each step once, and prints what each took."""

    def report(what: str, compiling: float | None, running: float) -> None:
        compiled = "" if compiling is None else f"{compiling:.1f}"
        peak = gigabytes(resource.RUSAGE_SELF)
        print(f"{what:14} {compiled:>9} {running:9.1f} {peak:12.2f}", flush=True)

    def timed(what: str, function: Callable, *inputs, donate: tuple[int, ...] = ()) -> Any:
        start = time.perf_counter()
        program = jax.jit(function, donate_argnums=donate).lower(*inputs).compile()
        compiled = time.perf_counter()
        result = jax.block_until_ready(program(*inputs))
        report(what, compiled - start, time.perf_counter() - compiled)
        return result

    print(f"{'':14} {'compile s':>9} {'run s':>9} {'peak GB':>12}")
    start = time.perf_counter()
    model = tav.load_model(
        folder,
        dtype=dtype,
        float32_modules=tav.TRAINABLE_MODULES,
        gradient_checkpointing="blocks",
    )
    jax.block_until_ready(model.unet.params)
    report("load", None, time.perf_counter() - start)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(n)) for n in (model.unet, model.vae)]
    print(f"  U-Net {sizes[0] / 1e9:.2f} GB, autoencoder {sizes[1] / 1e9:.2f} GB, stored {dtype}")

    # Ids within the vocabulary; the folder's tokenizer may be a smaller one.
    ids = np.arange(2 * 77, dtype=np.int32).reshape(2, 77)
    negative_context, context = jnp.split(
        timed("text", lambda encoder, ids: encoder(ids), model.text_encoder, ids), 2
    )
    pixel_values = jax.random.uniform(jax.random.key(1), (1, FRAMES, SIDE, SIDE, 3), minval=-1.0)
    moments = timed("encode", lambda vae, x: vae.bind().encode(x), model.vae, pixel_values)

    labels = tav.label_params(model.unet.params, tav.TRAINABLE_MODULES)
    optimizer = tav.make_optimizer(labels, learning_rate=3e-5)
    state = tav.init_state(model.unet, optimizer, jax.random.key(0))
    step = partial(
        tav.train_step,
        optimizer=optimizer,
        labels=labels,
        scaling_factor=model.vae.config.scaling_factor,
    )
    state, metrics = timed(
        "tuning step", step, state, moments, context, model.schedule, donate=(0,)
    )
    latents = timed(
        "guided step",
        partial(tav.ddim_sample, num_inference_steps=1),
        state.unet,
        model.schedule,
        jax.random.normal(jax.random.key(2), (1, FRAMES, SIDE // 8, SIDE // 8, 4)),
        context,
        negative_context,
        GUIDANCE_SCALE,
    )
    print(f"  loss {metrics['loss']:.4f}, grad_norm {metrics['grad_norm']:.4g}")
    for name, value in {**metrics, "latents": latents}.items():
        if not jnp.isfinite(value).all():
            sys.exit(f"{name}: not finite")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write a folder of v1-4's size with random weights, and take steps with it.",
        epilog="example: python tests/full_size.py full-size --steps",
    )
    parser.add_argument("folder", type=Path, nargs="?", help="kept; by default a temporary one")
    parser.add_argument("--tensors", choices=["float16", "float32"], default="float16")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", action="store_true", help="load it and take one step of each")
    parser.add_argument("--max-gb", type=float, default=16.0, help="of the child's memory (16)")
    parser.add_argument("--names", type=Path, default=HERE / "sd-v1-4-tensors.json")
    parser.add_argument("--tokenizer", type=Path, default=HERE / "golden" / "base" / "tokenizer")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "model"
        if not (folder / "tokenizer").is_dir():
            start = time.perf_counter()
            write_model(folder, args.names, args.tokenizer, args.tensors)
            print(f"{folder}: written in {time.perf_counter() - start:.0f} s")
        if not args.steps:
            return 0
        # A fresh process, whose peak is the steps' own.
        child = multiprocessing.get_context("spawn").Process(
            target=take_steps, args=(folder, args.dtype)
        )
        child.start()
        child.join()
    peak = gigabytes(resource.RUSAGE_CHILDREN)
    print(f"peak {peak:.2f} GB, allowed {args.max_gb:g}")
    return 1 if child.exitcode or peak > args.max_gb else 0


if __name__ == "__main__":
    sys.exit(main())
