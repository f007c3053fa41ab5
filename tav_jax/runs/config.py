"""A run's settings: frozen dataclasses <-> YAML, with the keys of the original release."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic.dataclasses import dataclass

from tav_jax.diffusion.samplers import SamplerName, check_eta
from tav_jax.errors import UserError
from tav_jax.models.attention.dispatch import AttentionImplementation, AttentionScope
from tav_jax.runs.sampling_settings import Eta, GuidanceScale, NumSteps, Seed
from tav_jax.settings import flatten, merge_trees, override, parse, read_tree, read_yaml, to_plain
from tav_jax.training.optimizer import TRAINABLE_MODULES, LRScheduler

SIZE_FACTOR = 8  # sides must be multiples of it, as the published pipeline demands

# Keys of the original release that have nothing to do here, with the reason.
MEANINGLESS_KEYS = {
    "use_8bit_adam": "Adam's moments are kept in float32, for the trained leaves alone",
    "enable_xformers_memory_efficient_attention": "see the key attention, which chooses by itself",
}


_strict = ConfigDict(extra="forbid", allow_inf_nan=False)
Size = Annotated[int, Field(gt=0, multiple_of=SIZE_FACTOR)]
# YAML 1.1 reads an unquoted `no` as false.
Precision = Annotated[
    Literal["no", "bf16", "fp16"],
    BeforeValidator(lambda value: "no" if value in (False, None) else value),
]
# The original has a switch, and on meant what "blocks" does.
Checkpointing = Annotated[
    Literal["auto", "none", "blocks", "full"],
    BeforeValidator(lambda value: ("none", "blocks")[value] if isinstance(value, bool) else value),
]

# Keys that change how a run is computed and not what: it may go on with others.
EXECUTION_KEYS = (
    *("attention", "gradient_checkpointing", "memory_limit_gb"),
    *("mesh.data", "mesh.frames", "mesh.fsdp"),
)


@dataclass(frozen=True, config=_strict)
class TrainData:
    """The clip and its caption.

    Args:
        video_path: A video file, or a folder of images.
        sampling: "rate": every `sample_frame_rate`-th frame from `sample_start_idx`;
            "uniform": evenly from there to the clip's end.
        fit: "stretch" to width x height, as the original does, or "crop" the centre.
    """

    video_path: str
    prompt: str
    n_sample_frames: PositiveInt = 8
    width: Size = 512
    height: Size = 512
    sample_start_idx: NonNegativeInt = 0
    sample_frame_rate: PositiveInt = 1
    sampling: Literal["rate", "uniform"] = "rate"
    fit: Literal["stretch", "crop"] = "stretch"


@dataclass(frozen=True, config=_strict)
class ValidationData:
    """What is sampled every `validation_steps`, and by default from the finished run.

    Args:
        video_length: Frames, as `width` and `height` by default those of the training clip, and
            necessarily so with `use_inv_latent`.
        use_inv_latent: Start from the inverted clip; otherwise from noise drawn from the seed.
        sampler: "dpm_solver", DPM-Solver++(2M), needs some 20 steps where DDIM needs 50.
        eta: Noise of each DDIM step.
        fps: Of the written videos, frames a second.
    """

    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    video_length: PositiveInt | None = None
    width: Size | None = None
    height: Size | None = None
    num_inference_steps: NumSteps = 50
    sampler: SamplerName = "ddim"
    guidance_scale: GuidanceScale = 12.5
    eta: Eta = 0.0
    use_inv_latent: bool = True
    num_inv_steps: NumSteps = 50
    video_format: Literal["mp4", "gif"] = "mp4"
    fps: PositiveFloat = 8.0


AxisSize = PositiveInt | Literal[-1]


@dataclass(frozen=True, config=_strict)
class MeshSizes:
    """How many devices lie along each axis; one may be -1, "all the rest".

    Args:
        data: Prompts and seeds of a batch of samples, draws of a training batch.
        frames: The clip's frames, with `fsdp` together; they must divide evenly.
        fsdp: Frames too, and large parameters are stored in so many parts.
    """

    data: AxisSize = 1
    frames: AxisSize = -1
    fsdp: AxisSize = 1


@dataclass(frozen=True, config=_strict)
class TuneConfig:
    """One tuning run, with the original's names and defaults.

    Args:
        train_batch_size: Draws of noise and timestep in a step's batch. (The original's loader
            holds one clip, so that a number above 1 had no effect there.)
        max_train_steps: Updates; an update has `gradient_accumulation_steps` batches.
        validation_steps, checkpointing_steps: Updates between; the last update always counts.
        resume_from_checkpoint: A `checkpoints/<step>` folder of another run to start from. The
            same command run again goes on from its own latest one without being told.
        mixed_precision: "bf16" computes, and stores frozen leaves, in bfloat16; "fp16" means the
            same here, since JAX's devices have bfloat16, which needs no loss scaling.
        attention_scope: What a frame's self-attention looks at.
        attention: How attention is computed: "einsum", "chunked", "fused" or, by layer, "auto".
        gradient_checkpointing: What is kept for the backward pass: all ("none"), inputs of
            "blocks", or fewer still ("full"); "auto" takes the first that fits.
        memory_limit_gb: Of device memory, in 10^9 bytes; by default all that JAX may use.
        mesh: How the work is spread over devices.
        revision, variant: Of a model on the Hub, of its weight files.
    """

    pretrained_model_path: str
    output_dir: str
    train_data: TrainData
    validation_data: ValidationData = Field(default_factory=ValidationData)
    validation_steps: PositiveInt = 100
    trainable_modules: tuple[str, ...] = TRAINABLE_MODULES
    train_batch_size: PositiveInt = 1
    max_train_steps: PositiveInt = 500
    learning_rate: NonNegativeFloat = 3e-5
    scale_lr: bool = False
    lr_scheduler: LRScheduler = "constant"
    lr_warmup_steps: NonNegativeInt = 0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_weight_decay: NonNegativeFloat = 1e-2
    adam_epsilon: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0
    gradient_accumulation_steps: PositiveInt = 1
    attention: AttentionImplementation = "auto"
    gradient_checkpointing: Checkpointing = "auto"
    memory_limit_gb: PositiveFloat | None = None
    checkpointing_steps: PositiveInt = 500
    # The original's "latest" is what happens anyway.
    resume_from_checkpoint: Annotated[
        str | None, BeforeValidator(lambda value: None if value == "latest" else value)
    ] = None
    mixed_precision: Precision = "no"
    seed: Seed = 0
    attention_scope: AttentionScope = "sparse_causal"
    mesh: MeshSizes = Field(default_factory=MeshSizes)
    revision: str | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        train, validation = self.train_data, self.validation_data
        clip = {
            "video_length": train.n_sample_frames,
            "width": train.width,
            "height": train.height,
        }
        differing = [
            f"{name} {getattr(validation, name)} is not {value}"
            for name, value in clip.items()
            if getattr(validation, name) not in (None, value)
        ]
        check_eta(validation.sampler, validation.eta)
        if validation.use_inv_latent and differing:
            raise UserError(
                f"validation_data: {', '.join(differing)} of train_data; the inverted clip has its "
                "own size, so set them alike or use_inv_latent: false"
            )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[TuneConfig, list[str]]:
    """Return a run's settings from a YAML file, and notes about keys that do nothing here.

    Args:
        path: The file.
        overrides: `key=value`, with dots for nested keys: `train_data.n_sample_frames=4`.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is not YAML, or keys or values are wrong; all are listed.
    """
    return _config_and_notes(read_tree(path, overrides), str(path))


def load_clips(
    path: str | Path, clips: str | Path, overrides: Sequence[str] = ()
) -> tuple[list[TuneConfig], list[str]]:
    """Return the settings of several runs, and the notes of all.

    Args:
        path: A YAML file with what the runs have in common.
        clips: A YAML file with a list. Each item has the keys in which one run differs:
            `train_data`, and usually `validation_data`. The default of its `output_dir` is a
            folder in the common `output_dir`, named like the video.
        overrides: `key=value` for all runs, as `load_config` takes them.

    Raises:
        MissingFileError: There is no such file.
        UserError: A file is not YAML, or keys or values are wrong; all are listed.
    """
    common = read_tree(path, overrides)
    items = read_yaml(Path(clips), "--clips")
    if not (isinstance(items, list) and items and all(isinstance(one, dict) for one in items)):
        raise UserError(f"{clips}: expected a list of keys and values, an item a clip")
    configs, notes, problems = [], [], []
    for number, item in enumerate(items, 1):
        tree = merge_trees(common, item)
        if "output_dir" not in item and "output_dir" in common:
            video = str(tree.get("train_data", {}).get("video_path", number))
            tree["output_dir"] = str(Path(common["output_dir"]) / Path(video).stem)
        try:
            config, more = _config_and_notes(tree, f"{clips}, clip {number}")
        except UserError as error:
            problems.append(str(error))
            continue
        configs.append(config)
        notes += more
    folders = Counter(config.output_dir for config in configs)
    problems += [
        f"{clips}: {count} clips have the output_dir {folder}; give each its own"
        for folder, count in folders.items()
        if count > 1
    ]
    if problems:
        raise UserError("\n".join(problems))
    return configs, list(dict.fromkeys(notes))


def _config_and_notes(tree: dict[str, Any], where: str) -> tuple[TuneConfig, list[str]]:
    notes = [
        f"{key}: has no effect here: {reason}"
        for key, reason in MEANINGLESS_KEYS.items()
        if tree.pop(key, False)
    ]
    config = parse_config(tree, where)
    if config.mixed_precision == "fp16":
        notes.append("mixed_precision: fp16 is computed as bf16, which needs no loss scaling")
    return config, notes


def parse_config(tree: dict[str, Any], where: str = "config") -> TuneConfig:
    """Return settings from nested dictionaries; raises as `load_config` does."""
    return parse(TuneConfig, tree, where)


def parse_mesh(text: str) -> MeshSizes:
    """Return sizes from `data=1,frames=4`; raises as `load_config` does."""
    return parse(MeshSizes, override({}, text.split(",")), "--mesh")


def with_absolute_paths(config: TuneConfig) -> TuneConfig:
    """Return the same settings, to be read from any working directory."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    model, checkpoint = config.pretrained_model_path, config.resume_from_checkpoint
    return replace(
        config,
        # What is no folder is an id on the Hub.
        pretrained_model_path=absolute(model) if Path(model).expanduser().is_dir() else model,
        output_dir=absolute(config.output_dir),
        train_data=replace(config.train_data, video_path=absolute(config.train_data.video_path)),
        resume_from_checkpoint=absolute(checkpoint) if checkpoint else None,
    )


def dump_config(config: TuneConfig) -> str:
    """Return the YAML that `load_config` reads back to the same settings."""
    return yaml.safe_dump(to_plain(asdict(config)), sort_keys=False, allow_unicode=True)


def differences(ours: TuneConfig, theirs: TuneConfig) -> list[str]:
    """Return the keys in which two runs differ, with both values, but for `EXECUTION_KEYS`."""
    mine, other = flatten(asdict(ours)), flatten(asdict(theirs))
    return [
        f"{key}: {other[key]!r} there, {value!r} here"
        for key, value in mine.items()
        if value != other[key] and key not in EXECUTION_KEYS
    ]
