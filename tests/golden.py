"""Runs every case of a set of reference numbers, and says how far from them we are.

    python tests/golden.py tests/golden

A set is a folder of the form that `tests/golden/README.md` describes: numbers written by the
published PyTorch code. Exit status 1 if any case is over its tolerance.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

import tav_jax as tav
from tav_jax.diffusion.schedule import add_noise, ddim_timesteps, velocity
from tav_jax.files import atomic_write
from tav_jax.models.attention.dispatch import AttentionImplementation
from tav_jax.models.compute import PRECISION_DTYPES, GradientCheckpointing
from tav_jax.models.network import Network, in_modules
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.models.vae import split_moments
from tav_jax.parallel.sharding import denoiser, make_mesh, on_mesh, shard
from tav_jax.pretrained import model as stable_diffusion
from tav_jax.pretrained import weights
from tav_jax.runs.config import parse_mesh
from tav_jax.training.optimizer import label_params, make_optimizer
from tav_jax.training.train_step import NoisedBatch, apply_gradients, init_state, loss_and_gradients

EXACT = 0.0
SINGLE = 1e-5  # relative: one pass through one network, in float32
TRAJECTORY = 1e-4  # relative: many passes, each starting from the rounding of the last
ADAM_ELEMENTS = 0.99  # share of trained elements held to ADAM_STEP; Adam magnifies rounding
ADAM_STEP = 0.02  # in units of learning rate x steps, the farthest an element can go
# How far bfloat16 is from the float32 reference, relative, by the beginning of a row's name. A
# number is rounded by up to 2^-9 = 0.002 at each of some fifty operations in a row.
IN_BFLOAT16 = {
    "text.last_hidden_state": 0.01,
    "vae": 0.04,
    "unet2d": 0.03,
    "unet3d": 0.03,
    "sample.trajectory": 0.05,
    "sample.video": 0.03,
    "invert": 0.02,
    "tune.loss": 0.001,
    "tune.grad_norm": 0.01,
    "tune.grad0": 0.06,
}


class Row(NamedTuple):
    """One comparison. `measured` is what is held against `tolerance`, named by `measure`."""

    name: str
    max_abs: float
    max_rel: float
    measured: float
    tolerance: float
    measure: str = "norm"

    @property
    def passed(self) -> bool:
        return bool(self.measured <= self.tolerance)  # false for NaN


def compare(name: str, ours, reference, tolerance: float) -> Row:
    """Compares by the norm of the difference over the norm of the reference."""
    ours, reference = (np.asarray(x, np.float64) for x in (ours, reference))
    if ours.shape != reference.shape:
        raise ValueError(f"{name}: shape {ours.shape}, the reference has {reference.shape}")
    difference = np.abs(ours - reference)
    scale = np.linalg.norm(reference) or 1.0
    largest = difference.max() / (np.abs(reference).max() or 1.0)
    return Row(
        name, difference.max(), largest, float(np.linalg.norm(ours - reference) / scale), tolerance
    )


def channels_last(x: np.ndarray) -> Any:
    """Returns PyTorch's video `... c f h w` as ours, `... f h w c`."""
    return np.moveaxis(x, -4, -1)


def channels_first(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, -4)


def images_last(x: np.ndarray) -> np.ndarray:
    """Returns PyTorch's images `b c h w` as clips of one frame, `b 1 h w c`."""
    return np.moveaxis(x, 1, -1)[:, None]


def images_first(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x)[:, 0], -1, 1)


