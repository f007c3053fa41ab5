"""Times guided and tuning steps, ours and PyTorch's in turns; or measures their memory.

    python tests/parity/speed.py --pairs 7 --at-most guided=0.77 tuning=0.77 whole=0.5
    python tests/parity/speed.py --memory
    python tests/parity/speed.py --network v1-4 --size 64 --precision bf16 --device cuda \\
        --attention sdpa --channels-last --compile --pairs 30

By default a small network of v1-4's layout in float32, 19 million parameters with an autoencoder of
5 and a text encoder of 3: on a CPU some four minutes each on two idle cores, up to 10 GB. The same
random weights and inputs are on both sides, which must first give the same numbers. PyTorch runs
with as many threads as there are cores, and with the fastest of what it is let try: its two
attentions and, where asked, channels-last and `torch.compile`, which needs a C++ compiler and some
minutes more.

Both sides share the device, one at work at a time. With `--precision bf16` frozen weights are
bfloat16 and trained ones float32 on both sides, as in the published mixed precision.

A tuning step is the U-Net's part alone. A whole one, as published, encodes clip and caption anew
each time; ours draws from the posterior of the clip that it has encoded once.

Exit status 1 if the numbers differ, or if a step's median ratio is over its `--at-most`.
`--memory` prints the peak of memory of each step, alone in a fresh process that holds one side's
libraries only: resident memory, or the GPU's as each library counts its own.
"""

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import jax
import numpy as np

from ours import Ours, make_schedule
from ours import peak_device_bytes as our_peak
from tav_jax.bench.programs import GUIDANCE_SCALE, LEARNING_RATE, NETWORKS, TEXT_TOKENS
from tav_jax.models.attention.dispatch import AttentionImplementation
from tav_jax.models.compute import PRECISION_DTYPES
from tav_jax.pretrained.sd_v1_4 import CONFIGS

if TYPE_CHECKING:  # PyTorch is imported late: it is not needed to print the help
    from theirs import Theirs

# What `NETWORKS` has no need of: how each one's text encoder differs from v1-4's.
TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "v1-4": {},
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "vocab_size": 1000,
    },
}
STEPS = {
    "guided": "guided step",
    "tuning": "tuning step",
    "whole": "whole tuning step",
}
SETTLING = 0.5  # seconds
# Relative: one pass of the network and back, in float32 with sums in another order. In bfloat16
# each side rounds after every layer: 7 % apart after guidance, which enlarges it, else 3 %.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.15}

Inputs = dict[str, np.ndarray]
Setting = Mapping[str, Any]
Run = Callable[[], Any]


def make_setting(args: argparse.Namespace, device: str) -> Setting:
    """Returns what both sides compute with: published configs, the paper's numbers, types."""
    changes = NETWORKS[args.network] | {"text_encoder": TEXT_ENCODERS[args.network]}
    parts = ("unet", "vae", "text_encoder")
    return {part: CONFIGS[part] | changes.get(part, {}) for part in parts} | {
        "guidance_scale": GUIDANCE_SCALE,
        "learning_rate": LEARNING_RATE,
        "weight_decay": 1e-2,
        "max_grad_norm": 1.0,
        "device": device,
        "dtype": PRECISION_DTYPES[args.precision],
        "gradient_checkpointing": args.gradient_checkpointing,
        "our_attention": args.our_attention,
    }


def choose_device(wanted: str | None) -> str:
    """Returns "cpu" or "cuda", and keeps JAX to it, here and in children.

    Raises:
        SystemExit: a GPU is wanted, and not both libraries have one.
    """
    import torch

    # JAX reads this when it first looks for devices, and would else leave PyTorch a quarter.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if wanted == "cpu" or not torch.cuda.is_available():
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")  # JAX, imported, has read the above already
    found = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if wanted == "cuda" and found != "cuda":
        raise SystemExit(
            f"--device cuda: PyTorch {'has one' if torch.cuda.is_available() else 'has none'}, "
            f"JAX runs on {jax.default_backend()}; both need a build for CUDA"
        )
    return found


