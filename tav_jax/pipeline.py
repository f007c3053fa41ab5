"""The method on one Model, end to end: encode a clip, tune on it, invert it, edit it.

Everything is compiled here once per shape; the rooms below hold plain functions.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax import Array
from jaxtyping import Float, Int, UInt8

from tav_jax.diffusion.guidance import guide
from tav_jax.diffusion.samplers import (
    Sampler,
    SamplerName,
    check_eta,
    ddim,
    ddim_inverse,
    dpm_solver,
)
from tav_jax.diffusion.sampling import run_steps
from tav_jax.diffusion.schedule import NoiseSchedule
from tav_jax.errors import UserError
from tav_jax.models import backend
from tav_jax.models.network import Network
from tav_jax.models.vae import split_moments
from tav_jax.parallel.sharding import (
    constrain,
    denoiser,
    gather_to_host,
    over_frames,
    shard,
    video_sharding,
)
from tav_jax.pretrained.model import Model
from tav_jax.pretrained.prompts import PromptSyntax, count_chunks, prompt_tokens
from tav_jax.progress import progress_bar
from tav_jax.training.optimizer import TRAINABLE_MODULES, label_params, make_optimizer
from tav_jax.training.train_step import TrainState, init_state, train_step
from tav_jax.types import Context, Latents, Moments, PixelValues, PRNGKey, Scalar
from tav_jax.video.read import to_pixel_values
from tav_jax.video.write import to_frames

TrainStep = Callable[
    [TrainState, Moments, Context, NoiseSchedule], tuple[TrainState, dict[str, Scalar]]
]

# Calls in which a loop with a bar runs: the bar moves after each.
PARTS = 10


def _loop(name: str, make_sampler: Callable[..., Sampler]) -> Callable:
    """Return a program that runs a sampler's steps from `start` to before `stop`.

    The bounds are dynamic, so that all parts of a loop are calls of one program. Each call makes
    the text's keys and values anew, which is far less work than one step. The state is donated.
    """

    def loop(
        state: Any,
        start: Int[Array, ""],
        stop: Int[Array, ""],
        unet: Network,
        schedule: NoiseSchedule,
        contexts: tuple[Context | None, ...],
        guidance_scale: float | Scalar = 1.0,
        *noise: Any,
        num_steps: int,
    ) -> Any:
        if backend.platform() == "gpu":
            unet = unet.with_kernels_cast()
        texts = jax.tree.map(unet.bind().text_keys_values, contexts)
        context, negative_context = (*texts, None)[:2]
        predict = guide(denoiser(unet), context, negative_context, guidance_scale)
        state, _ = run_steps(make_sampler(schedule, num_steps, *noise), predict, state, start, stop)
        # The next part takes this part's state, so it must be sharded in the same way.
        return constrain(state, video_sharding)

    loop.__name__ = name  # what logs, profiles and the cache on disk call the program
    return jax.jit(loop, static_argnames="num_steps", donate_argnames="state")


_encode_text = jax.jit(lambda text_encoder, ids: text_encoder(ids))
encode_video = jax.jit(over_frames(lambda vae, pixel_values: vae.bind().encode(pixel_values)))
decode_video = jax.jit(over_frames(lambda vae, latents: vae.bind().decode(latents)))
# The unused network commits the copy to the network's device, as the loop's own results are.
# Committed and uncommitted inputs would compile the loop twice.
_copy = jax.jit(
    lambda state, unet: constrain(jax.tree.map(jnp.copy, state), video_sharding), keep_unused=True
)
ddim_invert_loop = _loop("ddim_invert", ddim_inverse)
ddim_sample_loop = _loop("ddim_sample", ddim)
dpm_solver_sample_loop = _loop("dpm_solver_sample", dpm_solver)
SAMPLERS: dict[str, tuple[Callable[..., Sampler], Callable]] = {
    "ddim": (ddim, ddim_sample_loop),
    "dpm_solver": (dpm_solver, dpm_solver_sample_loop),
}


def _run(
    description: str,
    loop: Callable,
    sampler: Sampler,
    latents: Latents,
    unet: Network,
    *inputs: Any,
    progress: bool,
) -> Latents:
    """Return the latents after all steps: in one call, or in `PARTS` calls with a progress bar."""
    # The loop donates its state, and the latents belong to the caller.
    state = _copy(sampler.init(latents), unet)
    num_steps = sampler.num_steps
    if not progress:
        return sampler.latents(loop(state, 0, num_steps, unet, *inputs, num_steps=num_steps))
    parts = min(PARTS, num_steps)
    bounds = [num_steps * part // parts for part in range(parts + 1)]
    with progress_bar(description, total=num_steps, leave=False) as bar:
        for start, stop in pairwise(bounds):
            state = loop(state, start, stop, unet, *inputs, num_steps=num_steps)
            jax.block_until_ready(state)
            bar.update(stop - start)
    return sampler.latents(state)


def encode_prompts(
    model: Model, prompts: Sequence[str], *, syntax: PromptSyntax = "plain", chunks: int = 1
) -> Context:
    """Return the text states of each prompt.

    Chunks are encoded one by one and joined along the tokens. Weights are applied as by
    AUTOMATIC1111's web UI: states are multiplied by their tokens' weights, and then each chunk is
    scaled so that the mean of its states is what it was. (compel moves states away from those of
    the prompt without the token.)

    Args:
        model: The model.
        prompts: The prompts.
        syntax: "plain" cuts a prompt of more than one chunk, with a warning. "weighted" reads
            weights and prompts of any length, see `prompts.py`.
        chunks: Number of chunks at least. Shorter prompts are filled up with empty chunks.

    Raises:
        UserError: A weight is larger than any that is supported, or weights cancel each other out.
    """
    ids, weights = prompt_tokens(model, prompts, syntax, chunks)
    count = ids.shape[1]
    states = _encode_text(model.text_encoder, rearrange(ids, "b n s -> (b n) s"))
    if (weights != 1).any():
        states = _weigh(states, rearrange(weights, "b n s -> (b n) s 1"))
        if not np.isfinite(gather_to_host(states)).all():
            raise UserError("the weights of a prompt cancel each other out; change one of them")
    return states if count == 1 else rearrange(states, "(b n) s d -> b (n s) d", n=count)


@jax.jit
def _weigh(states: Context, weights: Float[Array, "b s 1"]) -> Context:
    """Return states times weights, scaled to the mean that they had."""
    weighted = states * weights
    before, after = (one.mean((1, 2), keepdims=True) for one in (states, weighted))
    # Chunks without weights stay the same to the bit, whatever they are encoded beside.
    is_weighted = (weights != 1).any((1, 2), keepdims=True)
    return jnp.where(is_weighted, weighted * (before / after), states)


def encode_frames(model: Model, frames: UInt8[np.ndarray, "f H W 3"]) -> Moments:
    """Return the posterior of a clip, as a batch of one.

    Raises:
        UserError: the frames' sides are no multiples of the autoencoder's factor.
    """
    factor = model.vae.config.downsampling
    if frames.shape[1] % factor or frames.shape[2] % factor:
        raise UserError(
            f"frames are {frames.shape[2]}x{frames.shape[1]}; this model takes sides that are "
            f"multiples of {factor}"
        )
    return encode_video(model.vae, to_pixel_values(frames)[None])


def decode_latents(model: Model, latents: Latents) -> PixelValues:
    """Return pixel values of scaled latents, nominally in [-1, 1]."""
    return decode_video(model.vae, latents)


def posterior_mean_latents(model: Model, moments: Moments) -> Latents:
    """Return the scaled mean of a clip's posterior, from which the inversion starts.

    The published code inverts the last training step's sample of the posterior, which has noise.
    """
    return split_moments(moments)[0] * model.vae.config.scaling_factor


def random_latents(
    model: Model, seeds: Sequence[int], video_length: int, height: int, width: int
) -> Latents:
    """Return standard normal latents, one item for each seed: sampling without a clip's motion."""
    factor = model.vae.config.downsampling
    shape = (video_length, height // factor, width // factor, model.vae.config.latent_channels)
    return jnp.stack([jax.random.normal(jax.random.key(seed), shape) for seed in seeds])


def invert_latents(
    model: Model, latents: Latents, *, num_inv_steps: int = 50, progress: bool = False
) -> Latents:
    """Return the noise that DDIM would turn into the given clean latents.

    The prompt is empty and there is no guidance, as in the published code.
    """
    context = jnp.repeat(encode_prompts(model, [""]), len(latents), axis=0)
    return _run(
        "inverting",
        ddim_invert_loop,
        ddim_inverse(model.schedule, num_inv_steps),
        latents,
        model.unet,
        model.schedule,
        (context,),
        progress=progress,
    )


def sample_latents(
    model: Model,
    latents: Float[Array, "_ f h w c"],
    prompts: Sequence[str],
    *,
    negative_prompt: str = "",
    guidance_scale: float = 12.5,
    num_inference_steps: int = 50,
    sampler: SamplerName = "ddim",
    eta: float = 0.0,
    seeds: Sequence[int] | None = None,
    prompt_syntax: PromptSyntax = "plain",
    progress: bool = False,
) -> Latents:
    """Return the clean latents that guided sampling finds under each prompt, all in one batch.

    Args:
        model: The model, tuned or not.
        latents: Noise, one item for each prompt, or one item for all.
        prompts: What the videos are to show.
        negative_prompt: What they are not to show: the unconditional side of the guidance.
        guidance_scale: Weight of the guidance (Ho & Salimans 2022). At 1 or below there is none,
            which halves the work.
        num_inference_steps: Number of sampling steps.
        sampler: "ddim", or "dpm_solver" for DPM-Solver++(2M), which needs some 20 steps where DDIM
            needs 50.
        eta: Share of noise in each DDIM step, from 0 to 1. Above 0 it is drawn from `seeds`.
        seeds: One for each prompt.
        prompt_syntax: How the prompts are written, see `encode_prompts`. All are filled up to as
            many chunks as the longest has, which changes the shorter ones' videos.
        progress: Show a progress bar.

    Raises:
        UserError: `eta` is above 0 without seeds, or with a sampler that draws no noise.
    """
    check_eta(sampler, eta)
    if len(latents) == 1:
        latents = jnp.repeat(latents, len(prompts), axis=0)
    is_guided = guidance_scale > 1
    chunks = count_chunks(
        model, [*prompts, *([negative_prompt] if is_guided else [])], prompt_syntax
    )
    context = encode_prompts(model, prompts, syntax=prompt_syntax, chunks=chunks)
    negative_context = None
    if is_guided:
        negative = encode_prompts(model, [negative_prompt], syntax=prompt_syntax, chunks=chunks)
        negative_context = jnp.broadcast_to(negative, context.shape)
    noise: tuple = ()
    if eta > 0:
        if seeds is None or len(seeds) != len(prompts):
            raise UserError(f"eta {eta} draws noise: give seeds, one for each prompt")
        noise = eta, jnp.stack([jax.random.key(seed) for seed in seeds])

    make_sampler, loop = SAMPLERS[sampler]
    return _run(
        "sampling",
        loop,
        make_sampler(model.schedule, num_inference_steps),
        latents,
        model.unet,
        model.schedule,
        (context, negative_context),
        guidance_scale,
        *noise,
        progress=progress,
    )


def compile_train_step(
    scaling_factor: float,
    *,
    optimizer: optax.GradientTransformation,
    labels: dict,
    gradient_accumulation_steps: int = 1,
) -> TrainStep:
    """Return `train_step`, jitted. It donates its state.

    Args:
        scaling_factor: That of the autoencoder's config.
        optimizer: As `make_optimizer` makes it.
        labels: "train" or "freeze" for each parameter, the same that made the optimiser.
        gradient_accumulation_steps: Draws over which each update's gradient is a mean.
    """
    return jax.jit(
        partial(
            train_step,
            optimizer=optimizer,
            labels=labels,
            scaling_factor=scaling_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
        ),
        donate_argnums=0,
    )


def tune_clip(
    model: Model,
    frames: UInt8[np.ndarray, "f H W 3"],
    prompt: str,
    *,
    max_train_steps: int = 300,
    learning_rate: float = 3e-5,
    trainable_modules: Sequence[str] = TRAINABLE_MODULES,
    key: PRNGKey | None = None,
    prompt_syntax: PromptSyntax = "plain",
    progress: bool = False,
) -> Model:
    """Return the model tuned on one captioned clip (Wu et al. 2023, section 3.2).

    The given model is not changed. For checkpoints, logs and resumption run `tav_jax.tune`.

    Args:
        model: An image model, as `load_model` gives it.
        frames: The clip.
        prompt: What the clip shows, such as "a man is skiing".
        max_train_steps: Number of updates.
        learning_rate: Constant learning rate of AdamW.
        trainable_modules: Names of the modules to train.
        key: Source of all randomness. The default is `jax.random.key(0)`.
        prompt_syntax: How the prompt is written, see `encode_prompts`.
        progress: Show a progress bar.
    """
    labels = label_params(model.unet.params, trainable_modules)
    optimizer = make_optimizer(labels, learning_rate)
    step = compile_train_step(model.vae.config.scaling_factor, optimizer=optimizer, labels=labels)
    # The step donates its state, and the caller's parameters are not ours to give away.
    unet = jax.tree.map(jnp.copy, model.unet)
    state = shard(init_state(unet, optimizer, jax.random.key(0) if key is None else key))
    moments = encode_frames(model, frames)
    context = encode_prompts(model, [prompt], syntax=prompt_syntax)
    with progress_bar("tuning", total=max_train_steps, show=progress) as bar:
        for _ in range(max_train_steps):
            state, _ = step(state, moments, context, model.schedule)
            bar.update(1)
    return model.with_unet(state.unet)


def edit_clip(
    model: Model,
    frames: UInt8[np.ndarray, "f H W 3"],
    prompts: Sequence[str],
    *,
    negative_prompt: str = "",
    guidance_scale: float = 12.5,
    num_inference_steps: int = 50,
    num_inv_steps: int = 50,
    prompt_syntax: PromptSyntax = "plain",
    progress: bool = False,
) -> UInt8[np.ndarray, "p f H W 3"]:
    """Return a video for each prompt, with the clip's motion (Wu et al. 2023, section 3.3).

    All prompts are sampled in one batch.

    Args:
        model: A model that was tuned on the clip. With an untuned one edits are worse.
        frames: The clip.
        prompts: What the edited videos are to show.
        negative_prompt: What they are not to show.
        guidance_scale: Weight of the guidance. At 1 or below there is none.
        num_inference_steps: Number of sampling steps.
        num_inv_steps: Number of inversion steps. With fewer the edits follow the motion less, while
            sampling may take fewer.
        prompt_syntax: See `sample_latents`.
        progress: Show progress bars.
    """
    noise = invert_latents(
        model,
        posterior_mean_latents(model, encode_frames(model, frames)),
        num_inv_steps=num_inv_steps,
        progress=progress,
    )
    latents = sample_latents(
        model,
        noise,
        prompts,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        prompt_syntax=prompt_syntax,
        progress=progress,
    )
    return to_frames(gather_to_host(decode_latents(model, latents)))
