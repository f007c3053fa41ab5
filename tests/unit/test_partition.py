import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tav_jax.models.network import parameter_shapes
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.pretrained.configs import read_unet_config
from tav_jax.pretrained.sd_v1_4 import CONFIGS
from tav_jax.training.optimizer import (
    TRAINABLE_MODULES,
    label_params,
    make_lr_schedule,
    make_optimizer,
    select,
)

BLOCK = "down_blocks.0.attentions.1.transformer_blocks.0"


@pytest.fixture(scope="module")
def names(unet_config):
    return list(parameter_shapes(UNet3DConditionModel, unet_config))


def trained(names, modules):
    return {name for name, label in label_params(names, modules).items() if label == "train"}


# Labels


@pytest.mark.parametrize(
    ("name", "label"),
    [
        pytest.param("attn1.to_q.kernel", "train", id="query between frames"),
        pytest.param("attn1.to_k.kernel", "freeze", id="key between frames"),
        pytest.param("attn1.to_v.kernel", "freeze", id="value between frames"),
        pytest.param("attn1.to_out.0.kernel", "freeze", id="output between frames"),
        pytest.param("attn2.to_q.kernel", "train", id="query to the text"),
        pytest.param("attn2.to_k.kernel", "freeze", id="key of the text"),
        pytest.param("attn2.to_out.0.bias", "freeze", id="output from the text"),
        pytest.param("attn_temp.to_q.kernel", "train", id="query over time"),
        pytest.param("attn_temp.to_k.kernel", "train", id="key over time"),
        pytest.param("attn_temp.to_v.kernel", "train", id="value over time"),
        pytest.param("attn_temp.to_out.0.kernel", "train", id="output over time"),
        pytest.param("attn_temp.to_out.0.bias", "train", id="output bias over time"),
        pytest.param("norm_temp.scale", "freeze", id="scale of the norm over time"),
        pytest.param("norm_temp.bias", "freeze", id="bias of the norm over time"),
        pytest.param("ff.net.0.proj.kernel", "freeze", id="feed-forward"),
    ],
)
def test_labels_are_those_of_the_paper(names, name, label):
    in_every_block = [full for full in names if full.endswith(f"transformer_blocks.0.{name}")]
    assert len(in_every_block) == 4  # one on the way down, one in the middle, two up
    labels = label_params(names, TRAINABLE_MODULES)
    assert {labels[full] for full in in_every_block} == {label}


def test_nothing_outside_of_transformers_trains(names):
    labels = label_params(names, TRAINABLE_MODULES)
    assert set(labels) == set(names)
    assert all(".transformer_blocks." in name for name in trained(names, TRAINABLE_MODULES))


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        pytest.param("to_q", {"attn1.to_q.kernel", "attn2.to_q.kernel"}, id="one step"),
        pytest.param("attn1.to_q", {"attn1.to_q.kernel"}, id="two steps"),
        pytest.param("to_out", {"attn1.to_out.0.kernel"}, id="everything below"),
        pytest.param("to_out.0", {"attn1.to_out.0.kernel"}, id="an element of a list"),
        pytest.param(f"{BLOCK}.attn2", {"attn2.to_q.kernel"}, id="a whole path"),
        pytest.param("attn", {"attn.kernel"}, id="no start of a longer name"),
        pytest.param("n1", {"n1.kernel"}, id="no end of a longer name"),
    ],
)
def test_a_pattern_matches_whole_names_only(pattern, matches):
    below = [
        "attn1.to_q.kernel",
        "attn1.to_out.0.kernel",
        "attn2.to_q.kernel",
        "attn.kernel",
        "n1.kernel",
        "xattn1.xto_q.kernel",
        "attn1.to_q2.kernel",
    ]
    found = trained([f"{BLOCK}.{name}" for name in below], [pattern])
    assert found == {f"{BLOCK}.{name}" for name in matches}


