"""python -m tav_jax.sample: new prompts from a tuned run, as videos and a contact sheet."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from tav_jax.cli import command, say
from tav_jax.config import TuneConfig
from tav_jax.pipeline import decode_latents, random_latents, sample_latents
from tav_jax.runs import (
    RunFolder,
    inverted_clip,
    load_tuned,
    open_run,
    read_clip,
    written_whole,
)
from tav_jax.sampling import Sampler, check_eta
from tav_jax.stable_diffusion import Model
from tav_jax.timing import Stages
from tav_jax.types import Latents
from tav_jax.video import (
    contact_sheet,
    enlarged,
    file_stem,
    read_frames,
    side_by_side,
    to_frames,
    write_image,
    write_video,
)

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
    sampler: Sampler = "ddim"

    def __post_init__(self) -> None:
        check_eta(self.sampler, self.eta)

    @property
    def stem(self) -> str:
        stem = file_stem(self.prompt) + (f"-seed{self.seed}" if self.name_seed else "")
        return f"{stem}-prompt" if stem in (SHEET, BESIDE) else stem

    @property
    def alike(self) -> "Sample":
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
    differing = [
        f"{name} {made.get(name)!r} there, {value!r} here"
        for name, value in asdict(sample).items()
        if made.get(name) != value
    ]
    if differing:
        raise FileExistsError(
            f"{video} was made with other settings ({'; '.join(differing)}); "
            "give another --output-dir, or --overwrite"
        )
    return True


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
        batch_size: How many are sampled at once. A last batch is filled up with repetitions,
            since another size would be compiled anew.
    """
    frames, height, width = sample_size(config)
    groups: dict[Sample, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.alike, []).append(sample)
    for alike, group in groups.items():
        size = min(batch_size, len(group))
        for start in range(0, len(group), size):
            batch = group[start : start + size]
            filled = batch + batch[-1:] * (size - len(batch))
            if alike.num_inv_steps is None:
                seeds = [sample.seed for sample in filled]
                noise = random_latents(model, seeds, frames, height, width)
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
                    pixel_values = np.asarray(decode_latents(model, clean[index : index + 1]))
                with stages("write"):
                    path = _write_sample(sample, to_frames(pixel_values)[0], folder, config)
                yield path


def _write_sample(sample: Sample, video: Frames, folder: Path, config: TuneConfig) -> Path:
    validation = config.validation_data
    video_path = folder / f"{sample.stem}.{validation.video_format}"
    # A video that is to be overwritten goes first and the settings come before the new one, so
    # that no video ever stands beside the settings of another.
    video_path.unlink(missing_ok=True)
    with written_whole(folder / f"{sample.stem}.json") as path:
        path.write_text(json.dumps(asdict(sample), indent=2, ensure_ascii=False) + "\n")
    write_video(video_path, shown(video), fps=validation.fps)
    return video_path


def shown(video: Frames) -> UInt8[np.ndarray, "f H2 W2 3"]:
    """Returns a video as it is written: tiny ones enlarged.

    Players show 32 pixels as a speck, and an mp4 has colours for every second pixel only.
    """
    return enlarged(video, LEAST_SIDE) if min(video.shape[1:3]) < TINY else video


