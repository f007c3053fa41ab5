"""python -m tav_jax.tune: tune a model on one captioned clip and sample edits of it.

The same command run again resumes from the last checkpoint.
"""

import sys
from collections.abc import Sequence
from contextlib import closing

from tav_jax.console import Parser, command, say
from tav_jax.errors import NotLearningError, UserError
from tav_jax.parallel import processes as distributed
from tav_jax.parallel.sharding import on_mesh
from tav_jax.report import renew_report
from tav_jax.runs.config import TuneConfig, load_clips, load_config, with_absolute_paths
from tav_jax.runs.dry_run import describe_plan
from tav_jax.runs.lock import lock_run
from tav_jax.runs.loggers import Loggers, require_loggers
from tav_jax.runs.run import Run
from tav_jax.runs.tuning import Programs, Tuning, begun, fit, prepare
from tav_jax.runs.validation import missing_samples, owes_samples, validate
from tav_jax.stopping import advise, start_job
from tav_jax.training.checkpoints import save_checkpoint


def tune(config: TuneConfig, programs: Programs | None = None) -> None:
    """Run one config from wherever it stands to its end.

    Args:
        config: The run's settings.
        programs: Train steps that earlier runs have compiled; this run's step is added.
    """
    require_loggers(config.log)
    run = Run.create(with_absolute_paths(config))
    with lock_run(run.folder):
        tune_alone(run, {} if programs is None else programs)


def tune_alone(run: Run, programs: Programs) -> None:
    """Do what `tune` does with a run that no other process tunes."""
    mesh = run.mesh()
    if mesh.size > 1:
        say(f"mesh: {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}")
    with on_mesh(mesh):
        tuning = prepare(run, programs)
        if owes_samples(tuning):
            missing_samples(run, tuning.start)  # refuses before anything is recorded
        with begun(run):
            with closing(Loggers(run, tuning.start)) as tuning.loggers:
                finish(tuning)
            if distributed.is_main_process():
                renew_report(run)


def finish(tuning: Tuning) -> None:
    """Run what is left of a run that is ready to step."""
    run, start, end = tuning.run, tuning.start, tuning.end
    if end == 0 and run.latest_step() is None:
        save_checkpoint(run.checkpoints, tuning.state, tuning.trained_names)
        say(f"wrote {run.checkpoint(0)}, the untuned model")
    if owes_samples(tuning):
        validate(tuning, start)
    if start >= end:
        say(f"{run.folder}: done, {start} of {end} steps")
        return
    count = sum(tuning.state.unet.params[name].size for name in tuning.trained_names)
    frames = len(run.clip())
    say(f"tuning {count:,} parameters on {frames} frames, steps {start + 1} to {end}")
    with closing(fit(tuning)) as steps:
        for step in steps:
            validate(tuning, step)


def tune_all(configs: Sequence[TuneConfig]) -> None:
    """Run configs one after another; runs of the same shapes share one compiled step.

    Raises:
        UserError: some cannot begin, so that none does; lists all.
        NotLearningError: some have not learnt; the others are done.
    """
    problems = []
    for config in configs:
        try:
            require_loggers(config.log)
            run = Run.create(with_absolute_paths(config))
            run.clip()
            run.check_additions()
            with lock_run(run.folder):
                pass
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    programs: Programs = {}
    failures = []
    for number, config in enumerate(configs, 1):
        say(f"clip {number} of {len(configs)}: {config.train_data.prompt} -> {config.output_dir}")
        try:
            tune(config, programs)
        except NotLearningError as error:
            failures.append(f"{config.output_dir}: {error}")
    if failures:
        raise NotLearningError("\n".join(failures))


def dry_run(configs: Sequence[TuneConfig]) -> None:
    """Print what `tune` would do with each config, and write nothing."""
    programs: Programs = {}
    for config in configs:
        run = Run.create(with_absolute_paths(config))
        say(f"run: {run.folder}")
        with on_mesh(run.mesh()):
            for line in describe_plan(run, programs):
                say(f"  {line}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the tune command with these arguments, by default the process's own."""
    parser = Parser(
        prog="python -m tav_jax.tune",
        description="Tune a text-to-image model on one captioned clip and sample edits of it. "
        "Run again, the same command goes on from the last checkpoint.",
        epilog="example: python -m tav_jax.tune --config configs/man-skiing.yaml "
        "max_train_steps=300 train_data.n_sample_frames=8",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML; see configs/")
    parser.add_argument(
        "--clips", metavar="FILE", help="YAML: a list of runs, each of the keys in which it differs"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be done, with the memory and time that it takes, and write nothing",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the file's values")
    args = parser.parse_args(argv)
    start_job()
    advise("the same command goes on")
    if args.clips:
        configs, notes = load_clips(args.config, args.clips, args.overrides)
    else:
        config, notes = load_config(args.config, args.overrides)
        configs = [config]
    for note in notes:
        say(f"note: {note}")
    if args.dry_run:
        dry_run(configs)
    elif args.clips:
        tune_all(configs)
    else:
        tune(config)


if __name__ == "__main__":
    sys.exit(main())
