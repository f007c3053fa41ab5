"""Times guided and tuning steps on the CPU, ours and PyTorch's in turns; or measures their memory.

    python tests/parity/speed.py --pairs 7 --at-most guided=0.77 tuning=0.77 whole=0.5
    python tests/parity/speed.py --memory

Some four minutes each on two idle cores, up to 10 GB. A U-Net of 19 million parameters, an
autoencoder of 5 and a text encoder of 3, in v1-4's layout, float32, the same weights and inputs on
both sides, which must first give the same numbers. PyTorch runs with as many threads as there are
cores, and with the faster of its two attentions (and, with `--compile`, of eager and
`torch.compile`, which needs a C++ compiler and some minutes more).

A tuning step is the U-Net's part alone. A whole one, as published, encodes clip and caption anew
each time; ours draws from the posterior of the clip that it has encoded once.

Exit status 1 if the numbers differ, or if a step's median ratio is over its `--at-most`.
`--memory` prints the peak of resident memory of each step, alone in a fresh process that holds
one side's libraries only.
"""

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

import tav_jax as tav
from tav_jax import published_config, weights
from tav_jax.models.clip import CLIPTextModel
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.models.vae import AutoencoderKL

if TYPE_CHECKING:  # PyTorch's libraries would count in our peak memory
    from theirs import Theirs

