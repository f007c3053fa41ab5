"""Checkpoints of a run, written by Orbax.

A checkpoint `checkpoints/<step>/` has two items. `trained` has the trained parameters, which
sampling needs. `progress` has the optimiser's state, the step and the key, which only resuming
needs. Frozen parameters are in neither. `digests.json` has the SHA-256 digest of every file, which
is checked when an item is restored. All is written in a folder of another name, which is renamed
when it is complete and on the disk, so a checkpoint is either whole or absent.
"""

import logging
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tav_jax.digests import folder_damage, has_digests, write_folder_digests
from tav_jax.errors import DamagedError, UserError
from tav_jax.files import explain_refusal, require_space, sync
from tav_jax.parallel.processes import (
    broadcast_from_main,
    broadcast_number_from_main,
    is_main_process,
)
from tav_jax.text import shorten
from tav_jax.training.train_step import TrainState
from tav_jax.types import Params

ITEMS = ("trained", "progress")
UNFINISHED = ".unfinished-"  # and a random number: a checkpoint that is being written
METADATA_BYTES = 600_000  # that Orbax writes beside the arrays; measured: 0.5 MB for 800 names
LONGEST_REMOVAL = 10  # seconds
MISFIT = "not a checkpoint of this network and optimiser"


def save_checkpoint(folder: Path, state: TrainState, trained_names: Iterable[str]) -> None:
    """Write the checkpoint `folder/<step>`, unless it is there already."""
    trained = {name: state.unet.params[name] for name in trained_names}
    save_items(folder, int(state.step), trained=trained, progress=_progress(state))


def save_items(folder: Path, step: int, **items: Any) -> None:
    """Write `folder/<step>` with a pytree of arrays under each name, unless it is there.

    In a job of several processes all must call this.

    Raises:
        UserError: The disk is full or refuses to be written; earlier checkpoints stay as they are.
    """
    if broadcast_from_main([step in saved_steps(folder)])[0]:
        return
    # A name of its own, so that no other job's half-written checkpoint is ever in the way.
    number = broadcast_number_from_main(secrets.randbelow(2**31))
    unfinished = folder / f"{UNFINISHED}{number:08x}"
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items)) + METADATA_BYTES
    with explain_refusal(folder / str(step), needed):
        try:
            # Before Orbax starts some hundred writes, of which each would fail.
            require_space(folder, needed)
            with _manager(unfinished) as manager:
                saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
                manager.save(step, args=ocp.args.Composite(**saves))
            if is_main_process():
                write_folder_digests(unfinished / str(step))
                (unfinished / str(step)).rename(folder / str(step))
                sync(folder)
                shutil.rmtree(unfinished, ignore_errors=True)
        except BaseException:
            if is_main_process():
                _remove_until_quiet(unfinished)
            raise
    broadcast_from_main([True])  # nobody restores it before it has its name


def _remove_until_quiet(folder: Path) -> None:
    """Remove a folder until nobody writes to it any more.

    TensorStore's threads outlive a failed save for a moment, and create again what was removed.
    """
    quiet, deadline = 0, time.monotonic() + LONGEST_REMOVAL
    while quiet < 3 and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
        quiet = 0 if folder.exists() else quiet + 1


def saved_steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint, the newest first. It may be damaged."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted((int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name)), reverse=True)


