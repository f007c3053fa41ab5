"""What the demo's page does, without the page: its queue, tuning, cancelling and sampling."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tav_jax.demo import jobs
from tav_jax.demo.jobs import (
    Choices,
    Defaults,
    Studio,
    chosen_frames,
    defaults_for,
    make_config,
)
from tav_jax.demo.queue import MOST_JOBS, Progress, Queue
from tav_jax.errors import UserError
from tav_jax.runs.adapters import read_adapter
from tav_jax.runs.config import load_config
from tav_jax.runs.metrics_log import read_metrics
from tav_jax.runs.run import Run
from tav_jax.stopping import Stopped
from tav_jax.video.read import read_all_frames


@pytest.fixture
def choices(material):
    return Choices(
        clip=str(material.clip),
        caption="a square is moving",
        model=str(material.model),
        frames=3,  # by which the tests' 8 devices cannot be divided: programs are those of one
        first_frame=1,
        sampling="every 2nd frame",
        size=32,
        steps=6,
        learning_rate=3e-3,
        guidance_scale=2.0,
        sampling_steps=3,
    )


def no_cancel():
    return threading.Event()


def test_a_cancelled_tuning_goes_on_and_equals_one_that_was_not(choices, tmp_path):
    studio, cancelled = Studio(tmp_path / "cancelled"), threading.Event()
    shown = []
    for progress in studio.tune(choices, "a ball", cancelled):
        shown.append(progress)
        if progress.text.startswith("tuning: step 3 "):
            cancelled.set()
    assert "step 3 of 6 is saved" in shown[-1].text
    assert [step for step, _ in shown[-1].losses] == [1, 2, 3]
    folder = shown[-1].result
    assert Run.open(folder).latest_step() == 3

    shown = list(studio.tune(choices, "a ball", no_cancel()))
    assert shown[-1].result == folder
    assert [step for step, _ in shown[-1].losses] == [1, 2, 3, 4, 5, 6]
    [preview] = shown[-1].videos
    assert preview == Run.open(folder).samples(6) / "a ball.mp4"
    whole = list(Studio(tmp_path / "whole").tune(choices, "", no_cancel()))[-1]
    assert whole.losses == shown[-1].losses
    assert whole.videos == ()

    # Fewer steps than are done leave the run as it is.
    again = list(studio.tune(replace(choices, steps=2), "a ball", no_cancel()))[-1]
    assert again.text == "tuned: 6 steps"
    assert again.videos == (preview,)
    assert len(read_metrics(Run.open(folder).metrics)) > 0

    # Other sampling belongs to the same run, and is another video.
    for changed in ({"sampling_steps": 2}, {"guidance_scale": 9.0}):
        *_, last = studio.tune(replace(choices, **changed), "a ball", no_cancel())
        assert last.result == folder
        assert last.videos[0].is_file()
        assert last.videos[0] != preview
    assert Run.open(folder).latest_step() == 6


@pytest.mark.parametrize(("apart", "steps"), [(0.0, [2, 4]), (1e9, [])])
def test_previews_come_at_thirds_but_not_one_soon_after_another(
    choices, tmp_path, monkeypatch, apart, steps
):
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN_PREVIEWS", apart)
    texts = [one.text for one in Studio(tmp_path).tune(choices, "a ball", no_cancel())]
    middle = [text for text in texts if text.endswith("sampling a preview")]
    assert middle == [f"tuning: step {step} of 6; sampling a preview" for step in steps]
    assert texts[-2:] == ["tuned: 6 steps; sampling the preview", "tuned: 6 steps"]


def test_prompts_are_sampled_beside_the_clip_and_the_adapter_is_written(choices, tmp_path):
    studio = Studio(tmp_path)
    folder = list(studio.tune(choices, "", no_cancel()))[-1].result
    prompts = ["a ball", "  ", "a ball", "<script>"]
    last = list(studio.sample(folder, prompts, {"guidance_scale": 2.0}, no_cancel()))[-1]
    assert [path.parent for path in last.videos[::2]] == [Run.open(folder).samples(6)] * 2
    assert read_all_frames(last.videos[0]).shape == (3, 256, 256, 3)
    assert read_all_frames(last.videos[1]).shape == (3, 256, 512, 3)

    # Another guidance is another video. A new process samples the same one.
    other = list(studio.sample(folder, prompts, {"guidance_scale": 3.0}, no_cancel()))[-1]
    assert not set(other.videos) & set(last.videos)
    before = last.videos[0].read_bytes()
    last.videos[0].unlink()
    list(Studio(tmp_path).sample(folder, prompts, {}, no_cancel()))
    assert last.videos[0].read_bytes() == before

    path = list(studio.adapter(folder, no_cancel()))[-1].result
    adapter = read_adapter(path)
    assert (adapter.step, adapter.config.train_data.prompt) == (6, choices.caption)
    assert adapter.inputs is not None
    assert adapter.inverted is not None


def test_choices_that_are_wrong_are_refused_before_anything_is_written(choices, tmp_path):
    for wrong, message in (
        ({"clip": None}, "choose a clip"),
        ({"caption": " "}, "write a caption"),
        ({"size": 33}, r"train_data\.width"),
        ({"steps": 1.5}, "max_train_steps"),
        ({"clip": str(tmp_path / "gone.mp4")}, "not there any more"),
        ({"model": str(tmp_path / "none")}, "pretrained_model_path"),
        ({"frames": 400}, "n_sample_frames"),
    ):
        with pytest.raises(UserError, match=message):
            list(Studio(tmp_path).tune(replace(choices, **wrong), "", no_cancel()))
    with pytest.raises(UserError, match="write a prompt"):
        list(Studio(tmp_path).sample(tmp_path, [" "], {}, no_cancel()))
    assert not list(tmp_path.glob("runs/*/config.yaml"))


def test_what_makes_another_run_has_another_folder(choices, tmp_path):
    folder = make_config(choices, tmp_path).output_dir
    for same in ({"steps": 7}, {"guidance_scale": 4.0}, {"sampling_steps": 4}):
        assert make_config(replace(choices, **same), tmp_path).output_dir == folder
    others = [{"caption": "b"}, {"first_frame": 0}, {"learning_rate": 1e-3}]
    folders = {make_config(replace(choices, **other), tmp_path).output_dir for other in others}
    assert len(folders | {folder}) == 1 + len(others)


def test_frames_are_shown_and_the_path_of_an_upload_is_not(choices, tmp_path):
    clip = chosen_frames(choices)
    assert clip.indices == [1, 3, 5]
    assert clip.frames.shape == (3, 256, 256, 3)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(UserError) as refused:
        chosen_frames(replace(choices, clip=str(broken)))
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "file"), [("tiny-figures", "quickstart"), ("tiny-scenes", "tiny-scenes")]
)
def test_the_page_proposes_the_numbers_of_the_shipped_configs(model, file):
    config, _ = load_config(Path(__file__).parents[2] / f"configs/{file}.yaml", [])
    validation = config.validation_data
    assert config.pretrained_model_path == model
    assert defaults_for(model) == Defaults(
        config.train_data.width,
        config.max_train_steps,
        config.learning_rate,
        validation.guidance_scale,
        validation.num_inference_steps,
    )


def test_a_drawn_clip_is_drawn_once(tmp_path):
    studio = Studio(tmp_path)
    path = studio.drawn_clip("man-skiing")
    written = path.stat().st_mtime_ns
    assert studio.drawn_clip("man-skiing").stat().st_mtime_ns == written
    assert read_all_frames(path).shape == (24, 256, 256, 3)


# The queue.


def test_jobs_are_done_in_turn_and_say_how_many_are_before_them():
    queue, go_on = Queue(), threading.Event()

    def first(cancelled):
        yield Progress("begun")
        assert go_on.wait(600)
        yield Progress("done")

    def second(cancelled):
        yield Progress("second done")

    job = queue.add(first)
    following = queue.follow(job)
    while next(following).text != "begun":
        pass
    waiting, gone = queue.add(second), queue.add(second)
    texts = queue.follow(gone)
    assert next(texts).text == "waiting: 2 jobs are before this one"
    queue.cancel(gone)
    assert [one.text for one in texts] == ["cancelled before it began"]
    texts = queue.follow(waiting)
    assert next(texts).text == "waiting: 1 job is before this one"
    go_on.set()
    assert list(texts)[-1].text == "second done"
    assert list(following)[-1].text == "done"


def test_a_cancelled_job_ends_itself_and_too_many_are_refused():
    queue = Queue()

    def until_cancelled(cancelled):
        yield Progress("begun", losses=((1, 0.5),))
        assert cancelled.wait(600)
        yield Progress("saved")

    jobs = [queue.add(until_cancelled) for _ in range(MOST_JOBS + 1)]
    with pytest.raises(UserError, match=f"{MOST_JOBS} jobs are waiting"):
        queue.add(until_cancelled)
    for job in reversed(jobs):
        queue.cancel(job)
    assert list(queue.follow(jobs[0]))[-1].text in ("saved", "cancelled before it began")


@pytest.mark.parametrize(
    ("error", "text", "is_printed"),
    [
        (UserError("the clip is short"), "error: the clip is short", False),
        (OSError(28, "No space left"), "error: [Errno 28] No space left", False),
        (KeyError("x"), "error: KeyError: 'x' (the terminal has the traceback)", True),
    ],
    ids=["mistake", "full-disk", "bug"],
)
def test_errors_are_a_line_and_the_queue_goes_on(error, text, is_printed, capsys):
    queue = Queue()

    def fail(cancelled):
        yield Progress("begun", losses=((1, 0.5),))
        raise error

    def work(cancelled):
        yield Progress("fine")

    failed, after = queue.add(fail), queue.add(work)
    assert list(queue.follow(failed))[-1] == Progress(text, losses=((1, 0.5),))
    assert list(queue.follow(after))[-1].text == "fine"
    assert ("Traceback" in capsys.readouterr().err) == is_printed


def test_a_stopped_job_ends_who_waits_for_it():
    queue = Queue()

    def stop(cancelled):
        raise Stopped(2, "saved step 3")
        yield

    queue.add(stop)
    with pytest.raises(Stopped, match="saved step 3"):
        queue.wait_until_stopped()
