"""Sample videos from a run and write each with the settings that made it."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import jax.numpy as jnp

from tav_jax.console import raise_if_interrupted, say
from tav_jax.files import atomic_write
from tav_jax.parallel.processes import broadcast_from_main, is_main_process
from tav_jax.parallel.sharding import gather_to_host, on_mesh
from tav_jax.pipeline import decode_latents, random_latents, sample_latents
from tav_jax.pretrained.model import Model
from tav_jax.runs.config import TuneConfig
from tav_jax.runs.metrics_log import Stages
from tav_jax.runs.overview import renew_overview, shown
from tav_jax.runs.run import inverted_clip, load_tuned, mesh_of
from tav_jax.runs.samples import Frames, Job, Sample, group_by_batch_key, sample_size
from tav_jax.types import Latents
from tav_jax.video.write import to_frames, write_video


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
            raise_if_interrupted()
            batch = group[start : start + size]
            yield from write_batch(model, config, batch, inverted, folder, stages, size=size)


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


def sample_run(job: Job, *, batch_size: int = 1) -> list[Path]:
    """Returns the paths of the videos that a run did not have yet and has now.

    The model is loaded only if something is missing.
    """
    run, config, step, folder = job.run, job.config, job.step, job.folder
    is_wanted = broadcast_from_main([sample in job.wanted for sample in job.samples])
    wanted = [sample for sample, flag in zip(job.samples, is_wanted, strict=True) if flag]
    if len(wanted) < len(job.samples):
        skipped = len(job.samples) - len(wanted)
        say(f"{skipped} of {len(job.samples)} videos are there already: skipped")
    written = []
    if wanted:
        warn_unused_seeds(wanted)
        with on_mesh(mesh_of(config)):
            model = load_tuned(run, config, step)
            for path in write_samples(
                model,
                config,
                wanted,
                lambda num_inv_steps: inverted_clip(run, config, model, step, num_inv_steps),
                folder,
                Stages(),
                batch_size=batch_size,
            ):
                say(f"wrote {path}")
                written.append(path)
    if is_main_process():
        renew_overview(job)
    return written


def warn_unused_seeds(samples: Sequence[Sample]) -> None:
    seeds = {sample.seed for sample in samples}
    if len(seeds) > 1 and any(one.eta == 0 and one.num_inv_steps is not None for one in samples):
        say(
            "note: from the inverted clip and with eta 0 nothing is drawn at random, so every "
            "seed gives the same video; use --eta 1 or --random-noise"
        )
