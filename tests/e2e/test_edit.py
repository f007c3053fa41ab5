"""The idea itself on the shipped base model: a few dozen steps, and an edit changes what it should.

The same judgement notices another noise than the inverted one, and a wrong choice of what trains.
Wrong arithmetic is noticed by the reference cases.
"""

import jax
import numpy as np
import pytest

from tav_jax import pipeline
from tav_jax.pipeline import edit_clip, encode_frames, encode_prompts, tune_clip
from tav_jax.pretrained.model import Model, load_model
from tav_jax.training.optimizer import TRAINABLE_MODULES, label_params
from tav_jax.training.train_step import denoising_loss, draw_batch
from tav_jax.worlds.tiny_scenes.drawing import render
from tav_jax.worlds.tiny_scenes.edits import edits_of
from tav_jax.worlds.tiny_scenes.metrics import measure
from tav_jax.worlds.tiny_scenes.scenes import CLIPS, describe

CLIP = CLIPS["circle-right"]
STEPS = 40
LEARNING_RATE = 2e-3
GUIDANCE_SCALE = 3.0


def tune() -> Model:
    return tune_clip(
        load_model("tiny-scenes"),
        render(CLIP, 8),
        describe(CLIP),
        max_train_steps=STEPS,
        learning_rate=LEARNING_RATE,
    )


def loss(model: Model) -> float:
    """The mean loss over the same sixteen draws for every model."""
    moments = encode_frames(model, render(CLIP, 8))
    moments = jax.numpy.repeat(moments, 16, axis=0)
    draw = draw_batch(jax.random.key(1), moments, model.schedule, 1.0)
    context = jax.numpy.repeat(encode_prompts(model, [describe(CLIP)]), 16, axis=0)
    return float(jax.jit(denoising_loss)(model.unet, model.schedule, draw, context))


def moves_what_trains(tuned: Model) -> bool:
    before, after = load_model("tiny-scenes").unet.params, tuned.unet.params
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    labels = label_params(list(before), TRAINABLE_MODULES)
    return moved == {name for name, label in labels.items() if label == "train"}


def edit_faults(tuned: Model) -> list[str]:
    """Says what is wrong with a colour edit, the source prompt and an open prompt."""
    by_kind = {edit.kind: edit for edit in edits_of(CLIP)}
    edits = [by_kind[kind] for kind in ("colour", "source", "open")]
    prompts = [edit.prompt for edit in edits]
    videos = edit_clip(tuned, render(CLIP, 8), prompts, guidance_scale=GUIDANCE_SCALE)
    colour, source, open_prompt = (
        measure(video, CLIP, edit.asks) for video, edit in zip(videos, edits, strict=True)
    )
    faults = {
        "no circle of the new colour": colour["colour"] < 0.8 or colour["subject"] < 0.8,
        "another way than the clip's": (colour["correlation"] or 0) < 0.8 or colour["error"] > 3,
        "source prompt: not the clip": (source["error"] or 9) > 1.5,
        "open prompt: frames that do not go together": open_prompt["flips"] > 0.3,
    }
    return [fault for fault, found in faults.items() if found]


@pytest.fixture(scope="module")
def tuned() -> Model:
    return tune()


def test_tuning_moves_what_trains_and_lowers_the_loss(tuned):
    assert moves_what_trains(tuned)
    assert loss(tuned) < 0.95 * loss(load_model("tiny-scenes"))


def test_an_edit_changes_the_colour_and_keeps_the_motion(tuned):
    assert edit_faults(tuned) == []


# The same judgement where one part is broken.


def test_another_noise_than_the_inverted_is_noticed(tuned, monkeypatch):
    def any_noise(model, latents, **settings):
        return jax.random.normal(jax.random.key(0), latents.shape)

    monkeypatch.setattr(pipeline, "invert_latents", any_noise)
    assert "another way than the clip's" in edit_faults(tuned)


def test_what_trains_and_does_not_move_or_moves_and_does_not_train_is_noticed(tuned):
    untuned = load_model("tiny-scenes").unet.params
    frozen, trained = "conv_in.kernel", next(name for name in untuned if "attn_temp" in name)
    for params in (
        tuned.unet.params | {frozen: tuned.unet.params[frozen] + 1},
        tuned.unet.params | {trained: untuned[trained]},
    ):
        assert not moves_what_trains(tuned.with_unet(tuned.unet.with_params(params)))
