"""Runs on meshes of eight devices against the same on one, and what the devices send each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tav_jax.bench.hlo import collective_bytes
from tav_jax.parallel import sharding
from tav_jax.parallel.sharding import AXES, make_mesh, on_mesh, param_spec, shard, video_sharding
from tav_jax.pipeline import compile_train_step, ddim_invert_loop, ddim_sample_loop
from tav_jax.pretrained.configs import read_schedule
from tav_jax.pretrained.sd_v1_4 import CONFIGS
from tav_jax.training.optimizer import TRAINABLE_MODULES, label_params, make_optimizer
from tav_jax.training.train_step import init_state

MESHES = [(1, 8, 1), (2, 4, 1), (1, 1, 8), (2, 2, 2)]
FRAMES, SIDE = 8, 8
SCHEDULE = read_schedule(CONFIGS["scheduler"])


def mesh_of(sizes, frames=FRAMES):
    return make_mesh(dict(zip(AXES, sizes, strict=True)), frames=frames)


@pytest.fixture(scope="module")
def unet(tiny_unet):
    return tiny_unet


@pytest.fixture(autouse=True)
def every_kernel_in_parts(monkeypatch):
    """However small: otherwise nothing in networks of these sizes would be."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 1)


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
    state, losses = shard(state), []
    for _ in range(steps):
        state, metrics = step(state, clip(8), CONTEXT, SCHEDULE)
        losses.append(metrics["loss"])
    latents = shard(jnp.asarray(clip(4)), video_sharding)
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


@pytest.mark.parametrize("scope", ["spatial", "first_frame", "full"])
def test_other_scopes_of_attention_are_the_same_on_a_mesh(unet, scope):
    unet = unet.with_config(attention_scope=scope)
    inputs = clip(4), np.array([500]), CONTEXT
    denoise = jax.jit(lambda unet, *inputs: sharding.denoiser(unet)(*inputs))
    expected = denoise(unet, *inputs)
    with on_mesh(mesh_of((1, 4, 2))):
        np.testing.assert_allclose(denoise(unet, *inputs), expected, rtol=1e-4, atol=1e-5)


# What devices send each other.


def sent(unet, sizes, frames):
    """Bytes by kind of one call of the network."""
    inputs = clip(4, frames), np.array([500]), CONTEXT
    with on_mesh(mesh_of(sizes, frames)):
        call = jax.jit(lambda unet, *inputs: sharding.denoiser(unet)(*inputs))
        latents = shard(jnp.asarray(inputs[0]), video_sharding)
        return collective_bytes(call.lower(unet, latents, *inputs[1:]).compile().as_text())


def test_what_is_sent_grows_with_the_boundary_and_not_with_the_video(unet):
    # Its transformers have width 8 on the fine grid, one on the way down and two up, and 16 on the
    # coarse one, in the middle.
    of_one_frame = 4 * SIDE**2 * 8 * 3 + 4 * (SIDE // 2) ** 2 * 16  # bytes of float32
    devices, groups, resnets = 8, unet.config.norm_num_groups, 8
    eight, sixteen = (sent(unet, (1, devices, 1), frames) for frames in (8, 16))
    # Keys and values of frame 0, and of the frame before the device's first.
    assert eight["all-reduce"] == sixteen["all-reduce"] == 2 * of_one_frame
    assert eight["collective-permute"] == sixteen["collective-permute"] == 2 * of_one_frame
    # There and back between frames and positions, of a device's own share of the video.
    assert eight["all-to-all"] == 2 * of_one_frame
    assert sixteen["all-to-all"] == 2 * 2 * of_one_frame
    # Mean and variance of each group, of each device: two norms a block, and one at the end.
    statistics = 2 * 4 * groups * devices * (2 * resnets + 1)
    assert eight["all-gather"] == sixteen["all-gather"] == statistics
    assert eight.keys() == {"all-reduce", "collective-permute", "all-to-all", "all-gather"}


def test_parts_of_parameters_are_gathered_and_nothing_else_is_added(unet):
    whole, parted = (sent(sharded_on(unet, sizes), sizes, 8) for sizes in ((1, 8, 1), (1, 1, 8)))
    kernels = sum(
        4 * value.size
        for name, value in unet.params.items()
        if param_spec(name, value.shape, mesh_of((1, 1, 8))) != PartitionSpec()
    )
    assert kernels > 0
    assert parted.pop("all-gather") <= kernels + whole.pop("all-gather")
    assert parted == whole


def sharded_on(unet, sizes):
    with on_mesh(mesh_of(sizes)):
        return shard(unet)


def test_one_frame_a_device_is_what_a_grid_that_does_not_divide_gets_too(unet):
    # 5 x 3 positions over 8 devices: some get padding.
    latents = np.random.default_rng(3).standard_normal((1, 8, 5, 3, 4), np.float32)
    denoise = jax.jit(lambda unet, *inputs: sharding.denoiser(unet)(*inputs))
    expected = denoise(unet, latents, np.array([500]), CONTEXT)
    with on_mesh(mesh_of((1, 8, 1))):
        ours = denoise(unet, latents, np.array([500]), CONTEXT)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


# Which mesh.


@pytest.mark.parametrize(
    ("sizes", "frames", "expected"),
    [
        pytest.param((1, -1, 1), 8, (1, 8, 1), id="all for frames"),
        pytest.param((1, -1, 1), 6, (1, 2, 1), id="as many as divide them"),
        pytest.param((1, -1, 1), 1, (1, 1, 1), id="an image"),
        pytest.param((2, -1, 1), 8, (2, 4, 1), id="the rest for frames"),
        pytest.param((1, -1, 4), 8, (1, 2, 4), id="the rest beside fsdp"),
        pytest.param((-1, 2, 1), 8, (4, 2, 1), id="the rest for data"),
        pytest.param((1, 2, 1), 8, (1, 2, 1), id="some devices"),
    ],
)
def test_sizes_of_a_mesh(sizes, frames, expected):
    assert tuple(mesh_of(sizes, frames).shape.values()) == expected


@pytest.mark.parametrize(
    ("sizes", "frames", "message"),
    [
        pytest.param((1, 3, 1), 8, "over 3 devices .* they do over 1, 2, 4, 8", id="frames"),
        pytest.param((1, -1, 3), 8, "over 6 devices|over 3 devices", id="fsdp"),
        pytest.param((4, 4, 1), 8, "takes 16 devices, there are 8", id="too many"),
        pytest.param((-1, -1, 1), 8, "only one of them can be -1", id="two rests"),
    ],
)
def test_meshes_that_cannot_be(sizes, frames, message):
    with pytest.raises(ValueError, match=message):
        mesh_of(sizes, frames)


def test_large_kernels_are_stored_in_parts_and_the_rest_whole(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 2**14)
    mesh = mesh_of((1, 1, 8))
    assert param_spec("0.conv1.kernel", (3, 3, 320, 320), mesh) == PartitionSpec(
        None, None, None, "fsdp"
    )
    assert param_spec("attn1.to_k.kernel", (320, 320), mesh) == PartitionSpec(None, "fsdp")
    assert param_spec("attn1.to_k.kernel", (64, 64), mesh) == PartitionSpec()
    trained = PartitionSpec(None, ("frames", "fsdp"))
    for name in ("attn1.to_q", "attn2.to_q", "attn_temp.to_k", "attn_temp.to_out.0"):
        assert param_spec(f"0.{name}.kernel", (320, 320), mesh) == trained
    assert param_spec("conv_out.kernel", (3, 3, 20480, 4), mesh) == PartitionSpec()
    assert param_spec("norm.scale", (32768,), mesh) == PartitionSpec()
