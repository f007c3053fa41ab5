"""Floating-point operations of a function, counted in its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters import partial_eval


def count_flops(function: Callable[..., Any], *inputs: Any) -> int:
    """Return the operations of all matrix products and convolutions; a multiply-add is two.

    Operations that no output depends on are not counted, since compilers drop them. An example is
    the gradients of frozen weights. Recomputation is counted, and products inside of kernels are
    not. To count the work of the method itself, trace with `attention="einsum"` and
    `gradient_checkpointing="none"`.

    Args:
        function: Any function that JAX can trace.
        inputs: Its arguments: arrays, or their shapes.
    """
    traced = jax.make_jaxpr(function)(*inputs).jaxpr
    live, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return _count_jaxpr(live)


def _count_jaxpr(jaxpr: Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: JaxprEqn) -> int:
    variables: tuple[Any, ...] = (*equation.invars, *equation.outvars)
    shapes = [getattr(variable.aval, "shape", ()) for variable in variables]
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            return 2 * math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
        case "conv_general_dilated":
            return _count_convolution(equation, *shapes)
        case "cond":
            return max(_count_jaxpr(branch.jaxpr) for branch in equation.params["branches"])
        case "scan":
            return equation.params["length"] * _count_jaxpr(equation.params["jaxpr"].jaxpr)
        case "custom_jvp_call" | "custom_vjp_call":
            return _count_jaxpr(equation.params["call_jaxpr"].jaxpr)
    return sum(_count_jaxpr(inner) for inner in jaxprs_in_params(equation.params))


def _count_convolution(equation: JaxprEqn, x: Any, kernel: Any, out: Any) -> int:
    """Count products with numbers of the input only, not with zeros of padding or dilation.

    For each axis, count the pairs of an output position and a kernel tap for which the tap reads a
    number of the input: it lies inside, and not on a zero that dilation inserted.
    """
    params = equation.params
    numbers = params["dimension_numbers"]
    products = 1
    for axis in range(len(x) - 2):
        size, taps = x[numbers.lhs_spec[2 + axis]], kernel[numbers.rhs_spec[2 + axis]]
        outputs, padding = out[numbers.out_spec[2 + axis]], params["padding"][axis][0]
        stride, dilation = params["window_strides"][axis], params["lhs_dilation"][axis]
        kernel_dilation = params["rhs_dilation"][axis]
        positions = [
            output * stride + tap * kernel_dilation - padding
            for output in range(outputs)
            for tap in range(taps)
        ]
        products *= sum(
            0 <= position <= (size - 1) * dilation and position % dilation == 0
            for position in positions
        )
    batch, channels = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    return 2 * batch * channels * kernel[numbers.rhs_spec[1]] * products
