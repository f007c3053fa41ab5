"""Samples: what decides each video of a run, what is there already, and how they are written."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from tav_jax.diffusion.samplers import SamplerName, check_eta
from tav_jax.errors import ExistingFileError
from tav_jax.files import atomic_write
from tav_jax.parallel.processes import is_main_process
from tav_jax.parallel.sharding import gather_to_host
from tav_jax.pipeline import decode_latents, random_latents, sample_latents
from tav_jax.pretrained.model import Model
from tav_jax.runs.config import TuneConfig
from tav_jax.runs.metrics_log import Stages
from tav_jax.runs.run import RunFolder, open_run
from tav_jax.types import Latents
from tav_jax.video.read import read_frames
from tav_jax.video.sheets import contact_sheet, enlarge, side_by_side
from tav_jax.video.write import to_frames, write_image, write_video

Frames = UInt8[np.ndarray, "f H W 3"]
SHEET, BESIDE = "contact-sheet", "side-by-side"
ROWS_OF_SHEET = 24
VIDEOS_BESIDE = 4
GIF_WIDTH = 1600  # beyond it a GIF has tens of megabytes
TINY, LEAST_SIDE = 64, 256  # pixels


@dataclass(frozen=True)
class Sample:
    """Everything that decides one video's pixels, given a run; written beside it as JSON.

    Args:
        step: Checkpoint of the run.
        seed: Of the noise that is drawn, if any is.
        num_inv_steps: Of the inversion that gives the starting noise; None for random noise.
        name_seed: Whether the file is named after the seed as well as the prompt.
    """

    prompt: str
    step: int
    seed: int
    negative_prompt: str
    guidance_scale: float
    num_inference_steps: int
    eta: float
    num_inv_steps: int | None
    name_seed: bool = False
    sampler: SamplerName = "ddim"

    def __post_init__(self) -> None:
        check_eta(self.sampler, self.eta)

    @property
    def stem(self) -> str:
        stem = file_stem(self.prompt) + (f"-seed{self.seed}" if self.name_seed else "")
        return f"{stem}-prompt" if stem in (SHEET, BESIDE) else stem

    @property
    def batch_key(self) -> "Sample":
        """What samples of one batch must have in common: everything but prompt and seed."""
        return replace(self, prompt="", seed=0)


def default_sample(config: TuneConfig, step: int) -> Sample:
    """Returns what a run's own settings say about sampling, for a prompt yet to be named."""
    validation = config.validation_data
    return Sample(
        prompt="",
        step=step,
        seed=config.seed,
        negative_prompt=validation.negative_prompt,
        guidance_scale=validation.guidance_scale,
        num_inference_steps=validation.num_inference_steps,
        eta=validation.eta,
        sampler=validation.sampler,
        num_inv_steps=validation.num_inv_steps if validation.use_inv_latent else None,
    )


def sample_size(config: TuneConfig) -> tuple[int, int, int]:
    """Returns frames, height and width of what a run samples."""
    train, validation = config.train_data, config.validation_data
    return (
        validation.video_length or train.n_sample_frames,
        validation.height or train.height,
        validation.width or train.width,
    )


def is_done(sample: Sample, folder: Path, video_format: str) -> bool:
    """Tells whether a sample's video is there already.

    Raises:
        FileExistsError: a video of that name is there which other settings made.
    """
    video, record = (folder / f"{sample.stem}.{suffix}" for suffix in (video_format, "json"))
    if not video.exists():
        return False
    made = json.loads(record.read_text()) if record.is_file() else {}
    made = {"sampler": "ddim"} | made  # records of before there was a choice do not say
    if differing := _differing(made, sample):
        values = "; ".join(f"{name} {a!r} there, {b!r} here" for name, a, b in differing)
        raise ExistingFileError(
            f"{video} was made with other settings ({values}); "
            "give another --output-dir, or --overwrite"
        )
    return True


def _differing(made: Mapping[str, object], sample: Sample) -> list[tuple[str, object, object]]:
    return [
        (name, made.get(name), value)
        for name, value in asdict(sample).items()
        if made.get(name) != value
    ]


