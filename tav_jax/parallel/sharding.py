"""Sharding: how videos and parameters are divided over devices. No other module knows a mesh.

A mesh has three axes:

| axis     | what is sharded along it                                                          |
|----------|-----------------------------------------------------------------------------------|
| `data`   | the batch: prompts and seeds when sampling, draws when tuning                      |
| `frames` | a video's frames; trained parameters                                               |
| `fsdp`   | a video's frames; all large parameters. The compiler gathers each before its use   |

Frames are sharded along `frames` and `fsdp` together. `over_frames` runs a network on each device's
own frames. What a layer needs of other devices' frames it gets through
`tav_jax.models.frame_collectives`. The compiler handles everything outside the networks.

Without a current mesh, or on one device, every function here returns what it was given.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tav_jax.errors import UserError
from tav_jax.models.frame_collectives import FRAME_AXES
from tav_jax.models.network import Network
from tav_jax.parallel.processes import connect
from tav_jax.types import Denoiser

DATA_AXIS = "data"
AXES = (DATA_AXIS, *FRAME_AXES)

# The mesh axes along which a parameter's last axis is sharded, by the end of its name. The first
# match counts. Adam's moments have the names of their parameters, and so the same sharding.
PARAM_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    # The trained parameters: each device then sums, and updates, its own part of their gradients.
    (r"\.(to_q|attn_temp\.\w+(\.0)?)\.kernel$", FRAME_AXES),
    (r"\.(kernel|embedding)$", ("fsdp",)),
    (r"", ()),
)
# Elements from which sharding a parameter saves more than gathering it costs.
MIN_SHARDED_SIZE = 2**14

Tree = TypeVar("Tree")
# Gives the sharding of each leaf of a tree on a mesh.
Rule = Callable[[Any, Any], Any]


def make_mesh(
    sizes: Mapping[str, int], *, frames: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Return a mesh over the first devices, as many as its axes need.

    Args:
        sizes: Devices along `data`, `frames` and `fsdp`. One of them may be -1, which means all
            the remaining devices; for `frames`, as many of them as divide the video.
        frames: Number of frames of the video.
        devices: The devices to choose from. By default all that JAX has.

    Raises:
        UserError: There are too few devices, or their number does not divide the frames. The
            message says which numbers would.
    """
    devices = jax.devices() if devices is None else devices
    wanted = f"mesh: {', '.join(f'{axis} {sizes[axis]}' for axis in AXES)}"
    open_axes = [axis for axis in AXES if sizes[axis] == -1]
    taken = math.prod(sizes[axis] for axis in AXES if sizes[axis] != -1)
    if len(open_axes) > 1:
        raise UserError(f"{wanted}: only one of them can be -1, the rest")
    if taken > len(devices):
        raise UserError(f"{wanted}: that takes {taken} devices, there are {len(devices)}")
    rest = len(devices) // taken
    shape = {axis: rest if axis in open_axes else sizes[axis] for axis in AXES}
    if open_axes == ["frames"] and frames % shape["fsdp"] == 0:
        shape["frames"] = math.gcd(rest, frames // shape["fsdp"])
    if frames % frame_devices(shape):
        divisors = [str(n) for n in range(1, frames + 1) if frames % n == 0]
        raise UserError(
            f"{wanted}: {frames} frames do not divide over {frame_devices(shape)} devices (frames "
            f"x fsdp); they do over {', '.join(divisors)}"
        )
    left_out = len(devices) - math.prod(shape.values())
    if left_out and jax.process_count() > 1:
        raise UserError(
            f"{wanted}: that leaves out {left_out} of {len(devices)} devices, and so processes; "
            f"{frames} frames are spread over {frame_devices(shape)}, give the rest to data"
        )
    # JAX's default is Explicit, under which the first frame of a sharded video cannot be sliced.
    auto = (AxisType.Auto,) * len(AXES)
    used = devices[: math.prod(shape.values())]
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=auto, devices=used)


def on_mesh(mesh: Mesh) -> AbstractContextManager:
    """Return a context in which `mesh` is the current mesh, unless it has one device only.

    On one device programs are compiled without any sharding. Several processes are connected first.
    """
    if mesh.size == 1:
        return nullcontext()
    connect(mesh)
    return jax.set_mesh(mesh)


def frame_devices(shape: Mapping[str, int]) -> int:
    """Return the number of devices over which a video's frames are sharded.

    Args:
        shape: The mesh's number of devices by axis.
    """
    return math.prod(shape[axis] for axis in FRAME_AXES)


