"""The page itself, in Gradio. What users write is shown by components that show plain text."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from tav_jax.demo.handlers import (
    OWN,
    Handlers,
    Sessions,
    choose_clip,
    choose_model,
    described,
    edit_of,
    enable,
)
from tav_jax.demo.jobs import SAMPLINGS, WORLD, Defaults, Studio, defaults_for
from tav_jax.demo.queue import Queue
from tav_jax.pretrained.hub import SHIPPED

FILE_TYPES = ["video", ".gif", ".webp", ".apng"]
FIRST_CLIP = "man-skiing"

# Fonts of the reader's system: the default theme's come from a server.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
.gradio-container { max-width: min(75rem, 100vw) !important; margin: auto; }
.gradio-container :is(.app, .wrap, .contain, .row, .column) { min-width: 0; }
.gradio-container label { max-width: 100%; }
#beside video, #preview video { max-height: 20rem; }
#frames .grid-wrap { min-height: 0; }
#frames .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
#loss svg { max-width: 100%; }
"""

INTRODUCTION = """
# Tune-A-Video
Tune an image model on one captioned clip, then describe what the clip is to show instead.
"""


def looping_video(label: str, elem_id: str) -> gr.Video:
    """Return a place for a video, which is shown when there is one."""
    return gr.Video(
        label=label,
        interactive=False,
        visible=False,
        autoplay=True,
        loop=True,
        elem_id=elem_id,
        buttons=[],
    )


@dataclass(frozen=True)
class ClipPart:
    """Components in which the clip is chosen."""

    clip: gr.Dropdown
    upload: gr.File
    caption: gr.Textbox
    frames: gr.Slider
    first_frame: gr.Number
    sampling: gr.Dropdown
    size: gr.Number
    gallery: gr.Gallery
    wrong: gr.Textbox


@dataclass(frozen=True)
class TuningPart:
    """Components for the tuning and its progress."""

    model: gr.Dropdown
    preview: gr.Textbox
    steps: gr.Number
    rate: gr.Number
    sampling_steps: gr.Number
    tune: gr.Button
    cancel: gr.Button
    text: gr.Textbox
    plot: gr.LinePlot
    video: gr.Video


@dataclass(frozen=True)
class EditingPart:
    """Components for the edits and what is made of them."""

    prompts: gr.Textbox
    guidance: gr.Slider
    sample: gr.Button
    cancel: gr.Button
    text: gr.Textbox
    video: gr.Video
    videos: gr.File
    make_adapter: gr.Button
    adapter: gr.File


