import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tav_jax.diffusion.schedule import make_schedule
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.training.optimizer import TRAINABLE_MODULES, label_params, make_optimizer, select
from tav_jax.training.train_step import (
    NoisedBatch,
    NotLearningError,
    apply_gradients,
    check_movement,
    denoising_loss,
    draw_batch,
    fingerprints,
    init_state,
    train_step,
)

ROUNDING = 1e-5  # relative, two orders of the same float32 sums

SCALING_FACTOR = 0.25
ACCUMULATION = pytest.mark.parametrize("steps", [1, 2], ids=["one draw", "two draws"])


def stable_diffusion(prediction_type="epsilon"):
    return make_schedule(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        set_alpha_to_one=False,
    )


ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


@pytest.fixture(scope="module")
def schedule():
    return stable_diffusion()


@pytest.fixture(scope="module")
def clip():
    """Posterior moments of a clip of three frames at 4x4, and five text states."""
    draw = np.random.default_rng(0).standard_normal
    moments, context = draw((1, 3, 4, 4, 8)), draw((1, 5, 8))
    return jnp.asarray(moments, jnp.float32), jnp.asarray(context, jnp.float32)


@pytest.fixture(scope="module")
def unet(random_network, unet_config):
    """One level only: compiling a derivative takes seconds for each."""
    one_level = {
        "block_out_channels": (8,),
        "down_attention": (True,),
        "up_attention": (True,),
        "num_attention_heads": (2,),
    }
    return random_network(UNet3DConditionModel, replace(unet_config, **one_level))


@pytest.fixture(scope="module")
def labels(unet):
    return label_params(unet.params, TRAINABLE_MODULES)


@pytest.fixture(scope="module")
def optimizer(labels):
    return make_optimizer(labels, 1e-3, max_grad_norm=1e6)


@pytest.fixture(scope="module")
def start(unet, optimizer):
    return init_state(unet, optimizer, jax.random.key(0))


# The loss


def noise_itself(schedule, draw):
    return draw.noise


def velocity_itself(schedule, draw):
    alpha = ALPHAS[np.asarray(draw.timesteps)][:, None, None, None, None]
    return np.float32(np.sqrt(alpha)) * draw.noise - np.float32(np.sqrt(1 - alpha)) * draw.latents


@pytest.fixture
def draw(key):
    latents, noise = jax.random.normal(key, (2, 2, 2, 2, 2, 4))
    return NoisedBatch(latents, noise, jnp.array([100, 900]))


@pytest.mark.parametrize(
    ("prediction_type", "truth", "other"),
    [
        pytest.param("epsilon", noise_itself, velocity_itself, id="epsilon"),
        pytest.param("v_prediction", velocity_itself, noise_itself, id="v_prediction"),
    ],
)
def test_the_loss_is_zero_at_the_truth_and_nowhere_near(draw, prediction_type, truth, other):
    schedule, context = stable_diffusion(prediction_type), jnp.zeros((2, 1, 1))

    def loss(prediction):
        return denoising_loss(lambda *inputs: jnp.asarray(prediction), schedule, draw, context)

    assert loss(truth(schedule, draw)) < ROUNDING**2
    assert loss(other(schedule, draw)) > 0.1
    np.testing.assert_allclose(loss(truth(schedule, draw) + 0.5), 0.25, rtol=ROUNDING)


def test_the_network_sees_noisy_latents_their_timesteps_and_the_text(draw, schedule):
    seen = []

    def denoise(*inputs):
        seen.extend(inputs)
        return draw.noise

    context = jnp.arange(6.0).reshape(2, 1, 3)
    denoising_loss(denoise, schedule, draw, context)
    latents, timesteps, text = seen
    alpha = ALPHAS[[100, 900]][:, None, None, None, None]
    expected = np.sqrt(alpha) * np.asarray(draw.latents)
    expected += np.sqrt(1 - alpha) * np.asarray(draw.noise)
    np.testing.assert_allclose(latents, expected, atol=ROUNDING)
    np.testing.assert_array_equal(timesteps, [100, 900])
    np.testing.assert_array_equal(text, context)


def test_the_loss_of_a_bfloat16_prediction_is_float32(draw, schedule):
    # 1/3 is no bfloat16 number: rounded to one, the loss would be off by 2e-3.
    third = draw._replace(noise=jnp.full_like(draw.noise, 1 / 3))
    loss = denoising_loss(
        lambda latents, *_: jnp.zeros_like(latents, jnp.bfloat16),
        schedule,
        third,
        jnp.zeros((2, 1, 1)),
    )
    assert loss.dtype == jnp.float32
    assert loss == pytest.approx(1 / 9, rel=1e-6)


# What a step draws