def device_title(device: str) -> str:
    import torch

    if device == "cpu":
        return f"{len(os.sched_getaffinity(0))} threads"
    name = torch.cuda.get_device_name()
    return f"{name}, jax {jax.__version__}, torch {torch.__version__}"


def relative_error(ours, theirs) -> float:
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def milliseconds(run: Run, settling: float) -> float:
    time.sleep(settling)
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def draw_inputs(setting: Setting, frames: int, size: int) -> Inputs:
    """Returns what both sides compute from, channels last."""
    rng = np.random.default_rng(0)
    text, factor = setting["text_encoder"], 2 ** (len(setting["vae"]["block_out_channels"]) - 1)
    states = (1, TEXT_TOKENS, text["hidden_size"])
    pixels = (1, frames, factor * size, factor * size, 3)
    return {
        "latents": rng.standard_normal((1, frames, size, size, 4), np.float32),
        "context": rng.standard_normal(states, np.float32),
        "negative_context": rng.standard_normal(states, np.float32),
        "pixel_values": 2 * rng.random(pixels, np.float32) - 1,
        "input_ids": rng.integers(text["vocab_size"], size=(1, TEXT_TOKENS)).astype(np.int32),
        "alphas_cumprod": np.asarray(make_schedule().alphas_cumprod),
    }


def differences(ours: Ours, theirs: "Theirs") -> dict[str, float]:
    """Returns relative errors of what was encoded and, after its first run, of each step."""
    from theirs import to_numpy

    posterior, context = theirs.encode()
    moments = np.concatenate([to_numpy(x) for x in (posterior.mean, posterior.logvar)], axis=1)
    errors = {
        "encoded clip: moments": relative_error(ours.moments[0], np.moveaxis(moments, 1, -1)),
        "encoded caption: states": relative_error(ours.context, to_numpy(context)),
    }
    sampled, expected = ours.guided(), to_numpy(theirs.guided())
    metrics, (loss, grad_norm) = ours.tuning(), map(to_numpy, theirs.tuning())
    means = ours.first_moments()
    if means.keys() != theirs.trained.keys():
        raise ValueError(f"trained differently: {sorted(means.keys() ^ theirs.trained.keys())}")
    state = theirs.optimizer.state
    gradients = [
        np.concatenate([np.ravel(tensors[name]) for name in sorted(means)])
        for tensors in (
            means,
            {k: to_numpy(state[v]["exp_avg"]) for k, v in theirs.trained.items()},
        )
    ]
    return errors | {
        "guided step: latents": relative_error(sampled, np.moveaxis(expected, 1, -1)),
        "tuning step: loss": relative_error(metrics["loss"], loss),
        "tuning step: grad_norm": relative_error(metrics["grad_norm"], grad_norm),
        "tuning step: gradients": relative_error(*gradients),
    }


def in_turns(
    ours: Run, theirs: Run, pairs: int, settling: float
) -> tuple[list[float], list[float]]:
    """Returns milliseconds of each run, one of ours, one of theirs, one of ours ..."""
    times = [(milliseconds(ours, settling), milliseconds(theirs, settling)) for _ in range(pairs)]
    return [a for a, _ in times], [b for _, b in times]


def fastest_of(
    variants: Sequence["Theirs"], step: str, settling: float
) -> tuple["Theirs", dict[str, float]]:
    """Returns PyTorch's fastest variant at a step, and milliseconds of each that ran."""
    best = {}
    for variant in variants:
        run = getattr(variant, step)
        try:
            run()
        except Exception as error:  # of as many kinds as compiling can fail
            if not variant.compiled:
                raise
            reason = (str(error).strip() or repr(error)).split("\n")[0]
            print(f"{STEPS[step]}: PyTorch without {variant.name}: {reason}")
            continue
        best[variant.name] = min(milliseconds(run, settling) for _ in range(2))
    fastest = min((v for v in variants if v.name in best), key=lambda v: best[v.name])
    return fastest, best


