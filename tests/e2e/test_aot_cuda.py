"""Every program compiles for an NVIDIA GPU that is not here, and its kernels are counted.

The networks have one level, with so many tokens and heads so wide that `auto` chooses cuDNN's
kernel in bfloat16. Compiling a tuning step still takes twenty seconds, nearly all of it in XLA.
So types and numbers of GPUs take turns: each program meets all four pairs of them, and so does each
implementation of attention. And each implementation is compiled backward with one preset. The other
combinations are only traced and lowered, which is where JAX refuses what it cannot do.
"""

from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tav_jax.bench.gpu_hlo import read_kernels, total_bytes
from tav_jax.bench.hlo import collective_bytes
from tav_jax.bench.programs import PROGRAMS, Networks
from tav_jax.bench.topology import assume_cudnn, find_target
from tav_jax.models.attention.frame_attention import sparse_causal_attention, spatial_attention
from tav_jax.models.clip import CLIPTextModel
from tav_jax.models.compute import ComputeOptions
from tav_jax.models.network import Network, in_modules, parameter_shapes
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.models.vae import AutoencoderKL
from tav_jax.parallel.sharding import make_mesh
from tav_jax.pretrained.configs import read_schedule
from tav_jax.pretrained.sd_v1_4 import CONFIGS
from tav_jax.training.memory import PRESETS, Size
from tav_jax.training.optimizer import TRAINABLE_MODULES

pytestmark = pytest.mark.skipif(
    find_spec("jax_cuda12_plugin") is None, reason="needs pip install '.[aot-cuda]'"
)

SIZE = Size(2, 64, 64)
IMPLEMENTATIONS = ["auto", "einsum", "by_head", "chunked", "fused"]
UNET_PROGRAMS = [
    *(("tune_step", preset) for preset in PRESETS),
    ("guided_step", "none"),
    ("inversion_step", "none"),
]
# The implementations of attention with which each program is compiled. Those of the tuning step are
# shared out over the presets. Its `fused` is what `auto` chooses.
COMPILED = {
    ("tune_step", "none"): ["auto", "chunked"],
    ("tune_step", "blocks"): ["einsum"],
    ("tune_step", "full"): ["by_head"],
    ("guided_step", "none"): IMPLEMENTATIONS,
    ("inversion_step", "none"): ["auto"],
}
TURNS = [("bfloat16", 1), ("float32", 2), ("float32", 1), ("bfloat16", 2)]


@pytest.fixture(scope="module")
def targets():
    return {gpus: find_target("h100", gpus) for gpus in (1, 2)}


@pytest.fixture
def make_program(unet_config, vae_config):
    """Return a function that makes one program of small networks."""
    unet_config = replace(
        unet_config,
        block_out_channels=(16,),
        down_attention=(True,),
        up_attention=(True,),
        num_attention_heads=(2,),
    )

    def make(name, dtype, **compute):
        networks = Networks(
            shapes(UNet3DConditionModel, unet_config, dtype),
            shapes(AutoencoderKL, vae_config, dtype),
            read_schedule(CONFIGS["scheduler"]),
        ).with_unet_compute(**compute)
        return PROGRAMS[name](networks, SIZE)

    return make


def shapes(module_class, config, dtype):
    """Return a network with shapes for parameters; what is trained is float32."""
    params = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, "float32" if in_modules(name, TRAINABLE_MODULES) else dtype
        )
        for name, leaf in parameter_shapes(module_class, config).items()
    }
    return Network(module_class, config, params, ComputeOptions(dtype=dtype))


@contextmanager
def on_gpus(target):
    sizes = {"data": 1, "frames": len(target.devices), "fsdp": 1}
    mesh = make_mesh(sizes, frames=SIZE.frames, devices=target.devices)
    with jax.set_mesh(mesh), assume_cudnn():
        yield NamedSharding(mesh, PartitionSpec())


@pytest.mark.parametrize(
    ("name", "preset", "attention", "dtype", "gpus"),
    [
        (name, preset, attention, *TURNS[(row + column) % 4])
        for row, (name, preset) in enumerate(UNET_PROGRAMS)
        for column, attention in enumerate(IMPLEMENTATIONS)
    ],
)
def test_programs_of_the_unet(targets, make_program, name, preset, attention, dtype, gpus):
    program = make_program(
        name, dtype, attention_implementation=attention, gradient_checkpointing=preset
    )
    uses_cudnn = attention in ("auto", "fused") and dtype == "bfloat16"
    with on_gpus(targets[gpus]):
        if attention not in COMPILED[name, preset]:
            text = program.function.lower(*program.abstract_inputs(), **program.settings).as_text()
            assert ("__cudnn$fmhaSoftmax" in text) == uses_cudnn
            return
        compiled = program.compile(targets[gpus].compiler_options)
    hlo = compiled.as_text()
    kernels = read_kernels(hlo)
    assert total_bytes(kernels, "matrix_product") > 0
    assert (total_bytes(kernels, "attention") > 0) == uses_cudnn
    assert bool(collective_bytes(hlo)) == (gpus > 1)


