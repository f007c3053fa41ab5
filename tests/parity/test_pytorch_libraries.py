"""The same random weights in PyTorch's libraries and here, stage by stage."""

import copy
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from tav_jax.diffusion.sampling import dpm_solver_sample
from tav_jax.diffusion.schedule import ddim_inverse_step, ddim_step, ddim_step_size, ddim_timesteps
from tav_jax.models.network import in_modules
from tav_jax.pretrained.configs import read_schedule
from tav_jax.pretrained.model import (
    load_model,
    load_schedule,
    load_text_encoder,
    load_unet,
    load_vae,
    save_unet,
    tokenize,
)
from tav_jax.pretrained.weights import TEMPORAL, tensor_name, to_tensor
from tav_jax.training.optimizer import TRAINABLE_MODULES, label_params, select
from torch_unet3d import UNet3D, freeze_all_but_trained

GOLDEN = Path(__file__).parents[1] / "golden"
BASE = GOLDEN / "base"

# Relative, of norms. Both sides compute in float32, so that only the order of sums differs.
FORWARD = 1e-5  # one pass through one network (measured: below 3e-6)
GRADIENT = 1e-4  # a sum over the whole grid, of terms that come back through the whole network
STEP = 5e-6  # one step of the sampler (measured: below 7e-7)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), theirs.detach().double().numpy()
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def randomize(network):
    """Moves every norm and bias off its start of one and zero, where mistakes would not show."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                around = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(around + 0.3 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def images_last(x):
    """Returns PyTorch's images `b c h w` as clips of one frame, `b 1 h w c`."""
    return jnp.moveaxis(x.numpy(), 1, -1)[:, None]


def videos_last(x):
    """Returns PyTorch's videos `b c f h w` as `b f h w c`."""
    return jnp.moveaxis(x.numpy(), 1, -1)


def channels_first(x):
    return np.moveaxis(np.asarray(x), -1, 1)


# --- the text encoder


def text_encoder(**changes):
    sizes = {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 11,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return randomize(CLIPTextModel(CLIPTextConfig(**sizes | changes)))


def save_text_encoder(folder, network):
    """Writes a text encoder under the names that every published model has: see below."""
    network.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"hidden_act": "quick_gelu"}, id="as in 1.x"),
        pytest.param({"hidden_act": "gelu", "num_attention_heads": 4}, id="as in 2.x"),
        pytest.param(
            {"num_attention_heads": 1, "num_hidden_layers": 3, "layer_norm_eps": 1e-2},
            id="one head",
        ),
        pytest.param({"num_attention_heads": 6, "intermediate_size": 96}, id="six heads"),
    ],
)
def test_text_states_are_those_of_transformers(tmp_path, changes):
    theirs = text_encoder(**changes)
    save_text_encoder(tmp_path, theirs)
    ids = torch.randint(0, 50, (3, 11))
    ours = jax.jit(lambda network, ids: network(ids))(load_text_encoder(tmp_path), ids.numpy())
    assert relative_error(ours, theirs(ids).last_hidden_state) < FORWARD


def test_a_text_encoder_that_was_never_a_published_one_is_read_too(tmp_path):
    # Since 5.6 transformers saves a CLIPTextModel without `text_model.` before each name, unless
    # it was loaded from a file that has it. What diffusers makes of a single-file checkpoint has
    # never been such a file.
    theirs = text_encoder()
    theirs.save_pretrained(tmp_path)
    ours = load_text_encoder(tmp_path)
    assert len(ours.params) == len(theirs.state_dict())


# --- the autoencoder


@pytest.mark.parametrize(
    ("widths", "layers", "groups", "latent", "size"),
    [
        pytest.param((8, 16, 16), 1, 8, 4, (16, 24), id="three levels"),
        pytest.param((12, 6), 2, 3, 3, (10, 6), id="narrowing"),
        pytest.param((10,), 1, 5, 5, (7, 9), id="one level of an odd image"),
        pytest.param((6, 18), 1, 6, 2, (9, 11), id="two levels of an odd image"),
    ],
)
def test_moments_and_images_are_those_of_diffusers(tmp_path, widths, layers, groups, latent, size):
    theirs = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        layers_per_block=layers,
        norm_num_groups=groups,
        latent_channels=latent,
        scaling_factor=0.3,
    )
    randomize(theirs).save_pretrained(tmp_path)
    ours = load_vae(tmp_path)
    assert ours.config.downsampling == 2 ** (len(widths) - 1)

    # Small inputs: the epsilons then weigh as much as the variances of the first layers.
    pixels = 0.01 * torch.randn(2, 3, *size)
    moments = jax.jit(lambda vae, x: vae.bind().encode(x))(ours, images_last(pixels))
    posterior = theirs.encode(pixels).latent_dist
    mean, logvar = jnp.split(channels_first(moments)[:, :, 0], 2, axis=1)
    assert relative_error(mean, posterior.mean) < FORWARD
    assert relative_error(logvar, posterior.logvar) < FORWARD

    latents = 0.01 * torch.randn(2, latent, 4, 3)
    images = jax.jit(lambda vae, z: vae.bind().decode(z))(ours, images_last(latents))
    expected = theirs.decode(latents / 0.3).sample
    assert relative_error(channels_first(images)[:, :, 0], expected) < FORWARD


