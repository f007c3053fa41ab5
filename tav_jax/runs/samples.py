"""Samples: the settings that determine a video, its file name, and whether it exists."""

import hashlib
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from pydantic.dataclasses import dataclass as dataclass_of_settings

from tav_jax.digests import sha256
from tav_jax.errors import ExistingFileError, MissingFileError, UserError
from tav_jax.files import first_unwritable_parent
from tav_jax.reading import read_json, why_not_a_file
from tav_jax.runs.config import LoraFile, TuneConfig
from tav_jax.runs.run import Run
from tav_jax.runs.sampling_settings import SETTING_NAMES, SamplingSettings
from tav_jax.settings import STRICT, LoraScale, Seed, StepsFromZero, parse, to_plain
from tav_jax.text import UNPRINTABLE, brief

Frames = UInt8[np.ndarray, "f H W 3"]


# What a record says that lacks a key.
UNSET = {"sampler": "ddim", "loras": [], "prompt_syntax": "plain"}

# File names, without suffix, that are not given to samples.
SHEET, BESIDE = "contact-sheet", "side-by-side"

MOST_PROBLEMS = 20  # that one message lists
MOST_VIDEOS = 100_000  # of one plan


@dataclass_of_settings(frozen=True, config=STRICT)
class LoraRecord:
    """A LoRA by its content.

    Args:
        name: Its file's name.
        sha256: Its file's digest.
        scale: The weight with which it is added.
    """

    name: str
    sha256: str
    scale: LoraScale


def record_loras(loras: Sequence[LoraFile]) -> tuple[LoraRecord, ...]:
    """Return the records of LoRAs.

    Raises:
        MissingFileError: Some are not there; all are listed.
    """
    paths = [Path(lora.path) for lora in loras]
    if missing := [f"{path}: {why}" for path in paths if (why := why_not_a_file(path))]:
        raise MissingFileError(f"--lora: {'; '.join(missing)}")
    return tuple(
        LoraRecord(path.name, sha256(path), lora.scale)
        for path, lora in zip(paths, loras, strict=True)
    )


@dataclass(frozen=True)
class Sample:
    """What determines a video of a run.

    Args:
        prompt: What the video is to show.
        step: The run's checkpoint.
        seed: Seed of the noise, if any is drawn.
        settings: How it is sampled.
        name_seed: Whether the file's name has the seed, too.
        loras: LoRAs that are added to the tuned model.
    """

    prompt: str
    step: int
    seed: int
    settings: SamplingSettings
    name_seed: bool = False
    loras: tuple[LoraRecord, ...] = ()

    @property
    def stem(self) -> str:
        """Return the name of the sample's files, without suffix."""
        stem = file_stem(self.prompt) + (f"-seed{self.seed}" if self.name_seed else "")
        return f"{stem}-prompt" if stem in (SHEET, BESIDE) else stem

    def video_in(self, folder: Path, video_format: str) -> Path:
        """Return the path of its video in a folder."""
        return folder / f"{self.stem}.{video_format}"

    def record_in(self, folder: Path) -> Path:
        """Return the path of the JSON file with its settings, beside the video."""
        return folder / f"{self.stem}.json"

    @property
    def batch_key(self) -> tuple[int, SamplingSettings]:
        """Return what samples of one batch have in common: checkpoint and settings."""
        return self.step, self.settings

    def to_record(self) -> dict[str, Any]:
        """Return a flat dictionary, which is written as JSON beside the video."""
        record = to_plain(asdict(self))
        record |= record.pop("settings")
        # As in the records of earlier versions.
        for name in ("loras", "prompt_syntax"):
            if record[name] == UNSET[name]:
                del record[name]
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str = "record") -> "Sample":
        """Return the sample of a record. Settings that an old record lacks have their defaults.

        Args:
            record: The dictionary.
            where: The record's file.

        Raises:
            UserError: The record lacks something else, has more, or a wrong value.
        """
        made = parse(Record, dict(record), where)
        settings = SamplingSettings(**{name: getattr(made, name) for name in SETTING_NAMES})
        return cls(made.prompt, made.step, made.seed, settings, made.name_seed, made.loras)


@dataclass_of_settings(frozen=True, kw_only=True, config=STRICT)
class Record(SamplingSettings):
    """What the JSON beside a video may say."""

    prompt: str
    step: StepsFromZero
    seed: Seed
    name_seed: bool = False
    loras: tuple[LoraRecord, ...] = ()


def default_sample(config: TuneConfig, step: int) -> Sample:
    """Return a sample with a run's own settings and an empty prompt."""
    settings = config.validation_data.sampling_settings(config.prompt_syntax)
    return Sample(prompt="", step=step, seed=config.seed, settings=settings)


def sample_size(config: TuneConfig) -> tuple[int, int, int]:
    """Return number of frames, height and width of a run's samples."""
    train, validation = config.train_data, config.validation_data
    return (
        validation.video_length or train.n_sample_frames,
        validation.height or train.height,
        validation.width or train.width,
    )


def is_done(sample: Sample, folder: Path, video_format: str) -> bool:
    """Tell whether a sample's video exists.

    Raises:
        ExistingFileError: A video of that name exists, but was made with other settings.
    """
    video, record = sample.video_in(folder, video_format), sample.record_in(folder)
    if not video.exists():
        return False
    made = read_record(record) if record.exists() else {}
    if differing := _differing(made, sample):
        values = "; ".join(f"{name} {brief(a)} there, {brief(b)} here" for name, a, b in differing)
        raise ExistingFileError(
            f"{video} was made with other settings ({values}); "
            "`python -m tav_jax.sample` makes one with these in another --output-dir, or in its "
            "place with --overwrite"
        )
    return True


