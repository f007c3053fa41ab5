"""What may change between two starts of one run, and what may not."""

from dataclasses import asdict
from pathlib import Path

from tav_jax.errors import UserError
from tav_jax.runs.config import TuneConfig
from tav_jax.settings import flatten
from tav_jax.text import brief, shorten

# Keys that change how a run is computed, but not its result. A run may resume with other values.
EXECUTION_KEYS = (
    *("attention", "gradient_checkpointing", "log", "memory_limit_gb"),
    *("mesh.data", "mesh.frames", "mesh.fsdp"),
)
# Keys that name files. What counts is the content, of which a run has digests. So it is with the
# files of `loras` and `embeddings`, whose number and scales count, too.
INPUT_KEYS = ("pretrained_model_path", "revision", "variant", "train_data.video_path")
# Keys on which the trained weights do not depend: when something is written, and how prompts are
# sampled. A run may go on with other values, which it then records.
OUTPUT_KEYS = ("validation_steps", "checkpointing_steps")
SAMPLING = "validation_data."
# Of the latter those that the record beside a video does not have, so that a video or an inverted
# clip made with one value would be taken for one of another.
UNRECORDED_KEYS = tuple(
    f"{SAMPLING}{name}" for name in ("fps", "video_format", "video_length", "width", "height")
)
NUM_INV_STEPS = f"{SAMPLING}num_inv_steps"
# Schedules whose rates so far are the same however many steps follow.
ENDLESS_SCHEDULES = ("constant", "constant_with_warmup")


def differences(ours: TuneConfig, theirs: TuneConfig) -> dict[str, str]:
    """Return the keys in which two runs differ, each with a line that has both values.

    `EXECUTION_KEYS` do not count.
    """
    mine, other = flatten(asdict(ours)), flatten(asdict(theirs))
    return {
        key: f"{key}: {brief(other[key])} there, {brief(value)} here"
        for key, value in mine.items()
        if value != other[key] and key not in EXECUTION_KEYS
    }


def check_changes(
    ours: TuneConfig,
    theirs: TuneConfig,
    folder: Path,
    *,
    done: int,
    has_digests: bool,
    has_samples: bool,
) -> None:
    """Raise `UserError` if a run cannot go on with other settings; lists all that is in the way.

    Args:
        ours: The settings of now.
        theirs: The settings that the run has recorded.
        folder: The run's folder.
        done: Its newest checkpoint's step, or 0.
        has_digests: Whether it knows the content of its clip and model, which may then have moved.
        has_samples: Whether it has videos or an inverted clip.
    """
    problems = []
    for key, line in differences(ours, theirs).items():
        if key == "max_train_steps":
            problem = _other_steps(ours, theirs, folder, done)
        elif key in INPUT_KEYS:
            problem = "" if has_digests else line
        elif key == "loras":
            is_same = has_digests and _scales(ours) == _scales(theirs)
            problem = "" if is_same else line
        elif key == "embeddings":
            is_same = has_digests and len(ours.embeddings) == len(theirs.embeddings)
            problem = "" if is_same else line
        elif key == NUM_INV_STEPS and has_samples:
            problem = (
                f"{line}, and the inverted clip is kept; `python -m tav_jax.sample --run {folder} "
                f"--num-inv-steps {ours.validation_data.num_inv_steps}` samples with another"
            )
        elif key in UNRECORDED_KEYS:
            problem = f"{line}, and the run has videos" if has_samples else ""
        else:
            problem = "" if key in OUTPUT_KEYS or key.startswith(SAMPLING) else line
        if problem:
            problems.append(f"  {problem}")
    if problems:
        raise UserError(
            f"output_dir: {shorten(str(folder), 150)} is a run of other settings; name another "
            "output_dir:\n" + "\n".join(problems)
        )


def _scales(config: TuneConfig) -> list[float]:
    return [lora.scale for lora in config.loras]


def _other_steps(ours: TuneConfig, theirs: TuneConfig, folder: Path, done: int) -> str:
    """Return why a run cannot have another number of steps, or nothing."""
    steps = ours.max_train_steps
    if steps < done:
        return (
            f"max_train_steps: {done} steps are done already, {steps} here; "
            f"`python -m tav_jax.sample --run {folder} --step N` samples an earlier checkpoint"
        )
    if not done or ours.lr_scheduler in ENDLESS_SCHEDULES:
        return ""
    return (
        f"max_train_steps: {theirs.max_train_steps} there, {steps} here, on which the rates of "
        f"lr_scheduler {ours.lr_scheduler} depend; resume_from_checkpoint="
        f"{folder}/checkpoints/{done} begins there"
    )
