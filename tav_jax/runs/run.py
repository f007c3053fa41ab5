"""A run: its folder, its settings, and what is loaded or computed from them once."""

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
from tav_jax.files import atomic_write, first_unwritable_parent, remove_partials
from tav_jax.models.compute import PRECISION_DTYPES
from tav_jax.parallel.processes import broadcast_from_main, is_main_process
from tav_jax.parallel.sharding import gather_to_host, make_mesh, shard
from tav_jax.pipeline import encode_frames, invert_latents, posterior_mean_latents
from tav_jax.pretrained.model import Model, load_model
from tav_jax.runs.config import TuneConfig, differences, dump_config, load_config, with_fps
from tav_jax.training.checkpoints import latest_step, restore_trained
from tav_jax.training.optimizer import label_params, select
from tav_jax.types import Latents, Moments
from tav_jax.video.read import Clip, read_clip

# Of frames spread over a long clip, whose own rate would be minutes to a frame.
LOWEST_AUTO_FPS = 1.0
DEFAULT_FPS = 8.0  # of a clip without a rate; the original release writes all videos at 8


class Run:
    """A run's folder with its settings. The constructor writes nothing.

    The clip is read once and encoded once. It is inverted once for each checkpoint and number of
    steps. The results are kept in memory.

    Args:
        folder: The run's folder, which need not exist.
        config: The run's settings.
    """

    def __init__(self, folder: str | Path, config: TuneConfig):
        self.folder = Path(folder)
        self.config = config
        self.config_file = self.folder / "config.yaml"
        self.metrics = self.folder / "metrics.jsonl"
        self.checkpoints = self.folder / "checkpoints"
        self._clip: Clip | None = None
        self._moments: Moments | None = None
        self._inverted: dict[tuple[int, int], Latents] = {}

    def checkpoint(self, step: int) -> Path:
        """Return the folder of a checkpoint."""
        return self.checkpoints / str(step)

    def inverted_file(self, step: int) -> Path:
        """Return the file of the clip inverted under a checkpoint."""
        return self.folder / "inv_latents" / f"ddim_latent-{step}.npy"

    def samples(self, step: int) -> Path:
        """Return the folder of the samples from a checkpoint."""
        return self.folder / "samples" / f"sample-{step}"

    @classmethod
    def create(cls, config: TuneConfig) -> "Run":
        """Return a run that is new or can be resumed. `record_config` is the first to write.

        Raises:
            UserError: The folder holds a run with other settings, which are listed. Or it holds
                something else, or is not writable.
        """
        run = cls(config.output_dir, config)
        if run.config_file.is_file():
            theirs, _ = load_config(run.config_file)
            if config.validation_data.fps is None:  # "auto" here, and a number there
                config = with_fps(config, theirs.validation_data.fps)
                run = cls(config.output_dir, config)
            # The folder's own path does not count: it may have been renamed or mounted elsewhere.
            differing = differences(config, replace(theirs, output_dir=config.output_dir))
            if differing:
                raise UserError(
                    f"output_dir: {run.folder} is a run of other settings; "
                    "name another output_dir:\n" + "\n".join(f"  {line}" for line in differing)
                )
        elif run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
            raise UserError(
                f"output_dir: {run.folder} exists and is not a run of tav_jax.tune; name another"
            )
        if parent := first_unwritable_parent(run.folder):
            raise UserError(f"output_dir: {parent} is not writable; name another")
        return run

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Return a run that `tune` has started.

        Raises:
            MissingFileError: The folder is not a run's.
            UserError: Its config.yaml is damaged.
        """
        run_config = Path(folder) / "config.yaml"
        if not run_config.is_file():
            raise MissingFileError(f"--run: {folder} is not a run of tav_jax.tune: no config.yaml")
        config, _ = load_config(run_config)
        return cls(folder, config)

    def remove_partials(self, samples: Path | None = None) -> None:
        """Remove what killed processes have left half-written in the run's folder.

        Args:
            samples: A folder of samples; by default all of the run's own.
        """
        if is_main_process():
            own = () if samples else (self.folder / "samples").glob("sample-*")
            for folder in (self.folder, self.inverted_file(0).parent, samples, *own):
                if folder:
                    remove_partials(folder)

    def record_config(self) -> None:
        """Create the run's folder with its complete settings."""
        if is_main_process():
            with atomic_write(self.config_file) as path:
                text = dump_config(with_fps(self.config, self.fps))
                path.write_text(text, encoding="utf-8")

    def latest_step(self) -> int | None:
        """Return the newest checkpoint's step, or None."""
        return latest_step(self.checkpoints)

    def find_step(self, step: int | None = None) -> int:
        """Return the step of a checkpoint, by default the newest.

        Raises:
            MissingFileError: there is no such checkpoint.
        """
        latest = self.latest_step()
        if latest is None:
            raise MissingFileError(
                f"--run: {self.folder} has no checkpoint yet; run tav_jax.tune first"
            )
        step = latest if step is None else step
        if not self.checkpoint(step).is_dir():
            raise MissingFileError(
                f"--step: {self.folder} has no checkpoint {step}; the newest is {latest}"
            )
        return step

    def mesh(self) -> Mesh:
        """Return the mesh of the run. It divides the frames of its clip and of its samples."""
        train, validation = self.config.train_data, self.config.validation_data
        frames = math.gcd(train.n_sample_frames, validation.video_length or 0)
        return make_mesh(asdict(self.config.mesh), frames=frames)

    def load_base(self) -> Model:
        """Return the base model, sharded over the mesh, with trained parameters in float32."""
        config = self.config
        model = load_model(
            config.pretrained_model_path,
            dtype=PRECISION_DTYPES[config.mixed_precision],
            float32_modules=config.trainable_modules,
            attention_scope=config.attention_scope,
            attention=config.attention,
            key=jax.random.key(config.seed),
            revision=config.revision,
            variant=config.variant,
        )
        unet, vae, text_encoder = shard((model.unet, model.vae, model.text_encoder))
        return replace(model, unet=unet, vae=vae, text_encoder=text_encoder)

    def load_model(self, step: int) -> Model:
        """Return the tuned model of a checkpoint."""
        model = self.load_base()
        params = model.unet.params
        labels = label_params(params, self.config.trainable_modules)
        trained = restore_trained(self.checkpoint(step), select(params, labels, "train"))
        return model.with_unet(model.unet.with_params(params | trained))

    def clip(self) -> UInt8[np.ndarray, "f H W 3"]:
        """Return the frames that the run tunes on. Errors are those of `read_clip`."""
        return self._read_clip().frames

    @property
    def fps(self) -> float:
        """Return the rate of the written videos. Errors are those of `read_clip`."""
        asked = self.config.validation_data.fps
        if asked is not None:
            return asked
        rate = self._read_clip().fps
        return DEFAULT_FPS if rate is None else max(rate, LOWEST_AUTO_FPS)

    def _read_clip(self) -> Clip:
        if self._clip is None:
            data = self.config.train_data
            self._clip = read_clip(
                data.video_path,
                n_sample_frames=data.n_sample_frames,
                width=data.width,
                height=data.height,
                sample_start_idx=data.sample_start_idx,
                sample_frame_rate=data.sample_frame_rate,
                sampling=data.sampling,
                fit=data.fit,
            )
        return self._clip

    def encoded_clip(self, model: Model) -> Moments:
        """Return the posterior of the clip. It is the same for all checkpoints."""
        if self._moments is None:
            self._moments = jax.block_until_ready(encode_frames(model, self.clip()))
        return self._moments

    def inverted_latents(
        self,
        model: Model,
        step: int,
        num_inv_steps: int,
        *,
        alone: Callable[[Path], AbstractContextManager[Any]] = nullcontext,
    ) -> Latents:
        """Return the noise from which a checkpoint's model would sample the clip.

        For the run's own `num_inv_steps` it is kept on disk, and read from there if it exists.

        Args:
            model: The run's model at `step`.
            step: The checkpoint.
            num_inv_steps: Number of steps of DDIM inversion.
            alone: Returns a context in which no other process writes the given file.
        """
        if (step, num_inv_steps) not in self._inverted:
            on_disk = num_inv_steps == self.config.validation_data.num_inv_steps
            self._inverted[step, num_inv_steps] = (
                self._kept_inversion(model, step, num_inv_steps, alone)
                if on_disk
                else self._invert(model, num_inv_steps)
            )
        return self._inverted[step, num_inv_steps]

    def _invert(self, model: Model, num_inv_steps: int) -> Latents:
        latents = posterior_mean_latents(model, self.encoded_clip(model))
        return invert_latents(model, latents, num_inv_steps=num_inv_steps, progress=True)

    def _kept_inversion(
        self,
        model: Model,
        step: int,
        num_inv_steps: int,
        alone: Callable[[Path], AbstractContextManager[Any]],
    ) -> Latents:
        file = self.inverted_file(step)
        if not broadcast_from_main([file.is_file()])[0]:
            with alone(file):
                # Another job may have made it in the meantime.
                if not broadcast_from_main([file.is_file()])[0]:
                    noise = np.asarray(
                        gather_to_host(self._invert(model, num_inv_steps)), np.float32
                    )
                    if is_main_process():
                        with atomic_write(file) as path, path.open("wb") as opened:
                            np.save(opened, noise)
                    return jnp.asarray(noise)
        return jnp.asarray(np.load(file))
