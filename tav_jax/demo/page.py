"""The page itself, in Gradio. What users write is shown by components that show plain text."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from tav_jax.demo.jobs import SAMPLINGS, WORLD, Choices, Studio, chosen_frames, defaults_for
from tav_jax.demo.queue import Job, Progress, Queue, Work
from tav_jax.errors import UserError
from tav_jax.pretrained.hub import SHIPPED

OWN = "a clip of mine"
FILE_TYPES = ["video", ".gif", ".webp", ".apng"]
FIRST_CLIP = "man-skiing"
MOST_POINTS = 500  # of the plot, which has no more pixels

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


class Sessions:
    """The jobs of every open page.

    Args:
        queue: Does them.
    """

    def __init__(self, queue: Queue):
        self._queue = queue
        self._jobs: defaultdict[str | None, list[Job]] = defaultdict(list)

    def follow(self, session: str | None, make: Callable[[], Work]) -> Iterator[Progress]:
        """Add a job to the queue and yield its progress, or what is wrong with it.

        Args:
            session: The page that asks for it.
            make: Returns the job's work.
        """
        try:
            job = self._queue.add(make())
        except UserError as error:
            yield Progress(f"error: {error}")
            return
        self._jobs[session].append(job)
        try:
            yield from self._queue.follow(job)
        finally:
            self._queue.cancel(job)  # if nobody follows any more
            self._jobs[session].remove(job)

    def cancel(self, request: gr.Request) -> None:
        """Cancel all jobs of the page that asks."""
        for job in list(self._jobs[request.session_hash]):
            self._queue.cancel(job)


class Handlers:
    """What the page does when its reader does something. Returns new values of its components.

    Args:
        studio: Does what readers ask for.
        sessions: Their jobs.
    """

    def __init__(self, studio: Studio, sessions: Sessions):
        self._studio, self._sessions = studio, sessions

    def choices(self, clip: str, upload: str | None, *values: Any) -> Choices:
        """Return what is chosen, with the file of a drawn clip."""
        file = str(self._studio.drawn_clip(clip)) if clip in WORLD.clips else upload
        return Choices(file, *values)

    def show_frames(self, *values: Any) -> tuple[Any, Any]:
        """Return the frames that are chosen, and what is wrong with the clip."""
        nothing = values[0] == OWN and not values[1]
        try:
            shown = None if nothing else chosen_frames(self.choices(*values))
        except UserError as error:
            return None, show(str(error))
        images = [] if shown is None else list(zip(shown.frames, shown.indices, strict=True))
        return [(image, str(index)) for image, index in images], show("")

    def tune(
        self, request: gr.Request, run: Path | None, prompt: str, *values: Any
    ) -> Iterator[Any]:
        """Yield the tuning's text, losses and preview, and the run's folder when there is one."""
        player = show(None)  # that of another run is not this one's
        video = None

        def work() -> Work:
            return partial(self._studio.tune, self.choices(*values), prompt.strip())

        for progress in self._sessions.follow(request.session_hash, work):
            run = progress.result or run
            newest = progress.videos[-1] if progress.videos else None
            if newest != video:
                video, player = newest, show(str(newest))
            yield progress.text, losses_table(progress), player, run
            player = gr.skip()  # which begins anew if it gets the same video again

    def sample(
        self, request: gr.Request, run: Path | None, prompts: str, guidance: int | float
    ) -> Iterator[Any]:
        """Yield the sampling's text, its newest video, and the files so far."""
        count = 0

        def work() -> Work:
            settings = {"guidance_scale": guidance}
            return partial(self._studio.sample, tuned_run(run), prompts.splitlines(), settings)

        for progress in self._sessions.follow(request.session_hash, work):
            files = [str(path) for path in progress.videos]
            player = gr.skip() if len(files) == count else show(files[-1])
            count = len(files)
            yield progress.text, player, show(files) if files else gr.skip()

    def make_adapter(self, request: gr.Request, run: Path | None) -> Iterator[Any]:
        """Yield what is done, and the adapter when it is made."""

        def work() -> Work:
            return partial(self._studio.adapter, tuned_run(run))

        for progress in self._sessions.follow(request.session_hash, work):
            yield progress.text, show(str(progress.result) if progress.result else None)


def choose_clip(clip: str) -> tuple[Any, ...]:
    """Return whether a file can be uploaded, and a caption and prompts for the clip."""
    if clip not in WORLD.clips:
        return gr.update(visible=True), "", "", ""
    return gr.update(visible=False), described(clip), edit_of(clip), edit_of(clip, 3)


def choose_model(model: str) -> tuple[Any, ...]:
    """Return settings that suit a base model."""
    return astuple(defaults_for(model))


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


