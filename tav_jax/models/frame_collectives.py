"""What frames on several devices tell each other.

Where a network runs under `jax.shard_map` with one of `FRAME_AXES` manual, each device holds a
run of a video's frames, in order, and the functions here exchange what leaves it. Elsewhere all
frames are in one place, and the same functions exchange nothing.
`tav_jax.parallel.sharding` decides which.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

FRAME_AXES = ("frames", "fsdp")
"""Axes of a mesh over which frames are spread, the first outermost."""


def _axes() -> tuple[str, ...]:
    """Returns the axes over which the frames are spread just now."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in FRAME_AXES if axis in manual)


def first_frame(x: Float[Array, "b f *axes"]) -> Float[Array, "b 1 *axes"]:
    """Returns frame 0 of the whole video."""
    axes = _axes()
    if not axes:
        return x[:, :1]
    # One addend is not zero, so that the sum is exact in any type.
    return jax.lax.psum(jnp.where(jax.lax.axis_index(axes) == 0, x[:, :1], 0), axes)


def previous_frame(x: Float[Array, "b f *axes"]) -> Float[Array, "b f *axes"]:
    """Returns for each frame the one before it, and frame 0 for itself."""
    before, axes = x[:, :1], _axes()
    if axes:
        pairs = [(device, device + 1) for device in range(jax.lax.axis_size(axes) - 1)]
        received = jax.lax.ppermute(x[:, -1:], axes, pairs)
        before = jnp.where(jax.lax.axis_index(axes) == 0, before, received)
    return jnp.concatenate([before, x[:, :-1]], axis=1)


def all_frames(x: Float[Array, "b f *axes"]) -> Float[Array, "b f2 *axes"]:
    """Returns every frame of the whole video."""
    axes = _axes()
    return jax.lax.all_gather(x, axes, axis=1, tiled=True) if axes else x


def to_positions(x: Float[Array, "b f n c"]) -> Float[Array, "b f2 n2 c"]:
    """Returns all frames at a part of the positions, where there were all positions of a part.

    Where devices do not divide the positions, the last ones get zeros.
    """
    axes = _axes()
    if not axes:
        return x
    padding = -x.shape[2] % jax.lax.axis_size(axes)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)))
    return jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=1, tiled=True)


def to_frames(x: Float[Array, "b f2 n2 c"], positions: int) -> Float[Array, "b f n c"]:
    """Returns what `to_positions` was given, of so many positions."""
    axes = _axes()
    if not axes:
        return x
    x = jax.lax.all_to_all(x, axes, split_axis=1, concat_axis=2, tiled=True)
    return x[:, :, :positions]


def mean_and_variance(
    x: Float[Array, "b *axes"], over: tuple[int, ...], *, of_all_devices: bool
) -> tuple[Float[Array, "b *axes2"], Float[Array, "b *axes2"]]:
    """Returns both over some axes of an array, on this device or on all.

    Each device takes them of its own frames, and one exchange merges them exactly (Chan et al.
    1979): the variance of the whole is the parts' mean variance plus the variance of their means.
    """
    mean = x.mean(over, keepdims=True)
    variance = jnp.square(x - mean).mean(over, keepdims=True)
    axes = _axes()
    if not (axes and of_all_devices):
        return mean, variance
    means, variances = jax.lax.all_gather(jnp.stack([mean, variance]), axes, axis=1)
    return means.mean(0), variances.mean(0) + means.var(0)
