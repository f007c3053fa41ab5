"""The videos of a run's validation prompts: which are owed, which are missing, and making them."""

from dataclasses import replace
from pathlib import Path

from tav_jax.parallel import processes as distributed
from tav_jax.runs.config import TuneConfig, with_absolute_paths
from tav_jax.runs.overview import has_overview
from tav_jax.runs.render import render
from tav_jax.runs.report import NAME as PAGE
from tav_jax.runs.run import Run
from tav_jax.runs.samples import Sample, default_sample, is_done
from tav_jax.runs.tuning import Tuning, is_validated


def owes_samples(tuning: Tuning) -> bool:
    """Tell whether the newest checkpoint is validated.

    A run that was stopped between a checkpoint and its samples still owes them, and one with new
    prompts owes those.
    """
    is_tuned = tuning.start > 0 or tuning.end == 0
    return is_tuned and is_validated(tuning.run.config, tuning.start)


def validation_samples(run: Run, step: int) -> list[Sample]:
    """Return the samples of the validation prompts."""
    default = default_sample(run.config, step)
    return [replace(default, prompt=prompt) for prompt in run.config.validation_data.prompts]


def missing_samples(run: Run, step: int) -> list[bool]:
    """Tell of each validation sample whether its video is not there yet.

    Raises:
        ExistingFileError: Videos of those names were made with other settings.
    """
    folder, video_format = run.samples(step), run.config.validation_data.video_format
    samples = validation_samples(run, step)
    return [not is_done(sample, folder, video_format) for sample in samples]


def validate(tuning: Tuning, step: int) -> None:
    """Sample the validation prompts that are not there yet, with the model as it is now."""
    run = tuning.run
    samples = validation_samples(run, step)
    is_wanted = distributed.broadcast_from_main(missing_samples(run, step))
    folder, loggers = run.samples(step), tuning.loggers
    assert loggers is not None

    def log_video(path: Path) -> None:
        loggers.video(step, path)

    if step > loggers.start:  # videos of an earlier start, whose events are dropped
        for sample, flag in zip(samples, is_wanted, strict=True):
            if not flag:
                log_video(sample.video_in(folder, run.config.validation_data.video_format))
    render(run, folder, samples, is_wanted, tuning.tuned_model, tuning.stages, on_written=log_video)


def is_made(config: TuneConfig) -> bool:
    """Tell whether a run has all its steps, the videos of its prompts, their overview and its page.

    Raises:
        UserError: The folder holds a run with other settings, or something else.
    """
    run = Run.create(with_absolute_paths(config))
    step = run.latest_step()
    return (
        step == config.max_train_steps
        and not any(missing_samples(run, step))
        and has_overview(run.samples(step))
        and (run.folder / PAGE).is_file()
    )
