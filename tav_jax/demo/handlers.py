"""What the page does when its reader does something, and the jobs of every open page."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from tav_jax.demo.jobs import WORLD, Choices, Studio, chosen_frames, defaults_for
from tav_jax.demo.queue import Job, Progress, Queue, Work
from tav_jax.errors import UserError

OWN = "a clip of mine"
MOST_POINTS = 500  # of the plot, which has no more pixels


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