def compare_speed(
    setting: Setting,
    inputs: Inputs,
    pairs: int,
    at_most: dict[str, float],
    variants_of_theirs: Sequence[dict[str, Any]],
) -> bool:
    """Prints differences and times; tells whether all are as they should be.

    Args:
        variants_of_theirs: What PyTorch may try, as `Theirs` takes it; the first is the one whose
            numbers are compared, and none but compiled ones may fail.
    """
    from theirs import Theirs
    from theirs import peak_device_bytes as their_peak

    on_gpu = setting["device"] == "cuda"
    # A CPU's threads go on spinning for a while after their work, and would take a core from the
    # other side's. A GPU's clock would only fall.
    settling = 0.0 if on_gpu else SETTLING
    ours = Ours(setting, inputs)
    ours.encode()
    variants = [Theirs(setting, inputs, **variant) for variant in variants_of_theirs]
    tensors = ours.tensors()
    for variant in variants:
        variant.take_over(tensors, ours.first_draw(), ours.context)
    counts = {part: sum(x.size for x in network.values()) for part, network in tensors.items()}
    del tensors
    print("parameters: " + ", ".join(f"{part} {count:,}" for part, count in counts.items()))

    good, tolerance = True, TOLERANCES[setting["dtype"]]
    for name, error in differences(ours, variants[0]).items():
        good &= error <= tolerance
        print(f"{name:24} {error:.1e} {'ok' if error <= tolerance else 'OVER'}")
    if not good:
        return False

    encoding = milliseconds(ours.encode, settling)
    print(f"ours encodes clip and caption once, in {encoding:.0f} ms")
    for step, title in STEPS.items():
        fastest, best = fastest_of(variants, step, settling)
        a, b = in_turns(getattr(ours, step), getattr(fastest, step), pairs, settling)
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        ratio = statistics.median(ratios)
        over = ratio > at_most.get(step, float("inf"))
        good &= not over
        digits = 1 if on_gpu else 0
        tried = ", ".join(f"{name} {ms:.{digits}f}" for name, ms in best.items())
        print(
            f"{title}: ours {statistics.median(a):.{digits}f} ms, "
            f"PyTorch {statistics.median(b):.{digits}f} ms ({fastest.name}; tried {tried}), "
            f"ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f} in {pairs} pairs)"
            f"{f', OVER {at_most[step]}' if over else ''}",
            flush=True,
        )
    if on_gpu:
        mine, other = our_peak() / 1e9, their_peak() / 1e9
        print(
            f"peak of the GPU's memory over all of this: ours {mine:.2f} GB, "
            f"PyTorch {other:.2f} GB, with {len(variants)} networks of each kind"
        )
    return good


# The kernel's own count of the process. `ru_maxrss` would be the same number, but a child starts
# with its parent's, which it keeps through exec.
CHILD = """
import importlib, pickle, re, sys

def peak_resident_bytes():
    kilobytes = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]
    return int(kilobytes) * 1024

name, side, arguments, steps = pickle.load(sys.stdin.buffer)
module = importlib.import_module(name)
on_gpu = arguments["setting"]["device"] == "cuda"
peak = module.peak_device_bytes if on_gpu else peak_resident_bytes
side = getattr(module, side)(**arguments)
before = peak()
for step in steps:
    getattr(side, step)()
strangers = {"jax", "torch"} & {*sys.modules} - {{"ours": "jax", "theirs": "torch"}[name]}
print(before / 1e9, peak() / 1e9, *strangers)
"""