def over_frames(run: Callable[..., Array]) -> Callable[..., Array]:
    """Return `run` for videos sharded over the current mesh: each device runs it on its frames.

    Args:
        run: Takes a network, a video `b f ...` and arrays that begin with a batch axis. Returns a
            video.
    """

    def run_sharded(network: Network, video: Array, *others: Any) -> Array:
        mesh = jax.sharding.get_abstract_mesh()
        # Frames that cannot be divided evenly, such as a single image, are not sharded: every
        # device computes all of them.
        if mesh.empty or mesh.size == 1 or video.shape[1] % frame_devices(mesh.shape):
            return run(network, video, *others)
        clip = video_spec(mesh, video.shape)
        batch = PartitionSpec(clip[0])
        return jax.shard_map(
            run,
            # Inside, parameters are whole: the compiler gathers each one before its use.
            in_specs=(PartitionSpec(), clip, *(batch for _ in others)),
            out_specs=clip,
            # The check would fail at loops that begin with zeros, and at kernels: neither says
            # along which axes its values vary.
            check_vma=False,
        )(network, video, *others)

    return run_sharded


def denoiser(unet: Network) -> Denoiser:
    """Return the U-Net as a function of latents that are sharded over the current mesh."""
    return partial(over_frames(lambda unet, *inputs: unet(*inputs)), unet)


def video_spec(mesh: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """Return the partition of a video `b f ...`; an axis that does not divide is not sharded."""
    batch, frames = shape[:2]
    return PartitionSpec(
        None if batch % mesh.shape[DATA_AXIS] else DATA_AXIS,
        None if frames % frame_devices(mesh.shape) else FRAME_AXES,
    )


def param_spec(name: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """Return the partition of a parameter, by its name.

    A parameter that is small, or whose last axis does not divide, is not sharded.
    """
    axes = next(axes for pattern, axes in PARAM_RULES if re.search(pattern, name))
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if not axes or math.prod(shape) < MIN_SHARDED_SIZE or shape[-1] % parts:
        return PartitionSpec()
    return PartitionSpec(*[None] * (len(shape) - 1), axes)


def param_sharding(tree: Tree, mesh: Any) -> Tree:
    """Return the sharding of each parameter, by its key in the innermost dictionary around it."""

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        name = names[-1] if names else ""
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def video_sharding(tree: Tree, mesh: Any) -> Tree:
    """Return the sharding of each leaf of a tree of videos."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, video_spec(mesh, leaf.shape)), tree)


def batch_sharding(tree: Tree, mesh: Any) -> Tree:
    """Return the sharding of arrays of independent items, such as images, over all devices.

    An array whose first axis they do not divide is not sharded.
    """

    def sharding(leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(None if len(leaf) % mesh.size else AXES))

    return jax.tree.map(sharding, tree)


def shard(tree: Tree, rule: Rule = param_sharding) -> Tree:
    """Place arrays on the devices of the current mesh. For use outside of jit.

    Args:
        tree: Arrays. In a run of several processes, each process must have the same values.
        rule: `param_sharding`, `video_sharding` or `batch_sharding`.
    """
    mesh = jax.sharding.get_mesh()
    return tree if mesh.empty else jax.tree.map(_place, tree, rule(tree, mesh))


def constrain(tree: Tree, rule: Rule = param_sharding) -> Tree:
    """Tell the compiler how arrays are to be sharded over the current mesh. For use inside jit.

    Args:
        tree: Arrays.
        rule: `param_sharding` or `video_sharding`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, rule(tree, mesh))


def _place(value: Any, sharding: NamedSharding) -> Array:
    if isinstance(value, Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = _place(jax.random.key_data(value), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    if sharding.is_fully_addressable or not getattr(value, "is_fully_addressable", True):
        return jax.device_put(value, sharding)
    # `device_put` would first send every value to all processes, to compare them.
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def gather_to_host(tree: Any) -> Any:
    """Return the whole arrays in the host memory of every process."""
    if jax.process_count() > 1 and not jax.sharding.get_abstract_mesh().empty:
        tree = _replicate(tree)
    return jax.device_get(tree)


# Jitted here, so that each shape is compiled once and not at every call.
_replicate = jax.jit(lambda tree: jax.lax.with_sharding_constraint(tree, PartitionSpec()))
