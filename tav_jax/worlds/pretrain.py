"""python -m tav_jax.worlds.pretrain: the base model `tiny-scenes`, from nothing, in three stages.

autoencoder -> text encoder and U-Net together -> a Stable Diffusion folder. Each stage goes on from
its last checkpoint, ends with its figure, and leaves its training curve in `metrics.jsonl`.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Float32, UInt8
from tqdm import tqdm

from tav_jax.console import command, say
from tav_jax.errors import NotLearningError, UserError
from tav_jax.files import atomic_write
from tav_jax.models.clip import CLIPTextModel
from tav_jax.models.network import Network, init_network
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.models.vae import AutoencoderKL, sample_posterior
from tav_jax.pretrained import configs as published_config
from tav_jax.pretrained.model import Model, save_model
from tav_jax.runs.metrics_log import keep_metrics
from tav_jax.settings import override, parse
from tav_jax.training.checkpoints import latest_step, restore_item, save_items
from tav_jax.training.train_step import NoisedBatch, denoising_loss
from tav_jax.types import Moments, Params, PixelValues, PRNGKey, Scalar
from tav_jax.video.read import to_pixel_values
from tav_jax.video.sheets import contact_sheet
from tav_jax.video.write import to_frames, write_image
from tav_jax.worlds.text_to_image import draw_scenes, in_words, share_right
from tav_jax.worlds.tiny_scenes.drawing import cover, place, render_batch
from tav_jax.worlds.tiny_scenes.recipe import (
    UNET,
    VAE,
    Recipe,
    scheduler_config,
    text_config,
    write_tokenizer,
)
from tav_jax.worlds.tiny_scenes.world import (
    SIZE,
    SUBJECTS,
    TAUGHT_STYLES,
    Scene,
    caption,
    describe,
    sample_scenes,
)

CAPTIONS_PER_SCENE = 4
# Weight of a pixel's error where something is drawn, against the background's.
FOREGROUND = 4.0
FIRST_LOGVAR = -4.0
# Of the latents' channels, 1 in all (root mean square). The silhouette's is the largest, so that
# while sampling a subject's place is settled before its colour, and is the same for every colour.
LATENT_DEVIATIONS = (1.6, 0.7, 0.7, 0.7)


class Learner(NamedTuple):
    """What a stage changes: parameters of one or more networks, their average, Adam's state."""

    params: dict[str, Params]
    average: dict[str, Params]
    opt_state: optax.OptState
    step: Array


@dataclass(frozen=True)
class Data:
    """The training set: scenes, each at several times.

    Args:
        frames: One clip per scene.
        silhouettes: How much of each latent's pixels the subject covers.
    """

    scenes: list[Scene]
    frames: UInt8[np.ndarray, "n f H W 3"]
    silhouettes: Float32[np.ndarray, "n f h w"]


def make_data(recipe: Recipe) -> Data:
    """Returns scenes without the held-out pairs, drawn at random times; two thirds are plain."""
    rng = np.random.default_rng(recipe.seed)
    half = recipe.scenes // 2
    scenes = sample_scenes(rng, recipe.scenes - half) + sample_scenes(
        rng, half, styles=TAUGHT_STYLES
    )
    times = np.sort(rng.random((recipe.scenes, recipe.frames_per_scene)), axis=1)
    drawn = [render_batch(scenes, column) for column in times.T]
    silhouettes = [silhouettes_of(scenes, column) for column in times.T]
    return Data(scenes, np.stack(drawn, axis=1), np.stack(silhouettes, axis=1))


def silhouettes_of(
    scenes: Sequence[Scene], times: Float[np.ndarray, "n"]
) -> Float32[np.ndarray, "n h w"]:
    """Returns how much of each latent's pixels the scenes' subjects cover."""
    places = np.array([place(*each) for each in zip(scenes, times.tolist(), strict=True)])
    subjects = np.array([SUBJECTS.index(scene.subject) for scene in scenes])
    covered = cover(subjects, places, SIZE)
    factor = VAE.downsampling
    return einops.reduce(covered, "n (h a) (w b) -> n h w", "mean", a=factor, b=factor)