def build_page(studio: Studio, queue: Queue, most_megabytes: int) -> gr.Blocks:
    """Return the page.

    Args:
        studio: Does what users ask for.
        queue: Does it one after another.
        most_megabytes: Size of the largest file that may be uploaded.
    """
    sessions = Sessions(queue)
    do = Handlers(studio, sessions)
    usual = defaults_for(WORLD.model)
    with gr.Blocks(title="Tune-A-Video", analytics_enabled=False) as page:
        run = gr.State(None)
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column():
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
                caption = gr.Textbox(
                    described(FIRST_CLIP), label="Caption: what it shows", elem_id="caption"
                )
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
                    label="The clip cannot be used",
                    interactive=False,
                    visible=False,
                    elem_id="wrong",
                )
            with gr.Column():
                gr.Markdown("## 2. Tune")
                model = gr.Dropdown(
                    sorted(SHIPPED),
                    value=WORLD.model,
                    allow_custom_value=True,
                    label="Base model",
                    info="A model of the package, a folder, a file or a Hub id",
                    elem_id="model",
                )
                preview = gr.Textbox(
                    edit_of(FIRST_CLIP), label="An edit to preview", elem_id="preview-prompt"
                )
                with gr.Accordion("Settings", open=False):
                    steps = gr.Number(
                        usual.steps, label="Steps", precision=0, minimum=1, elem_id="steps"
                    )
                    rate = gr.Number(
                        usual.learning_rate, label="Learning rate", elem_id="learning-rate"
                    )
                    sampling_steps = gr.Number(
                        usual.sampling_steps,
                        label="Sampling steps",
                        precision=0,
                        minimum=1,
                        elem_id="sampling-steps",
                    )
                with gr.Row():
                    tune_button = gr.Button("Tune", variant="primary", elem_id="tune")
                    cancel_tuning = gr.Button("Cancel", elem_id="cancel")
                tuned = gr.Textbox(label="Tuning", interactive=False, elem_id="tuning", lines=2)
                plot = gr.LinePlot(
                    x="step",
                    y="loss",
                    height=220,
                    label="Loss",
                    visible=False,
                    elem_id="loss",
                    buttons=[],
                )
                previewed = looping_video("Preview", "preview")
        gr.Markdown("## 3. Edit")
        with gr.Row():
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
                    sample_button = gr.Button("Sample", variant="primary", elem_id="sample")
                    cancel_sampling = gr.Button("Cancel")
                sampled = gr.Textbox(
                    label="Sampling", interactive=False, elem_id="sampling", lines=2
                )
            with gr.Column():
                beside = looping_video("The clip and the edit", "beside")
                videos = gr.File(
                    label="Videos: each edit, and the clip beside it",
                    interactive=False,
                    visible=False,
                    file_count="multiple",
                    height=140,
                    elem_id="videos",
                )
                adapter_button = gr.Button("Make the adapter", elem_id="make-adapter")
                adapter = gr.File(
                    label="Adapter: all that was trained",
                    interactive=False,
                    visible=False,
                    height=100,
                    elem_id="adapter",
                )

        chosen = [clip, upload, caption, model, frames, first_frame, sampling, size, steps, rate]
        chosen += [guidance, sampling_steps]

        # Jobs wait in our own queue, so events need not wait in Gradio's.
        event: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
        job = event | {"show_progress": "hidden"}
        looks = [chosen, [gallery, wrong]]
        page.load(do.show_frames, *looks, **event)
        clip.input(choose_clip, clip, [upload, caption, preview, prompts], **event).then(
            do.show_frames, *looks, **event
        )
        gr.on(
            [upload.change, frames.release, first_frame.submit, first_frame.blur],
            do.show_frames,
            *looks,
            **event,
        )
        gr.on([sampling.input, size.submit, size.blur], do.show_frames, *looks, **event)
        numbers = [size, steps, rate, guidance, sampling_steps]
        model.input(choose_model, model, numbers, **event).then(do.show_frames, *looks, **event)
        for button, function, inputs, outputs in (
            (tune_button, do.tune, [run, preview, *chosen], [tuned, plot, previewed, run]),
            (sample_button, do.sample, [run, prompts, guidance], [sampled, beside, videos]),
            (adapter_button, do.make_adapter, [run], [sampled, adapter]),
        ):
            # Gradio ignores a click on a button whose job goes on, so such a button is disabled.
            started = button.click(partial(enable, False), outputs=button, **job)
            ended = started.then(function, inputs, outputs, **job)
            ended.then(partial(enable, True), outputs=button, **job)
        for button in (cancel_tuning, cancel_sampling):
            button.click(sessions.cancel, queue=False, **event)
        page.unload(sessions.cancel)
    return page


def tuned_run(run: Path | None) -> Path:
    """Return the run's folder.

    Raises:
        UserError: Nothing has been tuned in this page.
    """
    if run is None:
        raise UserError("tune on a clip first")
    return run


def described(clip: str) -> str:
    """Return the caption of a drawn clip."""
    return WORLD.describe(WORLD.clips[clip])


def edit_of(clip: str, number: int = 1) -> str:
    """Return a prompt that changes one thing of a drawn clip."""
    return WORLD.edits[clip][number].prompt


def enable(is_enabled: bool) -> Any:
    """Return an update that lets a button be pressed or not."""
    return gr.update(interactive=is_enabled)


def show(value: Any) -> Any:
    """Return an update that shows a value's component, or hides it if there is none."""
    return gr.update(value=value, visible=bool(value))


def losses_table(progress: Progress) -> Any:
    """Return an update of the plot of the losses; of many it shows every nth."""
    shown = progress.losses[:: math.ceil(len(progress.losses) / MOST_POINTS) or 1]
    table = pd.DataFrame(shown, columns=["step", "loss"])
    return gr.update(value=table, visible=bool(shown))
