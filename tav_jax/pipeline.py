"""The method on one Model, end to end: encode a clip, tune on it, invert it, edit it.

Everything is compiled here once per shape; the rooms below hold plain functions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import SupportsInt

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, UInt8
from tqdm import tqdm

from tav_jax.partition import TRAINABLE_MODULES, label_params, make_optimizer
from tav_jax.sampling import Sampler, check_eta, ddim_invert, ddim_sample, dpm_solver_sample
from tav_jax.schedule import NoiseSchedule
from tav_jax.stable_diffusion import Model, tokenize
from tav_jax.training import TrainState, init_state, train_step
from tav_jax.types import Context, Latents, Moments, PixelValues, PRNGKey, Scalar
from tav_jax.video import to_frames, to_pixel_values

Step = Callable[[TrainState, Moments, Context, NoiseSchedule], tuple[TrainState, dict[str, Scalar]]]


class _ProgressBar:
    """Shows the steps of a compiled loop.

    One object for all loops, since the callback is part of the compiled program: a new one a
    call would compile anew.
    """

    bar: tqdm | None = None

    def __call__(self, done: SupportsInt) -> None:
        if self.bar is not None:
            self.bar.update(int(done) - self.bar.n)

    @contextmanager
    def show(self, description: str, total: int, *, progress: bool) -> Iterator[None]:
        with tqdm(
            total=total, desc=description, disable=_hidden(progress), leave=False
        ) as self.bar:
            try:
                yield
                jax.effects_barrier()
            finally:
                self.bar = None


def _hidden(progress: bool) -> bool | None:
    """Returns tqdm's `disable`: None shows a bar to a terminal and keeps it out of log files."""
    return None if progress else True


_progress_bar = _ProgressBar()
_encode_text = jax.jit(lambda text_encoder, ids: text_encoder(ids))
_encode_video = jax.jit(lambda vae, pixel_values: vae.bind().encode(pixel_values))
_decode_video = jax.jit(lambda vae, latents: vae.bind().decode(latents))
_invert = jax.jit(
    partial(ddim_invert, on_step=_progress_bar), static_argnames=("num_inv_steps", "trajectory")
)
_samplers = {
    name: jax.jit(
        partial(sample, on_step=_progress_bar),
        static_argnames=("num_inference_steps", "trajectory"),
    )
    for name, sample in {"ddim": ddim_sample, "dpm_solver": dpm_solver_sample}.items()
}


def encode_prompts(model: Model, prompts: Sequence[str]) -> Context:
    """Returns the text states of each prompt; one that is too long is cut, with a warning."""
    return _encode_text(model.text_encoder, tokenize(model, prompts))


def encode_frames(model: Model, frames: UInt8[np.ndarray, "f H W 3"]) -> Moments:
    """Returns the posterior of a clip, as a batch of one.

    Raises:
        ValueError: the frames' sides are no multiples of the autoencoder's factor.
    """
    factor = model.vae.config.downsampling
    if frames.shape[1] % factor or frames.shape[2] % factor:
        raise ValueError(
            f"frames are {frames.shape[2]}x{frames.shape[1]}; this model takes sides that are "
            f"multiples of {factor}"
        )
    return _encode_video(model.vae, to_pixel_values(frames)[None])


def decode_latents(model: Model, latents: Latents) -> PixelValues:
    """Returns pixel values of scaled latents, nominally in [-1, 1]."""
    return _decode_video(model.vae, latents)


def clean_latents(model: Model, moments: Moments) -> Latents:
    """Returns the scaled mean of a clip's posterior: what is inverted.

    The published code inverts the last training step's sample of it, which is that plus noise.
    """
    return jnp.split(moments, 2, axis=-1)[0] * model.vae.config.scaling_factor