def warm_up_cosine(learning_rate: float, steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(200, steps // 10), steps, 0.02 * learning_rate
    )


def learn(
    folder: Path,
    params: dict[str, Params],
    loss_fn: Callable[..., Scalar],
    batches: Callable[[int], tuple],
    *,
    steps: int,
    learning_rate: float,
    recipe: Recipe,
    seed: int,
    figure: Callable[[dict[str, Params]], str],
) -> dict[str, Params]:
    """Returns the averaged parameters after a stage, going on from its last checkpoint.

    Args:
        loss_fn: Of parameters, key and a batch.
        batches: Gives the batch of a step, by the step's number alone.
        figure: Says how good averaged parameters are.
    """
    schedule = warm_up_cosine(learning_rate, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b1=0.9, b2=0.99))

    @partial(jax.jit, donate_argnums=0)
    def update(learner: Learner, batch: tuple) -> tuple[Learner, Scalar]:
        key = jax.random.fold_in(jax.random.key(seed), learner.step)
        loss, gradients = jax.value_and_grad(loss_fn)(learner.params, key, *batch)
        updates, opt_state = optimizer.update(gradients, learner.opt_state)
        params = optax.apply_updates(learner.params, updates)
        # A young average would be mostly the first random parameters.
        decay = jnp.minimum(recipe.ema, (1 + learner.step) / (10 + learner.step))
        average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), learner.average, params)
        return Learner(params, average, opt_state, learner.step + 1), loss

    learner = Learner(params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.int32(0))
    newest = latest_step(folder / "checkpoints")
    if newest is not None:
        learner = restore_item(folder / "checkpoints" / str(newest), "learner", learner)
    start = int(learner.step)
    folder.mkdir(parents=True, exist_ok=True)
    keep_metrics(folder / "metrics.jsonl", start)
    began = time.perf_counter()
    with (folder / "metrics.jsonl").open("a", buffering=1) as log:
        losses = []
        for step in tqdm(range(start + 1, steps + 1), folder.name, initial=start, total=steps):
            learner, loss = update(learner, batches(step))
            losses.append(loss)
            if step % 50 == 0 or step == steps:
                line = {"step": step, "loss": float(jnp.stack(losses).mean())}
                line["seconds"] = round(time.perf_counter() - began, 1)
                if not np.isfinite(line["loss"]):
                    raise NotLearningError(f"{folder.name}: step {step} has no finite loss")
                log.write(json.dumps(line) + "\n")
                losses = []
            if step % recipe.checkpointing_steps == 0 or step == steps:
                save_items(folder / "checkpoints", step, learner=learner)
                say(f"{folder.name} {step}: {figure(learner.average)}")
    return learner.average


# ---- autoencoder


def train_vae(recipe: Recipe, data: Data, folder: Path) -> Network[AutoencoderKL]:
    """Returns the autoencoder, its latents standardised."""
    # All pictures of a batch at once; in a run they come by chunks.
    config = replace(VAE, frames_per_chunk=recipe.vae_batch)
    vae = init_network(AutoencoderKL, config, jax.random.key(recipe.seed))
    # Posteriors begin narrow. From deviations near 1 the decoder learns to ignore a channel for its
    # noise, and the encoder then never learns to use it.
    bias = vae.params["quant_conv.bias"].at[config.latent_channels :].set(FIRST_LOGVAR)
    vae = vae.with_params(vae.params | {"quant_conv.bias": bias})
    pictures = data.frames.reshape(-1, *data.frames.shape[2:])
    silhouettes = data.silhouettes.reshape(-1, *data.silhouettes.shape[2:])

    def loss_fn(
        params: dict, key: PRNGKey, pixel_values: PixelValues, weight: Array, silhouette: Array
    ) -> Scalar:
        module = vae.with_params(params["vae"]).bind()
        moments = module.encode(pixel_values)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        noise = jax.random.normal(key, mean.shape)
        decoded = module.decode(sample_posterior(moments, noise, 1.0))
        error = decoded - pixel_values
        reconstruction = jnp.mean(weight * (jnp.abs(error) + jnp.square(error)))
        divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
        silhouette_error = jnp.mean(jnp.square(mean[..., 0] - (2 * silhouette - 1)))
        return (
            reconstruction
            + recipe.kl_weight * divergence
            + recipe.silhouette_weight * silhouette_error
        )

    def batches(step: int) -> tuple:
        rng = np.random.default_rng((recipe.seed, 1, step))
        indices = rng.integers(len(pictures), size=recipe.vae_batch)
        chosen, silhouette = pictures[indices], silhouettes[indices, None]
        # What differs from the picture's own median is drawn on it.
        distance = np.abs(chosen.astype(np.float32) - np.median(chosen, axis=(1, 2), keepdims=True))
        weight = 1 + (FOREGROUND - 1) * (distance.max(-1, keepdims=True) > 60)
        weight = weight[:, None].astype(np.float32)
        return to_pixel_values(chosen)[:, None], weight, silhouette

    rng = np.random.default_rng((recipe.seed, 2))
    probe = sample_scenes(rng, 512, held_out=None, styles=TAUGHT_STYLES)
    truth = render_batch(probe, rng.random(512))

    @jax.jit
    def reconstruct(params: Params, pixel_values: PixelValues) -> tuple[Array, Array]:
        module = vae.with_params(params).bind()
        moments = module.encode(pixel_values)
        mean = jnp.split(moments, 2, axis=-1)[0]
        return module.decode(mean * VAE.scaling_factor), moments

    def figure(params: dict) -> str:
        decoded, moments = reconstruct(params["vae"], to_pixel_values(truth)[:, None])
        shares = share_right(probe, to_frames(np.asarray(decoded))[:, 0])
        mean, logvar = jnp.split(moments, 2, axis=-1)
        spread = jnp.sqrt(mean.var((0, 1, 2, 3)))
        deviation = jnp.exp(0.5 * logvar).mean((0, 1, 2, 3))
        return (
            f"{in_words(shares)}; per channel, means spread "
            f"{np.round(spread, 2).tolist()}, posterior deviates {np.round(deviation, 2).tolist()}"
        )

    params = learn(
        folder,
        {"vae": vae.params},
        loss_fn,
        batches,
        steps=recipe.vae_steps,
        learning_rate=recipe.vae_learning_rate,
        recipe=recipe,
        seed=recipe.seed + 1,
        figure=figure,
    )["vae"]
    _, moments = reconstruct(params, to_pixel_values(truth)[:, None])
    params = standardised(params, moments)
    say(f"standardised: {figure({'vae': params})}")
    return Network(AutoencoderKL, VAE, params)