# --- the image U-Net

V1 = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
V2 = V1 | {
    "layers_per_block": 1,
    "attention_head_dim": (1, 2, 4),
    "use_linear_projection": True,
}
SKIPPING = V1 | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (12, 8, 24),
    "layers_per_block": 1,
}
TWO_LEVELS = V1 | {
    "block_out_channels": (6, 12),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "layers_per_block": 3,
    "attention_head_dim": (3, 2),
    "norm_num_groups": 3,
}


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        pytest.param(V1, (8, 12), id="as in 1.x"),
        pytest.param(V2, (7, 5), id="as in 2.x on an odd grid"),
        pytest.param(SKIPPING, (6, 10), id="finest level without attention"),
        pytest.param(
            TWO_LEVELS | {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-4},
            (5, 9),
            id="two levels of three layers and sines first",
        ),
    ],
)
def test_at_one_frame_the_prediction_is_that_of_diffusers_image_network(tmp_path, config, grid):
    theirs = randomize(UNet2DConditionModel(**config))
    theirs.save_pretrained(tmp_path)
    # Small inputs: the epsilons then weigh as much as the variances of the first layers.
    sample = 0.01 * torch.randn(2, 4, *grid)
    timesteps, context = torch.tensor([981, 3]), torch.randn(2, 7, 12)
    ours = jax.jit(lambda unet, *inputs: unet(*inputs))(
        load_unet(tmp_path), images_last(sample), jnp.asarray(timesteps), jnp.asarray(context)
    )
    expected = theirs(sample, timesteps, context).sample
    assert relative_error(channels_first(ours)[:, :, 0], expected) < FORWARD


# --- the 3D U-Net


def published_3d(config):
    """Returns a config as the published Tune-A-Video writes it."""
    config = {"norm_eps": 1e-5, "in_channels": 4, "out_channels": 4} | config
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    for blocks in ("down_block_types", "up_block_types"):
        config[blocks] = [kind.replace("2D", "3D") for kind in config[blocks]]
    return config | {"_class_name": "UNet3DConditionModel"}


def save_3d(folder, config):
    """Returns a random 3D U-Net of `torch_unet3d`, written as the published code writes it."""
    config = published_3d(config)
    theirs = randomize(UNet3D(config))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(theirs.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return theirs


@pytest.mark.parametrize(
    ("config", "frames", "grid"),
    [
        pytest.param(V1, 4, (8, 4), id="as in 1.x"),
        pytest.param(V2, 3, (5, 7), id="as in 2.x on an odd grid"),
        pytest.param(TWO_LEVELS | {"layers_per_block": 1}, 5, (3, 6), id="two levels"),
    ],
)
def test_prediction_and_gradient_of_a_video_are_those_of_pytorch(tmp_path, config, frames, grid):
    theirs = save_3d(tmp_path, config)
    unet = load_unet(tmp_path)
    sample, target = 0.01 * torch.randn(2, 4, frames, *grid), torch.randn(2, 4, frames, *grid)
    timesteps, context = torch.tensor([981, 3]), torch.randn(2, 7, 12)

    trained = freeze_all_but_trained(theirs)
    expected = theirs(sample, timesteps, context)
    (expected * target).mean().backward()

    @jax.jit
    def predict(unet):
        labels = label_params(unet.params, TRAINABLE_MODULES)

        def loss(params):
            moved = unet.with_params(unet.params | params)
            out = moved(videos_last(sample), jnp.asarray(timesteps), jnp.asarray(context))
            return jnp.mean(out * videos_last(target)), out

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(
            select(unet.params, labels, "train")
        )
        return out, gradients

    out, gradients = predict(unet)
    assert relative_error(channels_first(out), expected) < FORWARD
    gradients = dict(to_tensor(name, np.asarray(value)) for name, value in gradients.items())
    assert gradients.keys() == trained.keys()
    scale = max(parameter.grad.norm().item() for parameter in trained.values())
    for name, parameter in trained.items():
        difference = np.linalg.norm(gradients[name] - parameter.grad.numpy())
        # Some are zero in truth, where a norm right after takes their effect away again.
        assert difference < GRADIENT * parameter.grad.norm().item() + 1e-6 * scale, name


@pytest.mark.parametrize("config", [V1, V2, SKIPPING], ids=["1.x", "2.x", "skipping"])
def test_what_we_save_is_loaded_by_the_published_network_to_the_last_tensor(tmp_path, config):
    UNet2DConditionModel(**config).save_pretrained(tmp_path / "image")
    unet = load_unet(tmp_path / "image", key=jax.random.key(1))
    save_unet(tmp_path / "tuned", unet)
    path = tmp_path / "tuned" / "diffusion_pytorch_model.safetensors"
    theirs = UNet3D(json.loads((tmp_path / "tuned" / "config.json").read_text()))
    theirs.load_state_dict(load_file(path), strict=True)
    loaded = theirs.state_dict()
    assert loaded.keys() == {tensor_name(name) for name in unet.params}
    for name, tensor in (to_tensor(n, np.asarray(p)) for n, p in unet.params.items()):
        np.testing.assert_array_equal(loaded[name].numpy(), tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_published_pickle_holds_what_the_published_safetensors_holds(tmp_path):
    tuned = GOLDEN / "tuned" / "unet"
    for name in ("config.json", "diffusion_pytorch_model.bin"):
        (tmp_path / name).write_bytes((tuned / name).read_bytes())
    pickled, safe = load_unet(tmp_path), load_unet(tuned)
    assert pickled.params.keys() == safe.params.keys()
    for name, value in safe.params.items():
        np.testing.assert_array_equal(pickled.params[name], value)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: torch.save({"state_dict": torch.load(path)}, path), id="nested"),
        pytest.param(lambda path: torch.save(torch.nn.Linear(1, 1), path), id="code"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:9999]), id="cut off"),
        pytest.param(lambda path: path.write_text("<html>404</html>"), id="a web page"),
    ],
)
def test_a_pickle_of_anything_but_tensors_is_one_line_that_names_it(tmp_path, damage):
    tuned = GOLDEN / "tuned" / "unet"
    for name in ("config.json", "diffusion_pytorch_model.bin"):
        (tmp_path / name).write_bytes((tuned / name).read_bytes())
    damage(tmp_path / "diffusion_pytorch_model.bin")
    message = r"diffusion_pytorch_model\.bin: not a file of plain tensors"
    with pytest.raises(ValueError, match=message) as error:
        load_unet(tmp_path)
    assert len(str(error.value).splitlines()) == 1


