"""What the page can do, without the page: runs are tuned and sampled in a folder."""

import hashlib
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from tav_jax.demo.queue import Progress
from tav_jax.digests import sha256
from tav_jax.errors import ExistingFileError, UserError
from tav_jax.parallel.sharding import on_mesh
from tav_jax.pretrained.hub import SHIPPED
from tav_jax.pretrained.model import Model
from tav_jax.runs.adapters import write_adapter
from tav_jax.runs.config import TuneConfig, parse_config, with_absolute_paths
from tav_jax.runs.lock import lock_run
from tav_jax.runs.metrics_log import Stages, read_metrics
from tav_jax.runs.overview import shown
from tav_jax.runs.render import write_samples
from tav_jax.runs.run import Run
from tav_jax.runs.samples import Sample, default_sample, file_stem, is_done
from tav_jax.runs.tuning import Programs, Tuning, begun, fit, prepare
from tav_jax.settings import to_plain
from tav_jax.stopping import Stopped, received, when_stopped
from tav_jax.training.checkpoints import save_checkpoint
from tav_jax.video.read import Clip, read_all_frames, read_clip
from tav_jax.video.sheets import side_by_side
from tav_jax.video.write import write_video
from tav_jax.worlds.figures.world import FIGURES

UPDATES = 50  # of the page, while a run is tuned; more of them if it is long
STEPS_APART_AT_MOST = 10  # between two updates, which are also where it can be cancelled
PREVIEWS = 3  # at most, while a run is tuned; the last is that of the tuned model
SECONDS_BETWEEN_PREVIEWS = 20.0  # a short tuning would take most of its time for them
WORLD = FIGURES  # of the clips that the page offers
FRAMES_OF_DRAWN_CLIP, FPS_OF_DRAWN_CLIP = 24, 8
MOST_PROMPTS = 20  # of one job

# How frames are chosen from the clip.
SAMPLINGS: dict[str, dict[str, Any]] = {
    "spread over the clip": {"sampling": "uniform"},
    "every frame": {"sample_frame_rate": 1},
    "every 2nd frame": {"sample_frame_rate": 2},
    "every 4th frame": {"sample_frame_rate": 4},
}


@dataclass(frozen=True)
class Defaults:
    """Settings that suit a base model.

    Args:
        size: Width and height of the frames, in pixels.
        steps: Number of updates.
        learning_rate: The learning rate.
        guidance_scale: Weight of the guidance.
        sampling_steps: Number of sampling steps.
    """

    size: int
    steps: int
    learning_rate: float
    guidance_scale: float
    sampling_steps: int


# As configs/quickstart.yaml and configs/tiny-scenes.yaml have them.
OF_SHIPPED = {
    "tiny-figures": Defaults(64, 40, 5e-4, 1.5, 20),
    "tiny-scenes": Defaults(32, 150, 2e-3, 2.0, 50),
}


def defaults_for(model: str) -> Defaults:
    """Return settings that suit a base model, by default those of the original release."""
    return OF_SHIPPED.get(model, Defaults(512, 500, 3e-5, 12.5, 50))


@dataclass(frozen=True)
class Choices:
    """What a user chooses before tuning. `make_config` checks it.

    Args:
        clip: The clip's file.
        caption: What the clip shows.
        model: The base model, as `pretrained_model_path` names it.
        frames: Number of frames.
        first_frame: Index of the first one.
        sampling: A key of `SAMPLINGS`.
        size: See `Defaults`.
        steps: See `Defaults`.
        learning_rate: See `Defaults`.
        guidance_scale: See `Defaults`.
        sampling_steps: Number of sampling steps.
    """

    clip: str | None
    caption: str
    model: str
    frames: int | float
    first_frame: int | float
    sampling: str
    size: int | float
    steps: int | float
    learning_rate: int | float
    guidance_scale: int | float
    sampling_steps: int | float = 50

    def train_data(self) -> dict[str, Any]:
        """Return the section `train_data` of a config.

        Raises:
            UserError: There is no clip.
        """
        if not self.clip:
            raise UserError("choose a clip, or upload one")
        return {
            "video_path": self.clip,
            "prompt": self.caption,
            "n_sample_frames": _whole(self.frames),
            "width": _whole(self.size),
            "height": _whole(self.size),
            "sample_start_idx": _whole(self.first_frame),
            "fit": "crop",
            **SAMPLINGS.get(self.sampling, {}),
        }