def standardised(params: Params, moments: Moments) -> Params:
    """Returns the same autoencoder with latents of mean 0 and `LATENT_DEVIATIONS`.

    The layers next to the latents are 1x1, so that scale and shift go into their weights.

    Args:
        moments: Posteriors of many pictures.
    """
    mean, logvar = jnp.split(moments, 2, axis=-1)
    axes = tuple(range(mean.ndim - 1))
    centre = mean.mean(axes)
    scale = jnp.sqrt(mean.var(axes) + jnp.exp(logvar).mean(axes)) / np.array(LATENT_DEVIATIONS)
    shift = jnp.concatenate([centre / scale, 2 * jnp.log(scale)])
    spread = jnp.concatenate([scale, jnp.ones_like(scale)])
    decoding = params["post_quant_conv.kernel"]
    return params | {
        "quant_conv.kernel": params["quant_conv.kernel"] / spread[None, None, None],
        "quant_conv.bias": params["quant_conv.bias"] / spread - shift,
        "post_quant_conv.kernel": decoding * scale[None, None, :, None],
        "post_quant_conv.bias": params["post_quant_conv.bias"] + centre @ decoding[0, 0],
    }


# ---- text encoder and U-Net


def still_at_first(params: Params) -> Params:
    """Returns a U-Net's parameters with the last layer of every residual branch zero.

    The untrained network then predicts zero and each branch joins in as it learns.
    """
    last = (".conv2.kernel", ".to_out.0.kernel", ".ff.net.2.kernel", ".proj_out.kernel")
    return {
        name: value * (not (name.endswith(last) or name.startswith("conv_out.kernel")))
        for name, value in params.items()
    }


def encode_all(vae: Network[AutoencoderKL], data: Data, at_a_time: int = 64) -> np.ndarray:
    """Returns the posteriors of the whole training set, once for all steps."""
    encode = jax.jit(lambda vae, pixel_values: vae.bind().encode(pixel_values))
    parts = [
        np.asarray(encode(vae, to_pixel_values(data.frames[start : start + at_a_time])))
        for start in range(0, len(data.frames), at_a_time)
    ]
    return np.concatenate(parts)


