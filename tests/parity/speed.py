"""Times a guided DDIM step and a tuning step on the CPU, ours and PyTorch's in turns.

    python tests/parity/speed.py --pairs 7

About two minutes on two cores, 2 GB. A network of 19 million parameters in v1-4's layout, float32,
the same weights and inputs on both sides, which must first give the same numbers. PyTorch runs
with as many threads as there are cores, and with the faster of its two attentions (and, with
`--compile`, of eager and `torch.compile`, which needs a C++ compiler and some minutes more).
Exit status 1 if the numbers differ, or if a median ratio is over `--at-most`.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import tav_jax as tav
from tav_jax import published_config, weights
from tav_jax.models.unet import UNet3DConditionModel
from torch_unet3d import UNet3D, freeze_all_but_trained, guided_step, tune_step

CONFIG: dict[str, Any] = {
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
}
STEPS = {"sample": "guided step", "tune": "tuning step"}
TEXT_TOKENS = 77
GUIDANCE_SCALE = 12.5  # the paper's
LEARNING_RATE = 3e-5
WEIGHT_DECAY = 1e-2
MAX_GRAD_NORM = 1.0
TOLERANCE = 1e-4  # relative: one pass of a float32 network and back, sums in another order


class Inputs(NamedTuple):
    """What both sides compute from, channels last."""

    latents: np.ndarray
    moments: np.ndarray
    context: np.ndarray
    negative_context: np.ndarray


Run = Callable[[], Any]


def to_torch(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x))


def video_to_torch(x) -> torch.Tensor:
    """Returns our video `b f h w c` as PyTorch's `b c f h w`."""
    return to_torch(np.moveaxis(np.asarray(x), -1, 1).copy())


def relative_error(ours, theirs) -> float:
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def milliseconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def draw_inputs(frames: int, size: int) -> Inputs:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    grid, states = (1, frames, size, size), (1, TEXT_TOKENS, CONFIG["cross_attention_dim"])
    return Inputs(normal(*grid, 4), normal(*grid, 8), normal(*states), normal(*states))