def random_latents(
    model: Model, seeds: Sequence[int], video_length: int, height: int, width: int
) -> Latents:
    """Returns unit Gaussian latents, an item a seed, for sampling without a clip's motion."""
    factor = model.vae.config.downsampling
    shape = (video_length, height // factor, width // factor, model.vae.config.latent_channels)
    return jnp.stack([jax.random.normal(jax.random.key(seed), shape) for seed in seeds])


def invert_latents(
    model: Model, latents: Latents, *, num_inv_steps: int = 50, progress: bool = False
) -> Latents:
    """Returns the noise that DDIM would turn into the given clean latents, under no prompt."""
    context = jnp.repeat(encode_prompts(model, [""]), len(latents), axis=0)
    with _progress_bar.show("inverting", num_inv_steps, progress=progress):
        return jax.block_until_ready(
            _invert(model.unet, model.schedule, latents, context, num_inv_steps=num_inv_steps)
        )


def sample_latents(
    model: Model,
    latents: Float[Array, "_ f h w c"],
    prompts: Sequence[str],
    *,
    negative_prompt: str = "",
    guidance_scale: float = 12.5,
    num_inference_steps: int = 50,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    seeds: Sequence[int] | None = None,
    progress: bool = False,
) -> Latents:
    """Returns the clean latents that guided sampling finds under each prompt, all in one batch.

    Args:
        latents: Noise, one item per prompt, or one for all.
        guidance_scale: At 1 or below there is no guidance, and half the work.
        sampler: DDIM, or DPM-Solver++(2M), which needs some 20 steps where DDIM needs 50.
        eta: Noise of each DDIM step; above 0 it is drawn from `seeds`, one per prompt.
    """
    if len(latents) == 1:
        latents = jnp.repeat(latents, len(prompts), axis=0)
    context = encode_prompts(model, prompts)
    negative_context = None
    if guidance_scale > 1:
        negative_context = jnp.broadcast_to(encode_prompts(model, [negative_prompt]), context.shape)
    check_eta(sampler, eta)
    drawn = {}
    if eta > 0:
        if seeds is None or len(seeds) != len(prompts):
            raise ValueError(f"eta {eta} draws noise: give seeds, one for each prompt")
        drawn = {"eta": eta, "keys": jnp.stack([jax.random.key(seed) for seed in seeds])}
    with _progress_bar.show("sampling", num_inference_steps, progress=progress):
        return jax.block_until_ready(
            _samplers[sampler](
                model.unet,
                model.schedule,
                latents,
                context,
                negative_context,
                guidance_scale,
                num_inference_steps=num_inference_steps,
                **drawn,
            )
        )


def compile_train_step(
    model: Model,
    *,
    optimizer: optax.GradientTransformation,
    labels: dict,
    gradient_accumulation_steps: int = 1,
) -> Step:
    """Returns `train_step` for this model, jitted, its state donated."""
    return jax.jit(
        partial(
            train_step,
            optimizer=optimizer,
            labels=labels,
            scaling_factor=model.vae.config.scaling_factor,
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
    progress: bool = False,
) -> Model:
    """Returns the model tuned on one captioned clip (Wu et al. 2023, section 3.2).

    The given model stays usable. For checkpoints, logs and resumption run `tav_jax.tune`.

    Args:
        prompt: What the clip shows, such as "a man is skiing".
        key: All randomness of the run; the default is `jax.random.key(0)`.
    """
    labels = label_params(model.unet.params, trainable_modules)
    optimizer = make_optimizer(labels, learning_rate)
    step = compile_train_step(model, optimizer=optimizer, labels=labels)
    # The step donates its state, and the caller's parameters are not ours to give away.
    unet = jax.tree.map(jnp.copy, model.unet)
    state = init_state(unet, optimizer, jax.random.key(0) if key is None else key)
    moments, context = encode_frames(model, frames), encode_prompts(model, [prompt])
    for _ in tqdm(range(max_train_steps), desc="tuning", disable=_hidden(progress)):
        state, _ = step(state, moments, context, model.schedule)
    return model.with_unet(state.unet)


def edit_clip(
    model: Model,
    frames: UInt8[np.ndarray, "f H W 3"],
    prompts: Sequence[str],
    *,
    negative_prompt: str = "",
    guidance_scale: float = 12.5,
    num_inference_steps: int = 50,
    progress: bool = False,
) -> UInt8[np.ndarray, "p f H W 3"]:
    """Returns a video per prompt with the clip's motion (Wu et al. 2023, section 3.3).

    Inverts the clip in as many steps as it samples, and samples all prompts in one batch.

    Args:
        model: Tuned on the clip; untuned it runs too, and edits worse.
    """
    noise = invert_latents(
        model,
        clean_latents(model, encode_frames(model, frames)),
        num_inv_steps=num_inference_steps,
        progress=progress,
    )
    latents = sample_latents(
        model,
        noise,
        prompts,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        progress=progress,
    )
    return to_frames(np.asarray(decode_latents(model, latents)))