def write_samples(
    model: Model,
    config: TuneConfig,
    samples: Sequence[Sample],
    inverted: Callable[[int], Latents],
    folder: Path,
    stages: Stages,
    *,
    batch_size: int = 1,
) -> Iterator[Path]:
    """Yields the path of each sample's video as soon as it is written, its settings beside it.

    Args:
        samples: May differ in anything; those alike but for prompt and seed share batches.
        inverted: Gives the clip's noise by its number of inversion steps.
        stages: Is told the time of inversion, sampling, decoding and writing.
        batch_size: How many are sampled at once.
    """
    for group in group_by_batch_key(samples):
        size = min(batch_size, len(group))
        for start in range(0, len(group), size):
            batch = group[start : start + size]
            yield from write_batch(model, config, batch, inverted, folder, stages, size=size)


def group_by_batch_key(samples: Sequence[Sample]) -> list[list[Sample]]:
    groups: dict[Sample, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.batch_key, []).append(sample)
    return list(groups.values())


def write_batch(
    model: Model,
    config: TuneConfig,
    batch: list[Sample],
    inverted: Callable[[int], Latents],
    folder: Path,
    stages: Stages,
    *,
    size: int,
) -> Iterator[Path]:
    """Yields the paths of the videos of one batch, as `write_samples` does.

    Args:
        batch: Samples that are alike, at most `size`. They are filled up to that number with
            repetitions, since another size would be compiled anew.
    """
    frames, height, width = sample_size(config)
    alike = batch[0].batch_key
    filled = batch + batch[-1:] * (size - len(batch))
    if alike.num_inv_steps is None:
        noise = random_latents(model, [sample.seed for sample in filled], frames, height, width)
    else:
        with stages("invert"):
            noise = jnp.repeat(inverted(alike.num_inv_steps), size, axis=0)
    with stages("sample"):
        clean = sample_latents(
            model,
            noise,
            [sample.prompt for sample in filled],
            negative_prompt=alike.negative_prompt,
            guidance_scale=alike.guidance_scale,
            num_inference_steps=alike.num_inference_steps,
            sampler=alike.sampler,
            eta=alike.eta,
            seeds=[sample.seed for sample in filled],
            progress=True,
        )
    for index, sample in enumerate(batch):
        with stages("decode"):
            pixel_values = gather_to_host(decode_latents(model, clean[index : index + 1]))
        with stages("write"):
            path = _write_sample(sample, to_frames(pixel_values)[0], folder, config)
        yield path


def _write_sample(sample: Sample, video: Frames, folder: Path, config: TuneConfig) -> Path:
    validation = config.validation_data
    video_path = folder / f"{sample.stem}.{validation.video_format}"
    if not is_main_process():
        return video_path
    # A video that is to be overwritten goes first and the settings come before the new one, so
    # that no video ever stands beside the settings of another.
    video_path.unlink(missing_ok=True)
    with atomic_write(folder / f"{sample.stem}.json") as path:
        path.write_text(json.dumps(asdict(sample), indent=2, ensure_ascii=False) + "\n")
    write_video(video_path, shown(video), fps=validation.fps)
    return video_path


def shown(video: Frames) -> UInt8[np.ndarray, "f H2 W2 3"]:
    """Returns a video as it is written: tiny ones enlarged.

    Players show 32 pixels as a speck, and an mp4 has colours for every second pixel only.
    """
    return enlarge(video, LEAST_SIDE) if min(video.shape[1:3]) < TINY else video


def sheet_of(folder: Path) -> Path:
    return folder / f"{SHEET}.png"


def has_overview(folder: Path) -> bool:
    """Tells whether a folder has a contact sheet that is newer than each of its samples."""
    sheet = sheet_of(folder)
    return sheet.is_file() and all(
        video.stat().st_mtime_ns < sheet.stat().st_mtime_ns
        for video in (*folder.glob("[!.]*.mp4"), *folder.glob("[!.]*.gif"))
        if video.stem != BESIDE
    )


