"""Metrics in TensorBoard's event files, wandb and trackio."""

import io
import json
import sys
import textwrap

import numpy as np
import pytest
import yaml
from PIL import Image, ImageSequence
from small_configs import RUN as SMALLEST

from tav_jax.errors import UserError
from tav_jax.runs.config import dump_config, load_config, parse_config
from tav_jax.runs.loggers import EVENTS, PACKAGES, Loggers, require_loggers
from tav_jax.runs.record import read_record
from tav_jax.runs.run import Run
from tav_jax.video.read import read_all_frames
from tav_jax.video.write import write_video


@pytest.fixture
def make_run(tmp_path):
    """Makes a run's folder, as far as logging needs it."""

    def make(*log):
        settings = SMALLEST | {"output_dir": str(tmp_path / "run"), "log": list(log)}
        config = parse_config(settings | {"validation_data": {"fps": 4}})
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/config.yaml").write_text(dump_config(config))
        return Run(tmp_path / "run", config)

    return make


def line(step, loss=None):
    return {"step": step, "loss": loss or 1 / step, "grad_norm": 0.5, "lr": 1e-3, "seconds": 0.25}


def record(run, *lines):
    with run.metrics.open("a") as file:
        file.writelines(f"{json.dumps(one)}\n" for one in lines)


def read_events(run):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(run.folder / EVENTS), {"scalars": 0, "images": 0})
    return events.Reload()


# Settings.


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("tensorboard", ("tensorboard",)),
        ("[tensorboard, wandb]", ("tensorboard", "wandb")),
        ("[trackio, trackio]", ("trackio",)),
        ("null", ()),
        ("[]", ()),
    ],
)
def test_log_is_a_word_or_a_list_of_words(written, read, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    config, _ = load_config(path, [f"log={written}"])
    assert config.log == read
    path.write_text(dump_config(config))
    assert ("log" in yaml.safe_load(path.read_text())) == bool(read)
    assert read_record(path).log == read


@pytest.mark.parametrize("written", ["tensorbord", "[wandb, mlflow]", "true", "{tensorboard: 1}"])
def test_other_loggers_are_refused(written, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    with pytest.raises(UserError, match=r"log(\.\d)?: Input should be 'tensorboard', 'wandb' or"):
        load_config(path, [f"log={written}"])


def test_what_is_not_installed_is_refused_with_the_way_to_install_it(monkeypatch):
    for package, _ in PACKAGES.values():
        monkeypatch.setitem(sys.modules, package, None)
    require_loggers(())
    with pytest.raises(UserError) as refused:
        require_loggers(("tensorboard", "wandb"))
    assert str(refused.value).splitlines() == [
        "log: tensorboard needs the package tensorboardX, which is not installed: "
        "pip install 'tav_jax[log]'",
        "log: wandb needs the package wandb, which is not installed: pip install wandb",
    ]


# TensorBoard.


@pytest.fixture
def needs_tensorboard():
    pytest.importorskip("tensorboardX")
    pytest.importorskip("tensorboard")


def test_tensorboard_reads_each_step_once_though_a_run_was_resumed(make_run, needs_tensorboard):
    run = make_run("tensorboard")
    killed = Loggers(run, 0)
    for step in range(1, 6):
        killed.scalars(line(step, loss=9.0))
    killed.flush()
    resumed = Loggers(run, 3)
    killed.close()
    for step in range(4, 8):
        resumed.scalars(line(step))
    resumed.close()
    assert len(list((run.folder / EVENTS).iterdir())) == 2, "also within one second"
    events = read_events(run)
    assert sorted(events.Tags()["scalars"]) == ["grad_norm", "loss", "lr", "seconds"]
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 8))
    expected = [9.0] * 3 + [1 / step for step in range(4, 8)]
    assert [event.value for event in losses] == pytest.approx(expected, rel=1e-6)


