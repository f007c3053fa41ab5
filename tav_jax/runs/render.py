"""Sample videos from a run and write each with the settings that made it."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from tav_jax.console import say
from tav_jax.files import atomic_write
from tav_jax.parallel.processes import broadcast_from_main, is_main_process
from tav_jax.parallel.sharding import gather_to_host, on_mesh
from tav_jax.pipeline import decode_latents, random_latents, sample_latents
from tav_jax.pretrained.model import Model
from tav_jax.pretrained.prompts import count_chunks
from tav_jax.runs.metrics_log import Stages
from tav_jax.runs.overview import ROWS_OF_SHEET, renew_overview, shown
from tav_jax.runs.run import Run
from tav_jax.runs.samples import Frames, Job, Sample, group_by_batch_key, sample_size
from tav_jax.video.write import to_frames, write_video


def render(
    run: Run,
    folder: Path,
    samples: Sequence[Sample],
    is_wanted: Sequence[bool],
    load_model: Callable[[], Model],
    stages: Stages,
    *,
    batch_size: int = 1,
    on_written: Callable[[Path], object] | None = None,
) -> list[Path]:
    """Write the wanted samples and then the folder's overview; return the videos' paths.

    The model is loaded only if something is wanted.

    Args:
        run: The run to sample from.
        folder: Takes the videos.
        samples: All that are asked for.
        is_wanted: For each sample whether it is to be made; the same in all processes.
        load_model: Gives the run's model at the samples' checkpoint.
        stages: Is told the time of inversion, sampling, decoding and writing.
        batch_size: Prompts and seeds sampled at once.
        on_written: Is told each video's path when it is there.
    """
    wanted = [sample for sample, flag in zip(samples, is_wanted, strict=True) if flag]
    fresh: dict[Path, Frames] = {}
    written = []
    if wanted:
        for path, video in write_samples(
            run, load_model(), wanted, folder, stages, batch_size=batch_size
        ):
            say(f"wrote {path}")
            written.append(path)
            if on_written is not None:
                on_written(path)
            fresh[path] = video
            if len(fresh) > ROWS_OF_SHEET:  # the sheet shows no more of them
                del fresh[next(iter(fresh))]
    if samples and is_main_process():
        with stages("write"):
            renew_overview(folder, run, fresh)
    return written


def write_samples(
    run: Run,
    model: Model,
    samples: Sequence[Sample],
    folder: Path,
    stages: Stages,
    *,
    batch_size: int = 1,
) -> Iterator[tuple[Path, Frames]]:
    """Write each sample's video with its settings beside it; yield its path and frames.

    Samples may differ in anything. Those that differ in prompt and seed only share batches.
    Arguments are those of `render`.
    """
    for group in group_by_batch_key(samples):
        size = min(batch_size, len(group))
        for start in range(0, len(group), size):
            batch = group[start : start + size]
            yield from write_batch(run, model, batch, folder, stages, size=size)


def write_batch(
    run: Run,
    model: Model,
    batch: list[Sample],
    folder: Path,
    stages: Stages,
    *,
    size: int,
    alone: Callable[[Path], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[Path, Frames]]:
    """Write the videos of one batch, as `write_samples` does.

    Args:
        run: The run to sample from.
        model: The run's model at the samples' checkpoint.
        batch: Samples with the same batch key, at most `size`. They are filled up to that number
            with repetitions, because another size would be compiled anew.
        folder: Takes the videos.
        stages: Is told where the time goes.
        size: Items that are sampled at once.
        alone: See `Run.inverted_latents`.
    """
    for together in split_by_chunks(model, batch):
        yield from _write_together(run, model, together, folder, stages, size=size, alone=alone)


def split_by_chunks(model: Model, batch: Sequence[Sample]) -> list[list[Sample]]:
    """Return the samples in lists whose prompts have equally many chunks.

    Shorter prompts would be filled up with empty chunks, which change their videos.
    """
    by_chunks: dict[int, list[Sample]] = {}
    for sample in batch:
        settings = sample.settings
        prompts = [sample.prompt, settings.negative_prompt]
        chunks = count_chunks(model, prompts, settings.prompt_syntax or "plain")
        by_chunks.setdefault(chunks, []).append(sample)
    return list(by_chunks.values())


def _write_together(
    run: Run,
    model: Model,
    batch: list[Sample],
    folder: Path,
    stages: Stages,
    *,
    size: int,
    alone: Callable[[Path], AbstractContextManager[Any]],
) -> Iterator[tuple[Path, Frames]]:
    """Write the videos of samples whose prompts have equally many chunks."""
    frames, height, width = sample_size(run.config)
    step, settings = batch[0].batch_key
    filled = batch + batch[-1:] * (size - len(batch))
    if settings.num_inv_steps is None:
        noise = random_latents(model, [sample.seed for sample in filled], frames, height, width)
    else:
        with stages("invert"):
            inverted = run.inverted_latents(model, step, settings.num_inv_steps, alone=alone)
            noise = jnp.repeat(inverted, size, axis=0)
    with stages("sample"):
        clean = sample_latents(
            model,
            noise,
            [sample.prompt for sample in filled],
            negative_prompt=settings.negative_prompt,
            guidance_scale=settings.guidance_scale,
            num_inference_steps=settings.num_inference_steps,
            sampler=settings.sampler,
            eta=settings.eta,
            seeds=[sample.seed for sample in filled],
            prompt_syntax=settings.prompt_syntax or "plain",
            progress=True,
        )
    for index, sample in enumerate(batch):
        with stages("decode"):
            pixel_values = gather_to_host(decode_latents(model, clean[index : index + 1]))
        with stages("write"):
            video = to_frames(pixel_values)[0]
            path = _write_sample(sample, video, folder, run)
        yield path, video


def _write_sample(sample: Sample, video: Frames, folder: Path, run: Run) -> Path:
    video_path = sample.video_in(folder, run.config.validation_data.video_format)
    if not is_main_process():
        return video_path
    # A video that is to be overwritten is removed first, and the settings are written before the
    # new video, so that no video ever stands beside the settings of another.
    video_path.unlink(missing_ok=True)
    with atomic_write(sample.record_in(folder)) as path:
        record = json.dumps(sample.to_record(), indent=2, ensure_ascii=False)
        path.write_text(f"{record}\n", encoding="utf-8")
    write_video(video_path, shown(video), fps=run.fps)
    return video_path


def sample_run(job: Job, *, batch_size: int = 1) -> list[Path]:
    """Write the videos of a job that are missing; return their paths."""
    run = job.run
    run.remove_partials(job.folder)
    is_wanted = broadcast_from_main([sample in job.wanted for sample in job.samples])
    if skipped := is_wanted.count(False):
        say(f"{skipped} of {len(job.samples)} videos are there already: skipped")
    warn_unused_seeds(job.wanted)
    if any(is_wanted):
        run.check_clip()
        run.check_additions()
    # Without a video to make no devices are needed, which a run of many may lack here.
    with on_mesh(run.mesh()) if any(is_wanted) else nullcontext():
        return render(
            run,
            job.folder,
            job.samples,
            is_wanted,
            lambda: run.load_model(job.step),
            Stages(),
            batch_size=batch_size,
        )


def warn_unused_seeds(samples: Sequence[Sample]) -> None:
    """Print a note if the samples have several seeds and nothing is drawn from them."""
    seeds = {sample.seed for sample in samples}
    all_settings = {sample.settings for sample in samples}
    if len(seeds) > 1 and any(one.eta == 0 and one.num_inv_steps for one in all_settings):
        say(
            "note: from the inverted clip and with eta 0 nothing is drawn at random, so every "
            "seed gives the same video; use --eta 1 or --random-noise"
        )