@pytest.fixture(scope="module")
def many(schedule):
    """Draws for 20000 clips of 4 values, with posteriors of mean 3 and deviation 2."""
    moments = np.empty((20_000, 1, 1, 1, 8), np.float32)
    moments[..., :4], moments[..., 4:] = 3, 2 * math.log(2)
    return draw_batch(jax.random.key(0), jnp.asarray(moments), schedule, SCALING_FACTOR)


def test_the_posterior_is_sampled_and_scaled(many):
    samples = np.asarray(many.latents) / SCALING_FACTOR
    # 80000 values: standard errors 2 / sqrt(80000) = 0.007, of which five are allowed.
    assert samples.mean() == pytest.approx(3, abs=0.035)
    assert samples.std() == pytest.approx(2, abs=0.025)


def test_noise_is_unit_gaussian_and_apart_from_the_posterior_s(many):
    noise = np.ravel(many.noise)
    posterior_noise = (np.ravel(many.latents) / SCALING_FACTOR - 3) / 2
    assert noise.mean() == pytest.approx(0, abs=0.018)
    assert noise.std() == pytest.approx(1, abs=0.0125)
    assert np.corrcoef(noise, posterior_noise)[0, 1] == pytest.approx(0, abs=0.018)


def test_timesteps_are_whole_and_uniform_from_0_to_999(many):
    timesteps = np.asarray(many.timesteps)
    assert timesteps.dtype == np.int32
    assert timesteps.shape == (20_000,)
    # Each end is missed by all with probability exp(-20).
    assert (timesteps.min(), timesteps.max()) == (0, 999)
    # Deciles of 2000 clips each, with standard error 42.
    np.testing.assert_allclose(np.histogram(timesteps, 10, (0, 1000))[0], 2000, atol=5 * 42)


def test_each_step_draws_posterior_noise_and_timesteps_anew(clip, schedule):
    moments, _ = clip
    one, other = (
        draw_batch(jax.random.fold_in(jax.random.key(0), step), moments, schedule, 1.0)
        for step in (0, 1)
    )
    for name in NoisedBatch._fields:
        assert np.all(getattr(one, name) != getattr(other, name)), name


# Steps


def reference_step(state, draw_keys, moments, context, schedule, *, names, optimizer):
    """A step that differentiates the named leaves and knows of no others."""
    chosen = {name: state.unet.params[name] for name in names}

    def add_draw(total, draw_key):
        draw = draw_batch(draw_key, moments, schedule, SCALING_FACTOR)

        def loss(chosen):
            unet = state.unet.with_params(state.unet.params | chosen)
            return denoising_loss(unet, schedule, draw, context)

        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(chosen)), None

    total, _ = jax.lax.scan(
        add_draw, (jnp.float32(0), jax.tree.map(jnp.zeros_like, chosen)), draw_keys
    )
    loss, gradients = jax.tree.map(lambda x: x / len(draw_keys), total)
    return apply_gradients(state, gradients, optimizer), loss, gradients


@pytest.fixture(scope="module")
def steps_of(jit, start, clip, schedule, labels, optimizer):
    """Compiled steps by number of draws: ours, and references for the named leaves."""
    cache = {}
    settings = {"optimizer": optimizer, "labels": labels, "scaling_factor": SCALING_FACTOR}

    def compiled(kind, steps):
        if (kind, steps) not in cache:
            if kind == "ours":
                step = partial(train_step, gradient_accumulation_steps=steps, **settings)
                inputs = start, *clip, schedule
            else:
                names = [name for name in labels if kind == "all" or labels[name] == "train"]
                step = partial(reference_step, names=names, optimizer=optimizer)
                inputs = start, jax.random.split(start.key, steps), *clip, schedule
            cache[kind, steps] = jit(step).lower(*inputs).compile()
        return cache[kind, steps]

    return compiled


@pytest.fixture(scope="module")
def states(steps_of, start, clip, schedule):
    """The state before and after each of three steps."""
    states = [start]
    for _ in range(3):
        states.append(steps_of("ours", 1)(states[-1], *clip, schedule)[0])
    return states


def test_frozen_leaves_stay_equal_to_the_bit_and_trained_ones_all_move(states, labels):
    before, after = states[0].unet.params, states[-1].unet.params
    assert set(labels.values()) == {"train", "freeze"}
    moved = {name for name in labels if np.any(after[name] != before[name])}
    assert moved == {name for name, label in labels.items() if label == "train"}
    assert [int(state.step) for state in states] == [0, 1, 2, 3]


def test_the_optimiser_keeps_no_state_for_frozen_leaves(start, labels):
    arrays = [leaf for leaf in jax.tree.leaves(start.opt_state) if leaf.ndim > 0]
    trained = select(start.unet.params, labels, "train")
    # Adam's two moments of each trained leaf; besides them only counts.
    assert len(arrays) == 2 * len(trained)
    assert sum(leaf.size for leaf in arrays) == 2 * sum(leaf.size for leaf in trained.values())