@pytest.mark.parametrize(("dtype", "gpus"), TURNS)
def test_programs_of_the_autoencoder(targets, make_program, dtype, gpus):
    for name in ("encode", "decode"):
        program = make_program(name, dtype)
        with on_gpus(targets[gpus]):
            compiled = program.compile(targets[gpus].compiler_options)
        assert total_bytes(read_kernels(compiled.as_text()), "convolution") > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_text_encoder(targets, text_config, dtype):
    with on_gpus(targets[1]) as sharding:
        tokens = jax.ShapeDtypeStruct((2, 7), jnp.int32, sharding=sharding)
        encode = jax.jit(lambda network, tokens: network(tokens))
        program = encode.lower(shapes(CLIPTextModel, text_config, dtype), tokens)
        kernels = read_kernels(program.compile(targets[1].compiler_options).as_text())
    assert total_bytes(kernels, "matrix_product") > 0


def small_program(target, function, *shapes):
    """Return the kernels of a function of bfloat16 arrays."""
    with on_gpus(target) as sharding:
        inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
        program = jax.jit(function).lower(*inputs).compile(target.compiler_options)
    return read_kernels(program.as_text())


@pytest.mark.parametrize(
    ("frames", "tokens", "keys", "width"),
    [
        (8, 4096, 77, 40),
        (1, 31 * 33, 77, 40),
        (24, 1024, 78, 80),
        (3, 31 * 17, 1, 80),
        (8, 256, 77, 160),
        (24, 64, 77, 160),
    ],
)
def test_attention_and_its_gradients_at_the_widths_of_v1_4(targets, frames, tokens, keys, width):
    def loss(video, text):
        out = sparse_causal_attention(video, video, video) + spatial_attention(video, text, text)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    shapes = (1, frames, tokens, 8, width), (1, 1, keys, 8, width)
    kernels = small_program(targets[1], jax.value_and_grad(loss, argnums=(0, 1)), *shapes)
    assert (total_bytes(kernels, "attention") > 0) == (width <= 128)


def flops(kernels):
    return {
        kind: sum(kernel.flops * kernel.runs for kernel in kernels if kernel.kind == kind)
        for kind in {kernel.kind for kernel in kernels if kernel.flops}
    }


def test_the_products_of_a_loop_are_counted_as_often_as_it_runs(targets):
    def repeat(x, y):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ y), x)

    kernels = small_program(targets[1], repeat, (256, 512), (512, 512))
    assert flops(kernels) == {"matrix_product": 5 * 2 * 256 * 512 * 512}
    moved = 2 * (2 * 256 * 512 + 512 * 512)
    assert total_bytes(kernels, "matrix_product") == 5 * moved


def test_a_convolution_and_its_gradients_cost_the_same(targets):
    def loss(x, kernel):
        out = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    shapes = (2, 16, 16, 32), (3, 3, 32, 64)
    forward = 2 * (2 * 16 * 16 * 64) * (3 * 3 * 32)
    assert flops(small_program(targets[1], loss, *shapes)) == {"convolution": forward}
    gradients = jax.grad(loss, argnums=(0, 1))
    assert flops(small_program(targets[1], gradients, *shapes)) == {"convolution": 3 * forward}


def test_attention_costs_two_products_and_its_gradients_five_more(targets):
    def attend(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")

    def loss(*heads):
        return jnp.sum(jnp.square(attend(*heads).astype(jnp.float32)))

    shapes = (2, 128, 4, 32), (2, 256, 4, 32), (2, 256, 4, 32)
    product = 2 * 2 * 4 * 128 * 256 * 32
    assert flops(small_program(targets[1], attend, *shapes)) == {"attention": 2 * product}
    step = jax.value_and_grad(loss, argnums=(0, 1, 2))
    assert flops(small_program(targets[1], step, *shapes)) == {"attention": 7 * product}


def test_bench_prints_the_work_of_a_gpu_and_writes_its_programs(bench_report, tmp_path):
    row = bench_report(
        *("--aot", "h200", "--chips", "2", "--network", "small", "--frames", "2", "--size", "32"),
        *("--programs", "encode", "--dump-hlo", str(tmp_path / "hlo")),
    )
    assert row["device"] == "h200, 2 devices"
    assert "4.3 TB/s" in row["floor_assumes"]
    kernels = read_kernels((tmp_path / "hlo" / "encode.hlo").read_text())
    assert row["encode_kernels"] == sum(kernel.runs for kernel in kernels)
    assert row["encode_moved_bytes"] == total_bytes(kernels)
    assert 0 < row["encode_moved_bytes_other"] < row["encode_moved_bytes"]
    assert row["encode_floor_ms"] > 0
