"""Sampling and inversion with predictions for which DDIM can be solved by hand."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tav_jax.diffusion.sampling import ddim_invert, ddim_sample
from tav_jax.diffusion.schedule import ddim_timesteps, make_schedule

ROUNDING = 1e-4  # float32 over a trajectory, where small abar magnify rounding by up to 15

STATIC = ("denoise", "trajectory")
sample = jax.jit(ddim_sample, static_argnames=("num_inference_steps", *STATIC))
invert = jax.jit(ddim_invert, static_argnames=("num_inv_steps", *STATIC))

PREDICTIONS = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])


def stable_diffusion(prediction_type="epsilon", set_alpha_to_one=True):
    return make_schedule(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        set_alpha_to_one=set_alpha_to_one,
    )


def relative_error(ours, expected):
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


def from_noise(schedule, latents, noise, timesteps):
    """The model output that means this noise in these latents."""
    alpha = schedule.alphas_cumprod[timesteps][:, None, None, None, None]
    if schedule.prediction_type == "epsilon":
        return noise
    # v = sqrt(abar) epsilon - sqrt(1 - abar) x0, and z = sqrt(abar) x0 + sqrt(1 - abar) epsilon.
    return (noise - jnp.sqrt(1 - alpha) * latents) / jnp.sqrt(alpha)


def at_one_point(schedule):
    """All data is one point mu, which the text names: epsilon = (z - sqrt(abar) mu) / sigma."""

    def denoise(latents, timesteps, context):
        alpha = schedule.alphas_cumprod[timesteps][:, None, None, None, None]
        mu = context[:, :, None, None, :]  # one text state a frame
        noise = (latents - jnp.sqrt(alpha) * mu) / jnp.sqrt(1 - alpha)
        return from_noise(schedule, latents, noise, timesteps)

    return denoise


def gaussian(schedule, deviation=2.0):
    """Data is Gaussian around 0: epsilon = sigma z / (abar deviation^2 + 1 - abar)."""

    def denoise(latents, timesteps, context):
        alpha = schedule.alphas_cumprod[timesteps][:, None, None, None, None]
        noise = jnp.sqrt(1 - alpha) / (alpha * deviation**2 + 1 - alpha) * latents
        return from_noise(schedule, latents, noise, timesteps)

    return denoise


def of_everything(latents, timesteps, context):
    """Noise without a meaning, to which latents, neighbouring frames, timestep and text matter."""
    waves = jnp.sin(timesteps / 100)[:, None, None, None, None]
    return jnp.tanh(latents + waves * jnp.flip(latents, 1) + context[:, :, None, None, :])


def blind(latents, timesteps, context):
    """Noise that follows the text and the timestep alone, so that inversion can be exact."""
    waves = jnp.sin(timesteps / 100)[:, None, None, None, None]
    return jnp.broadcast_to(waves + context[:, :, None, None, :], latents.shape)


@pytest.fixture(scope="module")
def clips():
    """Latents of three clips of two frames at 2x2, and a text state for each frame."""
    draw = np.random.default_rng(0).standard_normal
    return (
        jnp.asarray(draw((3, 2, 2, 2, 4)), jnp.float32),
        jnp.asarray(draw((3, 2, 4)), jnp.float32),
        jnp.asarray(draw((3, 2, 4)), jnp.float32),
    )


def points(context):
    return np.broadcast_to(np.asarray(context)[:, :, None, None, :], (len(context), 2, 2, 2, 4))


# Where sampling goes


@PREDICTIONS
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_sampling_lands_on_the_point_that_the_text_names(clips, prediction_type, num_steps):
    latents, context, _ = clips
    schedule = stable_diffusion(prediction_type)
    ours = sample(at_one_point(schedule), schedule, latents, context, num_inference_steps=num_steps)
    np.testing.assert_allclose(ours, points(context), atol=ROUNDING)


@PREDICTIONS
def test_the_way_to_a_point_is_a_straight_mixture_with_constant_noise(clips, prediction_type):
    latents, context, _ = clips
    schedule = stable_diffusion(prediction_type, set_alpha_to_one=False)
    path = sample(
        at_one_point(schedule),
        schedule,
        latents,
        context,
        num_inference_steps=4,
        trajectory=True,
    )
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    mu = points(context)
    noise = (np.asarray(latents) - math.sqrt(alphas[751]) * mu) / math.sqrt(1 - alphas[751])
    # Four steps stand at 751, 501, 251 and 1 and arrive at 501, 251, 1 and abar_0.
    for ours, t in zip(path, [501, 251, 1, 0], strict=True):
        expected = math.sqrt(alphas[t]) * mu + math.sqrt(1 - alphas[t]) * noise
        np.testing.assert_allclose(ours, expected, atol=ROUNDING)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 7.5])
def test_guidance_moves_the_point_along_the_line_from_the_negative_prompt(clips, guidance_scale):
    # The noise is linear in mu, so guided noise is that of mu_neg + s (mu - mu_neg).
    latents, context, negative = clips
    schedule = stable_diffusion()
    ours = sample(
        at_one_point(schedule),
        schedule,
        latents,
        context,
        negative,
        guidance_scale,
        num_inference_steps=5,
    )
    expected = points(negative) + guidance_scale * (points(context) - points(negative))
    np.testing.assert_allclose(ours, expected, atol=10 * ROUNDING)


def test_guidance_of_one_is_no_guidance(clips):
    latents, context, negative = clips
    schedule = stable_diffusion()
    guided = sample(of_everything, schedule, latents, context, negative, 1.0, num_inference_steps=5)
    plain = sample(of_everything, schedule, latents, context, num_inference_steps=5)
    np.testing.assert_allclose(guided, plain, atol=10 * ROUNDING)


def test_the_unconditional_half_of_a_guided_call_comes_first(clips):
    latents, context, negative = clips
    schedule = stable_diffusion()

    def blind_in_the_first_half(latents, timesteps, context):
        first = jnp.arange(len(latents)) < len(latents) // 2
        noise = blind(latents, timesteps, context)
        return jnp.where(first[:, None, None, None, None], noise, 0)

    # At scale 0 the result is the unconditional half's alone.
    ours = sample(
        blind_in_the_first_half, schedule, latents, context, negative, 0.0, num_inference_steps=3
    )
    expected = sample(blind, schedule, latents, negative, num_inference_steps=3)
    np.testing.assert_allclose(ours, expected, atol=ROUNDING)


# Inversion


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_sampling_undoes_inversion(clips, num_steps, set_alpha_to_one):
    latents, context, _ = clips
    schedule = stable_diffusion(set_alpha_to_one=set_alpha_to_one)
    inverted = invert(blind, schedule, latents, context, num_inv_steps=num_steps)
    assert np.abs(inverted - latents).max() > 0.01
    ours = sample(blind, schedule, inverted, context, num_inference_steps=num_steps)
    np.testing.assert_allclose(ours, latents, atol=ROUNDING)


def test_inversion_passes_the_same_latents_as_sampling_the_other_way_round(clips):
    latents, context, _ = clips
    schedule = stable_diffusion()
    up = invert(blind, schedule, latents, context, num_inv_steps=5, trajectory=True)
    down = sample(blind, schedule, up[-1], context, num_inference_steps=5, trajectory=True)
    assert len(up) == 6
    np.testing.assert_array_equal(up[0], latents)
    np.testing.assert_allclose(down, up[-2::-1], atol=ROUNDING)


@PREDICTIONS
def test_inversion_of_gaussian_data_finds_its_quantiles(clips, prediction_type):
    # The flow that DDIM follows keeps z / deviation(t), with deviation(t)^2 = 4 abar + 1 - abar.
    # Its steps are of first order: twice as many leave half the error.
    latents, context, _ = clips
    schedule = stable_diffusion(prediction_type)

    def error(num_steps):
        top = ddim_timesteps(schedule, num_steps)[0]
        variance = 1 + 3 * schedule.alphas_cumprod[top]
        ours = invert(gaussian(schedule), schedule, latents, context, num_inv_steps=num_steps)
        return relative_error(ours, latents * jnp.sqrt(variance) / 2)

    coarse, fine = error(100), error(200)
    assert fine < 0.05
    assert coarse / fine == pytest.approx(2, rel=0.15)


@PREDICTIONS
def test_inversion_then_sampling_approaches_the_start(clips, prediction_type):
    latents, context, _ = clips
    schedule = stable_diffusion(prediction_type)

    def error(num_steps):
        denoise = gaussian(schedule)
        inverted = invert(denoise, schedule, latents, context, num_inv_steps=num_steps)
        ours = sample(denoise, schedule, inverted, context, num_inference_steps=num_steps)
        return relative_error(ours, latents)

    assert error(400) < error(100) / 3 < 0.02


# Batches, seeds and programs


def test_prompts_side_by_side_give_what_each_gives_alone(clips):
    latents, context, negative = clips
    schedule = stable_diffusion()
    keys = jax.random.split(jax.random.key(0), 3)

    def run(*items):
        return sample(
            of_everything,
            schedule,
            *(x[jnp.array(items)] for x in (latents, context, negative)),
            7.5,
            0.5,
            keys[jnp.array(items)],
            num_inference_steps=4,
        )

    together = run(0, 1, 2)
    for item in range(3):
        np.testing.assert_allclose(run(item)[0], together[item], rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_array_equal(run(2, 0, 1), together[jnp.array([2, 0, 1])])


def test_noise_of_each_step_is_fresh_for_every_item_and_unit_gaussian():
    # A network that predicts no noise leaves z sqrt(abar_to / abar) + sigma noise.
    def silent(latents, timesteps, context):
        return jnp.zeros_like(latents)

    schedule = stable_diffusion()
    num_steps, eta = 4, 0.5
    start, context = jnp.ones((2, 3, 16, 16, 4)), jnp.zeros((2, 1, 1))
    path = sample(
        silent,
        schedule,
        start,
        context,
        None,
        1.0,
        eta,
        jax.random.split(jax.random.key(0), 2),
        num_inference_steps=num_steps,
        trajectory=True,
    )
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    noises = []
    stands = [751, 501, 251]  # the last step, to abar 1, has no noise
    for t, before, after in zip(stands, [start, *path], path, strict=False):
        alpha, alpha_to = alphas[t], alphas[t - 250]
        sigma = eta * math.sqrt((1 - alpha_to) / (1 - alpha) * (1 - alpha / alpha_to))
        noise = (np.asarray(after) - math.sqrt(alpha_to / alpha) * np.asarray(before)) / sigma
        noises += [noise[0].ravel(), noise[1].ravel()]
    count = noises[0].size
    # Correlations of independent noise have standard error 1 / sqrt(count); six noises, five of it.
    correlations = np.corrcoef(noises)
    np.testing.assert_allclose(correlations, np.eye(6), atol=5 / math.sqrt(count))
    np.testing.assert_allclose(np.std(noises, axis=1), 1, atol=5 / math.sqrt(2 * count))


@pytest.mark.parametrize(
    ("run", "length"),
    [
        pytest.param(partial(sample, num_inference_steps=4), 4, id="sampling"),
        pytest.param(partial(invert, num_inv_steps=4), 5, id="inversion, which starts clean"),
    ],
)
def test_trajectory_ends_in_the_result(clips, run, length):
    latents, context, _ = clips
    schedule = stable_diffusion()
    path = run(of_everything, schedule, latents, context, trajectory=True)
    assert len(path) == length
    result = run(of_everything, schedule, latents, context)
    np.testing.assert_allclose(path[-1], result, atol=ROUNDING)


def test_keys_and_values_may_stand_in_the_place_of_the_text(clips):
    latents, *texts = clips
    schedule = stable_diffusion()

    def of_keys(latents, timesteps, text):
        (((keys, _),),), *_ = text
        return of_everything(latents, timesteps, keys[:, 0, :, 0])

    # A pair of a block of a transformer of a level.
    read = [((((text[:, None, :, None], text[:, None, :, None]),),),) for text in texts]
    for guidance in (slice(1), slice(2)):
        np.testing.assert_array_equal(
            sample(of_keys, schedule, latents, *read[guidance], num_inference_steps=3),
            sample(of_everything, schedule, latents, *texts[guidance], num_inference_steps=3),
        )


@pytest.mark.parametrize("num_steps", [2, 50])
def test_the_whole_loop_is_one_program_that_holds_the_network_once(clips, num_steps):
    latents, context, negative = clips
    traces = []

    def counted(latents, timesteps, context):
        traces.append(latents.shape)
        return of_everything(latents, timesteps, context)

    schedule = stable_diffusion()
    arguments = counted, schedule, latents, context, negative, 7.5
    jax.block_until_ready(sample(*arguments, num_inference_steps=num_steps))
    assert traces == [(6, 2, 2, 2, 4)]  # both halves of guidance in one call
    traces.clear()
    jax.block_until_ready(invert(counted, schedule, latents, context, num_inv_steps=num_steps))
    assert traces == [(3, 2, 2, 2, 4)]


def test_another_guidance_scale_or_prompt_compiles_nothing(clips):
    latents, context, negative = clips
    traces = []

    def counted(latents, timesteps, context):
        traces.append(latents.shape)
        return of_everything(latents, timesteps, context)

    schedule = stable_diffusion()
    for scale in (7.5, 12.0):
        for text in (context, negative):
            sample(counted, schedule, latents, text, negative, scale, num_inference_steps=2)
    assert len(traces) == 1


@pytest.mark.parametrize("num_steps", [0, 1000])
def test_a_number_of_steps_that_does_not_fit_is_refused(clips, num_steps):
    latents, context, _ = clips
    schedule = stable_diffusion()
    expected = f"expected 1 to 999, got {num_steps}"
    with pytest.raises(ValueError, match=expected):
        sample(of_everything, schedule, latents, context, num_inference_steps=num_steps)
    with pytest.raises(ValueError, match=expected):
        invert(of_everything, schedule, latents, context, num_inv_steps=num_steps)