def read_record(path: Path) -> dict[str, Any]:
    """Return the settings in the JSON beside a video.

    Raises:
        UserError: It is damaged.
    """
    try:
        return read_json(path)
    except UserError as error:
        raise UserError(
            f"{error}; it has the settings of the video beside it: rename both, or give another "
            "--output-dir, or --overwrite"
        ) from None


def _differing(made: Mapping[str, object], sample: Sample) -> list[tuple[str, object, object]]:
    made, wanted = UNSET | dict(made), UNSET | sample.to_record()
    return [
        (name, made.get(name), value) for name, value in wanted.items() if made.get(name) != value
    ]


def sampled_steps(run: Run) -> dict[int, Path]:
    """Return a run's folders that have samples, by the checkpoints that these are from."""
    return {
        int(number): folder
        for folder in run.samples(0).parent.glob("sample-*")
        if (number := folder.name.removeprefix("sample-")).isdecimal() and video_records(folder)
    }


def video_records(folder: Path) -> list[Path]:
    """Return the records of a folder's videos that are there."""
    return sorted(
        path
        for path in folder.glob("[!.]*.json")
        if any(path.with_suffix(f".{kind}").is_file() for kind in ("mp4", "gif"))
    )


def group_by_batch_key(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Return the samples in lists that can be sampled together."""
    groups: dict[tuple[int, SamplingSettings], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.batch_key, []).append(sample)
    return list(groups.values())


@dataclass(frozen=True)
class Job:
    """What is to be sampled from a run.

    Args:
        run: The run.
        step: Its checkpoint.
        folder: Takes the videos.
        samples: All samples that were asked for.
        wanted: Those whose videos do not exist, or are to be overwritten.
    """

    run: Run
    step: int
    folder: Path
    samples: list[Sample]
    wanted: list[Sample]

    def video(self, sample: Sample) -> Path:
        """Return the path of a sample's video."""
        return sample.video_in(self.folder, self.run.config.validation_data.video_format)

    def is_done(self, sample: Sample) -> bool:
        """Tell whether a sample's video is there."""
        return is_done(sample, self.folder, self.run.config.validation_data.video_format)


def check_number_of_videos(number: int, where: str) -> None:
    """Raise `UserError` if more videos are asked for than any folder should hold."""
    if number > MOST_VIDEOS:
        raise UserError(f"{where}: {number} videos are asked for; at most {MOST_VIDEOS} at a time")


def plan_samples(
    run_folder: str | Path,
    make_samples: Callable[[Sample], list[Sample]],
    *,
    step: int | None = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
) -> Job:
    """Return what is to be sampled from a run. Nothing is written.

    Args:
        run_folder: The run's folder.
        make_samples: Takes the run's own settings and returns the samples that are asked for.
        step: The checkpoint to sample from, by default the newest.
        output_dir: Takes the videos. By default the run's `samples/sample-<step>`.
        overwrite: Sample again what is there already.

    Raises:
        MissingFileError: there is no such run or checkpoint.
        ExistingFileError: videos of those names are there, or asked for as well, of other settings;
            lists all.
    """
    run = Run.open(run_folder)
    step = run.find_step(step)
    samples = list(dict.fromkeys(make_samples(default_sample(run.config, step))))
    folder = Path(output_dir) if output_dir else run.samples(step)
    if output_dir and (parent := first_unwritable_parent(folder)):
        raise UserError(f"--output-dir: {parent} is not a folder that can be written to")
    job = Job(run, step, folder, samples, wanted=[])
    problems: list[str] = []
    named: dict[str, Sample] = {}
    for sample in samples:
        first = named.setdefault(sample.stem, sample)
        if differing := _differing(first.to_record(), sample):
            values = "; ".join(f"{name} {brief(a)} and {brief(b)}" for name, a, b in differing)
            problems.append(
                f"{job.video(sample)} is asked for with different settings ({values}); "
                "give each a seed of its own, which its name will have"
            )
        try:
            if overwrite or not job.is_done(sample):
                job.wanted.append(sample)
        except UserError as error:
            problems.append(str(error))
    if problems:
        if len(problems) > MOST_PROBLEMS:
            problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more"]
        raise ExistingFileError("\n".join(problems))
    return job


def file_stem(prompt: str) -> str:
    """Return a file name, without suffix, that resembles the prompt and is valid on any system.

    A prompt that can be a name as it is stays as it is, like the original's `<prompt>.gif`. Any
    other gets a hash of the whole prompt at its end, so that `a/b` and `a:b` remain two files.
    """
    # What Windows refuses, which includes what macOS and Linux do; and what a terminal obeys.
    stem = UNPRINTABLE.sub("_", re.sub(r'[<>:"/\\|?*\t\n]', "_", prompt))
    encoding = sys.getfilesystemencoding()  # not UTF-8 if the locale is C and UTF-8 is off
    stem = stem.encode(encoding, "replace").decode(encoding).replace("?", "_")
    stem = unicodedata.normalize("NFC", stem).strip(" .")  # macOS takes both forms of é for one.
    # Devices of Windows, whatever follows the dot.
    stem = re.sub(r"(?i)^(?=(con|prn|aux|nul|(com|lpt)[\d¹²³]) *(\.|$))", "_", stem)
    if stem == prompt and 0 < len(stem.encode()) <= 120:
        return stem
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    kept = stem.encode()[: 120 - len("-") - len(digest)].decode(errors="ignore").strip(" .")
    return f"{kept or 'prompt'}-{digest}"
