"""The folder of a run: what is where, and what it was made with."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from tav_jax.errors import MissingFileError, UserError
from tav_jax.files import atomic_write, first_unwritable_parent
from tav_jax.parallel.processes import broadcast_from_main, is_main_process
from tav_jax.parallel.sharding import gather_to_host, laid, make_mesh
from tav_jax.pipeline import encode_frames, invert_latents, posterior_mean_latents
from tav_jax.pretrained.model import Model, load_model
from tav_jax.runs.config import TuneConfig, differences, dump_config, load_config
from tav_jax.training.checkpoints import latest_step, restore_trained
from tav_jax.training.optimizer import label_params, select
from tav_jax.types import Latents
from tav_jax.video.read import read_frames


class RunFolder:
    """Paths of a run. Nothing is created by naming it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = self.folder / "config.yaml"
        self.metrics = self.folder / "metrics.jsonl"
        self.checkpoints = self.folder / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / str(step)

    def inverted(self, step: int) -> Path:
        return self.folder / "inv_latents" / f"ddim_latent-{step}.npy"

    def samples(self, step: int) -> Path:
        return self.folder / "samples" / f"sample-{step}"


def claim_folder(config: TuneConfig) -> RunFolder:
    """Returns the folder of a run, new or to be resumed, having created nothing yet.

    Raises:
        ValueError: the folder belongs to something else; says what differs.
    """
    run = RunFolder(config.output_dir)
    if run.config.is_file():
        theirs, _ = load_config(run.config)
        # Where it stands says nothing: a folder may be renamed, or mounted elsewhere.
        differing = differences(config, replace(theirs, output_dir=config.output_dir))
        if differing:
            raise UserError(
                f"output_dir: {run.folder} is a run of other settings; name another output_dir, "
                "or remove that one:\n" + "\n".join(f"  {line}" for line in differing)
            )
    elif run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
        raise UserError(
            f"output_dir: {run.folder} exists and is no run of tav_jax.tune; name another"
        )
    if place := first_unwritable_parent(run.folder):
        raise UserError(f"output_dir: nothing can be written in {place}; name another")
    return run


def record_config(run: RunFolder, config: TuneConfig) -> None:
    """Creates the run's folder, with its settings complete."""
    if not is_main_process():
        return
    with atomic_write(run.config) as path:
        path.write_text(dump_config(config))


def open_run(folder: str | Path, step: int | None = None) -> tuple[RunFolder, TuneConfig, int]:
    """Returns a finished or interrupted run, its settings, and the checkpoint to sample from.

    Args:
        step: The newest checkpoint by default.

    Raises:
        FileNotFoundError: it is no run's folder, or has no such checkpoint.
    """
    run = RunFolder(folder)
    if not run.config.is_file():
        raise MissingFileError(f"--run: {folder} is not a run of tav_jax.tune: no config.yaml")
    config, _ = load_config(run.config)
    latest = latest_step(run.checkpoints)
    if latest is None:
        raise MissingFileError(f"--run: {folder} has no checkpoint yet; run tav_jax.tune first")
    step = latest if step is None else step
    if not run.checkpoint(step).is_dir():
        raise MissingFileError(f"--step: {folder} has no checkpoint {step}; the newest is {latest}")
    return run, config, step


def load_base(config: TuneConfig) -> Model:
    """Returns the model that a run starts from, its trained leaves in float32, on the mesh."""
    model = load_model(
        config.pretrained_model_path,
        dtype="float32" if config.mixed_precision == "no" else "bfloat16",
        float32_modules=config.trainable_modules,
        attention_scope=config.attention_scope,
        attention=config.attention,
        key=jax.random.key(config.seed),
        revision=config.revision,
        variant=config.variant,
    )
    unet, vae, text_encoder = laid((model.unet, model.vae, model.text_encoder))
    return replace(model, unet=unet, vae=vae, text_encoder=text_encoder)


def mesh_of(config: TuneConfig) -> Mesh:
    """Returns the mesh of a run, which divides the frames of its clip and of its samples."""
    train, validation = config.train_data, config.validation_data
    frames = math.gcd(train.n_sample_frames, validation.video_length or 0)
    return make_mesh(asdict(config.mesh), frames=frames)


def load_tuned(run: RunFolder, config: TuneConfig, step: int) -> Model:
    """Returns the model that a run had at a checkpoint."""
    model = load_base(config)
    params = model.unet.params
    labels = label_params(params, config.trainable_modules)
    trained = restore_trained(run.checkpoint(step), select(params, labels, "train"))
    return model.with_unet(model.unet.with_params(params | trained))


def read_clip(config: TuneConfig) -> UInt8[np.ndarray, "f H W 3"]:
    """Returns the frames that a run tunes on; raises as `read_frames` does."""
    data = config.train_data
    return read_frames(
        data.video_path,
        n_sample_frames=data.n_sample_frames,
        width=data.width,
        height=data.height,
        sample_start_idx=data.sample_start_idx,
        sample_frame_rate=data.sample_frame_rate,
        sampling=data.sampling,
        fit=data.fit,
    )


def inverted_clip(
    run: RunFolder,
    config: TuneConfig,
    model: Model,
    step: int,
    num_inv_steps: int,
    *,
    alone: Callable[[Path], AbstractContextManager[Any]] = nullcontext,
) -> Latents:
    """Returns the clip's noise under the model of a checkpoint, from disk if it is there.

    Only the run's own `num_inv_steps` is kept on disk.

    Args:
        alone: Gives a context within which no other process makes the file.
    """

    def invert() -> Latents:
        latents = posterior_mean_latents(model, encode_frames(model, read_clip(config)))
        return invert_latents(model, latents, num_inv_steps=num_inv_steps, progress=True)

    if num_inv_steps != config.validation_data.num_inv_steps:
        return invert()
    kept = run.inverted(step)
    if not broadcast_from_main([kept.is_file()])[0]:
        with alone(kept):
            if not broadcast_from_main([kept.is_file()])[
                0
            ]:  # another job may have made it meanwhile
                noise = np.asarray(gather_to_host(invert()), np.float32)
                if is_main_process():
                    with atomic_write(kept) as path, path.open("wb") as file:
                        np.save(file, noise)
                return jnp.asarray(noise)
    return jnp.asarray(np.load(kept))