@ACCUMULATION
def test_no_weight_gradient_of_a_frozen_leaf_is_computed(steps_of, steps):
    # The body of a loop may be counted once or as often as it runs, but in both alike.
    ours, trained = (steps_of(kind, steps).cost_analysis()["flops"] for kind in ("ours", "trained"))
    assert ours == pytest.approx(trained, rel=0.01)


def test_weight_gradients_of_frozen_leaves_would_show_in_the_count(steps_of):
    every, trained = (steps_of(kind, 2).cost_analysis()["flops"] for kind in ("all", "trained"))
    assert every > 1.2 * trained


def draw_keys(state, count):
    step_key = jax.random.fold_in(state.key, state.step)
    return [jax.random.fold_in(step_key, index) for index in range(count)]


@ACCUMULATION
def test_the_gradient_is_the_mean_over_the_draws(steps_of, start, clip, schedule, steps):
    state, metrics = steps_of("ours", steps)(start, *clip, schedule)
    reference = steps_of("trained", 1)
    draws = [
        reference(start, draw_key[None], *clip, schedule)[1:]
        for draw_key in draw_keys(start, steps)
    ]
    loss, gradients = jax.tree.map(lambda *each: sum(map(np.float64, each)) / steps, *draws)
    norm = math.sqrt(sum(np.sum(np.square(gradient)) for gradient in gradients.values()))
    assert metrics["loss"] == pytest.approx(loss, rel=ROUNDING)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=ROUNDING)
    # After one step Adam's mean is a tenth of the gradient, as nothing was clipped.
    mean = optax.tree.get(state.opt_state, "mu")
    for name, gradient in gradients.items():
        np.testing.assert_allclose(mean[name], 0.1 * gradient, atol=ROUNDING * 0.1 * norm)


def test_draws_of_one_step_differ(steps_of, start, clip, schedule):
    losses = [
        steps_of("trained", 1)(start, draw_key[None], *clip, schedule)[1]
        for draw_key in draw_keys(start, 2)
    ]
    assert losses[0] != losses[1]


def as_numbers(state):
    """The state as NumPy arrays, its key by its data: what a checkpoint can hold."""
    return jax.tree.map(np.array, state._replace(key=jax.random.key_data(state.key)))


def test_a_step_after_a_restored_state_is_the_uninterrupted_one(steps_of, states, clip, schedule):
    *_, second, third = states
    saved = as_numbers(second)
    restored = jax.tree.map(jnp.asarray, saved)
    restored = restored._replace(key=jax.random.wrap_key_data(restored.key))
    again, _ = steps_of("ours", 1)(restored, *clip, schedule)
    jax.tree.map(np.testing.assert_array_equal, as_numbers(again), as_numbers(third))


def test_randomness_comes_from_key_and_step_alone(steps_of, start, clip, schedule):
    def loss(**changes):
        return steps_of("ours", 1)(start._replace(**changes), *clip, schedule)[1]["loss"]

    assert loss() == loss()
    assert loss(step=jnp.int32(1)) != loss()
    assert loss(key=jax.random.key(1)) != loss()


# Whether a run learns


def test_a_fingerprint_tells_any_change(key):
    value = jax.random.normal(key, (4, 4))
    changed = {
        "one bit": value.at[1, 2].set(jnp.nextafter(value[1, 2], jnp.inf)),
        "a sign": value.at[3, 3].multiply(-1),
        "two values swapped": value.at[0, 0].set(value[0, 1]).at[0, 1].set(value[0, 0]),
        "a shift of all": jnp.roll(value, 1),
    }
    expected = fingerprints({"w": value})["w"]
    assert fingerprints({"w": value + 0})["w"] == expected
    same = [name for name, other in changed.items() if fingerprints({"w": other})["w"] == expected]
    assert same == []


@pytest.mark.parametrize(
    ("moved", "message"),
    [
        pytest.param({"a.to_q.kernel", "b.attn.kernel"}, None, id="all that trains"),
        pytest.param({"a.to_q.kernel"}, "nothing has moved in attn:", id="one group stays"),
        pytest.param(
            {"a.to_q.kernel", "b.attn.kernel", "c.kernel"},
            "frozen parameters have changed: c.kernel",
            id="a frozen one moves",
        ),
    ],
)
def test_a_run_that_moves_the_wrong_parameters_is_stopped(moved, message):
    groups = ["to_q", "attn"]
    names = ["a.to_q.kernel", "b.attn.kernel", "b.attn.bias", "c.kernel"]
    before = {name: jnp.uint32(1) for name in names}
    after = before | {name: jnp.uint32(2) for name in moved}
    labels = label_params(names, groups)
    if message is None:
        check_movement(before, after, labels, groups)
    else:
        with pytest.raises(NotLearningError, match=message):
            check_movement(before, after, labels, groups)