TEXT_TOKENS = 77
SETTING: dict[str, Any] = {
    "unet": {
        "_class_name": "UNet3DConditionModel",
        "attention_head_dim": 8,
        "block_out_channels": [64, 128, 160, 160],
        "cross_attention_dim": 256,
        "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
        "in_channels": 4,
        "layers_per_block": 2,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": 4,
        "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [32, 64, 128, 128],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder": {
        "model_type": "clip_text_model",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "quick_gelu",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": TEXT_TOKENS,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "vocab_size": 1000,
    },
    "guidance_scale": 12.5,  # the paper's
    "learning_rate": 3e-5,
    "weight_decay": 1e-2,
    "max_grad_norm": 1.0,
}
STEPS = {
    "guided": "guided step",
    "tuning": "tuning step",
    "whole": "whole tuning step",
}
SETTLING = 0.5  # seconds
TOLERANCE = 1e-4  # relative: one pass of a float32 network and back, sums in another order

Inputs = dict[str, np.ndarray]
Run = Callable[[], Any]


def relative_error(ours, theirs) -> float:
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def milliseconds(run: Run) -> float:
    # Threads go on spinning for a while after their work, and would take a core from the other
    # side's.
    time.sleep(SETTLING)
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def make_schedule() -> tav.NoiseSchedule:
    # Of two timesteps, so that one step spans it all and the prediction weighs in the result.
    return tav.make_schedule(
        num_train_timesteps=2,
        beta_start=0.1,
        beta_end=0.9,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        set_alpha_to_one=False,
    )


def draw_inputs(frames: int, size: int) -> Inputs:
    """Returns what both sides compute from, channels last."""
    rng = np.random.default_rng(0)
    text, factor = SETTING["text_encoder"], 2 ** (len(SETTING["vae"]["block_out_channels"]) - 1)
    states = (1, TEXT_TOKENS, text["hidden_size"])
    pixels = (1, frames, factor * size, factor * size, 3)
    return {
        "latents": rng.standard_normal((1, frames, size, size, 4), np.float32),
        "context": rng.standard_normal(states, np.float32),
        "negative_context": rng.standard_normal(states, np.float32),
        "pixel_values": 2 * rng.random(pixels, np.float32) - 1,
        "input_ids": rng.integers(text["vocab_size"], size=(1, TEXT_TOKENS)),
        "alphas_cumprod": np.asarray(make_schedule().alphas_cumprod),
    }


class Ours:
    """The steps, compiled as `tav_jax.pipeline` compiles them."""

    def __init__(
        self, setting: Mapping[str, Any], inputs: Inputs, gradient_checkpointing: str = "none"
    ):
        self.setting, self.inputs, self.schedule = setting, inputs, make_schedule()
        unet_config = published_config.read_unet_config(setting["unet"])
        vae_config = published_config.read_vae_config(setting["vae"])
        text_config = published_config.read_text_config(setting["text_encoder"])
        unet_key, vae_key, text_key = jax.random.split(jax.random.key(0), 3)
        unet = tav.init_network(UNet3DConditionModel, unet_config, unet_key)
        unet = unet.with_config(gradient_checkpointing=gradient_checkpointing)
        self.vae = tav.init_network(AutoencoderKL, vae_config, vae_key)
        self.text_encoder = tav.init_network(CLIPTextModel, text_config, text_key)

        labels = tav.label_params(unet.params, tav.TRAINABLE_MODULES)
        optimizer = tav.make_optimizer(
            labels,
            setting["learning_rate"],
            adam_weight_decay=setting["weight_decay"],
            max_grad_norm=setting["max_grad_norm"],
        )
        self.state = tav.init_state(unet, optimizer, jax.random.key(0))
        self._train_step = tav.compile_train_step(
            self.vae.config.scaling_factor, optimizer=optimizer, labels=labels
        )
        self._sample = jax.jit(tav.ddim_sample, static_argnames="num_inference_steps")
        self._encode_text = jax.jit(lambda text_encoder, ids: text_encoder(ids))
        self._encode_video = jax.jit(lambda vae, pixel_values: vae.bind().encode(pixel_values))

    def encode(self) -> None:
        """Encodes clip and caption, as a run of `tav_jax.tune` does once before its first step."""
        self.moments, self.context = jax.block_until_ready(
            (
                self._encode_video(self.vae, self.inputs["pixel_values"]),
                self._encode_text(self.text_encoder, self.inputs["input_ids"]),
            )
        )

    def first_draw(self) -> tav.Draw:
        """Returns what the first tuning step draws."""
        key = jax.random.fold_in(jax.random.fold_in(self.state.key, 0), 0)
        return tav.draw_batch(key, self.moments, self.schedule, self.vae.config.scaling_factor)

    def tuning(self) -> dict[str, jax.Array]:
        self.state, metrics = self._train_step(
            self.state, self.moments, self.context, self.schedule
        )
        return jax.block_until_ready(metrics)

    whole = tuning  # nothing is encoded again

    def guided(self) -> jax.Array:
        """Returns the latents after the schedule's one step, from timestep 1 to the end."""
        return jax.block_until_ready(
            self._sample(
                self.state.unet,
                self.schedule,
                self.inputs["latents"],
                self.inputs["context"],
                self.inputs["negative_context"],
                self.setting["guidance_scale"],
                num_inference_steps=1,
            )
        )

    def tensors(self) -> dict[str, dict[str, np.ndarray]]:
        """Returns every network's parameters as a published checkpoint has them."""
        networks = {"unet": self.state.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        return {
            part: dict(weights.to_tensor(k, np.asarray(v)) for k, v in network.params.items())
            for part, network in networks.items()
        }

    def first_moments(self) -> dict[str, np.ndarray]:
        """Returns Adam's mean of the gradients: after one step a fixed share of the gradient."""
        moments = optax.tree.get(self.state.opt_state, "mu")
        moments = {k: np.asarray(v) for k, v in moments.items() if isinstance(v, jax.Array)}
        return dict(weights.to_tensor(*item) for item in moments.items())


def differences(ours: Ours, theirs: "Theirs") -> dict[str, float]:
    """Returns relative errors of what was encoded and, after its first run, of each step."""
    posterior, context = theirs.encode()
    moments = np.concatenate([posterior.mean, posterior.logvar], axis=1)
    errors = {
        "encoded clip: moments": relative_error(ours.moments[0], np.moveaxis(moments, 1, -1)),
        "encoded caption: states": relative_error(ours.context, context),
    }
    sampled, expected = ours.guided(), theirs.guided()
    metrics, (loss, grad_norm) = ours.tuning(), theirs.tuning()
    means = ours.first_moments()
    if means.keys() != theirs.trained.keys():
        raise ValueError(f"trained differently: {sorted(means.keys() ^ theirs.trained.keys())}")
    gradients = [
        np.concatenate([np.ravel(tensors[name]) for name in sorted(means)])
        for tensors in (
            means,
            {k: theirs.optimizer.state[v]["exp_avg"] for k, v in theirs.trained.items()},
        )
    ]
    return errors | {
        "guided step: latents": relative_error(sampled, np.moveaxis(expected.numpy(), 1, -1)),
        "tuning step: loss": relative_error(metrics["loss"], loss),
        "tuning step: grad_norm": relative_error(metrics["grad_norm"], grad_norm),
        "tuning step: gradients": relative_error(*gradients),
    }


def in_turns(ours: Run, theirs: Run, pairs: int) -> tuple[list[float], list[float]]:
    """Returns milliseconds of each run, one of ours, one of theirs, one of ours ..."""
    times = [(milliseconds(ours), milliseconds(theirs)) for _ in range(pairs)]
    return [a for a, _ in times], [b for _, b in times]


def compare_speed(
    inputs: Inputs,
    pairs: int,
    at_most: dict[str, float],
    attentions: Sequence[str],
    *,
    compiled: bool,
) -> bool:
    """Prints differences and times; tells whether all are as they should be."""
    from theirs import Theirs

    ours = Ours(SETTING, inputs)
    ours.encode()
    variants = [Theirs(SETTING, inputs, attention) for attention in attentions]
    if compiled:
        variants.append(Theirs(SETTING, inputs, "sdpa", compiled=True))
    tensors = ours.tensors()
    for variant in variants:
        variant.take_over(tensors, ours.first_draw(), ours.context)
    counts = {part: sum(x.size for x in network.values()) for part, network in tensors.items()}
    print("parameters: " + ", ".join(f"{part} {count:,}" for part, count in counts.items()))

    good = True
    for name, error in differences(ours, variants[0]).items():
        good &= error <= TOLERANCE
        print(f"{name:24} {error:.1e} {'ok' if error <= TOLERANCE else 'OVER'}")
    if not good:
        return False

    print(f"ours encodes clip and caption once, in {milliseconds(ours.encode):.0f} ms")
    for step, title in STEPS.items():
        runs = {variant.attention: getattr(variant, step) for variant in variants}
        best = {}
        for attention, run in runs.items():
            run()
            best[attention] = min(milliseconds(run) for _ in range(2))
        fastest = min(best, key=best.__getitem__)
        a, b = in_turns(getattr(ours, step), runs[fastest], pairs)
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        ratio = statistics.median(ratios)
        over = ratio > at_most.get(step, float("inf"))
        good &= not over
        tried = ", ".join(f"{attention} {ms:.0f}" for attention, ms in best.items())
        print(
            f"{title}: ours {statistics.median(a):.0f} ms, "
            f"PyTorch {statistics.median(b):.0f} ms ({fastest}; tried {tried}), "
            f"ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f} in {pairs} pairs)"
            f"{f', OVER {at_most[step]}' if over else ''}"
        )
    return good


# The kernel's own count of the process. `ru_maxrss` would be the same number, but a child starts
# with its parent's, which it keeps through exec.
CHILD = """
import importlib, pickle, re, sys

def peak():
    kilobytes = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]
    return int(kilobytes) * 1024 / 1e9

module, side, arguments, steps = pickle.load(sys.stdin.buffer)
side = getattr(importlib.import_module(module), side)(**arguments)
before = peak()
for step in steps:
    getattr(side, step)()
strangers = {"jax", "torch"} & {*sys.modules} - {{"speed": "jax", "theirs": "torch"}[module]}
print(before, peak(), *strangers)
"""


def peak_memory(module: str, side: str, arguments: dict, steps: list[str]) -> tuple[float, float]:
    """Returns peak resident GB of a process before and after it ran some steps of one side."""
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


def compare_memory(inputs: Inputs) -> None:
    """Prints peaks of both sides, what our compiler takes included."""
    both = {"setting": SETTING, "inputs": inputs}
    math, sdpa = (("theirs", "Theirs", both | {"attention": name}) for name in ("math", "sdpa"))
    none, blocks = (
        ("speed", "Ours", both | {"gradient_checkpointing": name}) for name in ("none", "blocks")
    )
    # Each step twice: what PyTorch keeps between steps, and ours gives away, is there by then.
    once_and_tuning = ["encode", "tuning", "tuning"]
    print(f"{'peak resident GB':46} start   peak  added")
    for row, side, steps in (
        ("whole tuning step: PyTorch, math", math, ["whole"] * 2),
        ("whole tuning step: PyTorch, sdpa", sdpa, ["whole"] * 2),
        ("whole tuning step: ours", none, once_and_tuning),
        ("whole tuning step: ours, checkpointing blocks", blocks, once_and_tuning),
        ("guided step: PyTorch, math", math, ["guided"] * 2),
        ("guided step: PyTorch, sdpa", sdpa, ["guided"] * 2),
        ("guided step: ours", none, ["guided"] * 2),
    ):
        start, top = peak_memory(*side, steps)
        print(f"{row:45} {start:6.2f} {top:6.2f} {top - start:6.2f}", flush=True)


def limit(text: str) -> tuple[str, float]:
    step, _, ratio = text.partition("=")
    if step not in STEPS:
        raise argparse.ArgumentTypeError(f"'{text}' is no STEP=RATIO of {', '.join(STEPS)}")
    return step, float(ratio)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Time guided and tuning steps, ours and PyTorch's in turns.",
        epilog="example: python tests/parity/speed.py --pairs 7 --at-most guided=0.77 whole=0.5",
    )
    parser.add_argument("--pairs", type=int, default=7, help="runs of each side (7)")
    parser.add_argument("--frames", type=int, default=8, help="frames of the clip (8)")
    parser.add_argument("--size", type=int, default=32, help="side of the latent grid (32)")
    parser.add_argument(
        "--attention",
        choices=["math", "sdpa"],
        help="PyTorch's: the published code's on a CPU is math; by default the faster of both",
    )
    parser.add_argument("--compile", action="store_true", help="try torch.compile too")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument(
        "--at-most",
        type=limit,
        nargs="+",
        default=[],
        metavar="STEP=RATIO",
        help=f"fail if a median ratio is over this; steps are {', '.join(STEPS)}",
    )
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{args.frames} frames of {args.size}x{args.size}, {cores} threads")
    inputs = draw_inputs(args.frames, args.size)
    if args.memory:
        compare_memory(inputs)
        return 0
    attentions = [args.attention] if args.attention else ["math", "sdpa"]
    good = compare_speed(inputs, args.pairs, dict(args.at_most), attentions, compiled=args.compile)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
