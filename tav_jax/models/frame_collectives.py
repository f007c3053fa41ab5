"""Communication between devices that hold different frames of one video.

If a network runs under `jax.shard_map` with one of `FRAME_AXES` manual, each device holds
consecutive frames of a video, and these functions exchange data between the devices. Otherwise
every device holds all frames, and the same functions communicate nothing.
`tav_jax.parallel.sharding` decides which of the two it is.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from tav_jax.models import backend

FRAME_AXES = ("frames", "fsdp")
"""Mesh axes over which frames are sharded, outermost first."""


def _axes() -> tuple[str, ...]:
    """Return the mesh axes over which frames are sharded in the program being traced."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in FRAME_AXES if axis in manual)


def first_frame(x: Float[Array, "b f *axes"]) -> Float[Array, "b 1 *axes"]:
    """Return frame 0 of the whole video, on every device."""
    axes = _axes()
    if not axes:
        return x[:, :1]
    # Only one addend is not zero, so the sum is exact in any type.
    return jax.lax.psum(jnp.where(jax.lax.axis_index(axes) == 0, x[:, :1], 0), axes)


def previous_frame(x: Float[Array, "b f *axes"]) -> Float[Array, "b f *axes"]:
    """Return the previous frame of each frame. That of frame 0 is frame 0 itself."""
    previous, axes = x[:, :1], _axes()
    if axes:
        pairs = [(device, device + 1) for device in range(jax.lax.axis_size(axes) - 1)]
        received = jax.lax.ppermute(x[:, -1:], axes, pairs)
        previous = jnp.where(jax.lax.axis_index(axes) == 0, previous, received)
    return jnp.concatenate([previous, x[:, :-1]], axis=1)


def all_frames(x: Float[Array, "b f *axes"]) -> Float[Array, "b f2 *axes"]:
    """Return every frame of the whole video, on every device."""
    return _gather(x) if _axes() else x


def _gather(x: Array) -> Array:
    """Return the arrays of all devices, concatenated along axis 1."""
    axes = _axes()
    if backend.platform() != "cpu" or jax.process_count() == 1:
        return jax.lax.all_gather(x, axes, axis=1, tiled=True)
    # The gradient of `all_gather` is a reduce-scatter. Between processes on CPUs gloo computes it,
    # and in jaxlib 0.10 it fails if a device is 30 seconds late, keeps a core busy while it waits,
    # and sums large arrays wrongly (jax-ml/jax issues 40830, 40831). Its all-to-all does not.
    copies = jnp.concatenate([x] * jax.lax.axis_size(axes), axis=1)
    return jax.lax.all_to_all(copies, axes, split_axis=1, concat_axis=1, tiled=True)


def to_positions(x: Float[Array, "b f n c"]) -> Float[Array, "b f2 n2 c"]:
    """Return all frames at some positions, given all positions of some frames.

    If the number of positions is not a multiple of the number of devices, zeros are appended.
    """
    axes = _axes()
    if not axes:
        return x
    padding = -x.shape[2] % jax.lax.axis_size(axes)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)))
    return jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=1, tiled=True)


def to_frames(x: Float[Array, "b f2 n2 c"], positions: int) -> Float[Array, "b f n c"]:
    """Return all positions of some frames: the inverse of `to_positions`.

    Args:
        x: All frames at some positions.
        positions: Number of positions before any were appended.
    """
    axes = _axes()
    if not axes:
        return x
    x = jax.lax.all_to_all(x, axes, split_axis=1, concat_axis=2, tiled=True)
    return x[:, :, :positions]


def mean_and_variance(
    x: Float[Array, "b *axes"], over: tuple[int, ...], *, across_devices: bool
) -> tuple[Float[Array, "b *axes2"], Float[Array, "b *axes2"]]:
    """Return mean and variance over some axes.

    Args:
        x: Data.
        over: Axes to reduce. They are kept, with length 1.
        across_devices: Whether to include the frames on other devices.
    """
    mean = x.mean(over, keepdims=True)
    variance = jnp.square(x - mean).mean(over, keepdims=True)
    return merge_statistics(mean, variance, across_devices=across_devices)


def merge_statistics(
    mean: Float[Array, "b *axes"], variance: Float[Array, "b *axes"], *, across_devices: bool
) -> tuple[Float[Array, "b *axes"], Float[Array, "b *axes"]]:
    """Return mean and variance over all frames, given those over each device's own frames.

    One exchange merges them (Chan et al. 1979): the variance of the whole is the mean of the parts'
    variances plus the variance of their means.

    Args:
        mean: Mean over this device's frames.
        variance: Variance over them.
        across_devices: Whether to include the frames on other devices.
    """
    if not (_axes() and across_devices):
        return mean, variance
    means, variances = _gather(jnp.stack([mean, variance])[:, None])
    return means.mean(0), variances.mean(0) + means.var(0)


def mean_over_devices(x: Array, *, across_devices: bool) -> Array:
    """Return the mean of x over the devices that hold a video's frames.

    Args:
        x: What each of them has.
        across_devices: Whether to include the other devices. Otherwise x is returned.
    """
    axes = _axes()
    return jax.lax.pmean(x, axes) if axes and across_devices else x