class GoldenSet:
    """One folder of reference cases.

    Args:
        attention, gradient_checkpointing: As `tav.load_model` takes them. No result depends on
            them, apart from rounding.
        precision: "bf16" computes in bfloat16, and stores so what is not to be trained, as a run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        attention: AttentionImplementation = "auto",
        gradient_checkpointing: GradientCheckpointing = "none",
        precision: Literal["no", "bf16"] = "no",
    ):
        self.folder, self.precision = folder, precision
        self.tensors = load_file(folder / "cases.safetensors")
        self.settings = json.loads((folder / "cases.json").read_text())
        self.base = stable_diffusion.load_model(
            folder / "base", attention=attention, gradient_checkpointing=gradient_checkpointing
        )
        tuned = stable_diffusion.load_unet(folder / "tuned" / "unet")
        tuned = replace(tuned, compute=self.base.unet.compute)
        self.tuned = self.base.with_unet(shard(tuned))
        if precision == "bf16":
            self.base, self.tuned = model_in_bfloat16(self.base), model_in_bfloat16(self.tuned)

    def rows(self, case: Callable[["GoldenSet"], Iterator[Row]]) -> Iterator[Row]:
        """Yields the comparisons of a case; in bfloat16 those of which the distance is stated."""
        for row in case(self):
            limits = [limit for name, limit in IN_BFLOAT16.items() if row.name.startswith(name)]
            if self.precision == "no":
                yield row
            elif limits:
                yield row._replace(tolerance=limits[0])

    def case(self, name: str) -> dict[str, Any]:
        start = f"{name}."
        return {k[len(start) :]: v for k, v in self.tensors.items() if k.startswith(start)}

    def inflated(self, zero_temporal_output: bool = False) -> Network[UNet3DConditionModel]:
        """Returns the base U-Net with the temporal tensors that the set gives."""
        init = dict(weights.to_parameter(*item) for item in self.case("init").items())
        if zero_temporal_output:
            init = {k: v * (".to_out." not in k) for k, v in init.items()}
        unet = self.base.unet
        return unet.with_params(unet.params | {k: jnp.asarray(v) for k, v in init.items()})


def model_in_bfloat16(model: stable_diffusion.Model) -> stable_diffusion.Model:
    return replace(
        model,
        vae=in_bfloat16(model.vae),
        text_encoder=in_bfloat16(model.text_encoder),
        unet=in_bfloat16(model.unet, tav.TRAINABLE_MODULES),
    )


def in_bfloat16(network: Network, float32_modules: tuple[str, ...] = ()) -> Network:
    params = {
        name: value if in_modules(name, float32_modules) else value.astype(jnp.bfloat16)
        for name, value in network.params.items()
    }
    return network.with_compute(dtype="bfloat16").with_params(params)


call = jax.jit(lambda network, *inputs: network(*inputs))
# These three run on whatever mesh is in force.
denoise = jax.jit(lambda unet, *inputs: denoiser(unet)(*inputs))
invert = jax.jit(
    lambda unet, *inputs, **steps: tav.ddim_invert(denoiser(unet), *inputs, **steps),
    static_argnames=("num_inv_steps", "trajectory"),
)
sample = jax.jit(
    lambda unet, *inputs, **steps: tav.ddim_sample(denoiser(unet), *inputs, **steps),
    static_argnames=("num_inference_steps", "trajectory"),
)


def text(golden: GoldenSet) -> Iterator[Row]:
    case, model = golden.case("text"), golden.base
    prompts = golden.settings["text.prompts"]
    ids = stable_diffusion.tokenize(model, prompts)
    yield compare("text.input_ids", ids, case["input_ids"], EXACT)
    states = call(model.text_encoder, case["input_ids"])
    yield compare("text.last_hidden_state", states, case["last_hidden_state"], SINGLE)


def vae(golden: GoldenSet) -> Iterator[Row]:
    case, network = golden.case("vae"), golden.base.vae
    moments = jax.jit(lambda vae, x: vae.bind().encode(x))(network, images_last(case["pixels"]))
    mean, logvar = split_moments(moments)
    yield compare("vae.mean", images_first(mean), case["mean"], SINGLE)
    yield compare("vae.logvar", images_first(logvar), case["logvar"], SINGLE)
    latents = images_last(case["latents"]) * network.config.scaling_factor
    decoded = jax.jit(lambda vae, z: vae.bind().decode(z))(network, latents)
    yield compare("vae.decoded", images_first(decoded), case["decoded"], SINGLE)


def unet2d(golden: GoldenSet) -> Iterator[Row]:
    case = golden.case("unet2d")
    unet = golden.inflated(zero_temporal_output=True)
    out = denoise(unet, images_last(case["sample"]), case["timesteps"], case["context"])
    yield compare("unet2d", images_first(out), case["out"], SINGLE)


def unet3d(golden: GoldenSet, name: str) -> Iterator[Row]:
    case = golden.case(name)
    unet = golden.inflated() if name.startswith("unet3d_inflated") else golden.tuned.unet
    out = denoise(unet, channels_last(case["sample"]), case["timesteps"], case["context"])
    yield compare(name, channels_first(out), case["out"], SINGLE)


def schedule(golden: GoldenSet) -> Iterator[Row]:
    case, ours = golden.case("schedule"), golden.base.schedule
    yield compare("schedule.alphas_cumprod", ours.alphas_cumprod, case["alphas_cumprod"], SINGLE)
    inputs = [
        jnp.asarray(x)
        for x in (channels_last(case["x0"]), channels_last(case["noise"]), case["timesteps"])
    ]
    for name, function in (("add_noise", add_noise), ("velocity", velocity)):
        out = channels_first(function(ours, *inputs))
        yield compare(f"schedule.{name}", out, case[name], SINGLE)
    for name in sorted(name for name in case if name.startswith("ddim_timesteps.")):
        steps = ddim_timesteps(ours, int(name.split(".")[1]))
        yield compare(f"schedule.{name}", steps, case[name], EXACT)


def sampling(golden: GoldenSet) -> Iterator[Row]:
    case, model = golden.case("sample"), golden.tuned
    settings = {k.removeprefix("sample."): v for k, v in golden.settings.items()}
    context = tav.encode_prompts(model, [settings["prompt"]])
    negative_context = tav.encode_prompts(model, [settings["negative_prompt"] or ""])
    trajectory = sample(
        model.unet,
        model.schedule,
        channels_last(case["latents"]),
        context,
        negative_context,
        settings["guidance_scale"],
        num_inference_steps=settings["steps"],
        trajectory=True,
    )
    yield compare("sample.trajectory", channels_first(trajectory), case["trajectory"], TRAJECTORY)
    video = tav.decode_latents(model, trajectory[-1]) / 2 + 0.5
    yield compare("sample.video", channels_first(video.clip(0, 1)), case["video"], TRAJECTORY)


def inversion(golden: GoldenSet) -> Iterator[Row]:
    case, model = golden.case("invert"), golden.tuned
    trajectory = invert(
        model.unet,
        model.schedule,
        channels_last(case["latents"]),
        tav.encode_prompts(model, [""]),
        num_inv_steps=golden.settings["invert.steps"],
        trajectory=True,
    )
    yield compare("invert.trajectory", channels_first(trajectory), case["trajectory"], TRAJECTORY)


def tune(golden: GoldenSet) -> Iterator[Row]:
    case = golden.case("tune")
    settings = {k.removeprefix("tune."): v for k, v in golden.settings.items()}
    unet = golden.inflated()
    labels = label_params(unet.params, tav.TRAINABLE_MODULES)
    trained = [name for name, label in labels.items() if label == "train"]
    count = sum(unet.params[name].size for name in trained)
    yield compare("tune.trainable_count", count, settings["trainable_count"], EXACT)
    names = sorted(weights.tensor_name(name) for name in trained)
    differing = len(set(names) ^ set(settings["trainable_names"]))
    yield Row("tune.trainable_names", differing, differing, differing, EXACT, "names")

    beta1, beta2 = settings["betas"]
    optimizer = make_optimizer(
        labels,
        settings["lr"],
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_epsilon=settings["eps"],
        adam_weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
    )

    @jax.jit
    def step(state, draw):
        loss, gradients = loss_and_gradients(
            state.unet, labels, golden.base.schedule, draw, jnp.asarray(case["context"])
        )
        return apply_gradients(state, gradients, optimizer), loss, gradients

    state = shard(init_state(unet, optimizer, jax.random.key(0)))
    latents = channels_last(case["x0"])
    losses, norms = [], []
    for index in range(settings["steps"]):
        noise, timesteps = channels_last(case["noise"][index]), case["timesteps"][index]
        draw = NoisedBatch(*(jnp.asarray(x) for x in (latents, noise, timesteps)))
        state, loss, gradients = step(state, draw)
        losses.append(loss)
        norms.append(optax.tree.norm(gradients))
        if index == 0:
            first = gradients
    yield compare("tune.loss", losses, case["loss"], SINGLE)
    yield compare("tune.grad_norm", norms, case["grad_norm"], TRAJECTORY)

    def flat(tensors: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([np.ravel(tensors[name]) for name in names])

    ours = dict(weights.to_tensor(name, np.asarray(value)) for name, value in first.items())
    yield compare("tune.grad0", flat(ours), flat(golden.case("tune.grad0")), TRAJECTORY)
    final = flat(
        dict(weights.to_tensor(name, np.asarray(state.unet.params[name])) for name in trained)
    )
    reference = flat(golden.case("tune.final"))
    difference = np.abs(final - reference)
    reach = settings["lr"] * settings["steps"]
    yield Row(
        "tune.final",
        difference.max(),
        difference.max() / np.abs(reference).max(),
        float(np.quantile(difference, ADAM_ELEMENTS)) / reach,
        ADAM_STEP,
        "p99/lr/steps",
    )


def cases(golden: GoldenSet) -> dict[str, Callable[[GoldenSet], Iterator[Row]]]:
    """Returns the cases that a set has, by name."""
    fixed: dict[str, Callable[[GoldenSet], Iterator[Row]]] = {
        "text": text,
        "vae": vae,
        "unet2d": unet2d,
        "schedule": schedule,
        "sample": sampling,
        "invert": inversion,
        "tune": tune,
    }
    outs = (name.removesuffix(".out") for name in golden.tensors if name.endswith(".out"))
    videos = sorted(name for name in outs if name.startswith("unet3d"))
    found = {name: function for name, function in fixed.items() if golden.case(name)}
    return found | {name: partial(unet3d, name=name) for name in videos}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compare every reference case of a set with what tav_jax computes.",
        epilog="example: python tests/golden.py tests/golden",
    )
    parser.add_argument("folder", type=Path, help="a set of the form of tests/golden/README.md")
    parser.add_argument("--attention", choices=get_args(AttentionImplementation), default="auto")
    parser.add_argument(
        "--gradient-checkpointing", choices=get_args(GradientCheckpointing), default="none"
    )
    parser.add_argument(
        "--precision",
        choices=["no", "bf16"],
        default="no",
        help="no: float32; bf16 has tolerances of its own, and leaves out what has none",
    )
    parser.add_argument(
        "--mesh", default="frames=1", metavar="AXES", help="of this machine's devices: frames=8"
    )
    parser.add_argument(
        "--cases", metavar="NAMES", help="only these, separated by commas: schedule,vae,unet2d"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    args = parser.parse_args()
    # A case of other numbers of frames is computed whole by each device.
    mesh = make_mesh(asdict(parse_mesh(args.mesh)), frames=8)
    with on_mesh(mesh):
        return report(
            GoldenSet(
                args.folder,
                attention=args.attention,
                gradient_checkpointing=args.gradient_checkpointing,
                precision=args.precision,
            ),
            args.markdown,
            args.cases.split(",") if args.cases else None,
        )


PAGE = """# Parity with the published code

