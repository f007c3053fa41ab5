"""A run: its folder, its settings, and what is loaded or computed from them once."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from tav_jax.console import say
from tav_jax.errors import DamagedError, MissingFileError, UserError
from tav_jax.files import atomic_write, first_unwritable_parent, move_aside, remove_partials
from tav_jax.models.compute import PRECISION_DTYPES
from tav_jax.models.vae import VAEConfig
from tav_jax.parallel.processes import broadcast_from_main, is_main_process
from tav_jax.parallel.sharding import gather_to_host, make_mesh, shard
from tav_jax.pipeline import encode_frames, invert_latents, posterior_mean_latents
from tav_jax.pretrained.hub import find_folder
from tav_jax.pretrained.lora import change_of, read_loras
from tav_jax.pretrained.model import Model, load_model
from tav_jax.runs.additions import find_additions
from tav_jax.runs.changes import check_changes
from tav_jax.runs.config import LoraFile, TuneConfig, dump_config, with_fps, with_model
from tav_jax.runs.inputs import (
    ClipDigest,
    FileDigest,
    Inputs,
    OtherInputError,
    check_clip,
    check_model,
    digest_frames,
    digest_model,
    in_background,
    read_inputs,
    write_inputs,
)
from tav_jax.runs.inversions import read_inversion, write_inversion
from tav_jax.runs.lock import is_empty
from tav_jax.runs.record import read_record
from tav_jax.training.checkpoints import (
    checkpoint_damage,
    latest_step,
    restore_trained,
    saved_steps,
)
from tav_jax.training.optimizer import label_params, select
from tav_jax.types import Latents, Moments, Params
from tav_jax.video.read import Clip, read_clip

# Of frames spread over a long clip, whose own rate would be minutes to a frame.
LOWEST_AUTO_FPS = 1.0
DEFAULT_FPS = 8.0  # of a clip without a rate; the original release writes all videos at 8


class Run:
    """A run's folder with its settings. The constructor writes nothing.

    The clip is read once and encoded once. It is inverted once for each checkpoint and number of
    steps. The results are kept in memory. Where the clip is read or the model loaded, each is
    compared with what the run has recorded.

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
        self.inputs_file = self.folder / "inputs.json"
        self._clip: Clip | None = None
        self._clip_digest: ClipDigest | None = None
        self._model_digests: Future[dict[str, FileDigest]] | None = None
        self._moments: Moments | None = None
        self._inverted: dict[tuple[int, int], Latents] = {}
        self._lora_dir: Path | None = None
        self._more_loras: tuple[LoraFile, ...] = ()

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
            theirs = read_record(run.config_file)
            if config.validation_data.fps is None:  # "auto" here, and a number there
                config = with_fps(config, theirs.validation_data.fps)
                run = cls(config.output_dir, config)
            check_changes(
                config,
                # The folder's own path does not count: it may have been renamed.
                replace(theirs, output_dir=config.output_dir),
                run.folder,
                done=run.latest_step() or 0,
                has_digests=run.recorded is not None,
                has_samples=any(run.folder.glob("samples/*/*"))
                or any(run.folder.glob("inv_latents/*")),
            )
        elif run.folder.exists() and not (run.folder.is_dir() and is_empty(run.folder)):
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
            UserError: Its config.yaml is damaged or incomplete.
        """
        run_config = Path(folder) / "config.yaml"
        if not run_config.is_file():
            raise MissingFileError(f"--run: {folder} is not a run of tav_jax.tune: no config.yaml")
        return cls(folder, read_record(run_config))

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
        """Create the run's folder with its complete settings and the digests of what it reads."""
        if not is_main_process():
            return
        self.clip()
        assert self._clip_digest is not None
        self.begin_digests()
        assert self._model_digests is not None
        inputs = Inputs(
            self._clip_digest,
            self._model_digests.result(),
            loras=tuple(digest for _, digest in self.found_loras),
            embeddings=tuple(digest for _, digest in self.found_embeddings),
        )
        text = dump_config(with_fps(self.config, self.fps))
        with atomic_write(self.config_file) as path:
            path.write_text(text, encoding="utf-8")
        # After the settings, without which the folder would be no run.
        if inputs != self.recorded:
            write_inputs(self.inputs_file, inputs)

    @cached_property
    def recorded(self) -> Inputs | None:
        """Return what the run has recorded of its clip and model, if it has.

        Raises:
            UserError: The record is damaged.
        """
        return read_inputs(self.inputs_file)

    def require_folder(self) -> None:
        """Raise `MissingFileError` if the folder was removed since `record_config`."""
        if not self.config_file.is_file():
            raise MissingFileError(
                f"{self.config_file} is gone: the run's folder was removed, moved or emptied "
                "while the run was going on; what was made since is lost"
            )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Raise `MissingFileError` if the folder is removed during the block."""
        try:
            yield
        except Exception as error:
            # Whatever failed because of it.
            if not isinstance(error, UserError):
                self.require_folder()
            raise
        self.require_folder()

    def latest_step(self) -> int | None:
        """Return the newest checkpoint's step, or None."""
        return latest_step(self.checkpoints)

    def find_step(self, step: int | None = None) -> int:
        """Return the step of a checkpoint to sample from, by default the newest that is whole.

        Damaged ones that are newer are named in a line each.

        Raises:
            MissingFileError: there is no such checkpoint.
            DamagedError: the checkpoint is damaged, or all are.
        """
        steps = saved_steps(self.checkpoints)
        if not steps:
            raise MissingFileError(
                f"--run: {self.folder} has no checkpoint yet; run tav_jax.tune first"
            )
        if step is not None and step not in steps:
            raise MissingFileError(
                f"--step: {self.folder} has no checkpoint {step}; the newest is {steps[0]}"
            )
        damaged: dict[int, str] = {}
        for one in steps if step is None else [step]:
            damage = checkpoint_damage(self.checkpoint(one), ["trained"])
            if damage is None:
                for newer, why in damaged.items():
                    say(f"{self.checkpoint(newer)} is damaged ({why}); sampling from {one}")
                return one
            damaged[one] = damage
        if step is not None:
            others = f"; there are {', '.join(map(str, steps))}" if len(steps) > 1 else ""
            raise DamagedError(f"--step: {self.checkpoint(step)} is damaged: {damage}{others}")
        raise self.all_damaged(damaged)

    def all_damaged(self, damaged: Mapping[int, str]) -> DamagedError:
        """Return the error of a run of which no checkpoint is whole.

        Args:
            damaged: What is wrong with each, by its step.
        """
        listed = "; ".join(f"{step} ({why})" for step, why in damaged.items())
        return DamagedError(
            f"{self.checkpoints}: every checkpoint is damaged: {listed}; put back copies of them, "
            "or tune again with another output_dir"
        )

    def mesh(self) -> Mesh:
        """Return the mesh of the run. It divides the frames of its clip and of its samples."""
        train, validation = self.config.train_data, self.config.validation_data
        frames = math.gcd(train.n_sample_frames, validation.video_length or 0)
        return make_mesh(asdict(self.config.mesh), frames=frames)

    def load_base(self) -> Model:
        """Return the base model with the run's LoRAs and embeddings, sharded over the mesh.

        Trained parameters are float32.
        """
        config, folder = self.config, self._model_folder
        paths = [path for path, _ in self.found_loras]
        loras = [(path, lora.scale) for path, lora in zip(paths, config.loras, strict=True)]
        if self.recorded:
            self._begin_digests(folder)
        model = load_model(
            folder,
            dtype=PRECISION_DTYPES[config.mixed_precision],
            float32_modules=config.trainable_modules,
            attention_scope=config.attention_scope,
            attention=config.attention,
            key=jax.random.key(config.seed),
            variant=config.variant,
            loras=[*loras, *self._added()],
            embeddings=[path for path, _ in self.found_embeddings],
        )
        if self.recorded and self._model_digests:
            now = self._model_digests.result()
            check_model(self.recorded.model, now, self.folder, config.pretrained_model_path)
        unet, vae, text_encoder = shard((model.unet, model.vae, model.text_encoder))
        return replace(model, unet=unet, vae=vae, text_encoder=text_encoder)

    @cached_property
    def found_loras(self) -> list[tuple[Path, FileDigest]]:
        """Return the files of the run's LoRAs with their digests, compared with the recorded ones.

        Errors are those of `find_additions`.
        """
        paths = [lora.path for lora in self.config.loras]
        recorded = self.recorded.loras if self.recorded else None
        return find_additions("loras", paths, recorded, self._lora_dir, self.folder)

    @cached_property
    def found_embeddings(self) -> list[tuple[Path, FileDigest]]:
        """Return the files of the run's embeddings as `found_loras` does."""
        recorded = self.recorded.embeddings if self.recorded else None
        paths = self.config.embeddings
        return find_additions("embeddings", paths, recorded, self._lora_dir, self.folder)

    def use_lora_dir(self, folder: str) -> None:
        """Look for the run's LoRAs and embeddings in a folder, by their digests."""
        self._lora_dir = Path(folder).expanduser()

    def add_loras(self, loras: Sequence[LoraFile]) -> None:
        """Add further LoRAs to the tuned model. The inverted clip is then not kept on disk."""
        self._more_loras = tuple(loras)

    def _added(self) -> list[tuple[str, float]]:
        return [(lora.path, lora.scale) for lora in self._more_loras]

    @cached_property
    def _model_folder(self) -> Path:
        config = self.config
        return find_folder(
            config.pretrained_model_path, revision=config.revision, variant=config.variant
        )

    def begin_digests(self) -> None:
        """Begin to compute the digests that `record_config` waits for.

        Call it when the model has been loaded, which keeps several cores busy: what comes next,
        compiling, is mostly one thread's work.
        """
        if self._model_digests is None and is_main_process():
            self._begin_digests(self._model_folder)

    def _begin_digests(self, folder: Path) -> None:
        known = self.recorded.model if self.recorded else {}
        variant = self.config.variant
        self._model_digests = in_background(lambda: digest_model(folder, variant, known))

    def load_model(self, step: int) -> Model:
        """Return the tuned model of a checkpoint."""
        try:
            model = self.load_base()
        except MissingFileError as error:
            raise MissingFileError(f"{error}; if the model has moved, give --model DIR") from None
        params = model.unet.params
        trained = self._trained(step, params)
        # The base has what further LoRAs add already, and the checkpoint has not.
        more = read_loras(self._added(), model.text_encoder.config, model.unet.config)
        change = change_of([lora.unet for lora in more])
        for name in trained:
            if (added := change(name)) is not None:
                trained[name] = shard(trained[name] + added)
        return model.with_unet(model.unet.with_params(params | trained))

    def trained_parameters(self, step: int) -> Params:
        """Return what a checkpoint has of its own. The base model is loaded, too, and compared."""
        return self._trained(step, self.load_base().unet.params)

    def _trained(self, step: int, params: Params) -> Params:
        labels = label_params(params, self.config.trainable_modules)
        return restore_trained(self.checkpoint(step), select(params, labels, "train"))

    def clip(self) -> UInt8[np.ndarray, "f H W 3"]:
        """Return the frames that the run tunes on. Errors are those of `read_clip`."""
        return self._read_clip().frames

    def frame_indices(self) -> list[int]:
        """Return the numbers of these frames in the clip. Errors are those of `read_clip`."""
        return self._read_clip().indices

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
            clip = read_clip(
                data.video_path,
                n_sample_frames=data.n_sample_frames,
                width=data.width,
                height=data.height,
                sample_start_idx=data.sample_start_idx,
                sample_frame_rate=data.sample_frame_rate,
                sampling=data.sampling,
                fit=data.fit,
            )
            self._clip_digest = digest_frames(clip.frames, Path(data.video_path))
            if self.recorded and self.recorded.clip:
                check_clip(self.recorded.clip, self._clip_digest, self.folder, data.video_path)
            self._clip = clip
        return self._clip

    def check_clip(self) -> None:
        """Raise `OtherInputError` if another clip is where the run's was.

        A clip that is gone, or cannot be read, is not needed for samples from kept latents.
        """
        if self.recorded:
            try:
                self.clip()
            except OtherInputError:
                raise
            except UserError:
                return

    def use_float32(self) -> None:
        """Load the base model in float32, whatever the run computes in."""
        self.config = replace(self.config, mixed_precision="no")

    def check_additions(self) -> None:
        """Raise `UserError` if LoRAs or embeddings are not where they were, or are others."""
        _ = self.found_loras, self.found_embeddings

    def use_model(self, path: str) -> None:
        """Load the base model from another place.

        Args:
            path: The model, as `pretrained_model_path` names it. Its files are compared with those
                that the run was tuned with.
        """
        self.config = with_model(self.config, path)
        if self.recorded is None:
            warnings.warn(
                f"{self.folder} has no digests of its model's files, so that {path} is not "
                "compared with them",
                stacklevel=2,
            )

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

        For the run's own `num_inv_steps` it is kept on disk, and read from there if it exists. With
        LoRAs that are not the run's it is another, which is not kept.

        Args:
            model: The run's model at `step`.
            step: The checkpoint.
            num_inv_steps: Number of steps of DDIM inversion.
            alone: Returns a context in which no other process writes the given file.
        """
        if (step, num_inv_steps) not in self._inverted:
            own_steps = self.config.validation_data.num_inv_steps
            on_disk = num_inv_steps == own_steps and not self._more_loras
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
        noise, _ = self._read_inversion(model, file)
        if noise is None:
            with alone(file):
                # Another job may have made it in the meantime.
                noise, damage = self._read_inversion(model, file)
                if noise is None:
                    if damage and is_main_process():
                        say(f"{damage}; it is moved to {move_aside(file).name}; inverting again")
                    noise = np.asarray(
                        gather_to_host(self._invert(model, num_inv_steps)), np.float32
                    )
                    if is_main_process():
                        write_inversion(file, noise)
        return jnp.asarray(noise)

    def _read_inversion(self, model: Model, file: Path) -> tuple[np.ndarray | None, str | None]:
        """Return the kept inversion, or None with what is wrong; all processes have it, or none."""
        noise = damage = None
        try:
            noise, _ = read_inversion(file) if file.exists() else (None, False)
            expected = inverted_shape(self.config, model.vae.config)
            if noise is not None and noise.shape != expected:
                raise DamagedError(f"{file}: it has the shape {noise.shape}, not {expected}")
        except DamagedError as error:
            noise, damage = None, str(error)
        is_whole = broadcast_from_main([noise is not None])[0]
        if is_whole and noise is None:
            raise DamagedError(damage or f"{file}: not found, though the main process has read it")
        return (noise, None) if is_whole else (None, damage)


def inverted_shape(config: TuneConfig, vae: VAEConfig) -> tuple[int, ...]:
    """Return the shape of a run's inverted clip."""
    data, factor = config.train_data, vae.downsampling
    grid = data.height // factor, data.width // factor
    return (1, data.n_sample_frames, *grid, vae.latent_channels)
