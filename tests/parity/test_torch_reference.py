"""The PyTorch reference against numbers of the published code, so that parity may stand on it."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file

from torch_unet3d import (
    UNet3D,
    ddim_move,
    freeze_all_but_trained,
    guided_step,
    tune_step,
)

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-5  # float32 on both sides: only the order of sums differs (measured: below 3e-6)

# With one channel a group at the last level, conv_norm_out removes any constant this bias adds.
# Its gradient is zero but for rounding, and Adam turns rounding into full steps.
UNDETERMINED = {"up_blocks.3.attentions.2.transformer_blocks.0.attn_temp.to_out.0.bias"}


def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


@pytest.fixture(scope="module")
def cases():
    return load_file(GOLDEN / "cases.safetensors")


@pytest.fixture(scope="module")
def settings():
    return json.loads((GOLDEN / "cases.json").read_text())


def load_unet(folder, extra=None, attention="math"):
    config = json.loads((folder / "config.json").read_text())
    unet = UNet3D(config, attention)
    unet.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors") | (extra or {}))
    return unet


@pytest.fixture
def inflated(cases):
    temporal = {k.removeprefix("init."): v for k, v in cases.items() if k.startswith("init.")}
    return load_unet(GOLDEN / "base" / "unet", temporal)


def inputs_of(cases, name):
    return (cases[f"{name}.{part}"] for part in ("sample", "timesteps", "context"))


@pytest.mark.parametrize("attention", ["math", "sdpa"])
@pytest.mark.parametrize("shape", ["1f", "8f", "3f_batch2", "4f_odd"])
@torch.no_grad()
def test_tuned_network_predicts_as_published(cases, shape, attention):
    name = f"unet3d_tuned.{shape}"
    out = load_unet(GOLDEN / "tuned" / "unet", attention=attention)(*inputs_of(cases, name))
    assert relative_error(out, cases[f"{name}.out"]) < TOLERANCE


@torch.no_grad()
def test_inflated_network_predicts_as_published(cases, inflated):
    out = inflated(*inputs_of(cases, "unet3d_inflated.8f"))
    assert relative_error(out, cases["unet3d_inflated.8f.out"]) < TOLERANCE


@torch.no_grad()
def test_one_frame_without_temporal_output_is_the_image_network(cases, inflated):
    for name, parameter in inflated.named_parameters():
        if "attn_temp.to_out" in name:  # published inflation zeroes the weight and forgets the bias
            parameter.zero_()
    sample, timesteps, context = inputs_of(cases, "unet2d")
    out = inflated(sample[:, :, None], timesteps, context)[:, :, 0]
    assert relative_error(out, cases["unet2d.out"]) < TOLERANCE


@torch.no_grad()
def test_inversion_follows_the_published_trajectory(cases, settings):
    unet = load_unet(GOLDEN / "tuned" / "unet")
    context = cases["text.last_hidden_state"][settings["text.prompts"].index("")][None]
    alphas_cumprod = cases["schedule.alphas_cumprod"]
    stride = len(alphas_cumprod) // settings["invert.steps"]
    latents, *trajectory = cases["invert.trajectory"]
    for step, reference in enumerate(trajectory):
        t = 1 + step * stride  # the prediction is made at the noisier end of the step
        noise_pred = unet(latents, torch.tensor([t]), context)
        abar = alphas_cumprod[max(t - stride, 0)]
        latents = ddim_move(latents, noise_pred, abar, alphas_cumprod[t])
        assert relative_error(latents, reference) < TOLERANCE


def test_guided_sampling_follows_the_published_trajectory(cases, settings):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(GOLDEN / "base" / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(GOLDEN / "base" / "text_encoder")
    prompts = [settings["sample.negative_prompt"] or "", settings["sample.prompt"]]
    ids = tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        negative_context, context = encoder(ids).last_hidden_state.split(1)
    unet = load_unet(GOLDEN / "tuned" / "unet")
    alphas_cumprod = cases["schedule.alphas_cumprod"]
    stride = len(alphas_cumprod) // settings["sample.steps"]
    scale = settings["sample.guidance_scale"]
    latents = cases["sample.latents"]
    for step, reference in enumerate(cases["sample.trajectory"]):
        t = 1 + (settings["sample.steps"] - 1 - step) * stride
        latents = guided_step(
            unet, latents, t, t - stride, context, negative_context, scale, alphas_cumprod
        )
        assert relative_error(latents, reference) < TOLERANCE


def test_tuning_follows_the_published_run(cases, settings, inflated):
    trained = freeze_all_but_trained(inflated)
    assert sorted(trained) == settings["tune.trainable_names"]
    optimizer = torch.optim.AdamW(
        trained.values(),
        lr=settings["tune.lr"],
        betas=settings["tune.betas"],
        eps=settings["tune.eps"],
        weight_decay=settings["tune.weight_decay"],
    )
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for step in range(settings["tune.steps"]):
        loss, grad_norm = tune_step(
            inflated,
            optimizer,
            cases["tune.x0"],
            cases["tune.noise"][step],
            cases["tune.timesteps"][step],
            cases["tune.context"],
            cases["schedule.alphas_cumprod"],
            settings["tune.max_grad_norm"],
        )
        assert loss.item() == pytest.approx(cases["tune.loss"][step].item(), rel=TOLERANCE)
        assert grad_norm.item() == pytest.approx(
            cases["tune.grad_norm"][step].item(), rel=TOLERANCE
        )
        if step == 0:  # the norm is far below the clip, so these are the gradients themselves
            for name, parameter in trained.items():
                difference = (parameter.grad - cases[f"tune.grad0.{name}"]).norm()
                assert difference < TOLERANCE * grad_norm, name
    for name in trained.keys() - UNDETERMINED:
        moved = trained[name].detach() - start[name]
        reference = cases[f"tune.final.{name}"] - start[name]
        # Adam divides each gradient by its own size, so rounding in a small one weighs as much
        # as in a large one (measured: below 7e-5).
        assert relative_error(moved, reference) < 1e-3, name
