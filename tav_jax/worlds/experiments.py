"""python -m tav_jax.worlds.experiments: the paper's comparisons, on a drawn world's base model.

For each variant of the method, each clip and each seed it tunes, inverts, samples the clip's
prompts, and measures each video. Results are written as they come, so the same command resumes an
interrupted experiment. At the end it writes tables and plots.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby, product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from pydantic import Field
from pydantic.dataclasses import dataclass

from tav_jax.console import Parser, command, say
from tav_jax.errors import UserError
from tav_jax.files import keep_json_lines
from tav_jax.models.attention.dispatch import AttentionScope
from tav_jax.pipeline import (
    compile_train_step,
    decode_latents,
    encode_frames,
    encode_prompts,
    invert_latents,
    posterior_mean_latents,
    random_latents,
    sample_latents,
)
from tav_jax.pretrained.model import Model, load_model
from tav_jax.progress import progress_bar
from tav_jax.runs.sampling_settings import SamplingSettings
from tav_jax.settings import (
    STRICT,
    Frames,
    GuidanceScale,
    NumSteps,
    PathText,
    Rate,
    Seed,
    StepsFromZero,
    parse,
    read_tree,
)
from tav_jax.training.optimizer import TRAINABLE_MODULES, label_params, make_optimizer
from tav_jax.training.train_step import init_state
from tav_jax.video.sheets import contact_sheet
from tav_jax.video.write import to_frames, write_image
from tav_jax.worlds.networks import without_temporal_attention
from tav_jax.worlds.recipe import WorldName
from tav_jax.worlds.recorded_settings import differ_from_recorded, record_settings
from tav_jax.worlds.report import Record, write_report
from tav_jax.worlds.world import Edit, World
from tav_jax.worlds.worlds import WORLDS


@dataclass(frozen=True, config=STRICT)
class Setting(SamplingSettings):
    """One way of running the method. The defaults suit `tiny-scenes`.

    The numbers of steps are 25, because 50 take twice the time and give the same metrics.

    Args:
        negative_prompt: See `SamplingSettings`.
        num_inference_steps: See `SamplingSettings`.
        sampler: See `SamplingSettings`.
        guidance_scale: See `SamplingSettings`.
        eta: See `SamplingSettings`.
        num_inv_steps: See `SamplingSettings`.
        prompt_syntax: See `SamplingSettings`.
        attention_scope: The frames that spatial attention looks at.
        temporal_attention: Whether the network has a temporal attention, and tunes it.
        max_train_steps: Number of updates.
        learning_rate: Learning rate of tuning.
        inversion: Start from the inverted clip. Otherwise start from random noise.
    """

    num_inference_steps: NumSteps = 25
    guidance_scale: GuidanceScale = 2.0
    num_inv_steps: NumSteps = 25
    attention_scope: AttentionScope = "sparse_causal"
    temporal_attention: bool = True
    max_train_steps: StepsFromZero = 150
    learning_rate: Rate = 2e-3
    inversion: bool = True


@dataclass(frozen=True, config=STRICT)
class Experiment:
    """Variants of the method to compare, over clips and seeds.

    Args:
        variants: What each variant changes in `setting`, by the variant's name. The others are
            compared with the first one.
        setting: What the variants have in common.
        sweep: The one setting in which the variants differ, if they are a scale of it.
        world: The drawn world.
        pretrained_model_path: The base model. The world's own if it is not given.
        clips: Names of the world's clips. All of them if none is given.
        seeds: Each variant runs on each clip with each seed.
        frames: Number of frames of each clip.
    """

    variants: dict[str, dict[str, Any]]
    setting: Setting = Field(default_factory=Setting)
    sweep: str | None = None
    world: WorldName = "tiny-scenes"
    pretrained_model_path: PathText = ""
    clips: tuple[str, ...] = ()
    seeds: tuple[Seed, ...] = (0, 1, 2)
    frames: Frames = 8

    def __post_init__(self) -> None:
        world = WORLDS[self.world]
        # Filled in here, so that a record says them and is compared by them.
        object.__setattr__(self, "clips", self.clips or tuple(world.clips))
        model = self.pretrained_model_path or world.model
        object.__setattr__(self, "pretrained_model_path", model)
        unknown = [clip for clip in self.clips if clip not in world.clips]
        if unknown or not self.seeds or not self.variants:
            raise UserError(
                f"seeds and variants must be given, and clips be among {', '.join(world.clips)}"
                + (f"; there is no {', '.join(unknown)}" if unknown else "")
            )

    def settings(self) -> dict[str, Setting]:
        """Return each variant's setting, by its name.

        Raises:
            UserError: A variant has an unknown setting, or a wrong value.
        """
        return {
            name: parse(Setting, asdict(self.setting) | changes, f"variants: {name}")
            for name, changes in self.variants.items()
        }


def experiment(config: Experiment, folder: Path) -> None:
    """Run what is not in `folder` yet, and then write the report."""
    settings, world = config.settings(), WORLDS[config.world]
    results = claim_results(folder, config)
    done = {(record["variant"], record["clip"], record["seed"]) for record in results}
    total = len(settings) * len(config.clips) * len(config.seeds)

    # Variants with equal settings of tuning share one tuned model.
    def tuning(name: str) -> tuple:
        setting = settings[name]
        return setting.attention_scope, setting.temporal_attention, setting.learning_rate

    with (
        (folder / "results.jsonl").open("a", buffering=1, encoding="utf-8") as file,
        progress_bar("experiments", total=total, initial=len(done)) as bar,
    ):
        for _, names in groupby(sorted(settings, key=tuning), key=tuning):
            group = list(names)
            tuned = Tuned(config, settings[group[0]])
            for clip, seed in product(config.clips, config.seeds):
                frames, edits = tuned.frames(clip), world.edits[clip]
                missing = [name for name in group if (name, clip, seed) not in done]
                missing.sort(key=lambda name: settings[name].max_train_steps)
                steps = [settings[name].max_train_steps for name in missing]
                for name, model in zip(missing, tuned.after(clip, seed, steps), strict=True):
                    videos = sample_edits(model, frames, edits, settings[name], seed)
                    record = measure_all(world, name, clip, seed, videos)
                    file.write(json.dumps(record) + "\n")
                    results.append(record)
                    if seed == config.seeds[0]:
                        keep_sheet(folder, name, clip, frames, edits, videos)
                    bar.update(1)
    write_report(folder, results, list(settings), config.sweep, world.attributes)


def claim_results(folder: Path, config: Experiment) -> list[Record]:
    """Write the experiment's settings to a folder, and return the results that are there.

    A line that a killed process left half-written is dropped, so that result is made again.

    Raises:
        UserError: The folder holds another experiment, or something else.
    """
    settings, results = folder / "experiment.json", folder / "results.jsonl"
    if differ_from_recorded(settings, config):
        raise UserError(f"--output-dir: {folder} holds another experiment; name another folder")
    if not settings.is_file() and folder.exists() and any(folder.iterdir()):
        raise UserError(f"--output-dir: {folder} exists and is not an experiment; name another")
    record_settings(settings, config)
    return keep_json_lines(results, _is_result)


def _is_result(line: dict[str, Any]) -> bool:
    """Return True; raises KeyError if the line is no result's."""
    return all(line[name] is not None for name in ("variant", "clip", "seed", "videos"))