def write_overview(folder: Path, config: TuneConfig, source: Frames | None) -> list[Path]:
    """Returns the paths of a contact sheet and of videos side by side, of a folder's samples.

    They show the clip first and then the newest samples of the folder, whoever wrote them.
    """
    frames, height, width = sample_size(config)
    suffix = config.validation_data.video_format
    rows: dict[str, Frames] = {}
    if source is not None and source.shape == (frames, height, width, 3):
        rows[f"source: {config.train_data.prompt}"] = source
    records = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    for record in records[-ROWS_OF_SHEET:]:
        if (video := record.with_suffix(f".{suffix}")).is_file():
            sample = Sample(**json.loads(record.read_text()))
            label = sample.prompt + (f" (seed {sample.seed})" if sample.name_seed else "")
            rows[label] = read_frames(video, n_sample_frames=frames, width=width, height=height)
    if not rows:
        return []
    joined = side_by_side(*(shown(video) for video in list(rows.values())[: 1 + VIDEOS_BESIDE]))
    # Where it stays small, a GIF as well: web pages and slides play those by themselves.
    suffixes = dict.fromkeys([suffix, "gif"] if joined.shape[2] <= GIF_WIDTH else [suffix])
    videos = [folder / f"{BESIDE}.{suffix}" for suffix in suffixes]
    for path in videos:
        write_video(path, joined, fps=config.validation_data.fps)
    # Last, since the folder has its overview once this is there.
    sheet = sheet_of(folder)
    write_image(sheet, contact_sheet(rows))
    return [sheet, *videos]


@dataclass(frozen=True)
class Job:
    """What a run is to sample, checked against what it has."""

    run: RunFolder
    config: TuneConfig
    step: int
    folder: Path
    samples: list[Sample]
    wanted: list[Sample]

    def video(self, sample: Sample) -> Path:
        return self.folder / f"{sample.stem}.{self.config.validation_data.video_format}"

    def record(self, sample: Sample) -> Path:
        return self.folder / f"{sample.stem}.json"

    def is_done(self, sample: Sample) -> bool:
        return is_done(sample, self.folder, self.config.validation_data.video_format)


def plan_samples(
    run_folder: str | Path,
    make_samples: Callable[[Sample], list[Sample]],
    *,
    step: int | None = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
) -> Job:
    """Returns what is to be sampled from a run, having changed nothing.

    Args:
        make_samples: Given what the run's settings say, returns what is asked for.
        output_dir: By default the run's `samples/sample-<step>`.

    Raises:
        FileNotFoundError: there is no such run or checkpoint.
        FileExistsError: videos of those names are there, or asked for as well, of other settings;
            lists all.
    """
    run, config, step = open_run(run_folder, step)
    samples = list(dict.fromkeys(make_samples(default_sample(config, step))))
    folder = Path(output_dir) if output_dir else run.samples(step)
    job = Job(run, config, step, folder, samples, wanted=[])
    problems: list[str] = []
    named: dict[str, Sample] = {}
    for sample in samples:
        first = named.setdefault(sample.stem, sample)
        if differing := _differing(asdict(first), sample):
            values = "; ".join(f"{name} {a!r} and {b!r}" for name, a, b in differing)
            problems.append(
                f"{job.video(sample)} is asked for with different settings ({values}); "
                "give each a seed of its own, which its name will have"
            )
        try:
            if overwrite or not job.is_done(sample):
                job.wanted.append(sample)
        except FileExistsError as error:
            problems.append(str(error))
    if problems:
        raise ExistingFileError("\n".join(problems))
    return job


def file_stem(prompt: str) -> str:
    """A file name, without suffix, that reads like the prompt on any system.

    A prompt that can be a name as it is stays as it is, like the original's `<prompt>.gif`. Any
    other gets a hash of the whole prompt at its end, so that `a/b` and `a:b` remain two files.
    """
    # What Windows refuses, which includes what macOS and Linux do; lone surrogates have no UTF-8.
    stem = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]', "_", prompt)
    stem = unicodedata.normalize("NFC", stem).strip(" .")  # macOS takes both forms of é for one.
    # Devices of Windows, whatever follows the dot.
    stem = re.sub(r"(?i)^(?=(con|prn|aux|nul|(com|lpt)[\d¹²³]) *(\.|$))", "_", stem)
    if stem == prompt and 0 < len(stem.encode()) <= 120:
        return stem
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    kept = stem.encode()[: 120 - len("-") - len(digest)].decode(errors="ignore").strip(" .")
    return f"{kept or 'prompt'}-{digest}"