class Ours:
    """Both steps, compiled as `tav_jax.pipeline` compiles them."""

    def __init__(self, unet: tav.Network, schedule: tav.NoiseSchedule, inputs: Inputs):
        self.schedule, self.inputs, self.unet = schedule, inputs, unet
        labels = tav.label_params(unet.params, tav.TRAINABLE_MODULES)
        optimizer = tav.make_optimizer(labels, LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
        # The step gives its state away, and `unet` is needed for the guided step.
        self.state = tav.init_state(jax.tree.map(jnp.copy, unet), optimizer, jax.random.key(0))
        self._train_step = jax.jit(
            lambda state, *inputs: tav.train_step(
                state, *inputs, optimizer=optimizer, labels=labels, scaling_factor=1.0
            ),
            donate_argnums=0,
        )
        self._sample = jax.jit(tav.ddim_sample, static_argnames="num_inference_steps")

    def first_draw(self) -> tav.Draw:
        """Returns what the first tuning step draws."""
        key = jax.random.fold_in(jax.random.fold_in(self.state.key, 0), 0)
        return tav.draw_batch(key, self.inputs.moments, self.schedule, 1.0)

    def tune(self) -> dict[str, jax.Array]:
        self.state, metrics = self._train_step(
            self.state, self.inputs.moments, self.inputs.context, self.schedule
        )
        return jax.block_until_ready(metrics)

    def sample(self) -> jax.Array:
        """Returns the latents after the schedule's one step, from timestep 1 to the end."""
        return jax.block_until_ready(
            self._sample(
                self.unet,
                self.schedule,
                self.inputs.latents,
                self.inputs.context,
                self.inputs.negative_context,
                GUIDANCE_SCALE,
                num_inference_steps=1,
            )
        )

    def first_moments(self) -> dict[str, np.ndarray]:
        """Returns Adam's mean of the gradients: after one step a fixed share of the gradient."""
        moments = optax.tree.get(self.state.opt_state, "mu")
        moments = {k: np.asarray(v) for k, v in moments.items() if isinstance(v, jax.Array)}
        return dict(weights.to_tensor(*item) for item in moments.items())


class Theirs:
    """The same steps in PyTorch, under one of its attentions."""

    def __init__(self, ours: Ours, attention: str, *, compiled: bool):
        inputs, self.attention = ours.inputs, attention + (", compiled" if compiled else "")
        self.unet = UNet3D(CONFIG, attention)
        tensors = (weights.to_tensor(k, np.asarray(v)) for k, v in ours.unet.params.items())
        self.unet.load_state_dict({name: to_torch(tensor) for name, tensor in tensors})
        self.trained = freeze_all_but_trained(self.unet)
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )
        self.run = torch.compile(self.unet) if compiled else self.unet
        draw = ours.first_draw()
        self.alphas_cumprod = to_torch(ours.schedule.alphas_cumprod)
        self.latents, self.context = video_to_torch(inputs.latents), to_torch(inputs.context)
        self.negative_context = to_torch(inputs.negative_context)
        self.clean, self.noise = video_to_torch(draw.latents), video_to_torch(draw.noise)
        self.timesteps = to_torch(draw.timesteps).long()

    def tune(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tune_step(
            self.run,
            self.optimizer,
            self.clean,
            self.noise,
            self.timesteps,
            self.context,
            self.alphas_cumprod,
            MAX_GRAD_NORM,
        )

    def sample(self) -> torch.Tensor:
        return guided_step(
            self.run,
            self.latents,
            1,
            -1,  # before the first timestep
            self.context,
            self.negative_context,
            GUIDANCE_SCALE,
            self.alphas_cumprod,
        )


def differences(ours: Ours, theirs: Theirs) -> dict[str, float]:
    """Returns relative errors after the first run of each step, which also compiles ours."""
    sampled, expected = ours.sample(), theirs.sample()
    metrics, (loss, grad_norm) = ours.tune(), theirs.tune()
    moments = ours.first_moments()
    if moments.keys() != theirs.trained.keys():
        raise ValueError(f"trained differently: {sorted(moments.keys() ^ theirs.trained.keys())}")
    gradients = [
        np.concatenate([np.ravel(tensors[name]) for name in sorted(moments)])
        for tensors in (
            moments,
            {k: theirs.optimizer.state[v]["exp_avg"] for k, v in theirs.trained.items()},
        )
    ]
    return {
        "guided step: latents": relative_error(sampled, np.moveaxis(expected.numpy(), 1, -1)),
        "tuning step: loss": relative_error(metrics["loss"], loss),
        "tuning step: grad_norm": relative_error(metrics["grad_norm"], grad_norm),
        "tuning step: gradients": relative_error(*gradients),
    }


def in_turns(ours: Run, theirs: Run, pairs: int) -> tuple[list[float], list[float]]:
    """Returns milliseconds of each run, one of ours, one of theirs, one of ours ..."""
    times = [(milliseconds(ours), milliseconds(theirs)) for _ in range(pairs)]
    return [a for a, _ in times], [b for _, b in times]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Time one guided DDIM step and one tuning step, ours and PyTorch's in turns.",
        epilog="example: python tests/parity/speed.py --pairs 7",
    )
    parser.add_argument("--pairs", type=int, default=7, help="runs of each side (7)")
    parser.add_argument("--frames", type=int, default=8, help="frames of the clip (8)")
    parser.add_argument("--size", type=int, default=32, help="side of the latent grid (32)")
    parser.add_argument("--compile", action="store_true", help="try torch.compile too")
    parser.add_argument("--at-most", type=float, help="fail if a median ratio is over this")
    args = parser.parse_args()

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    config = published_config.read_unet_config(CONFIG)
    unet = tav.init_network(UNet3DConditionModel, config, jax.random.key(0))
    # Of two timesteps, so that one step spans it all and the prediction weighs in the result.
    schedule = tav.make_schedule(
        num_train_timesteps=2,
        beta_start=0.1,
        beta_end=0.9,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        set_alpha_to_one=False,
    )
    count = sum(value.size for value in unet.params.values())
    print(f"{count:,} parameters, {args.frames} frames of {args.size}x{args.size}, {cores} threads")

    ours = Ours(unet, schedule, draw_inputs(args.frames, args.size))
    variants = [Theirs(ours, attention, compiled=False) for attention in ("math", "sdpa")]
    if args.compile:
        variants.append(Theirs(ours, "sdpa", compiled=True))

    failed = False
    for name, error in differences(ours, variants[0]).items():
        failed |= not error <= TOLERANCE
        print(f"{name:24} {error:.1e} {'ok' if error <= TOLERANCE else 'OVER'}")
    if failed:
        return 1

    for step in STEPS:
        ours_run = getattr(ours, step)
        runs = {variant.attention: getattr(variant, step) for variant in variants}
        best = {}
        for attention, run in runs.items():
            run()
            best[attention] = min(milliseconds(run) for _ in range(2))
        fastest = min(best, key=best.__getitem__)
        a, b = in_turns(ours_run, runs[fastest], args.pairs)
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        ratio = statistics.median(ratios)
        failed |= args.at_most is not None and ratio > args.at_most
        tried = ", ".join(f"{attention} {ms:.0f}" for attention, ms in best.items())
        print(
            f"{STEPS[step]}: ours {statistics.median(a):.0f} ms, "
            f"PyTorch {statistics.median(b):.0f} ms ({fastest}; tried {tried}), "
            f"ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f} in {args.pairs} pairs)"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