class Tuned:
    """Models tuned on clips with one setting, whose train step is compiled once."""

    def __init__(self, config: Experiment, setting: Setting):
        self.config, self.setting = config, setting
        self.world = WORLDS[config.world]
        modules = list(TRAINABLE_MODULES)
        if not setting.temporal_attention:
            modules.remove("attn_temp")
        model = self.base(0)
        labels = label_params(model.unet.params, modules)
        self.optimizer = make_optimizer(labels, setting.learning_rate)
        self.step = compile_train_step(
            model.vae.config.scaling_factor, optimizer=self.optimizer, labels=labels
        )

    def base(self, seed: int) -> Model:
        """Return the untuned model, with a temporal attention initialised from the seed."""
        model = load_model(
            self.config.pretrained_model_path,
            attention_scope=self.setting.attention_scope,
            key=jax.random.key(seed),
        )
        if self.setting.temporal_attention:
            return model
        return without_temporal_attention(model)

    def frames(self, clip: str) -> UInt8[np.ndarray, "f H W 3"]:
        """Return the frames of a clip."""
        return self.world.render(self.world.clips[clip], self.config.frames)

    def after(self, clip: str, seed: int, steps: Sequence[int]) -> Iterator[Model]:
        """Yield the model after each of the given numbers of steps, in ascending order."""
        if not steps:
            return
        model = self.base(seed)
        moments = encode_frames(model, self.frames(clip))
        context = encode_prompts(model, [self.world.describe(self.world.clips[clip])])
        state, done = init_state(model.unet, self.optimizer, jax.random.key(seed)), 0
        for wanted in steps:
            for _ in range(wanted - done):
                state, _ = self.step(state, moments, context, model.schedule)
            done = wanted
            # Copied, because the next step donates the state's buffers.
            yield model.with_unet(jax.tree.map(jnp.copy, state.unet))


