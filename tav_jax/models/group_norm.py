"""Group norm: its definition, and for GPUs one that reads less.

`one_pass_group_norm` reads its input once for the statistics and once to normalise. Its gradient is
written by hand: it reads the input and the output's gradient once for sums and once for the result.
For the backward pass it keeps nothing but the input and the statistics.
"""

import math
from functools import partial
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from tav_jax.models import backend
from tav_jax.models.frame_collectives import (
    mean_and_variance,
    mean_over_devices,
    merge_statistics,
)

Parts: TypeAlias = tuple[Array, ...]
"""Arrays `b *axes c` that differ in c alone. They stand for their concatenation along it."""
Channels: TypeAlias = Float[Array, "b c"]
"""A float32 number for each batch item and channel."""

# The sums of `one_pass_group_norm` are over at most so many pieces of at least so many positions.
MAX_PIECES, MIN_PIECE = 512, 64


class NormOptions(NamedTuple):
    """Arguments of `group_norm` that are not arrays."""

    num_groups: int
    eps: float
    joint_frames: bool
    silu: bool = False


def group_norm(
    x: Float[Array, "b *axes _"] | Parts,
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    shift: Float[Array, "b c"] | None = None,
    *,
    num_groups: int,
    eps: float,
    joint_frames: bool,
    silu: bool = False,
) -> Float[Array, "b *axes c"]:
    """Return x with zero mean and unit variance in each group of channels, then scaled.

    Statistics are taken over all axes but the first, for each group of channels, in float32.

    Args:
        x: Videos `b f h w c` or images `n h w c`. A tuple of arrays stands for their concatenation
            along the channels.
        scale: Factor of each channel.
        bias: Offset of each channel.
        shift: Added to x first.
        num_groups: Number of groups of neighbouring channels.
        eps: Added to the variance.
        joint_frames: The second axis of x is frames, and they share their statistics. If a video's
            frames are on several devices, those exchange the statistics.
        silu: Whether to apply SiLU to the result.
    """
    parts = x if isinstance(x, tuple) else (x,)
    options = NormOptions(num_groups, eps, joint_frames, silu)
    if backend.platform() != "gpu":
        return plain_group_norm(parts, scale, bias, shift, options)
    if shift is None:
        shift = jnp.zeros((len(parts[0]), len(scale)), jnp.float32)
    return one_pass_group_norm(parts, scale, bias, shift, options)


def plain_group_norm(
    parts: Parts, scale: Array, bias: Array, shift: Array | None, options: NormOptions
) -> Array:
    """Return `group_norm` by its definition."""
    x = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    if shift is not None:
        x = x + jnp.expand_dims(shift, range(1, x.ndim - 1))
    groups = options.num_groups
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups).astype(jnp.float32)
    mean, variance = mean_and_variance(grouped, (1, 3), across_devices=options.joint_frames)
    normed = ((grouped - mean) * jax.lax.rsqrt(variance + options.eps)).reshape(x.shape)
    y = (normed * _spread(scale[None], normed) + _spread(bias[None], normed)).astype(x.dtype)
    return jax.nn.silu(y) if options.silu else y


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def one_pass_group_norm(
    parts: Parts, scale: Array, bias: Array, shift: Array, options: NormOptions
) -> Array:
    """Return `group_norm`, whose statistics are made from those of each channel.

    Neither the concatenation of the parts nor the sum of x and shift is computed: a shift of a
    channel by a constant moves its mean alone.
    """
    return _forward(parts, scale, bias, shift, options)[0]


def _forward(parts: Parts, scale: Array, bias: Array, shift: Channels, options: NormOptions):
    mean, rstd = _statistics(parts, shift, options)
    mean = mean - shift  # that of x without the shift
    pieces = [
        (jax.nn.silu(y) if options.silu else y).astype(x.dtype)
        for x, (_, y) in zip(parts, _normalise(parts, mean, rstd, scale, bias), strict=True)
    ]
    out = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)
    return out, (parts, scale, bias, shift, mean, rstd)


def _backward(options: NormOptions, residuals: tuple, gradient: Array):
    """Return the gradients by parts, scale, bias and shift.

    With x^ = (x - mean) rstd and dx^ = scale dy, where dy is the gradient before SiLU:

        dscale = sum dy x^, dbias = sum dy, dx = rstd (dx^ - mean(dx^) - x^ mean(dx^ x^))

    The means are over a group. They are made from sums over each channel.
    """
    parts, scale, bias, shift, _, rstd = residuals
    pairs = _before_scale(residuals, gradient, options)
    dbias = jnp.concatenate([_sum(dy) for _, dy in pairs], axis=-1)
    dscale = jnp.concatenate([_sum(dy * x_hat) for x_hat, dy in pairs], axis=-1)
    wide_scale = scale.astype(jnp.float32)[None]
    positions = parts[0].size // (parts[0].shape[0] * parts[0].shape[-1])
    mean_dx, mean_dx_x = (
        mean_over_devices(
            _over_groups(wide_scale * total / positions, options.num_groups),
            across_devices=options.joint_frames,
        )
        for total in (dbias, dscale)
    )
    vectors = (rstd * wide_scale, rstd * mean_dx, rstd * mean_dx_x)
    # Without the barrier XLA would keep what both passes compute from their inputs, in float32.
    residuals, gradient, vectors = jax.lax.optimization_barrier((residuals, gradient, vectors))
    pairs = _before_scale(residuals, gradient, options)
    dparts = [
        dy * _spread(a, dy) - _spread(m, dy) - x_hat * _spread(n, dy)
        for (x_hat, dy), a, m, n in zip(pairs, *(split_as(parts, v) for v in vectors), strict=True)
    ]
    return (
        tuple(dx.astype(x.dtype) for dx, x in zip(dparts, parts, strict=True)),
        dscale.sum(0).astype(scale.dtype),
        dbias.sum(0).astype(bias.dtype),
        jnp.concatenate([_sum(dx) for dx in dparts], axis=-1).astype(shift.dtype),
    )


