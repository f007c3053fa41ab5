import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tav_jax.diffusion.schedule import (
    add_noise,
    ddim_inverse_step,
    ddim_step,
    ddim_step_size,
    ddim_timesteps,
    make_schedule,
    training_target,
    velocity,
)

ROUNDING = 1e-5  # float32, for values around 1

PREDICTIONS = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])


def stable_diffusion(prediction_type="epsilon", **changes):
    settings = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
    }
    return make_schedule(prediction_type=prediction_type, **settings | changes)


def alphas_by_product(*, beta_start, beta_end, power, count=1000):
    """abar_t, one factor at a time in float64; betas evenly spaced once their root is taken."""
    first, last = beta_start ** (1 / power), beta_end ** (1 / power)
    alphas, product = [], 1.0
    for t in range(count):
        product *= 1 - (first + (last - first) * t / (count - 1)) ** power
        alphas.append(product)
    return np.array(alphas)


ALPHAS = alphas_by_product(beta_start=0.00085, beta_end=0.012, power=2)


@pytest.fixture
def clip(key):
    """Clean latents and noise of three clips."""
    return jax.random.normal(key, (2, 3, 2, 2, 2, 4))


# Alphas


@pytest.mark.parametrize(("beta_schedule", "power"), [("linear", 1), ("scaled_linear", 2)])
def test_alphas_are_products_of_one_minus_beta(beta_schedule, power):
    schedule = stable_diffusion(beta_schedule=beta_schedule)
    expected = alphas_by_product(beta_start=0.00085, beta_end=0.012, power=power)
    assert schedule.alphas_cumprod.dtype == jnp.float32
    np.testing.assert_allclose(schedule.alphas_cumprod, expected, rtol=1e-6)
    assert schedule.alphas_cumprod[0] == np.float32(1 - 0.00085)


@pytest.mark.parametrize(
    ("set_alpha_to_one", "expected"),
    [pytest.param(False, np.float32(1 - 0.00085), id="abar_0"), pytest.param(True, 1, id="one")],
)
def test_final_alpha_is_abar_0_or_one(set_alpha_to_one, expected):
    assert stable_diffusion(set_alpha_to_one=set_alpha_to_one).final_alpha_cumprod == expected


# Noise and what the network predicts


def test_add_noise_keeps_the_share_of_signal_that_abar_says(clip):
    latents, noise = clip
    timesteps = [0, 500, 999]
    ours = add_noise(stable_diffusion(), latents, noise, jnp.array(timesteps))
    for item, t in enumerate(timesteps):
        signal, sigma = math.sqrt(ALPHAS[t]), math.sqrt(1 - ALPHAS[t])
        expected = signal * latents[item] + sigma * noise[item]
        np.testing.assert_allclose(ours[item], expected, atol=ROUNDING)


def test_velocity_gives_back_the_clean_latents_and_the_noise(clip):
    # Salimans & Ho 2022, appendix D: x0 = alpha z - sigma v and epsilon = sigma z + alpha v.
    latents, noise = clip
    timesteps = jnp.array([0, 500, 999])
    schedule = stable_diffusion()
    noisy = add_noise(schedule, latents, noise, timesteps)
    v = velocity(schedule, latents, noise, timesteps)
    for item, t in enumerate(timesteps):
        signal, sigma = math.sqrt(ALPHAS[t]), math.sqrt(1 - ALPHAS[t])
        clean = signal * noisy[item] - sigma * v[item]
        np.testing.assert_allclose(clean, latents[item], atol=ROUNDING)
        np.testing.assert_allclose(
            sigma * noisy[item] + signal * v[item], noise[item], atol=ROUNDING
        )


def test_training_target_is_the_noise_or_the_velocity(clip):
    latents, noise = clip
    timesteps = jnp.array([0, 500, 999])
    target = training_target(stable_diffusion("epsilon"), latents, noise, timesteps)
    np.testing.assert_array_equal(target, noise)
    schedule = stable_diffusion("v_prediction")
    target = training_target(schedule, latents, noise, timesteps)
    np.testing.assert_array_equal(target, velocity(schedule, latents, noise, timesteps))


# Timesteps


@pytest.mark.parametrize(
    ("num_steps", "first", "last", "size"),
    [
        pytest.param(50, [981, 961, 941], [41, 21, 1], 20, id="the paper's 50"),
        pytest.param(3, [667, 334, 1], [667, 334, 1], 333, id="3 leave a remainder"),
        pytest.param(1, [1], [1], 1000, id="a single step"),
        pytest.param(999, [999, 998, 997], [3, 2, 1], 1, id="every one"),
    ],
)
def test_timesteps_are_evenly_spaced_down_to_one(num_steps, first, last, size):
    schedule = stable_diffusion()
    timesteps = ddim_timesteps(schedule, num_steps)
    assert timesteps.dtype == np.int32
    assert len(timesteps) == num_steps
    assert timesteps[:3].tolist() == first
    assert timesteps[-3:].tolist() == last
    assert ddim_step_size(schedule, num_steps) == size


def test_every_number_of_steps_stays_within_the_schedule():
    schedule = stable_diffusion()
    for num_steps in range(1, 1000):
        timesteps = ddim_timesteps(schedule, num_steps)
        assert timesteps[0] <= 999
        assert timesteps[-1] == 1
        assert set(np.diff(timesteps)) <= {-ddim_step_size(schedule, num_steps)}


@pytest.mark.parametrize("num_steps", [0, -1, 1000, 2000])
def test_a_number_of_steps_that_does_not_fit_is_refused(num_steps):
    with pytest.raises(ValueError, match=f"DDIM steps: expected 1 to 999, got {num_steps}"):
        ddim_timesteps(stable_diffusion(), num_steps)