def has_overview(folder: Path) -> bool:
    return (folder / f"{SHEET}.png").is_file()


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
    sheet = folder / f"{SHEET}.png"
    write_image(sheet, contact_sheet(rows))
    joined = side_by_side(*(shown(video) for video in list(rows.values())[: 1 + VIDEOS_BESIDE]))
    # Where it stays small, a GIF as well: web pages and slides play those by themselves.
    suffixes = dict.fromkeys([suffix, "gif"] if joined.shape[2] <= GIF_WIDTH else [suffix])
    videos = [folder / f"{BESIDE}.{suffix}" for suffix in suffixes]
    for path in videos:
        write_video(path, joined, fps=config.validation_data.fps)
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
        FileExistsError: videos of those names are there which other settings made; lists all.
    """
    run, config, step = open_run(run_folder, step)
    samples = make_samples(default_sample(config, step))
    folder = Path(output_dir) if output_dir else run.samples(step)
    wanted, problems = [], []
    for sample in samples:
        try:
            if overwrite or not is_done(sample, folder, config.validation_data.video_format):
                wanted.append(sample)
        except FileExistsError as error:
            problems.append(str(error))
    if problems:
        raise FileExistsError("\n".join(problems))
    return Job(run, config, step, folder, samples, wanted)


def sample_run(job: Job, *, batch_size: int = 1) -> list[Path]:
    """Returns the paths of the videos that a run did not have yet and has now.

    The model is loaded only if something is missing.
    """
    run, config, step, folder = job.run, job.config, job.step, job.folder
    if len(job.wanted) < len(job.samples):
        skipped = len(job.samples) - len(job.wanted)
        say(f"{skipped} of {len(job.samples)} videos are there already: skipped")
    written = []
    if job.wanted:
        _say_if_seeds_do_nothing(job.wanted)
        model = load_tuned(run, config, step)
        for path in write_samples(
            model,
            config,
            job.wanted,
            lambda num_inv_steps: inverted_clip(run, config, model, step, num_inv_steps),
            folder,
            Stages(),
            batch_size=batch_size,
        ):
            say(f"wrote {path}")
            written.append(path)
    if written or not has_overview(folder):
        try:
            source = read_clip(config)
        except (OSError, ValueError) as error:
            say(f"the contact sheet goes without the clip: {error}")
            source = None
        for path in write_overview(folder, config, source):
            say(f"wrote {path}")
    return written


def _say_if_seeds_do_nothing(samples: Sequence[Sample]) -> None:
    seeds = {sample.seed for sample in samples}
    if len(seeds) > 1 and any(one.eta == 0 and one.num_inv_steps is not None for one in samples):
        say(
            "note: from the inverted clip and with eta 0 nothing is drawn at random, so every "
            "seed gives the same video; use --eta 1 or --random-noise"
        )


def read_prompts(path: str | Path) -> list[str]:
    """Returns the prompts of a text file, one a line.

    Raises:
        ValueError: the file is missing, no text, or empty.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts: {path}: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts: {path} has no prompts; write one a line")
    return prompts


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected numbers, as in 0,1,2") from None
    if not all(0 <= seed < 2**63 for seed in seeds):
        raise argparse.ArgumentTypeError(f"'{text}': expected numbers from 0 to 2^63 - 1")
    return seeds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tav_jax.sample",
        description="Sample new prompts from a tuned run. What is not given is as the run's "
        "config.yaml has it; videos that are there already are skipped.",
        epilog='example: python -m tav_jax.sample --run outputs/man-skiing --prompt "spider man '
        'is skiing on the beach, cartoon style" --prompt "wonder woman is skiing"',
    )
    parser.add_argument(
        "--run", required=True, metavar="RUN_DIR", help="output_dir of tav_jax.tune"
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    parser.add_argument("--prompts", metavar="FILE", help="a text file, one prompt a line")
    parser.add_argument("--seeds", type=_seeds, metavar="0,1,2", help="a video per prompt and seed")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--negative-prompt", metavar="TEXT")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--num-inference-steps", type=int, metavar="N")
    parser.add_argument("--num-inv-steps", type=int, metavar="N")
    parser.add_argument("--sampler", choices=get_args(Sampler), help="dpm_solver: 20 steps do")
    parser.add_argument("--eta", type=float, help="noise of each DDIM step, 0 to 1")
    parser.add_argument("--random-noise", action="store_true", help="do not start from the clip")
    parser.add_argument("--output-dir", metavar="DIR", help="default: RUN_DIR/samples/sample-STEP")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="prompts at a time")
    parser.add_argument("--overwrite", action="store_true", help="make existing videos again")
    return parser


def _check(args: argparse.Namespace) -> None:
    bounds = {
        "num_inference_steps": (1, 999),
        "num_inv_steps": (1, 999),
        "batch_size": (1, float("inf")),
        "guidance_scale": (0, float("inf")),
        "eta": (0, 1),
    }
    problems = [
        f"--{name.replace('_', '-')} {value}: expected {low} to {high}"
        for name, (low, high) in bounds.items()
        if (value := getattr(args, name)) is not None and not low <= value <= high
    ]
    if problems:
        raise ValueError("\n".join(problems))


def _is_text(prompt: str) -> bool:
    """Tells whether a prompt is Unicode; a terminal of another encoding may give what is not."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    _check(args)
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if not prompts:
        raise ValueError("no prompts: give --prompt TEXT or --prompts FILE")
    if garbled := [prompt for prompt in prompts if not _is_text(prompt)]:
        raise ValueError("\n".join(f"--prompt: not text: {one!r}" for one in garbled))

    def make_samples(default: Sample) -> list[Sample]:
        names = (
            *("negative_prompt", "guidance_scale", "num_inference_steps", "num_inv_steps"),
            *("sampler", "eta"),
        )
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        default = replace(default, **given, name_seed=args.seeds is not None)
        if args.random_noise:
            default = replace(default, num_inv_steps=None)
        seeds = args.seeds or [default.seed]
        return [
            replace(default, prompt=prompt, seed=seed)
            for prompt in dict.fromkeys(prompts)
            for seed in dict.fromkeys(seeds)
        ]

    job = plan_samples(
        args.run,
        make_samples,
        step=args.step,
        output_dir=args.output_dir,
        overwrite=args.overwrite,
    )
    sample_run(job, batch_size=args.batch_size)


if __name__ == "__main__":
    sys.exit(main())
