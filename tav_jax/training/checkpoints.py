"""Checkpoints of a run, written by Orbax.

A checkpoint `checkpoints/<step>/` has two items. `trained` has the trained parameters, which
sampling needs. `progress` has the optimiser's state, the step and the key, which only resuming
needs. Frozen parameters are in neither. Orbax writes to a temporary name and renames it, so a
checkpoint is either complete or absent.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tav_jax.errors import UserError
from tav_jax.training.train_step import TrainState
from tav_jax.types import Params

MISFIT = "not a checkpoint of this network and optimiser"


def save_checkpoint(folder: Path, state: TrainState, trained_names: Iterable[str]) -> None:
    """Write the checkpoint `folder/<step>`, unless it is there already."""
    trained = {name: state.unet.params[name] for name in trained_names}
    save_items(folder, int(state.step), trained=trained, progress=_progress(state))


def save_items(folder: Path, step: int, **items: Any) -> None:
    """Write `folder/<step>` with a pytree of arrays under each name, unless it is there."""
    with _manager(folder) as manager:
        if step not in manager.all_steps():
            saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
            manager.save(step, args=ocp.args.Composite(**saves))


def latest_step(folder: Path) -> int | None:
    """Return the newest step that has a complete checkpoint, or None."""
    if not folder.is_dir():
        return None
    with _manager(folder) as manager:
        return manager.latest_step()


def restore_state(path: Path, state: TrainState, trained_names: Iterable[str]) -> TrainState:
    """Return the train state of a checkpoint.

    Args:
        path: The checkpoint's folder, `.../<step>`.
        state: A state of the same network and optimiser. Gives the frozen parameters and all
            shapes.
        trained_names: Names of the parameters that train.

    Raises:
        UserError: The folder has no checkpoint, or one of another network or optimiser.
    """
    trained = restore_trained(path, {name: state.unet.params[name] for name in trained_names})
    progress = restore_item(path, "progress", _progress(state))
    return TrainState(
        state.unet.with_params(state.unet.params | trained),
        progress["opt_state"],
        progress["step"],
        jax.random.wrap_key_data(progress["key"]),
    )


def restore_trained(path: Path, like: Params) -> Params:
    """Return the trained parameters of a checkpoint.

    Args:
        path: The checkpoint's folder, `.../<step>`.
        like: Parameters with the names, shapes and types that are expected.

    Raises:
        UserError: The folder has no checkpoint, or one of another network.
    """
    differing = _differences(path / "trained", like) if (path / "trained").is_dir() else []
    if differing:
        raise UserError(f"{path}: {MISFIT}:\n" + "\n".join(f"  {line}" for line in differing))
    return restore_item(path, "trained", like)


def _progress(state: TrainState) -> dict[str, Any]:
    return {
        "opt_state": state.opt_state,
        "step": state.step,
        "key": jax.random.key_data(state.key),
    }


def restore_item(path: Path, item: str, like: Any) -> Any:
    """Return one pytree of a checkpoint folder, of the structure, shapes and types of `like`."""
    if not (path / item).is_dir():
        raise UserError(f"{path}: no checkpoint of ours; expected a folder checkpoints/<step>")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        with _manager(path.parent) as manager:
            args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
            restored = manager.restore(int(path.name), args=args)[item]
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(f"{path}: {MISFIT}: {' '.join(str(error).split())[:300]}") from None

    def own(leaf: jax.Array) -> jax.Array:
        # Copied, because Orbax's buffers may be shared and the train step donates its state. On one
        # device the copy is uncommitted, as a new state is: else the step would compile twice.
        return jnp.copy(leaf) if leaf.sharding.num_devices > 1 else jnp.array(np.asarray(leaf))

    return jax.tree.map(own, restored)


def _differences(item: Path, like: Params) -> list[str]:
    """Return which parameters on disk have other names or shapes than those expected."""
    with _without_metadata_warning(), ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(item.absolute()).item_metadata
    if metadata is None:  # damaged, as restoring will say
        return []
    there, here = (
        {name: tuple(leaf.shape) for name, leaf in tree.items()} for tree in (metadata.tree, like)
    )
    return [
        f"{name}: {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


@contextmanager
def _without_metadata_warning() -> Iterator[None]:
    """Hide Orbax's warning that an item has no checkpoint metadata: it is in the parent folder."""

    def is_other(record: logging.LogRecord) -> bool:
        return "Metadata file" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _manager(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)
