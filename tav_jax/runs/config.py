"""A run's settings, as dataclasses and as YAML with the keys of the original release."""

import secrets
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from tav_jax.errors import UserError
from tav_jax.models.attention.dispatch import AttentionImplementation, AttentionScope
from tav_jax.parallel.processes import broadcast_number_from_main
from tav_jax.pretrained.prompts import PromptSyntax
from tav_jax.reading import read_text, read_yaml, why_not_a_file
from tav_jax.runs.sampling_settings import SamplingSettings, select_settings
from tav_jax.settings import (
    MOST_PIXELS,
    SIZE_FACTOR,
    STRICT,
    BatchSize,
    Decay,
    Fps,
    Frames,
    Integer,
    LoraScale,
    Number,
    NumSteps,
    PathText,
    Positive,
    Rate,
    Seed,
    Size,
    Steps,
    StepsFromZero,
    Text,
    merge_trees,
    override,
    parse,
    read_tree,
    to_plain,
)
from tav_jax.training.optimizer import TRAINABLE_MODULES, LRScheduler

# Keys of the original release that have no effect here, with the reason.
MEANINGLESS_KEYS = {
    "use_8bit_adam": "Adam's moments are kept in float32, for the trained leaves alone",
    "enable_xformers_memory_efficient_attention": "the key attention chooses the implementation",
}


Index = Annotated[Integer, Field(ge=0, le=10**9)]  # of a clip's frame
# YAML 1.1 reads an unquoted `no` as false.
Precision = Annotated[
    Literal["no", "bf16", "fp16"],
    BeforeValidator(lambda value: "no" if value in (False, None) else value),
]
# In the original it is true or false, and true means "blocks".
Checkpointing = Annotated[
    Literal["auto", "none", "blocks", "full"],
    BeforeValidator(lambda value: ("none", "blocks")[value] if isinstance(value, bool) else value),
]


def _as_words(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(value)) if all(isinstance(v, str) for v in value) else value
    return () if value is None else (value,)


LogName = Literal["tensorboard", "wandb", "trackio"]
Logs = Annotated[tuple[LogName, ...], BeforeValidator(_as_words)]

# None is "auto".
ClipFps = Annotated[Fps | None, BeforeValidator(lambda value: None if value == "auto" else value)]

# Keys that a run's config.yaml has only if they have another value.
UNSET: dict[str, Any] = {
    "loras": [],
    "embeddings": [],
    "prompt_syntax": "plain",
    "validation_data.prompt_syntax": None,
    "log": [],
}

# The first and the last line of a run's config.yaml: what begins with one and lacks the other has
# been cut off.
FIRST_LINE = "# The complete settings of a run, down to the line that says so."
LAST_LINE = "# These are the complete settings."


def check_pixels(frames: int, width: int, height: int) -> None:
    """Raise `UserError` if a clip is larger than any that can be computed."""
    if frames * width * height > MOST_PIXELS:
        raise UserError(
            f"{frames} frames of {width}x{height}: at most {MOST_PIXELS} pixels are supported"
        )


@dataclass(frozen=True, config=STRICT)
class TrainData:
    """The clip and its caption.

    Args:
        video_path: A video file, or a folder of images.
        prompt: What the clip shows.
        n_sample_frames: Number of frames.
        width: Width of the frames, in pixels.
        height: Height of the frames, in pixels.
        sample_start_idx: Index of the first frame.
        sample_frame_rate: Distance between frames: 2 takes every second one.
        sampling: "rate" takes every `sample_frame_rate`-th frame. "uniform" spreads the frames
            evenly from `sample_start_idx` to the clip's end.
        fit: "stretch" ignores the aspect ratio, as the original does. "crop" takes the centre.
    """

    video_path: PathText
    prompt: Text
    n_sample_frames: Frames = 8
    width: Size = 512
    height: Size = 512
    sample_start_idx: Index = 0
    sample_frame_rate: Annotated[Index, Field(ge=1)] = 1
    sampling: Literal["rate", "uniform"] = "rate"
    fit: Literal["stretch", "crop"] = "stretch"

    def __post_init__(self) -> None:
        check_pixels(self.n_sample_frames, self.width, self.height)


