"""Runs on meshes of eight devices against the same on one, and what the devices send each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tav_jax import sharding
from tav_jax.models.unet import UNet3DConditionModel, UNetConfig
from tav_jax.partition import TRAINABLE_MODULES, label_params, make_optimizer
from tav_jax.pipeline import compile_train_step, ddim_invert_loop, ddim_sample_loop
from tav_jax.published_config import read_schedule
from tav_jax.sharding import AXES, laid, make_mesh, on_mesh, videos
from tav_jax.training import init_state
from tav_jax.v1_4 import CONFIGS

ONE = (1, 1, 1)
MESHES = [(1, 8, 1), (2, 4, 1), (1, 1, 8), (2, 2, 2)]
FRAMES, SIDE = 8, 8
SCHEDULE = read_schedule(CONFIGS["scheduler"])
SMALL = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(8, 16),
    down_attention=(True, False),
    up_attention=(False, True),
    num_attention_heads=(2, 2),
    layers_per_block=1,
    cross_attention_dim=8,
    norm_num_groups=4,
    norm_eps=1e-5,
    use_linear_projection=False,
    flip_sin_to_cos=True,
    freq_shift=0.0,
)


def mesh_of(sizes, frames=FRAMES):
    return make_mesh(dict(zip(AXES, sizes, strict=True)), frames=frames)


@pytest.fixture(autouse=True)
def every_kernel_in_parts(monkeypatch):
    """However small: otherwise nothing in networks of these sizes would be."""
    monkeypatch.setattr(sharding, "WORTH_PARTING", 1)


@pytest.fixture(scope="module")
def unet(random_network):
    return random_network(UNet3DConditionModel, SMALL)


def clip(channels, frames=FRAMES):
    shape = (1, frames, SIDE, SIDE, channels)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


CONTEXT = np.random.default_rng(2).standard_normal((1, 6, 8), np.float32)


def tune_invert_and_sample(unet, steps=3):
    """Everything a run computes: losses, what was trained, the inverted clip, an edit."""
    labels = label_params(unet.params, TRAINABLE_MODULES)
    optimizer = make_optimizer(labels, 1e-3)
    step = compile_train_step(0.18, optimizer=optimizer, labels=labels)
    state = init_state(jax.tree.map(jnp.copy, unet), optimizer, jax.random.key(7))
    state, losses = laid(state), []
    for _ in range(steps):
        state, metrics = step(state, clip(8), CONTEXT, SCHEDULE)
        losses.append(metrics["loss"])
    latents = laid(jnp.asarray(clip(4)), videos)
    noise = ddim_invert_loop(
        jnp.copy(latents), 0, steps, state.unet, SCHEDULE, (CONTEXT,), num_steps=10
    )
    texts = CONTEXT, CONTEXT[:, ::-1]
    edit = ddim_sample_loop(
        jnp.copy(noise), 0, steps, state.unet, SCHEDULE, texts, 7.5, num_steps=10
    )
    trained = {name: state.unet.params[name] for name in labels if labels[name] == "train"}
    return jax.device_get({"losses": losses, "trained": trained, "noise": noise, "edit": edit})


@pytest.fixture(scope="module")
def on_one_device(unet):
    return tune_invert_and_sample(unet)


@pytest.mark.parametrize("sizes", MESHES)
def test_a_mesh_computes_what_one_device_does(unet, on_one_device, sizes):
    with on_mesh(mesh_of(sizes)):
        ours = tune_invert_and_sample(unet)
    for name, one in on_one_device.items():
        for value, expected in zip(jax.tree.leaves(ours[name]), jax.tree.leaves(one), strict=True):
            distance = np.abs(value - expected).max() / np.abs(expected).max()
            assert distance <= 1e-5, name


def test_reference_cases_pass_on_a_mesh(golden):
    # On the others by `python tests/golden.py tests/golden --mesh ...`, see BUILD_NOTES.
    with on_mesh(mesh_of((2, 2, 2))):
        reference = GoldenSet(golden)
        run = cases(reference)
        rows = [row for name in ("sample", "invert", "tune") for row in run[name](reference)]
    assert [row for row in rows if not row.passed] == []


@pytest.mark.parametrize("scope", ["spatial", "first_frame", "full"])
def test_other_scopes_of_attention_are_the_same_on_a_mesh(unet, scope):
    unet = unet.with_config(attention_scope=scope)
    inputs = clip(4), np.array([500]), CONTEXT
    denoise = jax.jit(lambda unet, *inputs: sharding.denoiser(unet)(*inputs))
    expected = denoise(unet, *inputs)
    with on_mesh(mesh_of((1, 4, 2))):
        np.testing.assert_allclose(denoise(unet, *inputs), expected, rtol=1e-4, atol=1e-5)
