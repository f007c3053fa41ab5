"""Floating-point operations of a function, counted from what it traces to."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters import partial_eval


def count_flops(function: Callable[..., Any], *inputs: Any) -> int:
    """Returns the operations of all matrix products and convolutions; a multiply-add is two.

    What no output depends on is not counted, since compilers drop it: gradients of frozen weights.
    Recomputation counts, and kernels that hide their products do not: count with
    `attention="einsum"` and `gradient_checkpointing="none"` to know the work of the method itself.

    Args:
        inputs: Arrays, or their shapes.
    """
    traced = jax.make_jaxpr(function)(*inputs).jaxpr
    live, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return _of_jaxpr(live)


def _of_jaxpr(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: JaxprEqn) -> int:
    variables: tuple[Any, ...] = (*equation.invars, *equation.outvars)
    shapes = [getattr(variable.aval, "shape", ()) for variable in variables]
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            return 2 * math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
        case "conv_general_dilated":
            return _of_convolution(equation, *shapes)
        case "cond":
            return max(_of_jaxpr(branch.jaxpr) for branch in equation.params["branches"])
        case "scan":
            return equation.params["length"] * _of_jaxpr(equation.params["jaxpr"].jaxpr)
        case "custom_jvp_call" | "custom_vjp_call":
            return _of_jaxpr(equation.params["call_jaxpr"].jaxpr)
    return sum(_of_jaxpr(inner) for inner in jaxprs_in_params(equation.params))


def _of_convolution(equation: JaxprEqn, x: Any, kernel: Any, out: Any) -> int:
    """Counts products with real numbers only, not with the zeros of padding or dilation.

    Along one axis a kernel's tap meets a number of the input for those places of the output at
    which it lies inside and between no dilated points.
    """
    params = equation.params
    numbers = params["dimension_numbers"]
    products = 1
    for axis in range(len(x) - 2):
        size, taps = x[numbers.lhs_spec[2 + axis]], kernel[numbers.rhs_spec[2 + axis]]
        places, low = out[numbers.out_spec[2 + axis]], params["padding"][axis][0]
        stride, spread = params["window_strides"][axis], params["lhs_dilation"][axis]
        between = params["rhs_dilation"][axis]
        met = [
            place * stride + tap * between - low for place in range(places) for tap in range(taps)
        ]
        products *= sum(0 <= at <= (size - 1) * spread and at % spread == 0 for at in met)
    batch, channels = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    return 2 * batch * channels * kernel[numbers.rhs_spec[1]] * products