@dataclass(frozen=True, config=STRICT)
class ValidationData(SamplingSettings):
    """What is sampled every `validation_steps`, and the defaults of the sample command.

    Args:
        prompts: What the edited videos are to show.
        negative_prompt: See `SamplingSettings`.
        num_inference_steps: See `SamplingSettings`.
        sampler: See `SamplingSettings`.
        guidance_scale: See `SamplingSettings`.
        eta: See `SamplingSettings`.
        use_inv_latent: Start from the inverted clip. Otherwise start from random noise.
        num_inv_steps: Number of inversion steps.
        video_length: Number of frames. Like `width` and `height` it is by default that of the
            training clip. With `use_inv_latent` it cannot be another.
        width: Width of the videos, in pixels.
        height: Height of the videos, in pixels.
        video_format: "mp4" or "gif".
        fps: Frames per second of the written videos. The default, "auto", is the rate of the
            frames that were chosen from the clip, or 8 if the clip has no rate, as a folder of
            images. A run's config.yaml has the number.
        prompt_syntax: See `SamplingSettings`. By default that of the caption.
    """

    prompts: tuple[Text, ...] = ()
    use_inv_latent: bool = True
    num_inv_steps: NumSteps = 50  # never None: use_inv_latent says whether there is an inversion
    video_length: Frames | None = None
    width: Size | None = None
    height: Size | None = None
    video_format: Literal["mp4", "gif"] = "mp4"
    fps: ClipFps = None
    prompt_syntax: PromptSyntax | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pixels(self.video_length or 1, self.width or SIZE_FACTOR, self.height or SIZE_FACTOR)

    def sampling_settings(self, prompt_syntax: PromptSyntax = "plain") -> SamplingSettings:
        """Return the settings with which the prompts are sampled.

        Args:
            prompt_syntax: The caption's, which is that of prompts without their own.
        """
        settings = select_settings(self, invert=self.use_inv_latent)
        return replace(settings, prompt_syntax=settings.prompt_syntax or prompt_syntax)


@dataclass(frozen=True, config=STRICT)
class LoraFile:
    """A LoRA that is added to the base model.

    Args:
        path: A `.safetensors` or `.bin` file.
        scale: The weight with which it is added.
    """

    path: PathText
    scale: LoraScale = 1.0


# A path alone has the scale 1.
Lora = Annotated[
    LoraFile,
    BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value),
]


def _is_axis_size(value: int) -> int:
    if value < -1 or value == 0:
        raise ValueError("Input should be a number of devices, or -1 for the rest of them")
    return value


AxisSize = Annotated[Integer, Field(le=10**6), AfterValidator(_is_axis_size)]


@dataclass(frozen=True, config=STRICT)
class MeshSizes:
    """Number of devices along each axis of the mesh. One may be -1: all the remaining devices.

    Args:
        data: Devices over which a batch is sharded: prompts and seeds, or draws when tuning.
        frames: Devices over which the clip's frames are sharded, together with `fsdp`. The product
            of the two must divide the number of frames.
        fsdp: Devices over which the frames and all large parameters are sharded.
    """

    data: AxisSize = 1
    frames: AxisSize = -1
    fsdp: AxisSize = 1


