"""`python -m tav_jax.tune --clips`: several runs in one job."""

import pytest
import yaml
from run_lines import losses

from tav_jax import tune


@pytest.fixture
def write_clips(tmp_path):
    def write(*items):
        path = tmp_path / "clips.yaml"
        path.write_text(yaml.safe_dump(list(items)))
        return path

    return write


def test_clips_are_tuned_one_after_another_and_only_the_first_compiles(
    cli, write_config, write_clips, tmp_path, finished_run, compiled, monkeypatch
):
    begun = []
    one_run = tune.tune

    def marked(config, programs):
        begun.append(len(compiled))
        one_run(config, programs)

    monkeypatch.setattr(tune, "tune", marked)
    clips = write_clips(
        {"train_data": {"prompt": "a ball is moving"}, "output_dir": str(tmp_path / "runs/ball")},
        {},
    )
    config = write_config(output_dir=str(tmp_path / "runs"))
    ended = cli(tune, "--config", config, "--clips", clips)
    assert ended.status == 0, ended.err
    # Between the beginning of the second and the end nothing was compiled.
    assert begun[1] > 0
    assert len(compiled) == begun[1]
    # What has no folder of its own has one named like the video. It is the run that it is alone.
    second = tmp_path / "runs/moving square"
    assert losses(second) == losses(finished_run.folder)
    assert losses(tmp_path / "runs/ball") != losses(second)
    assert list((second / "samples/sample-6").glob("*.mp4"))


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        pytest.param([{}, {}], ["2 clips have the output_dir"], id="one folder twice"),
        pytest.param(
            [{"train_data": {"promt": "a"}}, {"max_train_steps": -1, "output_dir": "b"}],
            ["clip 1", "promt: unknown key", "clip 2", "max_train_steps"],
            id="two wrong clips",
        ),
        pytest.param(
            [{"train_data": {"video_path": "none.mp4"}}, {"train_data": {"video_path": "no.mp4"}}],
            ["none.mp4: no such video", "no.mp4: no such video"],
            id="two videos that are not there",
        ),
        pytest.param(["a.mp4"], ["expected a list of keys and values"], id="names alone"),
    ],
)
def test_what_is_wrong_with_any_clip_is_said_before_the_first(
    cli, write_config, write_clips, tmp_path, items, messages
):
    ended = cli(tune, "--config", write_config(), "--clips", write_clips(*items))
    assert ended.status == 1
    for message in messages:
        assert message in ended.err
    assert not (tmp_path / "run").exists()