def build_page(studio: Studio, queue: Queue, most_megabytes: int) -> gr.Blocks:
    """Return the page.

    Args:
        studio: Does what users ask for.
        queue: Does it one after another.
        most_megabytes: Size of the largest file that may be uploaded.
    """
    usual = defaults_for(WORLD.model)
    with gr.Blocks(title="Tune-A-Video", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column():
                clip = clip_part(usual, most_megabytes)
            with gr.Column():
                tuning = tuning_part(usual)
        gr.Markdown("## 3. Edit")
        with gr.Row():
            editing = editing_part(usual)
        sessions = Sessions(queue)
        connect(page, clip, tuning, editing, Handlers(studio, sessions), sessions)
    return page


def clip_part(usual: Defaults, most_megabytes: int) -> ClipPart:
    """Lay out the components for the clip."""
    gr.Markdown("## 1. Clip")
    names = [(described(name), name) for name in WORLD.clips]
    clip = gr.Dropdown([*names, OWN], value=FIRST_CLIP, label="Clip", elem_id="clip")
    upload = gr.File(
        label=f"A video of yours, at most {most_megabytes} MB",
        file_types=FILE_TYPES,
        visible=False,
        height=140,
        elem_id="upload",
    )
    caption = gr.Textbox(described(FIRST_CLIP), label="Caption: what it shows", elem_id="caption")
    with gr.Accordion("Frames", open=False):
        frames = gr.Slider(1, 24, 8, step=1, label="Number of frames", elem_id="count")
        first_frame = gr.Number(0, label="First frame", precision=0, minimum=0)
        sampling = gr.Dropdown(list(SAMPLINGS), label="Which frames follow")
        size = gr.Number(
            usual.size, label="Width and height in pixels", precision=0, elem_id="size"
        )
    # Gradio lays a gallery's label over its first frames.
    gr.Markdown("The frames that will be used, by number:")
    gallery = gr.Gallery(
        show_label=False,
        columns=4,
        height="auto",
        interactive=False,
        elem_id="frames",
        buttons=[],
    )
    wrong = gr.Textbox(
        label="The clip cannot be used", interactive=False, visible=False, elem_id="wrong"
    )
    return ClipPart(clip, upload, caption, frames, first_frame, sampling, size, gallery, wrong)


def tuning_part(usual: Defaults) -> TuningPart:
    """Lay out the components for the tuning."""
    gr.Markdown("## 2. Tune")
    model = gr.Dropdown(
        sorted(SHIPPED),
        value=WORLD.model,
        allow_custom_value=True,
        label="Base model",
        info="A model of the package, a folder, a file or a Hub id",
        elem_id="model",
    )
    preview = gr.Textbox(edit_of(FIRST_CLIP), label="An edit to preview", elem_id="preview-prompt")
    with gr.Accordion("Settings", open=False):
        steps = gr.Number(usual.steps, label="Steps", precision=0, minimum=1, elem_id="steps")
        rate = gr.Number(usual.learning_rate, label="Learning rate", elem_id="learning-rate")
        sampling_steps = gr.Number(
            usual.sampling_steps,
            label="Sampling steps",
            precision=0,
            minimum=1,
            elem_id="sampling-steps",
        )
    with gr.Row():
        tune = gr.Button("Tune", variant="primary", elem_id="tune")
        cancel = gr.Button("Cancel", elem_id="cancel")
    text = gr.Textbox(label="Tuning", interactive=False, elem_id="tuning", lines=2)
    plot = gr.LinePlot(
        x="step",
        y="loss",
        height=220,
        label="Loss",
        visible=False,
        elem_id="loss",
        buttons=[],
    )
    video = looping_video("Preview", "preview")
    return TuningPart(model, preview, steps, rate, sampling_steps, tune, cancel, text, plot, video)


def editing_part(usual: Defaults) -> EditingPart:
    """Lay out the components for the edits, in two columns."""
    with gr.Column():
        prompts = gr.Textbox(
            edit_of(FIRST_CLIP, 3), lines=3, label="Prompts, one a line", elem_id="prompts"
        )
        guidance = gr.Slider(
            0,
            20,
            usual.guidance_scale,
            step=0.5,
            label="Guidance",
            info="Higher follows the prompt more and the clip less",
        )
        with gr.Row():
            sample = gr.Button("Sample", variant="primary", elem_id="sample")
            cancel = gr.Button("Cancel")
        text = gr.Textbox(label="Sampling", interactive=False, elem_id="sampling", lines=2)
    with gr.Column():
        video = looping_video("The clip and the edit", "beside")
        videos = gr.File(
            label="Videos: each edit, and the clip beside it",
            interactive=False,
            visible=False,
            file_count="multiple",
            height=140,
            elem_id="videos",
        )
        make_adapter = gr.Button("Make the adapter", elem_id="make-adapter")
        adapter = gr.File(
            label="Adapter: all that was trained",
            interactive=False,
            visible=False,
            height=100,
            elem_id="adapter",
        )
    return EditingPart(
        prompts, guidance, sample, cancel, text, video, videos, make_adapter, adapter
    )


def connect(
    page: gr.Blocks,
    clip: ClipPart,
    tuning: TuningPart,
    editing: EditingPart,
    do: Handlers,
    sessions: Sessions,
) -> None:
    """Let the components do what they say."""
    run = gr.State(None)
    chosen = [clip.clip, clip.upload, clip.caption, tuning.model, clip.frames, clip.first_frame]
    chosen += [clip.sampling, clip.size, tuning.steps, tuning.rate]
    chosen += [editing.guidance, tuning.sampling_steps]

    # Jobs wait in our own queue, so events need not wait in Gradio's.
    event: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
    shown: dict[str, Any] = {"fn": do.show_frames, "inputs": chosen}
    shown |= {"outputs": [clip.gallery, clip.wrong], **event}
    page.load(**shown)
    texts = [clip.upload, clip.caption, tuning.preview, editing.prompts]
    clip.clip.input(choose_clip, clip.clip, texts, **event).then(**shown)
    numbers = [clip.size, tuning.steps, tuning.rate, editing.guidance, tuning.sampling_steps]
    tuning.model.input(choose_model, tuning.model, numbers, **event).then(**shown)
    first, size = clip.first_frame, clip.size
    gr.on([clip.upload.change, clip.frames.release, first.submit, first.blur], **shown)
    gr.on([clip.sampling.input, size.submit, size.blur], **shown)

    job = event | {"show_progress": "hidden"}
    of_tuning = [tuning.text, tuning.plot, tuning.video, run]
    of_sampling = [editing.text, editing.video, editing.videos]
    for button, function, inputs, outputs in (
        (tuning.tune, do.tune, [run, tuning.preview, *chosen], of_tuning),
        (editing.sample, do.sample, [run, editing.prompts, editing.guidance], of_sampling),
        (editing.make_adapter, do.make_adapter, [run], [editing.text, editing.adapter]),
    ):
        # Gradio ignores a click on a button whose job goes on, so such a button is disabled.
        started = button.click(partial(enable, False), outputs=button, **job)
        ended = started.then(function, inputs, outputs, **job)
        ended.then(partial(enable, True), outputs=button, **job)
    for button in (tuning.cancel, editing.cancel):
        button.click(sessions.cancel, queue=False, **event)
    page.unload(sessions.cancel)