# DDIM


def noisy(latents, noise, alpha):
    return math.sqrt(alpha) * latents + math.sqrt(1 - alpha) * noise


def prediction(prediction_type, latents, noise, alpha):
    """What a perfect network would say of noise in latents."""
    if prediction_type == "epsilon":
        return noise
    return math.sqrt(alpha) * noise - math.sqrt(1 - alpha) * latents


@PREDICTIONS
@pytest.mark.parametrize(
    ("timestep", "size"),
    [
        pytest.param(981, 20, id="first of 50"),
        pytest.param(21, 20, id="last but one of 50"),
        pytest.param(999, 1, id="smallest step"),
        pytest.param(20, 20, id="arrives at timestep 0"),
    ],
)
def test_a_step_keeps_clean_latents_and_noise_and_changes_their_shares(
    clip, prediction_type, timestep, size
):
    latents, noise = clip
    alpha, alpha_to = ALPHAS[timestep], ALPHAS[timestep - size]
    # abar_0 is not the final alpha here, so that arriving at timestep 0 is not yet the end.
    ours = ddim_step(
        stable_diffusion(prediction_type, set_alpha_to_one=True),
        prediction(prediction_type, latents, noise, alpha),
        noisy(latents, noise, alpha),
        jnp.int32(timestep),
        size,
    )
    # At abar 0.006 clean latents are found from 13 times as much noise.
    np.testing.assert_allclose(ours, noisy(latents, noise, alpha_to), atol=5 * ROUNDING)


@PREDICTIONS
@pytest.mark.parametrize(
    ("set_alpha_to_one", "arrives_at"),
    [pytest.param(False, ALPHAS[0], id="abar_0"), pytest.param(True, 1.0, id="one")],
)
def test_the_last_step_arrives_at_the_final_alpha(
    clip, prediction_type, set_alpha_to_one, arrives_at
):
    latents, noise = clip
    schedule = stable_diffusion(prediction_type, set_alpha_to_one=set_alpha_to_one)
    model_output = prediction(prediction_type, latents, noise, ALPHAS[1])
    ours = ddim_step(schedule, model_output, noisy(latents, noise, ALPHAS[1]), jnp.int32(1), 20)
    np.testing.assert_allclose(ours, noisy(latents, noise, arrives_at), atol=ROUNDING)


@PREDICTIONS
@pytest.mark.parametrize(
    ("timestep", "size"),
    [
        pytest.param(981, 20, id="far from the data"),
        pytest.param(501, 100, id="in the middle"),
        pytest.param(1, 20, id="at the data"),
    ],
)
def test_an_inverse_step_undoes_a_step_with_the_same_noise(clip, prediction_type, timestep, size):
    schedule = stable_diffusion(prediction_type)
    latents, noise = clip
    at = jnp.int32(timestep)
    alpha = ALPHAS[timestep]
    alpha_to = ALPHAS[timestep - size] if timestep >= size else ALPHAS[0]
    start = noisy(latents, noise, alpha)
    nearer = ddim_step(
        schedule, prediction(prediction_type, latents, noise, alpha), start, at, size
    )
    back = ddim_inverse_step(
        schedule, prediction(prediction_type, latents, noise, alpha_to), nearer, at, size
    )
    np.testing.assert_allclose(back, start, atol=ROUNDING)


def one_random_step(eta, noise_value, timestep=500):
    """A step of size 1 from known latents and prediction, under constant noise."""
    latents, model_output, noise = (
        jnp.full((1, 1, 1, 1, 1), value) for value in (0.7, -1.3, float(noise_value))
    )
    return ddim_step(
        stable_diffusion(), model_output, latents, jnp.int32(timestep), 1, eta, noise
    ).item()


def test_at_eta_one_a_step_is_the_posterior_of_ddpm():
    # Ho et al. 2020, eq. 6 and 7, at t = 500.
    alpha, alpha_to = ALPHAS[500], ALPHAS[499]
    beta = 1 - alpha / alpha_to
    variance = (1 - alpha_to) / (1 - alpha) * beta
    clean = (0.7 + 1.3 * math.sqrt(1 - alpha)) / math.sqrt(alpha)
    mean = math.sqrt(alpha_to) * beta / (1 - alpha) * clean
    mean += math.sqrt(1 - beta) * (1 - alpha_to) / (1 - alpha) * 0.7
    assert one_random_step(1.0, 0) == pytest.approx(mean, abs=ROUNDING)
    deviation = (one_random_step(1.0, 1) - one_random_step(1.0, -1)) / 2
    # beta comes from the difference of two numbers near 1, each known within 6e-8.
    assert deviation**2 == pytest.approx(variance, rel=1e-4)


def test_noise_is_proportional_to_eta_and_absent_at_zero():
    whole = one_random_step(1.0, 1) - one_random_step(1.0, -1)
    half = one_random_step(0.5, 1) - one_random_step(0.5, -1)
    assert half == pytest.approx(whole / 2, rel=1e-4)
    assert one_random_step(0.0, 1) == one_random_step(0.0, -1)


def test_without_noise_eta_zero_is_the_deterministic_step():
    latents, model_output = jnp.full((1, 1, 1, 1, 1), 0.7), jnp.full((1, 1, 1, 1, 1), -1.3)
    plain = ddim_step(stable_diffusion(), model_output, latents, jnp.int32(500), 1).item()
    assert one_random_step(0.0, 1) == pytest.approx(plain, abs=1e-6)