def peak_memory(module: str, side: str, arguments: dict, steps: list[str]) -> tuple[float, float]:
    """Returns peak GB of a process before and after it ran some steps of one side."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=pickle.dumps((module, side, arguments, steps)),
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    before, after, *strangers = child.stdout.decode().split()
    if strangers:
        raise RuntimeError(f"{module}.py has imported {strangers[0]}, which counts in its memory")
    return float(before), float(after)


def compare_memory(
    setting: Setting, inputs: Inputs, attentions: Sequence[str], *, channels_last: bool
) -> None:
    """Prints peaks of both sides; in resident memory, what our compiler takes is included."""
    checkpointings = ["none"]
    if setting["gradient_checkpointing"] != "none":
        checkpointings.append(setting["gradient_checkpointing"])
    layout = " + channels-last" * channels_last

    def under(checkpointing: str) -> dict[str, Any]:
        setting_under = {**setting, "gradient_checkpointing": checkpointing}
        return {"setting": setting_under, "inputs": inputs}

    def pytorch(title: str, step: str, checkpointing: str = "none"):
        kept = "" if checkpointing == "none" else f", checkpointing {checkpointing}"
        for attention in attentions:
            arguments = under(checkpointing) | {
                "attention": attention,
                "channels_last": channels_last,
            }
            row = f"{title}: PyTorch, {attention}{layout}{kept}"
            yield row, ("theirs", "Theirs", arguments), [step] * 2

    # Each step twice: what PyTorch keeps between steps, and ours gives away, is there by then.
    once_and_tuning = ["encode", "tuning", "tuning"]
    none, blocks = (("ours", "Ours", under(name)) for name in ("none", "blocks"))
    rows = [
        *(row for name in checkpointings for row in pytorch("whole tuning step", "whole", name)),
        ("whole tuning step: ours", none, once_and_tuning),
        ("whole tuning step: ours, checkpointing blocks", blocks, once_and_tuning),
        *pytorch("guided step", "guided"),
        ("guided step: ours", none, ["guided"] * 2),
    ]
    wide = max(len(row) for row, _, _ in rows)
    title = "peak GPU GB" if setting["device"] == "cuda" else "peak resident GB"
    print(f"{title:{wide}}  start   peak  added")
    for row, side, steps in rows:
        start, top = peak_memory(*side, steps)
        print(f"{row:{wide}} {start:6.2f} {top:6.2f} {top - start:6.2f}", flush=True)


def limit(text: str) -> tuple[str, float]:
    step, _, ratio = text.partition("=")
    if step not in STEPS:
        raise argparse.ArgumentTypeError(f"'{text}' is no STEP=RATIO of {', '.join(STEPS)}")
    return step, float(ratio)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time guided and tuning steps, ours and PyTorch's in turns.",
        epilog="example: python tests/parity/speed.py --pairs 7 --at-most guided=0.77 whole=0.5",
    )
    parser.add_argument("--network", choices=list(TEXT_ENCODERS), default="small")
    parser.add_argument("--pairs", type=int, default=7, help="runs of each side (7)")
    parser.add_argument("--frames", type=int, default=8, help="frames of the clip (8)")
    parser.add_argument(
        "--size", type=int, default=32, help="side of the latent grid (32; 64 for 512 pixels)"
    )
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="no: float32")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="by default cuda where both sides have one"
    )
    parser.add_argument(
        "--gradient-checkpointing", choices=["none", "blocks"], default="none", help="of both sides"
    )
    parser.add_argument(
        "--attention",
        choices=["math", "sdpa"],
        help="PyTorch's: the published code's on a CPU is math; by default the faster of both",
    )
    parser.add_argument(
        "--our-attention", choices=get_args(AttentionImplementation), default="auto"
    )
    parser.add_argument(
        "--channels-last", action="store_true", help="let PyTorch try channels-last too"
    )
    parser.add_argument(
        "--compile",
        "--compile-pytorch",
        action="store_true",
        help="let PyTorch try torch.compile too",
    )
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument(
        "--at-most",
        type=limit,
        nargs="+",
        default=[],
        metavar="STEP=RATIO",
        help=f"fail if a median ratio is over this; steps are {', '.join(STEPS)}",
    )
    return parser.parse_args()


def main() -> int:
    args = read_arguments()
    device = choose_device(args.device)
    setting = make_setting(args, device)
    print(
        f"{args.network}, {setting['dtype']}, {args.frames} frames of {args.size}x{args.size}, "
        f"{device_title(device)}",
        flush=True,
    )
    inputs = draw_inputs(setting, args.frames, args.size)
    attentions = [args.attention] if args.attention else ["math", "sdpa"]
    if args.memory:
        compare_memory(setting, inputs, attentions, channels_last=args.channels_last)
        return 0
    variants: list[dict[str, Any]] = [{"attention": name} for name in attentions]
    if args.compile:
        variants.append({"attention": "sdpa", "compiled": True})
    if args.channels_last:
        variants += [variant | {"channels_last": True} for variant in variants]
    good = compare_speed(setting, inputs, args.pairs, dict(args.at_most), variants)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
