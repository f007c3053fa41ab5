import jax
import jax.numpy as jnp
import pytest

from tav_jax.bench.arguments import bench_flags
from tav_jax.errors import UserError
from tav_jax.runs.tuning import config_keys
from tav_jax.training.memory import (
    Alternative,
    DoesNotFitError,
    Plan,
    Size,
    compile_plan,
    device_bytes,
    planned_bytes,
)
from tav_jax.training.memory import fitting_preset as raw_fitting_preset

SIZE = Size(8, 512, 512)


def plan(preset, size):
    """A program needs 1 byte a frame and pixel, more where more is kept."""
    kept = {"none": 9, "blocks": 3, "full": 1}[preset]
    return Plan((preset, size), float(kept * size.frames * size.height * size.width))


def fitting_preset(*arguments):
    """Call `fitting_preset` as the tuning command does, with its words for what would fit."""
    try:
        return raw_fitting_preset(*arguments)
    except DoesNotFitError as error:
        raise error.with_advice(config_keys) from None


CLIP = 8 * 512 * 512


@pytest.mark.parametrize(
    ("limit", "chosen"), [(9 * CLIP, "none"), (9 * CLIP - 1, "blocks"), (CLIP, "full")]
)
def test_auto_takes_the_fastest_preset_that_fits(limit, chosen):
    preset, program = fitting_preset(plan, None, SIZE, float(limit))
    assert preset == chosen
    assert program == (chosen, SIZE)


def test_a_preset_that_is_named_is_taken_though_a_faster_one_fits():
    assert fitting_preset(plan, "full", SIZE, 100.0 * CLIP)[0] == "full"


def test_a_preset_that_does_not_fit_is_refused_with_one_that_does():
    with pytest.raises(ValueError, match=r"512x512 .*=none need 0.0 GB.*: gradient_.*=blocks$"):
        fitting_preset(plan, "none", SIZE, 3.0 * CLIP)


def test_a_clip_that_does_not_fit_is_refused_with_the_frames_and_sides_that_do():
    # Half the memory: 4 frames, or 5/8 of each side, the next multiple of 64 below 512 / sqrt(2).
    with pytest.raises(ValueError, match=r"memory: 8 frames of 512x512") as refused:
        fitting_preset(plan, None, SIZE, CLIP / 2)
    fits = str(refused.value).split("what fits: ")[1]
    assert fits == (
        "gradient_checkpointing=full train_data.n_sample_frames=4, or "
        "gradient_checkpointing=full train_data.height=320 train_data.width=320"
    )


def test_a_refusal_has_what_fits_as_values_and_every_command_words_it():
    with pytest.raises(DoesNotFitError) as refused:
        raw_fitting_preset(plan, None, SIZE, CLIP / 2)
    error = refused.value
    assert (error.preset, error.size, error.limit) == ("full", SIZE, CLIP / 2)
    assert error.alternatives == (
        Alternative("full", Size(4, 512, 512)),
        Alternative("full", Size(8, 320, 320)),
    )
    assert isinstance(error, UserError)
    assert str(error.with_advice(bench_flags)).endswith(
        "what fits: --gradient-checkpointing full --frames 4, or "
        "--gradient-checkpointing full --size 320"
    )


def test_the_compiler_alone_can_refuse_where_the_limit_is_not_known():
    def refused_above_three_frames(preset, size):
        return Plan(None, float("inf")) if size.frames > 3 else Plan("program", 1.0)

    with pytest.raises(UserError, match=r"need more than the device has; .*n_sample_frames=3$"):
        fitting_preset(refused_above_three_frames, None, SIZE, float("inf"))


def test_what_does_not_shrink_with_the_clip_is_not_hoped_to():
    def mostly_parameters(preset, size):
        tried.append(size)
        return Plan("program", 1e9 + size.frames, 1e9)

    tried = []
    with pytest.raises(ValueError, match="no smaller clip fits either"):
        fitting_preset(mostly_parameters, "full", SIZE, 0.9e9)
    assert set(tried) == {SIZE}


def test_where_the_compiler_refuses_smaller_clips_are_tried():
    def refused_above_three_frames(preset, size):
        return Plan(None, float("inf")) if size.frames > 3 else Plan("program", 1.0)

    with pytest.raises(ValueError, match=r"need more, .*n_sample_frames=3$"):
        fitting_preset(refused_above_three_frames, None, SIZE, 10.0)


def test_what_nothing_can_fit_into_is_refused_as_such():
    with pytest.raises(ValueError, match="no smaller clip fits either"):
        fitting_preset(plan, None, SIZE, 1.0)


def test_a_refusal_by_the_compiler_counts_as_not_fitting():
    def refuse():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm"
        )

    assert compile_plan(refuse) == Plan(None, float("inf"))


def test_other_errors_of_the_compiler_are_not_hidden():
    def fail():
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault"):
        compile_plan(fail)


@pytest.mark.usefixtures("optimized")
def test_planned_bytes_count_arguments_results_and_what_lies_between():
    # 4 MB in, 4 MB out, and between them a product of 4 MB that is read twice.
    x = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    program = jax.jit(lambda x: jnp.sin(x @ x) @ x).lower(x).compile()
    assert 12e6 <= planned_bytes(program) < 21e6


@pytest.mark.usefixtures("optimized")
def test_a_donated_argument_is_counted_once():
    x = jax.ShapeDtypeStruct((10**6,), jnp.float32)

    def bytes_of(**how):
        return planned_bytes(jax.jit(lambda x: x + 1, **how).lower(x).compile())

    assert bytes_of() - bytes_of(donate_argnums=0) == 4e6


def test_this_machine_has_memory():
    assert device_bytes() > 2**30