Written by `python tests/golden.py {folder} --markdown FILE` on a {device}, in {type}.
"Measured" is the norm of the difference divided by the norm of the reference, unless the last
column says otherwise. A case passes if "measured" is at most "allowed".

| case | max abs | max rel | measured | allowed | measure |
|---|---|---|---|---|---|
"""


def report(
    golden: GoldenSet, markdown: Path | None = None, names: Sequence[str] | None = None
) -> int:
    """Prints a line a comparison; returns 1 if any is over its tolerance, or else 0.

    Args:
        golden: The set.
        markdown: A file for the same table, as docs/parity.md has it.
        names: Only these cases.
    """
    found = cases(golden)
    if unknown := sorted(set(names or ()) - found.keys()):
        raise SystemExit(f"--cases: no {', '.join(unknown)}; there are {', '.join(found)}")
    page = PAGE.format(
        folder=golden.folder,
        device=jax.default_backend().upper(),
        type=PRECISION_DTYPES[golden.precision],
    )
    print(f"{'case':32} {'max abs':>9} {'max rel':>9} {'measured':>9} {'allowed':>9}  measure")
    failed = 0
    for name in names or found:
        for row in golden.rows(found[name]):
            failed += not row.passed
            numbers = row.max_abs, row.max_rel, row.measured, row.tolerance
            page += f"| {row.name} | {' | '.join(f'{x:.1e}' for x in numbers)} | {row.measure} |\n"
            print(
                f"{row.name:32} {row.max_abs:9.1e} {row.max_rel:9.1e} {row.measured:9.1e} "
                f"{row.tolerance:9.1e}  {row.measure:12} {'ok' if row.passed else 'OVER'}"
            )
    print(f"{failed} over" if failed else "all within tolerance")
    if markdown is not None:
        with atomic_write(markdown) as path:
            path.write_text(page, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