def _whole(number: Any) -> Any:
    """Return a number from a page, which may be 8.0, as settings have it."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def make_config(choices: Choices, runs: Path) -> TuneConfig:
    """Return the settings of the run for a user's choices.

    Its folder's name has a digest of what makes it another run, so the same choices go on with the
    same run. The number of steps and how prompts are sampled do not.

    Raises:
        UserError: Choices are missing or wrong; wrong ones are all listed.
    """
    data = choices.train_data()
    if not choices.caption.strip():
        raise UserError("write a caption: what the clip shows")
    steps = _whole(choices.steps)
    steps_apart = steps // UPDATES if isinstance(steps, int) else 1
    steps_apart = max(1, min(steps_apart, STEPS_APART_AT_MOST))
    large = choices.model not in SHIPPED and jax.default_backend() != "cpu"
    tree = {
        "pretrained_model_path": choices.model,
        "output_dir": str(runs),
        "train_data": data,
        "validation_data": {
            "num_inference_steps": _whole(choices.sampling_steps),
            "guidance_scale": choices.guidance_scale,
        },
        "learning_rate": choices.learning_rate,
        "max_train_steps": steps,
        "validation_steps": steps_apart,
        "mixed_precision": "bf16" if large else "no",
    }
    config = with_absolute_paths(parse_config(tree, "settings"))
    clip = Path(config.train_data.video_path)
    if not clip.is_file():
        raise UserError("the clip is not there any more; choose or upload it again")
    parts = asdict(config.train_data) | {"video_path": sha256(clip)}
    identity = [
        parts,
        config.pretrained_model_path,
        config.learning_rate,
        config.mixed_precision,
        config.validation_data.num_inv_steps,
    ]
    folder = runs / f"{file_stem(clip.stem)[:60].strip()}-{_digest(identity)}"
    # A longer run that was tuned before stays as it is.
    done = Run(folder, config).latest_step() or 0
    return replace(
        config,
        output_dir=str(folder.absolute()),
        max_train_steps=max(config.max_train_steps, done),
    )


def _digest(value: Any) -> str:
    text = json.dumps(to_plain(value), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def chosen_frames(choices: Choices) -> Clip:
    """Return the frames of a clip that will be used, enlarged if they are tiny.

    Raises:
        UserError: There is no clip, or frames cannot be read.
    """
    tree = {"pretrained_model_path": "-", "output_dir": "-", "train_data": choices.train_data()}
    data = parse_config(tree, "settings").train_data
    keys = ("n_sample_frames", "width", "height", "sample_start_idx", "sample_frame_rate")
    options = {name: getattr(data, name) for name in (*keys, "sampling", "fit")}
    try:
        clip = read_clip(data.video_path, **options)
    except UserError as error:
        # Whoever uploads a clip need not learn where it lies.
        raise UserError(str(error).removeprefix(f"{data.video_path}: ")) from None
    return clip._replace(frames=shown(clip.frames))


class Studio:
    """Tunes runs and samples them, all in one folder.

    Its calls belong into one thread. It keeps compiled steps, and the model of the last run.

    Args:
        folder: Takes the runs and the drawn clips.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs, self.clips = folder / "runs", folder / "clips"
        self._programs: Programs = {}
        self._kept: tuple[Path, int, Model] | None = None

    def drawn_clip(self, name: str) -> Path:
        """Return the file of a clip of `WORLD`, drawn at its first use."""
        path = self.clips / f"{name}.mp4"
        if not path.is_file():
            frames = WORLD.render(WORLD.clips[name], FRAMES_OF_DRAWN_CLIP)
            write_video(path, shown(frames), fps=FPS_OF_DRAWN_CLIP)
        return path

    def tune(self, choices: Choices, prompt: str, cancelled: threading.Event) -> Iterator[Progress]:
        """Tune a run, from wherever it stands, and preview an edit now and then.

        Args:
            choices: The settings.
            prompt: The edit. Without it there is no preview.
            cancelled: When it is set, the step of then is saved, and the run can go on from it.

        Yields:
            What to show; the last has the run's folder.

        Raises:
            UserError: The clip, the model or the settings do not fit.
        """
        config = make_config(choices, self.runs)
        yield Progress("loading the model and compiling the training step")
        self._kept = None  # two models may not fit
        run = Run.create(config)
        with lock_run(run.folder), on_mesh(run.mesh()):
            tuning = prepare(run, self._programs)
            with begun(run):
                yield from self._fit(tuning, prompt, cancelled)
            self._kept = run.folder, tuning.start, tuning.tuned_model()

    def _fit(self, tuning: Tuning, prompt: str, cancelled: threading.Event) -> Iterator[Progress]:
        run, end = tuning.run, tuning.end
        videos: tuple[Path, ...] = ()
        step = tuning.start

        def progress(text: str) -> Progress:
            return Progress(text, losses(run), videos, run.folder if run.latest_step() else None)

        def preview() -> tuple[Path, ...]:
            sample = replace(default_sample(run.config, step), prompt=prompt)
            return (self._write(run, tuning.tuned_model(), sample),)

        due = [math.ceil(end * part / PREVIEWS) for part in range(1, PREVIEWS)]
        due = [one for one in due if one > step] if prompt else []
        if step < end:
            last = time.monotonic()
            with closing(fit(tuning)) as steps:
                for step in steps:
                    yield progress(f"tuning: step {step} of {end}")
                    if cancelled.is_set():
                        break
                    if due and step >= due[0] and step < end:
                        due = [one for one in due if one > step]
                        if time.monotonic() - last < SECONDS_BETWEEN_PREVIEWS:
                            continue
                        yield progress(f"tuning: step {step} of {end}; sampling a preview")
                        videos = preview()
                        last = time.monotonic()
        if cancelled.is_set() and step < end:
            save(tuning)
            yield progress(
                f"cancelled: step {step} of {end} is saved; Tune goes on from there, and prompts "
                "are sampled from it"
            )
            return
        if prompt:
            yield progress(f"tuned: {step} steps; sampling the preview")
            videos = preview()
        yield progress(f"tuned: {step} steps")

    def sample(
        self,
        folder: Path,
        prompts: Sequence[str],
        settings: Mapping[str, Any],
        cancelled: threading.Event,
    ) -> Iterator[Progress]:
        """Sample prompts from a run's newest checkpoint.

        Args:
            folder: The run's folder.
            prompts: What the videos are to show.
            settings: Those of `SamplingSettings` that are other than the run's.
            cancelled: When it is set, no further prompt is begun.

        Yields:
            What to show. Of each prompt there are two videos: the edit, and the clip beside it.

        Raises:
            UserError: The run, its clip or its model is not there, or settings are wrong.
        """
        prompts = list(dict.fromkeys(one.strip() for one in prompts if one.strip()))
        if not prompts:
            raise UserError("write a prompt: what the video is to show")
        if len(prompts) > MOST_PROMPTS:
            raise UserError(f"{len(prompts)} prompts; at most {MOST_PROMPTS} at a time")
        run = Run.open(folder)
        step = run.find_step()
        usual = default_sample(run.config, step)
        changed = usual.settings.with_changes(
            {name: _whole(value) for name, value in settings.items()}, "settings"
        )
        videos: list[Path] = []
        yield Progress("loading the tuned model")
        with on_mesh(run.mesh()):
            model = self._model(run, step)
            for number, prompt in enumerate(prompts, 1):
                if cancelled.is_set():
                    text = f"cancelled: {number - 1} of {len(prompts)} prompts are sampled"
                    yield Progress(text, videos=tuple(videos), result=folder)
                    return
                text = f"sampling prompt {number} of {len(prompts)}"
                yield Progress(text, videos=tuple(videos), result=folder)
                sample = replace(usual, prompt=prompt, settings=changed)
                video = self._write(run, model, sample)
                beside = folder / "beside" / video.parent.name / f"beside the clip {video.name}"
                write_video(
                    beside, side_by_side(shown(run.clip()), read_all_frames(video)), fps=run.fps
                )
                videos += [video, beside]
        yield Progress(
            f"sampled {len(prompts)} of {len(prompts)}: the clip is on the left, the edit on the "
            "right",
            videos=tuple(videos),
            result=folder,
        )

    def adapter(self, folder: Path, cancelled: threading.Event) -> Iterator[Progress]:
        """Write the adapter of a run's newest checkpoint; the last progress has its path."""
        yield Progress("writing the adapter")
        run = Run.open(folder)
        step = run.find_step()
        path = folder / f"{folder.name}-{step}.safetensors"
        if not cancelled.is_set():
            with on_mesh(run.mesh()):
                count = write_adapter(run, path, step=step)
            yield Progress(f"an adapter of {count:,} parameters", result=path)

    def _model(self, run: Run, step: int) -> Model:
        if self._kept is None or self._kept[:2] != (run.folder, step):
            self._kept = None
            run.check_clip()
            self._kept = run.folder, step, run.load_model(step)
        return self._kept[2]

    def _write(self, run: Run, model: Model, sample: Sample) -> Path:
        """Return the video of a sample, which is made unless it is there."""
        folder = run.samples(sample.step)
        video_format = run.config.validation_data.video_format
        # The names of videos have no settings, and the run's may have been others before.
        is_usual = sample.settings == default_sample(run.config, sample.step).settings
        try:
            done = is_usual and is_done(sample, folder, video_format)
        except ExistingFileError:
            is_usual = False
        if not is_usual:
            folder = run.folder / "edits" / f"{folder.name}-{_digest(asdict(sample.settings))}"
            done = is_done(sample, folder, video_format)
        if done:
            return sample.video_in(folder, video_format)
        [(path, _)] = write_samples(run, model, [sample], folder, Stages())
        return path


def save(tuning: Tuning) -> None:
    """Save the step that a run has come to.

    Raises:
        Stopped: A signal came meanwhile.
    """
    run = tuning.run
    with when_stopped(None):
        if run.latest_step() != tuning.start:
            save_checkpoint(run.checkpoints, tuning.state, tuning.trained_names)
        if signal := received():
            raise Stopped(signal, f"saved {run.checkpoint(tuning.start)}")


def losses(run: Run) -> tuple[tuple[int, float], ...]:
    """Return the steps that a run has logged, each with its loss."""
    lines = read_metrics(run.metrics)
    return tuple((line["step"], line["loss"]) for line in lines if line.get("loss") is not None)