# --- exports


@pytest.fixture(scope="module")
def pipeline():
    """The base model after some training: every parameter has moved."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        BASE, safety_checker=None, requires_safety_checker=False
    )
    torch.manual_seed(0)
    for network in (pipeline.text_encoder, pipeline.vae, pipeline.unet):
        for parameter in network.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    return pipeline


NETWORKS = ("text_encoder", "vae", "unet")


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param(torch.float32, {}, id="plain"),
        pytest.param(torch.bfloat16, {}, id="bfloat16"),
        pytest.param(torch.float16, {"variant": "fp16"}, id="fp16"),
        pytest.param(torch.float32, {"max_shard_size": "100KB"}, id="sharded"),
        pytest.param(
            torch.float16, {"max_shard_size": "50KB", "variant": "fp16"}, id="sharded fp16"
        ),
        pytest.param(torch.float32, {"safe_serialization": False}, id="pickled"),
        pytest.param(torch.bfloat16, {"safe_serialization": False}, id="pickled bfloat16"),
        pytest.param(
            torch.float32,
            {"safe_serialization": False, "max_shard_size": "100KB"},
            id="sharded pickled",
        ),
    ],
)
def test_a_pipeline_that_diffusers_exports_is_read_to_the_last_bit(
    tmp_path, pipeline, dtype, options
):
    exported = copy.deepcopy(pipeline)
    for part in NETWORKS:
        getattr(exported, part).to(dtype)
    exported.save_pretrained(tmp_path, **options)
    ours = load_model(tmp_path, variant=options.get("variant"))
    for part in NETWORKS:
        network = getattr(ours, part)
        params = {n: p for n, p in network.params.items() if not in_modules(n, TEMPORAL)}
        theirs = {
            f"text_model.{name}" if part == "text_encoder" else name: tensor
            for name, tensor in getattr(exported, part).state_dict().items()
        }
        assert {tensor_name(name) for name in params} == theirs.keys()
        for name, tensor in (to_tensor(n, np.asarray(p)) for n, p in params.items()):
            np.testing.assert_array_equal(tensor, theirs[name].float().numpy())


def test_the_configs_and_the_tokenizer_of_an_export_say_what_the_originals_said(tmp_path, pipeline):
    pipeline.save_pretrained(tmp_path)
    ours, base = load_model(tmp_path), load_model(BASE)
    for part in NETWORKS:
        assert getattr(ours, part).config == getattr(base, part).config
    np.testing.assert_array_equal(ours.schedule.alphas_cumprod, base.schedule.alphas_cumprod)
    assert ours.schedule.final_alpha_cumprod == base.schedule.final_alpha_cumprod
    assert ours.schedule.prediction_type == base.schedule.prediction_type
    prompts = ["a photo of a cat, watching", ""]
    np.testing.assert_array_equal(tokenize(ours, prompts), tokenize(base, prompts))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_scheduler_that_replaced_the_original_is_read(tmp_path, pipeline, scheduler):
    other = scheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    other.save_pretrained(tmp_path)
    schedule = load_schedule(tmp_path)
    expected = load_schedule(BASE / "scheduler").alphas_cumprod
    np.testing.assert_array_equal(schedule.alphas_cumprod, expected)
    assert schedule.prediction_type == "v_prediction"


# --- the schedule


def ddim_config(prediction_type, set_alpha_to_one, beta_schedule="scaled_linear"):
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": beta_schedule,
        "clip_sample": False,
        "steps_offset": 1,
        "prediction_type": prediction_type,
        "set_alpha_to_one": set_alpha_to_one,
    }


@pytest.mark.parametrize("num_steps", [1, 7, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0], ids=["eta 0", "eta 1"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("to_one", [False, True], ids=["to abar_0", "to one"])
def test_every_ddim_step_is_that_of_diffusers(prediction_type, to_one, eta, num_steps):
    theirs = DDIMScheduler(**ddim_config(prediction_type, to_one))
    theirs.set_timesteps(num_steps)
    ours = read_schedule(theirs.config)
    timesteps = ddim_timesteps(ours, num_steps)
    np.testing.assert_array_equal(timesteps, theirs.timesteps.numpy())
    latents, prediction, noise = torch.randn(3, 2, 4, 3, 5, 2)
    step = jax.jit(ddim_step, static_argnames="step_size")
    for t in timesteps:
        expected = theirs.step(
            prediction, int(t), latents, eta=eta, variance_noise=noise if eta else None
        ).prev_sample
        moved = step(
            ours,
            videos_last(prediction),
            videos_last(latents),
            t,
            step_size=ddim_step_size(ours, num_steps),
            eta=eta,
            noise=videos_last(noise) if eta else None,
        )
        assert relative_error(channels_first(moved), expected) < STEP, t


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("to_one", [False, True], ids=["from abar_0", "from one"])
def test_every_inverse_step_is_that_of_diffusers(prediction_type, to_one):
    theirs = DDIMInverseScheduler(**ddim_config(prediction_type, to_one))
    theirs.set_timesteps(7)
    ours = read_schedule(theirs.config)
    timesteps = ddim_timesteps(ours, 7)[::-1]
    np.testing.assert_array_equal(timesteps, theirs.timesteps.numpy())
    latents, prediction = torch.randn(2, 2, 4, 3, 5, 2)
    step = jax.jit(ddim_inverse_step, static_argnames="step_size")
    for t in timesteps:
        expected = theirs.step(prediction, int(t), latents).prev_sample
        moved = step(
            ours,
            videos_last(prediction),
            videos_last(latents),
            t,
            step_size=ddim_step_size(ours, 7),
        )
        assert relative_error(channels_first(moved), expected) < STEP, t


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_noise_levels_are_those_of_diffusers(beta_schedule):
    theirs = DDIMScheduler(**ddim_config("epsilon", False, beta_schedule))
    ours = read_schedule(theirs.config)
    # diffusers multiplies a thousand float32 numbers where we multiply in float64.
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-5)
    assert float(ours.final_alpha_cumprod) == float(theirs.final_alpha_cumprod)


# Of diffusers' own conversions.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_dpm_solver_step_is_that_of_diffusers(prediction_type, num_steps):
    config = ddim_config(prediction_type, set_alpha_to_one=False)
    theirs = DPMSolverMultistepScheduler.from_config(config)
    theirs.set_timesteps(num_steps)
    mix = np.random.default_rng(0).normal(0, 0.3, (4, 4)).astype(np.float32)
    noise = np.random.default_rng(1).standard_normal((1, 2, 3, 3, 4), np.float32)

    def denoise(latents, timesteps, context):
        return jnp.tanh(latents @ mix) + 0.001 * timesteps.reshape(-1, 1, 1, 1, 1)

    path = dpm_solver_sample(
        denoise,
        read_schedule(config),
        jnp.asarray(noise),
        jnp.zeros((1, 1, 1)),
        num_inference_steps=num_steps,
        trajectory=True,
    )
    latents = torch.tensor(noise)
    for timestep, ours in zip(theirs.timesteps, path, strict=True):
        at = jnp.asarray(timestep.numpy())[None]
        output = torch.tensor(np.asarray(denoise(jnp.asarray(latents.numpy()), at, None)))
        latents = theirs.step(output, timestep, latents).prev_sample
        assert relative_error(ours, latents) < 5e-6
