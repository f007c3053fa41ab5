"""How a run lies on several devices: the only room that knows a mesh.

A mesh has three axes. Prompts, seeds and batched draws go along `data`; a video's frames along
`frames` and `fsdp` together; large parameters are stored in parts along `fsdp`, what trains along
both, and each layer's are gathered for its use. A network runs on each device's own frames by
`over_frames`, and what it needs of others' it asks for in
`tav_jax.models.frame_collectives`; all around it is left to the compiler.

With no mesh in force, or on one device, everything here is the identity.
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
from tav_jax.types import Denoiser

DATA_AXIS = "data"
AXES = (DATA_AXIS, *FRAME_AXES)

# Along which axes a leaf's last one is cut, by the end of its name; the first that matches counts.
# Adam's moments lie as their parameters do.
STORAGE_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    # What the method trains: its gradients are then summed in parts, each where its Adam lies.
    (r"\.(to_q|attn_temp\.\w+(\.0)?)\.kernel$", FRAME_AXES),
    (r"\.(kernel|embedding)$", ("fsdp",)),
    (r"", ()),
)
# Numbers of a leaf from which parting it saves more than gathering it costs.
MIN_SHARDED_SIZE = 2**14

Tree = TypeVar("Tree")


def make_mesh(
    sizes: Mapping[str, int], *, frames: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh over the first devices, as many as its axes take.

    Args:
        sizes: Devices along `data`, `frames` and `fsdp`. One of them may be -1, "the rest": of
            frames as many as divide the video.
        frames: Of the video.
        devices: By default all there are.

    Raises:
        ValueError: there are not so many devices, or they do not divide the frames; says what
            would.
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
    # Auto, since with JAX's default one cannot take the first frame of a video in parts.
    auto = (AxisType.Auto,) * len(AXES)
    some = devices[: math.prod(shape.values())]
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=auto, devices=some)


def on_mesh(mesh: Mesh) -> AbstractContextManager:
    """Puts a mesh in force, unless it is one device, on which programs stay as they are."""
    return jax.set_mesh(mesh) if mesh.size > 1 else nullcontext()


def frame_devices(shape: Mapping[str, int]) -> int:
    """Returns over how many devices a video's frames are spread, given a mesh's sizes."""
    return math.prod(shape[axis] for axis in FRAME_AXES)


def over_frames(run: Callable[..., Array]) -> Callable[..., Array]:
    """Returns `run` for videos that lie on the mesh in force: each device runs it on its frames.

    Args:
        run: Takes a network, a video `b f ...` and anything that begins with a batch axis, and
            returns a video.
    """

    def spread(network: Network, video: Array, *others: Any) -> Array:
        mesh = jax.sharding.get_abstract_mesh()
        # A video that does not divide, such as a picture, is worked on whole, by all alike.
        if mesh.empty or mesh.size == 1 or video.shape[1] % frame_devices(mesh.shape):
            return run(network, video, *others)
        clip = video_spec(mesh, video.shape)
        batch = PartitionSpec(clip[0])
        return jax.shard_map(
            run,
            # The parameters whole: from their parts the compiler gathers each for its use.
            in_specs=(PartitionSpec(), clip, *(batch for _ in others)),
            out_specs=clip,
            # Loops that begin with zeros, and kernels, do not say along what they vary.
            check_vma=False,
        )(network, video, *others)

    return spread


def denoiser(unet: Network) -> Denoiser:
    """Returns the U-Net as a function of latents that lie on the mesh in force."""
    return partial(over_frames(lambda unet, *inputs: unet(*inputs)), unet)


def video_spec(mesh: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """Returns how a video `b f ...` lies: along each axis in parts, if it divides, or whole."""
    batch, frames = shape[:2]
    return PartitionSpec(
        None if batch % mesh.shape[DATA_AXIS] else DATA_AXIS,
        None if frames % frame_devices(mesh.shape) else FRAME_AXES,
    )


def param_spec(name: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """Returns how a leaf is stored, by its name; whole if it is small or does not divide."""
    axes = next(axes for pattern, axes in STORAGE_RULES if re.search(pattern, name))
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if not axes or math.prod(shape) < MIN_SHARDED_SIZE or shape[-1] % parts:
        return PartitionSpec()
    return PartitionSpec(*[None] * (len(shape) - 1), axes)


def storage(tree: Tree, mesh: Any) -> Tree:
    """Returns the sharding of each leaf, by the name under which its dictionary has it."""

    def of(path: tuple, leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        name = names[-1] if names else ""
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, tree)


def videos(tree: Tree, mesh: Any) -> Tree:
    """Returns the sharding of each leaf, all of them videos."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, video_spec(mesh, leaf.shape)), tree)


def laid(tree: Tree, lie: Callable[[Any, Any], Any] = storage) -> Tree:
    """Returns the tree lying on the mesh in force as `lie` says: as `storage` or as `videos`.

    Inside a program this is a constraint. Outside, where arrays are placed, values must be the
    same in all processes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        return jax.lax.with_sharding_constraint(tree, lie(tree, mesh))
    return jax.tree.map(_place, tree, lie(tree, jax.sharding.get_mesh()))


def _place(value: Any, sharding: NamedSharding) -> Array:
    if isinstance(value, Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = _place(jax.random.key_data(value), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    if sharding.is_fully_addressable or not getattr(value, "is_fully_addressable", True):
        return jax.device_put(value, sharding)
    # Not `device_put`, which sends every value round to compare it.
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def gather_to_host(tree: Any) -> Any:
    """Returns a tree of arrays in every process's memory, wherever their parts lie."""
    if jax.process_count() > 1 and not jax.sharding.get_abstract_mesh().empty:
        tree = _whole(tree)
    return jax.device_get(tree)


# Jitted here, so that each shape compiles once and not at every call.
_whole = jax.jit(lambda tree: jax.lax.with_sharding_constraint(tree, PartitionSpec()))