def test_a_pattern_at_the_start_of_a_path_matches():
    assert trained(["conv_in.kernel", "down.conv_in2.kernel"], ["conv_in"]) == {"conv_in.kernel"}


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        pytest.param(
            "attn3.to_q", "modules like it: attn1.to_q, attn2.to_q, attn_temp.to_q", id="same end"
        ),
        pytest.param("atn_temp", "modules like it: .*attn_temp", id="misspelt"),
        pytest.param("attn1.to_q.weight", "modules like it: ", id="a tensor and no module"),
        pytest.param("%", "see model.unet.params for all names", id="like nothing"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(names, pattern, hint):
    expected = f"^trainable_modules: '{pattern}' matches no parameter; {hint}"
    with pytest.raises(ValueError, match=expected):
        label_params(names, ["attn_temp", pattern])


def test_all_patterns_that_match_nothing_are_told_at_once(names):
    with pytest.raises(ValueError, match=r"'attn3.to_q'(.|\n)*'attn4.to_k'") as error:
        label_params(names, ["attn3.to_q", "attn_temp", "attn4.to_k"])
    assert len(str(error.value).splitlines()) == 2


def test_no_patterns_at_all_are_refused(names):
    with pytest.raises(ValueError, match="trainable_modules: empty"):
        label_params(names, [])


def test_74_million_of_909_million_parameters_of_v1_4_train():
    config = read_unet_config(CONFIGS["unet"])
    shapes = parameter_shapes(UNet3DConditionModel, config)
    count = Counter()
    for name, label in label_params(shapes, TRAINABLE_MODULES).items():
        count[label] += math.prod(shapes[name].shape)
    # Two queries, and queries, keys, values and output with a bias over time. Two transformers
    # down and three up at each of three widths, and one in the middle.
    each = {width: 6 * width**2 + width for width in (320, 640, 1280)}
    assert count["train"] == 5 * each[320] + 5 * each[640] + 6 * each[1280] == 74_354_880
    # The published image U-Net has 859,520,964 parameters; ours adds norm and attention over time.
    over_time = {width: 4 * width**2 + 3 * width for width in each}
    added = 5 * over_time[320] + 5 * over_time[640] + 6 * over_time[1280]
    assert count.total() == 859_520_964 + added


def test_select_divides_parameters_by_label():
    labels = {"a": "train", "b": "freeze", "c": "train"}
    params = {name: jnp.float32(index) for index, name in enumerate("abc")}
    assert select(params, labels, "train") == {"a": 0, "c": 2}
    assert select(params, labels, "freeze") == {"b": 1}


# The optimiser


def one_update(gradients, **settings):
    """Updates of "trained" and "frozen", both (1, 2), by the given gradients of both."""
    optimizer = make_optimizer({"trained": "train", "frozen": "freeze"}, 0.1, **settings)
    params = {name: jnp.array([1.0, 2.0]) for name in ("trained", "frozen")}
    gradients = {name: jnp.asarray(value, jnp.float32) for name, value in gradients.items()}
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    return updates


@pytest.mark.parametrize(
    ("max_grad_norm", "clipped"),
    [
        pytest.param(1.0, (0.6, 0.8), id="clipped"),
        pytest.param(10.0, (3.0, 4.0), id="within the limit"),
    ],
)
@pytest.mark.parametrize("frozen", [0.0, 1e6])
def test_clipping_and_the_update_see_trained_gradients_only(max_grad_norm, clipped, frozen):
    # Adam's first step is g / (|g| + eps), which tells lengths apart while eps is 1; then the
    # decay of the parameters (1, 2), all of it times the learning rate 0.1.
    updates = one_update(
        {"trained": (3, 4), "frozen": (frozen, frozen)},
        max_grad_norm=max_grad_norm,
        adam_epsilon=1.0,
        adam_weight_decay=0.01,
    )
    expected = [-0.1 * (g / (g + 1) + 0.01 * p) for g, p in zip(clipped, (1, 2), strict=True)]
    np.testing.assert_allclose(updates["trained"], expected, rtol=1e-5)
    np.testing.assert_array_equal(updates["frozen"], [0, 0])


def test_defaults_are_those_of_the_paper():
    # First step of AdamW with eps 1e-8: the sign of the gradient, and a decay of 1e-2.
    updates = one_update({"trained": (3, -4), "frozen": (1, 1)})
    np.testing.assert_allclose(updates["trained"], [-0.1 * 1.01, -0.1 * (-1 + 0.02)], rtol=1e-5)
    # Gradients g, then 0: mean 0.9 0.1 g / (1 - 0.9^2), square 0.999 0.001 g^2 / (1 - 0.999^2).
    optimizer = make_optimizer({"trained": "train"}, 0.1, adam_weight_decay=0.0)
    params = {"trained": jnp.array([1.0])}
    state = optimizer.init(params)
    _, state = optimizer.update({"trained": jnp.array([0.5])}, state, params)
    updates, _ = optimizer.update({"trained": jnp.array([0.0])}, state, params)
    mean = 0.9 * 0.1 / (1 - 0.9**2)
    square = 0.999 * 0.001 / (1 - 0.999**2)
    np.testing.assert_allclose(updates["trained"], [-0.1 * mean / math.sqrt(square)], rtol=1e-4)


# Learning rates

# Warm-up over 10 of 110 steps, to 2e-5. At step 60 half of the way after the warm-up is done, at
# step 35 a quarter.
LR_CASES = [
    ("constant", {0: 1, 5: 1, 60: 1, 110: 1, 500: 1}),
    ("constant_with_warmup", {0: 0, 5: 1 / 2, 10: 1, 60: 1, 500: 1}),
    ("linear", {0: 0, 5: 1 / 2, 10: 1, 35: 3 / 4, 60: 1 / 2, 110: 0, 500: 0}),
    ("cosine", {0: 0, 5: 1 / 2, 10: 1, 35: (1 + math.sqrt(1 / 2)) / 2, 60: 1 / 2, 110: 0}),
    ("cosine_with_restarts", {5: 1 / 2, 10: 1, 35: (1 + math.sqrt(1 / 2)) / 2, 110: 0, 500: 0}),
    # 1e-7 is 0.005 of 2e-5.
    ("polynomial", {0: 0, 5: 1 / 2, 10: 1, 60: 0.005 + 0.995 / 2, 110: 0.005, 500: 0.005}),
]


@pytest.mark.parametrize(
    ("name", "step", "share"),
    [
        pytest.param(name, step, share, id=f"{name} at {step}")
        for name, shares in LR_CASES
        for step, share in shares.items()
    ],
)
def test_learning_rates_follow_the_schedules_of_diffusers(name, step, share):
    schedule = make_lr_schedule(name, 2e-5, warmup_steps=10, total_steps=110)
    np.testing.assert_allclose(schedule(jnp.int32(step)), 2e-5 * share, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, _ in LR_CASES])
def test_without_warm_up_the_first_rate_is_the_whole_one(name):
    schedule = make_lr_schedule(name, 2e-5, warmup_steps=0, total_steps=100)
    np.testing.assert_allclose(schedule(jnp.int32(0)), 2e-5, rtol=1e-6)


def test_the_optimiser_counts_the_schedule_s_steps_from_zero():
    schedule = make_lr_schedule("linear", 0.1, warmup_steps=2, total_steps=4)
    optimizer = make_optimizer({"w": "train"}, schedule, adam_weight_decay=0.0)
    params, gradient = {"w": jnp.array([1.0])}, {"w": jnp.array([0.5])}
    state = optimizer.init(params)
    sizes = []
    for _ in range(5):
        updates, state = optimizer.update(gradient, state, params)
        sizes.append(-updates["w"].item())
    # A gradient that stays the same gives steps of the learning rate.
    np.testing.assert_allclose(sizes, [0, 0.05, 0.1, 0.05, 0], atol=1e-6)