@dataclass(frozen=True, config=STRICT)
class TuneConfig:
    """One tuning run, with the original's names and defaults.

    Args:
        pretrained_model_path: The base model: a folder, a shipped model's name or a Hub id.
        output_dir: The run's folder.
        train_data: The clip.
        validation_data: What is sampled.
        validation_steps: Updates between validations. The last update is always validated.
        trainable_modules: The ends of the names of the modules to train.
        train_batch_size: Draws of noise and timestep in a batch. (In the original a number above 1
            has no effect, because its loader has one clip.)
        max_train_steps: Number of updates. Each has `gradient_accumulation_steps` batches. With 0
            the untuned model is kept and sampled, to compare with.
        learning_rate: Peak learning rate of AdamW.
        scale_lr: Multiply the learning rate by the number of draws in an update.
        lr_scheduler: How the learning rate changes, by the names of diffusers.
        lr_warmup_steps: Updates in which the learning rate rises from 0.
        adam_beta1: Decay of Adam's first moment.
        adam_beta2: Decay of Adam's second moment.
        adam_weight_decay: Weight decay.
        adam_epsilon: Adam's epsilon.
        max_grad_norm: The gradient is clipped to this norm.
        gradient_accumulation_steps: Batches over which an update's gradient is a mean.
        attention: Implementation of attention; "auto" chooses one for each layer.
        gradient_checkpointing: What is kept for the backward pass: everything ("none"), the inputs
            of blocks ("blocks"), or less ("full"). "auto" takes the first that fits in memory.
        memory_limit_gb: Device memory that may be used, in 10^9 bytes. By default all that JAX has.
        checkpointing_steps: Updates between checkpoints. The last update always has one.
        resume_from_checkpoint: A folder `checkpoints/<step>` of another run to start from. A run
            resumes from its own newest checkpoint without this key.
        mixed_precision: "no" for float32. "bf16" computes, and stores frozen parameters, in
            bfloat16. "fp16" means bfloat16 too, which needs no loss scaling.
        seed: Seed of all randomness.
        attention_scope: The frames that spatial self-attention looks at.
        mesh: How the work is sharded over devices.
        revision: Branch, tag or commit of a model on the Hub.
        variant: Variant of its weight files, such as "fp16".
        loras: LoRAs that are added to the base model before it is tuned.
        embeddings: Files of words that were learnt by textual inversion.
        prompt_syntax: How the caption is written, see `SamplingSettings`, and by default the
            prompts.
        log: Where metrics go besides the run's own `metrics.jsonl`: a word or a list of
            "tensorboard", "wandb" and "trackio".
    """

    pretrained_model_path: PathText
    output_dir: PathText
    train_data: TrainData
    validation_data: ValidationData = Field(default_factory=ValidationData)
    validation_steps: Steps = 100
    trainable_modules: tuple[str, ...] = TRAINABLE_MODULES
    train_batch_size: BatchSize = 1
    max_train_steps: StepsFromZero = 500
    learning_rate: Rate = 3e-5
    scale_lr: bool = False
    lr_scheduler: LRScheduler = "constant"
    lr_warmup_steps: StepsFromZero = 0
    adam_beta1: Decay = 0.9
    adam_beta2: Decay = 0.999
    adam_weight_decay: Annotated[Number, Field(ge=0, le=1000)] = 1e-2
    adam_epsilon: Positive = 1e-8
    max_grad_norm: Positive = 1.0
    gradient_accumulation_steps: Annotated[Integer, Field(ge=1, le=10_000)] = 1
    attention: AttentionImplementation = "auto"
    gradient_checkpointing: Checkpointing = "auto"
    memory_limit_gb: Positive | None = None
    checkpointing_steps: Steps = 500
    # The original's "latest" is what happens anyway.
    resume_from_checkpoint: Annotated[
        PathText | None, BeforeValidator(lambda value: None if value == "latest" else value)
    ] = None
    mixed_precision: Precision = "no"
    seed: Seed = 0
    attention_scope: AttentionScope = "sparse_causal"
    mesh: MeshSizes = Field(default_factory=MeshSizes)
    revision: Text | None = None
    variant: Text | None = None
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[PathText, ...] = ()
    prompt_syntax: PromptSyntax = "plain"
    log: Logs = ()

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
        UserError: it is not YAML, or keys or values are wrong, which all are listed. Or it is a
            run's config.yaml and has been cut off.
    """
    require_end(Path(path))
    return _config_and_notes(read_tree(path, overrides, TuneConfig), str(path))


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
    common = read_tree(path, overrides, TuneConfig)
    items = read_yaml(Path(clips), "--clips")
    if not (isinstance(items, list) and items and all(isinstance(one, dict) for one in items)):
        raise UserError(f"{clips}: expected a list of keys and values, an item a clip")
    configs, notes, problems = [], [], []
    for number, item in enumerate(items, 1):
        tree = merge_trees(common, item)
        if "output_dir" not in item and isinstance(common.get("output_dir"), str):
            data = tree.get("train_data")
            video = str(data.get("video_path", number) if isinstance(data, dict) else number)
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
    if "seed" in tree and tree["seed"] is None:  # the original's "no seed"
        tree["seed"] = find_seed(tree.get("output_dir"))
        notes.append(f"seed: null: the run has the seed {tree['seed']}")
    config = parse_config(tree, where)
    if config.mixed_precision == "fp16":
        notes.append("mixed_precision: fp16 is computed as bf16, which needs no loss scaling")
    return config, notes


def find_seed(output_dir: Any) -> int:
    """Return the seed that a run has recorded, or a new one. All processes get the same."""
    seed = secrets.randbelow(2**31)
    with suppress(RuntimeError, TypeError):  # no path, as will be said when it is parsed
        record = Path(output_dir).expanduser() / "config.yaml"
        recorded = None if why_not_a_file(record) else read_yaml(record, "output_dir")
        if isinstance(recorded, dict) and isinstance(recorded.get("seed"), int):
            seed = recorded["seed"]
    return broadcast_number_from_main(seed)


def parse_config(tree: dict[str, Any], where: str = "config") -> TuneConfig:
    """Return settings from nested dictionaries. Errors are those of `load_config`."""
    return parse(TuneConfig, tree, where)


def parse_mesh(text: str) -> MeshSizes:
    """Return sizes from text such as `data=1,frames=4`. Errors are those of `load_config`."""
    try:
        tree = override({}, text.split(","), MeshSizes)
    except UserError as error:
        raise UserError(f"--mesh: {error}") from None
    return parse(MeshSizes, tree, "--mesh")


def with_absolute_paths(config: TuneConfig) -> TuneConfig:
    """Return the same settings with absolute paths, valid in any working directory."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    checkpoint = config.resume_from_checkpoint
    return replace(
        with_model(config, config.pretrained_model_path),
        output_dir=absolute(config.output_dir),
        train_data=replace(config.train_data, video_path=absolute(config.train_data.video_path)),
        resume_from_checkpoint=absolute(checkpoint) if checkpoint else None,
        loras=tuple(replace(lora, path=absolute(lora.path)) for lora in config.loras),
        embeddings=tuple(map(absolute, config.embeddings)),
    )


