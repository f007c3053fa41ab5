"""The idea itself on the shipped base model: a few dozen steps, and an edit changes what it should.

The same judgement is passed on methods with one part broken each, and notices every one.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import jax
import numpy as np
import pytest

from tav_jax import pipeline
from tav_jax.models.attention import einsum as attention
from tav_jax.pipeline import edit_clip, encode_frames, encode_prompts, tune_clip
from tav_jax.pretrained.model import Model, load_model
from tav_jax.training.optimizer import TRAINABLE_MODULES, label_params
from tav_jax.training.train_step import denoising_loss, draw_batch
from tav_jax.worlds.metrics import measure
from tav_jax.worlds.tiny_scenes.drawing import render
from tav_jax.worlds.tiny_scenes.edits import edits_of, source_prompt
from tav_jax.worlds.tiny_scenes.world import CLIPS

CLIP = CLIPS["circle-right"]
STEPS = 40
LEARNING_RATE = 2e-3
GUIDANCE_SCALE = 3.0


@dataclass
class Edited:
    """A colour edit, an open prompt and what tuning did."""

    colour: dict
    source: dict
    open: dict
    loss_ratio: float
    moved: set[str]
    names: list[str]


def run(steps: int = STEPS) -> Edited:
    model, frames = load_model("tiny-scenes"), render(CLIP, 8)
    tuned = tune_clip(
        model, frames, source_prompt(CLIP), max_train_steps=steps, learning_rate=LEARNING_RATE
    )
    by_kind = {edit.kind: edit for edit in edits_of(CLIP)}
    edits = [by_kind[kind] for kind in ("colour", "source", "open")]
    prompts = [edit.prompt for edit in edits]
    videos = edit_clip(tuned, frames, prompts, guidance_scale=GUIDANCE_SCALE)
    figures = [measure(video, CLIP, edit.asks) for video, edit in zip(videos, edits, strict=True)]
    before, after = model.unet.params, tuned.unet.params
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    return Edited(*figures, loss(tuned) / loss(model), moved, list(before))


def loss(model: Model) -> float:
    """The mean loss over the same sixteen draws for every model."""
    moments = encode_frames(model, render(CLIP, 8))
    moments = jax.numpy.repeat(moments, 16, axis=0)
    draw = draw_batch(jax.random.key(1), moments, model.schedule, 1.0)
    context = jax.numpy.repeat(encode_prompts(model, [source_prompt(CLIP)]), 16, axis=0)
    return float(jax.jit(denoising_loss)(model.unet, model.schedule, draw, context))


def faults(edited: Edited) -> Iterator[str]:
    labels = label_params(edited.names, TRAINABLE_MODULES)
    if edited.moved != {name for name, label in labels.items() if label == "train"}:
        yield "partition: what moved is not what trains"
    if edited.loss_ratio > 0.95:
        yield f"tuning: the loss fell to {edited.loss_ratio:.2f} of itself only"
    if edited.colour["colour"] < 0.8 or edited.colour["subject"] < 0.8:
        yield "edit: no circle of the new colour"
    if (edited.colour["correlation"] or 0) < 0.8 or edited.colour["error"] > 3:
        yield "edit: another way than the clip's"
    if (edited.source["error"] or 9) > 1.5:
        yield "source prompt: not the clip"
    if edited.open["flips"] > 0.3:
        yield "open prompt: frames that do not go together"


def test_an_edit_changes_the_colour_and_keeps_the_motion():
    assert list(faults(run())) == []


def weights_over_queries(scores, width, dtype):
    return jax.nn.softmax(scores * width**-0.5, axis=-2).astype(dtype)


def other_way_round(names, trainable_modules):
    labels = label_params(names, trainable_modules)
    return {name: "freeze" if label == "train" else "train" for name, label in labels.items()}


def any_noise(model, latents, **settings):
    return jax.random.normal(jax.random.key(0), latents.shape)


BROKEN = {
    "attention": (attention, "attention_weights", weights_over_queries),
    "inversion": (pipeline, "invert_latents", any_noise),
    "partition": (pipeline, "label_params", other_way_round),
}


def faults_when_broken(part: str) -> list[str]:
    setattr(*BROKEN[part])
    # Three updates move everything that trains. More of them are slow when all weights train.
    return list(faults(run(3 if part == "partition" else STEPS)))


@pytest.mark.parametrize(
    ("part", "fault"),
    [("attention", "edit"), ("inversion", "edit: another way"), ("partition", "partition")],
)
def test_a_broken_part_is_noticed(part, fault):
    # In a process of its own: programs that were compiled from the whole parts would hide it.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        found = process.submit(faults_when_broken, part).result()
    assert any(line.startswith(fault) for line in found), found