def _before_scale(
    residuals: tuple, gradient: Array, options: NormOptions
) -> list[tuple[Array, Array]]:
    """Return x^ and dy of each part, float32."""
    parts, scale, bias, _, mean, rstd = residuals
    pairs = []
    normed = _normalise(parts, mean, rstd, scale, bias)
    for (x_hat, y), dy in zip(normed, split_as(parts, gradient), strict=True):
        dy = dy.astype(jnp.float32)
        if options.silu:
            sigmoid = jax.nn.sigmoid(y)
            dy = dy * sigmoid * (1 + y * (1 - sigmoid))
        pairs.append((x_hat, dy))
    return pairs


one_pass_group_norm.defvjp(_forward, _backward)


def _statistics(parts: Parts, shift: Array, options: NormOptions) -> tuple[Channels, Channels]:
    """Return each channel's mean, and the inverse of its deviation: those of its group."""
    moments = [channel_statistics(x) for x in parts]
    mean, variance = (jnp.concatenate(both, axis=-1) for both in zip(*moments, strict=True))
    mean = mean + shift
    groups = options.num_groups
    group_mean = _over_groups(mean, groups)
    # The variance of a group is the mean of its channels' variances plus that of their means.
    variance = _over_groups(variance + jnp.square(mean - group_mean), groups)
    mean, variance = merge_statistics(group_mean, variance, across_devices=options.joint_frames)
    return mean, jax.lax.rsqrt(variance + options.eps)


def channel_statistics(x: Float[Array, "b *axes c"]) -> tuple[Channels, Channels]:
    """Return mean and variance of each channel, in one pass over x.

    They come from the sums of d and d^2, where d is the distance from the channel's first value.
    With N values the first is at most sqrt(N) deviations from the mean. So a mean that is far from
    zero costs no accuracy.
    """
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    first = rows[:, :1].astype(jnp.float32)
    distance = rows.astype(jnp.float32) - first
    shift = _sum(distance) / rows.shape[1]
    variance = _sum(jnp.square(distance)) / rows.shape[1] - jnp.square(shift)
    return first[:, 0] + shift, jnp.maximum(variance, 0)


def _normalise(
    parts: Parts, mean: Channels, rstd: Channels, scale: Array, bias: Array
) -> list[tuple[Array, Array]]:
    """Return each part normalised, before and after scale and bias, float32."""
    out = []
    pieces = (split_as(parts, v) for v in (mean, rstd, scale[None], bias[None]))
    for x, m, r, s, b in zip(parts, *pieces, strict=True):
        x_hat = (x.astype(jnp.float32) - _spread(m, x)) * _spread(r, x)
        out.append((x_hat, x_hat * _spread(s, x) + _spread(b, x)))
    return out


def _over_groups(values: Channels, groups: int) -> Channels:
    """Return the mean over each channel's group, for each channel."""
    grouped = values.reshape(len(values), groups, -1)
    return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(values.shape)


def split_as(parts: Parts, x: Array, axis: int = -1) -> list[Array]:
    """Return x cut along an axis of channels as `parts` are."""
    ends = list(accumulate(part.shape[-1] for part in parts))
    return jnp.split(x, ends[:-1], axis)


def _spread(vector: Float[Array, "_ c"], x: Array) -> Array:
    """Return a number for each channel, shaped so that it broadcasts over x."""
    wide = vector.astype(jnp.float32)
    return wide.reshape(len(wide), *(1,) * (x.ndim - 2), wide.shape[-1])


def _sum(x: Float[Array, "b *axes c"]) -> Channels:
    """Return the sum over all axes but the first and the last.

    It is a sum of sums over pieces, so that few images keep all of a GPU busy. Otherwise XLA would
    compute what is summed, and store it, in a kernel of its own.
    """
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    whole, rest = divmod(rows.shape[1], MIN_PIECE)
    pieces = 1 if rest else math.gcd(whole, MAX_PIECES)
    sums = rows.reshape(len(rows), pieces, -1, rows.shape[-1]).sum(2)
    return jax.lax.optimization_barrier(sums).sum(1)