def with_model(config: TuneConfig, path: str) -> TuneConfig:
    """Return the same settings with a base model, the path of a folder or file being absolute."""
    place = Path(path).expanduser()
    # If there is no such place it is a name or a Hub id.
    return replace(config, pretrained_model_path=str(place.absolute()) if place.exists() else path)


def with_fps(config: TuneConfig, fps: float | None) -> TuneConfig:
    """Return the same settings with another rate of the written videos."""
    return replace(config, validation_data=replace(config.validation_data, fps=fps))


def config_tree(config: TuneConfig) -> dict[str, Any]:
    """Return settings as nested dictionaries and lists.

    Keys that most runs do not need are there only if they are set.
    """
    tree = to_plain(asdict(config))
    for key, default in UNSET.items():
        *path, name = key.split(".")
        section = tree
        for part in path:
            section = section[part]
        if section[name] == default:
            del section[name]
    return tree


def dump_config(config: TuneConfig) -> str:
    """Return the YAML that `load_config` reads back to the same settings."""
    keys = yaml.safe_dump(config_tree(config), sort_keys=False, allow_unicode=True)
    return f"{FIRST_LINE}\n{keys}{LAST_LINE}\n"


def require_end(path: Path) -> None:
    """Raise `UserError` if a file written from `dump_config` has been cut off."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, UserError):  # as will be said when its keys are read
        return
    if lines[:1] == [FIRST_LINE] and LAST_LINE not in lines:
        raise cut_off(path, f"it lacks the line {LAST_LINE!r}")


def cut_off(path: Path, why: str) -> UserError:
    """Return the error of a run's config.yaml that is not complete."""
    return UserError(
        f"{path}: cut off or damaged: {why}; put a whole copy in its place, as the run's tune "
        "command writes into another output_dir"
    )
