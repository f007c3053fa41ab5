import jax
import jax.numpy as jnp
import pytest

from tav_jax.bench.flops import count_flops
from tav_jax.models.network import Network, parameter_shapes
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.pretrained import configs as published_config
from tav_jax.pretrained.sd_v1_4 import CONFIGS


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def convolve(x, kernel, **how):
    dims = ("NHWC", "HWIO", "NHWC")
    how = {"window_strides": (1, 1), "padding": "SAME"} | how
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=dims, **how)


@pytest.mark.parametrize(
    ("function", "inputs", "expected"),
    [
        pytest.param(jnp.matmul, [shape(3, 4), shape(4, 5)], 2 * 3 * 4 * 5, id="product"),
        pytest.param(
            lambda x, y: jnp.einsum("bik,bjk->bij", x, y),
            [shape(7, 3, 4), shape(7, 5, 4)],
            2 * 7 * 3 * 4 * 5,
            id="batch",
        ),
        pytest.param(
            # Three taps at two rows inside and two at the edges: 4 rows have 2 + 3 + 3 + 2.
            convolve,
            [shape(2, 4, 4, 5), shape(3, 3, 5, 6)],
            2 * 2 * 10 * 10 * 5 * 6,
            id="convolution without its padding",
        ),
        pytest.param(
            lambda x, kernel: convolve(x, kernel, window_strides=(2, 2), padding="VALID"),
            [shape(1, 5, 5, 1), shape(3, 3, 1, 1)],
            2 * 2 * 2 * 9,
            id="stride",
        ),
        pytest.param(
            lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=6)[0],
            [shape(3, 3)],
            6 * 2 * 27,
            id="every round of a loop",
        ),
        pytest.param(lambda x, y: (x @ y, x)[1], [shape(3, 3)] * 2, 0, id="nothing that is unused"),
        pytest.param(jax.jit(jax.checkpoint(jnp.matmul)), [shape(3, 3)] * 2, 54, id="inside calls"),
    ],
)
def test_products_are_counted(function, inputs, expected):
    assert count_flops(function, *inputs) == expected


def test_a_gradient_costs_its_products_and_only_those_asked_for():
    def loss(x, y):
        return jnp.sum(jnp.sin(x @ y))

    inputs = [shape(3, 4), shape(4, 5)]
    both = count_flops(jax.grad(loss, argnums=(0, 1)), *inputs)
    one = count_flops(lambda *inputs: jax.grad(loss, argnums=(0, 1))(*inputs)[0], *inputs)
    assert (one, both) == (2 * 120, 3 * 120)


def test_v1_4_costs_what_is_known_of_it():
    # 7.8 TFLOP a call at 8 frames of 512x512, counted on the published network with the zeros of
    # its padding, some two per cent.
    config = published_config.read_unet_config(CONFIGS["unet"])
    unet = Network(UNet3DConditionModel, config, parameter_shapes(UNet3DConditionModel, config))
    unet = unet.with_compute(attention_implementation="einsum")
    inputs = shape(1, 8, 64, 64, 4), jax.ShapeDtypeStruct((1,), jnp.int32), shape(1, 77, 768)
    flops = count_flops(lambda unet, *inputs: unet(*inputs), unet, *inputs)
    assert 0.96 * 7.8e12 < flops < 7.8e12