def test_what_is_no_number_is_left_out(make_run, needs_tensorboard):
    run = make_run("tensorboard")
    loggers = Loggers(run, 0)
    loggers.scalars(line(1) | {"loss": None})
    loggers.close()
    assert sorted(read_events(run).Tags()["scalars"]) == ["grad_norm", "lr", "seconds"]


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_a_sample_is_a_gif_of_the_same_frames(kind, make_run, tmp_path, needs_tensorboard):
    run = make_run("tensorboard")
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    for index, frame in enumerate(frames):
        frame[4 * index : 8 + 4 * index] = (250, 80 * index, 40)
    video = tmp_path / f"a cat.{kind}"
    write_video(video, frames, fps=4)
    loggers = Loggers(run, 0)
    loggers.video(6, video)
    loggers.close()
    (event,) = read_events(run).Images("samples/a cat")
    assert (event.step, event.width, event.height) == (6, 48, 32)
    write_video(tmp_path / "same.gif", read_all_frames(video), fps=4)
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        assert image.format == "GIF"
        shown = [np.asarray(one.convert("RGB")) for one in ImageSequence.Iterator(image)]
    np.testing.assert_array_equal(np.stack(shown), read_all_frames(tmp_path / "same.gif"))


def test_without_log_nothing_is_written(make_run):
    run = make_run()
    loggers = Loggers(run, 0)
    loggers.scalars(line(1))
    loggers.video(1, run.folder / "none.mp4")
    loggers.close()
    assert [path.name for path in run.folder.iterdir()] == ["config.yaml"]


def test_a_logger_that_fails_is_a_line_and_left_alone(make_run, capsys):
    pytest.importorskip("tensorboardX")
    run = make_run("tensorboard")
    (run.folder / EVENTS).write_text("in the way")
    loggers = Loggers(run, 0)
    for step in (1, 2):
        loggers.scalars(line(step))
        loggers.flush()
    loggers.close()
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("log: tensorboard has failed and gets no more of this run: ")
    assert said.endswith("; metrics.jsonl has everything")


def test_a_logger_that_fails_later_is_a_line_too(make_run, capsys, tmp_path):
    pytest.importorskip("tensorboardX")
    run = make_run("tensorboard")
    loggers = Loggers(run, 0)
    loggers.scalars(line(1))
    loggers.video(1, tmp_path / "gone.mp4")
    loggers.scalars(line(2))
    loggers.close()
    (said,) = capsys.readouterr().out.splitlines()
    assert "gone.mp4: no such" in said


# wandb and trackio: tests cannot reach these services. In their place a module keeps its calls.

SERVICE = """
    import json
    calls = []
    def init(**settings): calls.append(("init", settings))
    def log(values, step):
        if step == 13: raise RuntimeError("the service is away")
        calls.append(("log", step, values))
    def finish(): calls.append(("finish",))
"""


@pytest.fixture(params=["wandb", "trackio"])
def service(request, tmp_path, monkeypatch):
    (tmp_path / f"{request.param}.py").write_text(textwrap.dedent(SERVICE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    yield request.param
    sys.modules.pop(request.param, None)


def test_a_service_gets_each_step_once_under_one_name(service, make_run):
    run = make_run(service)
    require_loggers(run.config.log)
    lines = [line(step) for step in range(1, 7)]
    first = Loggers(run, 0)
    for one in lines[:5]:
        record(run, one)
        first.scalars(one)
    second = Loggers(run, 3)
    for one in lines[3:]:
        second.scalars(one)
    second.close()
    calls = sys.modules[service].calls
    began = [call[1] for call in calls if call[0] == "init"]
    assert began[0] == began[1], "the second start goes on with the first one's run"
    assert began[0]["name"].startswith("run")
    assert began[0]["resume"] == "allow"
    assert began[0]["config"]["train_data"]["prompt"] == SMALLEST["train_data"]["prompt"]
    assert [call[1] for call in calls if call[0] == "log"] == [1, 2, 3, 4, 5, 6]
    assert calls[-2] == ("log", 6, {k: v for k, v in lines[5].items() if k != "step"})
    assert calls[-1] == ("finish",)


def test_a_service_that_is_away_is_a_line(service, make_run, capsys):
    loggers = Loggers(make_run(service), 0)
    for step in (12, 13, 14):
        loggers.scalars(line(step))
    loggers.close()
    assert [call[:2] for call in sys.modules[service].calls[1:]] == [("log", 12), ("finish",)]
    (said,) = capsys.readouterr().out.splitlines()
    assert said == (
        f"log: {service} has failed and gets no more of this run: the service is away; "
        "metrics.jsonl has everything"
    )