def sample_edits(
    model: Model,
    frames: UInt8[np.ndarray, "f H W 3"],
    edits: Sequence[Edit],
    setting: Setting,
    seed: int,
) -> UInt8[np.ndarray, "p f H W 3"]:
    """Return a video for each edit, all sampled from the same noise."""
    if setting.inversion:
        latents = posterior_mean_latents(model, encode_frames(model, frames))
        noise = invert_latents(model, latents, num_inv_steps=setting.num_inv_steps)
    else:
        noise = random_latents(model, [seed], *frames.shape[:3])
    videos = []
    for edit in edits:  # one by one, which takes four fifths of a batch's time on a CPU
        latents = sample_latents(
            model,
            noise,
            [edit.prompt],
            negative_prompt=setting.negative_prompt,
            guidance_scale=setting.guidance_scale,
            num_inference_steps=setting.num_inference_steps,
            sampler=setting.sampler,
            eta=setting.eta,
            seeds=[seed],
            prompt_syntax=setting.prompt_syntax or "plain",
        )
        videos.append(to_frames(np.asarray(decode_latents(model, latents))))
    return np.concatenate(videos)


def measure_all(
    world: World, variant: str, clip: str, seed: int, videos: UInt8[np.ndarray, "p f H W 3"]
) -> Record:
    """Return the record of a variant, a clip and a seed, with the metrics of each video."""
    scene = world.clips[clip]
    return {
        "variant": variant,
        "clip": clip,
        "motion": world.motion(scene),
        "seed": seed,
        "videos": [
            {"kind": edit.kind, "prompt": edit.prompt, **world.measure(video, scene, edit.asks)}
            for edit, video in zip(world.edits[clip], videos, strict=True)
        ],
    }


def keep_sheet(
    folder: Path,
    variant: str,
    clip: str,
    frames: np.ndarray,
    edits: Sequence[Edit],
    videos: np.ndarray,
) -> None:
    """Write one image with all videos of a variant and a clip, since metrics may mislead."""
    rows = {"clip": frames} | {
        f"{edit.kind}: {edit.prompt}": video for edit, video in zip(edits, videos, strict=True)
    }
    (folder / "sheets").mkdir(exist_ok=True)
    write_image(folder / "sheets" / f"{clip} - {variant}.png", contact_sheet(rows))


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default the process's own."""
    parser = Parser(
        prog="python -m tav_jax.worlds.experiments",
        description="Compare variants of the method on a drawn world's base model. The same "
        "command resumes an interrupted experiment, and writes the report again.",
        epilog="example: python -m tav_jax.worlds.experiments "
        "--config configs/experiments/ablations.yaml",
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="YAML")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="outputs/experiments/NAME")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the file's values")
    args = parser.parse_args(argv)
    config = parse(Experiment, read_tree(args.config, args.overrides, Experiment), str(args.config))
    folder = args.output_dir or Path("outputs/experiments") / args.config.stem
    experiment(config, folder)
    say(f"wrote {folder / 'report.md'}")


if __name__ == "__main__":
    sys.exit(main())