def train_diffusion(recipe: Recipe, data: Data, vae: Network[AutoencoderKL], folder: Path) -> Model:
    """Returns the whole model, its text encoder and U-Net trained together on captions."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    schedule = published_config.read_schedule(scheduler_config(recipe))
    text_key, unet_key = jax.random.split(jax.random.key(recipe.seed + 2))
    text_encoder = init_network(CLIPTextModel, text_config(len(tokenizer)), text_key)
    unet = init_network(UNet3DConditionModel, UNET, unet_key)
    unet = unet.with_params(still_at_first(unet.params))

    moments = encode_all(vae, data)
    rng = np.random.default_rng((recipe.seed, 3))
    sentences = [[caption(s, rng) for _ in range(CAPTIONS_PER_SCENE)] for s in data.scenes]
    length = text_encoder.config.max_position_embeddings
    padding = {"padding": "max_length", "max_length": length, "truncation": True}
    ids = np.array([tokenizer(each, **padding).input_ids for each in sentences], np.int32)
    no_ids = np.array(tokenizer("", **padding).input_ids, np.int32)

    def loss_fn(params: dict, key: PRNGKey, moments: Moments, ids: Array) -> Scalar:
        posterior_key, noise_key, time_key = jax.random.split(key, 3)
        shape = (*moments.shape[:-1], moments.shape[-1] // 2)
        latents = sample_posterior(
            moments, jax.random.normal(posterior_key, shape), vae.config.scaling_factor
        )
        noise = jax.random.normal(noise_key, shape)
        # Stratified: one timestep from each of b equal parts, for a calmer loss.
        b, total = len(moments), len(schedule.alphas_cumprod)
        timesteps = ((jnp.arange(b) + jax.random.uniform(time_key, (b,))) * (total / b)).astype(
            jnp.int32
        )
        context = text_encoder.with_params(params["text_encoder"])(ids)
        return denoising_loss(
            unet.with_params(params["unet"]),
            schedule,
            NoisedBatch(latents, noise, timesteps),
            context,
        )

    def batches(step: int) -> tuple:
        rng = np.random.default_rng((recipe.seed, 4, step))
        frames = recipe.frames_per_scene if rng.random() < recipe.group_share else 1
        b = recipe.batch // frames
        chosen = rng.integers(len(moments), size=b)
        if frames == 1:
            clip = moments[chosen, rng.integers(recipe.frames_per_scene, size=b)][:, None]
        else:
            clip = moments[chosen]
        said = ids[chosen, rng.integers(CAPTIONS_PER_SCENE, size=b)]
        said = np.where(rng.random((b, 1)) < recipe.caption_dropout, no_ids, said)
        return clip, said

    def assemble(params: dict[str, Params]) -> Model:
        return Model(
            tokenizer,
            text_encoder.with_params(params["text_encoder"]),
            vae,
            unet.with_params(params["unet"]),
            schedule,
        )

    params = learn(
        folder,
        {"text_encoder": text_encoder.params, "unet": unet.params},
        loss_fn,
        batches,
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        recipe=recipe,
        seed=recipe.seed + 3,
        figure=lambda average: drawn_figure(assemble(average), recipe, folder),
    )
    return assemble(params)


def drawn_figure(model: Model, recipe: Recipe, folder: Path) -> str:
    """Says how often the model draws what full prompts name, and leaves some in `pictures.png`."""
    lines: list[str] = []
    rows: dict[str, np.ndarray] = {}
    for pairs in ("seen", "held-out"):
        scenes, pictures = draw_scenes(
            model,
            recipe.probe,
            recipe.guidance_scale,
            held_out=pairs == "held-out",
            seed=recipe.seed,
        )
        lines.append(f"{pairs} pairs: {in_words(share_right(scenes, pictures))}")
        rows |= {
            f"{pairs} pairs: {describe(scenes[start])} ...": pictures[start : start + 8]
            for start in range(0, min(len(scenes), 24), 8)
        }
    write_image(folder / "pictures.png", contact_sheet(rows))
    return "; ".join(lines)


def pretrain(recipe: Recipe, output_dir: Path) -> None:
    """Runs all stages and writes the model in float16 to `output_dir/tiny-scenes`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    record = output_dir / "recipe.json"
    text = json.dumps(dataclasses.asdict(recipe), indent=2) + "\n"
    if record.is_file() and record.read_text() != text:
        raise UserError(f"--output-dir: {output_dir} holds a training of another recipe")
    with atomic_write(record) as path:
        path.write_text(text)
    data = make_data(recipe)
    vae = train_vae(recipe, data, output_dir / "autoencoder")
    model = train_diffusion(recipe, data, vae, output_dir / "diffusion")

    def halve(network: Network) -> Network:
        return network.with_params({k: v.astype(jnp.float16) for k, v in network.params.items()})

    model = replace(
        model,
        text_encoder=halve(model.text_encoder),
        vae=halve(model.vae),
        unet=halve(model.unet),
    )
    save_model(output_dir / "tiny-scenes", model, scheduler_config(recipe))
    say(f"wrote {output_dir / 'tiny-scenes'}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tav_jax.worlds.pretrain",
        description="Train the small base model from nothing. Run again, the same command goes on.",
        epilog="example: python -m tav_jax.worlds.pretrain --output-dir outputs/pretrain seed=1",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/pretrain"), metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    args = parser.parse_args(argv)
    recipe = parse(Recipe, override({}, args.overrides), "recipe")
    pretrain(recipe, args.output_dir)


if __name__ == "__main__":
    sys.exit(main())