def latest_step(folder: Path) -> int | None:
    """Return the newest step that has a complete checkpoint, or None."""
    return next(iter(saved_steps(folder)), None)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have left of checkpoints. Nobody else may be writing one."""
    if is_main_process() and folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(UNFINISHED) or ".orbax-checkpoint-tmp" in path.name:
                shutil.rmtree(path, ignore_errors=True)


def checkpoint_damage(path: Path, items: Sequence[str] = ITEMS) -> str | None:
    """Return what is wrong with the items of a checkpoint, or None if nothing is.

    Files are compared with their digests. Without digests, the items are read.
    """
    for item in items:
        if not (path / item).is_dir():
            return f"it has no {item}"
        damage = folder_damage(path, item) if has_digests(path) else _why_unreadable(path / item)
        if damage:
            return damage
    return None


def _why_unreadable(item: Path) -> str | None:
    """Read an item as arrays in host memory, and return why that fails, or None."""
    _hide_logs()
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(item.absolute()).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            checkpointer.restore(item.absolute(), restore_args=as_numpy)
    except MemoryError:
        raise
    except Exception as error:  # of any kind, as the damage has it
        return f"{item.name} cannot be read ({shorten(str(error), 100)})"
    return None


def restore_state(path: Path, state: TrainState, trained_names: Iterable[str]) -> TrainState:
    """Return the train state of a checkpoint.

    Args:
        path: The checkpoint's folder, `.../<step>`.
        state: A state of the same network and optimiser. Gives the frozen parameters and all
            shapes.
        trained_names: Names of the parameters that train.

    Raises:
        UserError: The folder has no checkpoint, or one of another network or optimiser.
        DamagedError: The checkpoint is not as it was written.
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
        DamagedError: The checkpoint is not as it was written.
    """
    _require_whole(path, "trained")
    if differing := _differences(path / "trained", like):
        raise UserError(f"{path}: {MISFIT}:\n" + "\n".join(f"  {line}" for line in differing))
    return _restore(path, "trained", like)


def _progress(state: TrainState) -> dict[str, Any]:
    return {
        "opt_state": state.opt_state,
        "step": state.step,
        "key": jax.random.key_data(state.key),
    }


def restore_item(path: Path, item: str, like: Any) -> Any:
    """Return one pytree of a checkpoint folder, of the structure, shapes and types of `like`.

    Errors are those of `restore_state`.
    """
    _require_whole(path, item)
    return _restore(path, item, like)


def _require_whole(path: Path, item: str) -> None:
    if not (path / item).is_dir():
        if path.name.isdecimal() and path.is_dir():
            raise DamagedError(f"{path}: it has no {item}")
        raise UserError(f"{path}: no checkpoint of ours; expected a folder checkpoints/<step>")
    if has_digests(path) and (damage := folder_damage(path, item)):
        raise DamagedError(f"{path}: {damage}")


def _restore(path: Path, item: str, like: Any) -> Any:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        with _manager(path.parent) as manager:
            args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
            restored = manager.restore(int(path.name), args=args)[item]
    except Exception as error:
        # With digests it is whole. Else what cannot be read at all is damaged.
        if not has_digests(path) and (damage := _why_unreadable(path / item)):
            raise DamagedError(f"{path}: {damage}") from None
        if not isinstance(error, ValueError | KeyError | FileNotFoundError):
            raise
        raise UserError(f"{path}: {MISFIT}: {shorten(str(error))}") from None

    def own(leaf: jax.Array) -> jax.Array:
        # Copied, because Orbax's buffers may be shared and the train step donates its state. On one
        # device the copy is uncommitted, as a new state is: else the step would compile twice.
        return jnp.copy(leaf) if leaf.sharding.num_devices > 1 else jnp.array(np.asarray(leaf))

    return jax.tree.map(own, restored)


def _differences(item: Path, like: Params) -> list[str]:
    """Return which parameters on disk have other names or shapes than those expected."""
    _hide_logs()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(item.absolute()).item_metadata
        there = {name: tuple(leaf.shape) for name, leaf in metadata.tree.items()}
    except (AttributeError, LookupError, TypeError, ValueError, OSError):
        return []  # damaged, as restoring will say
    here = {name: tuple(leaf.shape) for name, leaf in like.items()}
    return [
        f"{name}: {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


def _manager(folder: Path) -> ocp.CheckpointManager:
    _hide_logs()
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def _hide_logs() -> None:
    """Hide what Orbax logs beside the errors that it raises, also from its threads and later."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_shown)  # the same filter is added once only
    usual = sys.unraisablehook
    if getattr(usual, "__name__", "") != "skip_late_answers":

        def skip_late_answers(unraisable: Any) -> None:
            # After a failure TensorStore answers requests of which Orbax has closed the loop.
            if str(unraisable.exc_value) != "Event loop is closed":
                usual(unraisable)

        sys.unraisablehook = skip_late_answers


def _is_shown(record: logging.LogRecord) -> bool:
    hidden = (
        "Metadata file",  # an item has no checkpoint metadata: it is in the parent folder
        "run() raised an exception",  # which the call raises, too
        "exception was never retrieved",  # those after the first
    )
    return not any(text in record.getMessage() for text in hidden)
