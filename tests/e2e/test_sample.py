"""`python -m tav_jax.sample`, from a tuned run to new videos."""

import json
import shutil
import signal
import time

import numpy as np
import pytest
import yaml
from PIL import Image

import tav_jax.runs.render
from tav_jax import sample, tune
from tav_jax.video.read import read_frames


def read_video(path):
    return read_frames(path, n_sample_frames=4, width=32, height=32)


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def frames_of(monkeypatch):
    """The frames of every video as they go to the encoder, by the file's name.

    Video compression would hide small differences, and make others out of them.
    """
    written = {}

    def remember(path, frames, fps=8):
        written[path.name] = frames
        real(path, frames, fps=fps)

    real = tav_jax.runs.render.write_video
    monkeypatch.setattr(tav_jax.runs.render, "write_video", remember)
    return written


# What is written.


def test_prompts_come_from_the_command_line_and_from_a_file(finished_run, cli, tmp_path):
    prompts = tmp_path / "my prompts.txt"
    prompts.write_text("a dog is moving\n\n  滑雪的熊猫 🐼 \na dog is moving\n", encoding="utf-8")
    folder = tmp_path / "two words" / "edits"
    outcome = cli(
        sample,
        *("--run", finished_run.folder),
        *("--prompt", "a/b: is it moving?", "--prompt", "a bird"),
        *("--prompts", prompts),
        *("--output-dir", folder),
    )
    assert outcome.status == 0
    assert outcome.err == ""
    [odd] = folder.glob("a_b_ is it moving_-*.mp4")
    stems = [odd.stem, "a bird", "a dog is moving", "滑雪的熊猫 🐼"]
    names = [f"{stem}.{suffix}" for stem in stems for suffix in ("mp4", "json")]
    assert {path.name for path in folder.iterdir()} == {
        *names,
        "contact-sheet.png",
        "contact-sheet.txt",  # the labels' font has no Chinese
        "side-by-side.gif",
        "side-by-side.mp4",
    }
    written = [f"{stem}.mp4" for stem in stems] + [
        "contact-sheet.png",
        "contact-sheet.txt",
        "side-by-side.mp4",
        "side-by-side.gif",
    ]
    assert outcome.out.splitlines() == [f"wrote {folder / name}" for name in written]
    for stem in stems:
        assert read_video(folder / f"{stem}.mp4").std() > 1
    # The clip and four edits, beside and above each other.
    beside = read_frames(folder / "side-by-side.mp4", n_sample_frames=4, width=160, height=32)
    assert beside.shape == (4, 32, 160, 3)
    with Image.open(folder / "contact-sheet.png") as sheet:
        assert sheet.height > 5 * 64
    settings = json.loads((folder / "滑雪的熊猫 🐼.json").read_text(encoding="utf-8"))
    assert settings["prompt"] == "滑雪的熊猫 🐼"
    assert settings["step"] == 6
    assert settings["guidance_scale"] == 12.5


def test_a_checkpoint_is_sampled_by_the_program_that_its_run_compiled(
    write_config, cli, tmp_path, compiled
):
    assert cli(tune, "--config", write_config(max_train_steps=1, validation_steps=1)).status == 0
    compiled.clear()
    assert cli(sample, "--run", tmp_path / "run", "--prompt", "a bird").status == 0
    assert "jit(ddim_sample)" not in compiled


def test_a_run_samples_later_what_it_would_have_sampled_itself(finished_run, cli, tmp_path):
    prompt = "a ball is moving"
    outcome = cli(
        sample, "--run", finished_run.folder, "--prompt", prompt, "--output-dir", tmp_path
    )
    assert outcome.status == 0
    np.testing.assert_array_equal(
        read_video(tmp_path / f"{prompt}.mp4"),
        read_video(finished_run.folder / f"samples/sample-6/{prompt}.mp4"),
    )


def test_what_is_there_is_skipped_without_loading_the_model(finished_run, cli, compiled):
    before = listing(finished_run.folder)
    outcome = cli(
        sample, "--run", finished_run.folder, "--prompt", "a ball is moving", "--prompt", "a cat"
    )
    assert outcome.status == 0
    assert outcome.out == "2 of 2 videos are there already: skipped\n"
    assert listing(finished_run.folder) == before
    assert compiled == []


def test_only_what_is_missing_is_made(run_copy, cli):
    folder = run_copy / "samples/sample-6"
    before = listing(folder)
    outcome = cli(sample, "--run", run_copy, "--prompt", "a cat", "--prompt", "a dog is moving")
    assert outcome.status == 0
    assert "1 of 2 videos are there already: skipped" in outcome.out
    assert [line for line in outcome.out.splitlines() if "contact" not in line][1:] == [
        f"wrote {folder / 'a dog is moving.mp4'}",
        f"wrote {folder / 'side-by-side.mp4'}",
        f"wrote {folder / 'side-by-side.gif'}",
    ]
    after = listing(folder)
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed == {
        "a dog is moving.mp4",
        "a dog is moving.json",
        "contact-sheet.png",
        "side-by-side.gif",
        "side-by-side.mp4",
    }


def test_a_sheet_that_is_missing_is_made_even_if_no_video_is(run_copy, cli):
    # As a kill leaves it between the last video and the contact sheet.
    sheet = run_copy / "samples/sample-6/contact-sheet.png"
    sheet.unlink()
    assert cli(sample, "--run", run_copy, "--prompt", "a cat").status == 0
    assert sheet.is_file()


@pytest.mark.parametrize("record", ['{"prompt": ', "[1]", '{"prompt": 3}', "{}"])
def test_a_damaged_record_of_another_video_does_not_stop_the_sheet(record, run_copy, cli):
    folder = run_copy / "samples/sample-6"
    (folder / "a cat.json").write_text(record)
    (folder / "contact-sheet.png").unlink()
    outcome = cli(sample, "--run", run_copy, "--prompt", "a ball is moving")
    assert outcome.status == 0
    assert f"the contact sheet goes without a video: {folder / 'a cat.json'}: " in outcome.out
    assert (folder / "contact-sheet.png").is_file()
    assert (folder / "a cat.json").read_text() == record


def test_prompts_that_the_labels_font_cannot_write_stand_in_a_legend(finished_run, cli, tmp_path):
    folder = tmp_path / "edits"
    arguments = ["--run", finished_run.folder, "--prompt", "一只猫", "--output-dir", folder]
    assert cli(sample, *arguments).status == 0
    assert (folder / "contact-sheet.txt").read_text(encoding="utf-8") == "row 2: 一只猫\n"
    assert (folder / "一只猫.mp4").is_file()


def test_a_video_of_other_settings_is_kept_unless_told_otherwise(run_copy, cli, compiled):
    video = run_copy / "samples/sample-6/a cat.mp4"
    before, pixels = listing(run_copy), read_video(video)
    command = ("--run", run_copy, "--prompt", "a cat", "--guidance-scale", 3)
    outcome = cli(sample, *command)
    assert outcome.status == 1
    assert f"error: {video} was made with other settings" in outcome.err
    assert "guidance_scale 12.5 there, 3.0 here" in outcome.err
    assert "--overwrite" in outcome.err
    assert listing(run_copy) == before
    assert compiled == []

    assert cli(sample, *command, "--overwrite").status == 0
    assert not np.array_equal(read_video(video), pixels)
    again = cli(sample, *command)
    assert again.status == 0
    assert "1 of 1 videos are there already" in again.out


def test_all_videos_of_other_settings_are_named_at_once(finished_run, cli):
    outcome = cli(
        sample,
        *("--run", finished_run.folder, "--eta", 0.5),
        *("--prompt", "a cat", "--prompt", "a ball is moving"),
    )
    assert outcome.status == 1
    assert "a cat.mp4" in outcome.err
    assert "a ball is moving.mp4" in outcome.err


def test_a_video_is_never_paired_with_the_settings_of_another(run_copy, cli, monkeypatch):
    # Killed while it overwrites: the new settings are there, the new video is not.
    def kill(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tav_jax.runs.render, "write_video", kill)
    command = ("--run", run_copy, "--prompt", "a cat", "--negative-prompt", "dark")
    assert cli(sample, *command, "--overwrite").status == 130
    monkeypatch.undo()
    video = run_copy / "samples/sample-6/a cat.mp4"
    old = video.stat().st_mtime_ns if video.exists() else None
    # Either it knows that the old video is not what is asked for, or it makes the new one.
    outcome = cli(sample, *command)
    assert outcome.status == 1 or video.stat().st_mtime_ns != old


def test_an_interrupted_batch_of_prompts_is_completed_by_the_same_command(
    start, cli, finished_run, tmp_path
):
    names = ["a dog", "a bird", "a horse", "a fish", "a car"]
    (tmp_path / "prompts.txt").write_text("\n".join(names))
    folder = tmp_path / "edits"
    command = ["--run", finished_run.folder, "--prompts", tmp_path / "prompts.txt"]
    command += ["--output-dir", folder]
    process = start("-m", "tav_jax.sample", *command)
    deadline = time.monotonic() + 600
    while not (folder / "a dog.mp4").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    done = listing(folder)
    videos = [path for path in done if path.suffix == ".mp4"]
    assert 0 < len(videos) < len(names)
    assert not [path for path in done if path.name.startswith(".")], "nothing half-written stays"

    outcome = cli(sample, *command)
    assert outcome.status == 0
    assert f"{len(videos)} of {len(names)} videos are there already: skipped" in outcome.out
    for video in videos:
        assert video.stat().st_mtime_ns == done[video]
    assert {path.stem for path in folder.glob("*.json")} == set(names)
    for name in names:
        read_video(folder / f"{name}.mp4")


# What decides the pixels.


def test_noise_and_seeds_decide_the_pixels(finished_run, cli, tmp_path, frames_of):
    command = ("--run", finished_run.folder, "--prompt", "a cat", "--output-dir", tmp_path)
    outcome = cli(sample, *command, "--random-noise", "--seeds", "0,1,33")
    assert outcome.status == 0
    assert "note:" not in outcome.out
    noisy = [frames_of[f"a cat-seed{seed}.mp4"] for seed in (0, 1, 33)]
    for one, other in ((0, 1), (1, 2), (2, 0)):
        assert not np.array_equal(noisy[one], noisy[other])
    assert json.loads((tmp_path / "a cat-seed1.json").read_text())["num_inv_steps"] is None

    # Without --seeds the run's own seed, which is 33.
    assert cli(sample, *command, "--random-noise").status == 0
    np.testing.assert_array_equal(frames_of["a cat.mp4"], noisy[2])


def test_seeds_that_change_nothing_are_said_to(finished_run, cli, tmp_path, frames_of):
    command = ("--run", finished_run.folder, "--prompt", "a cat", "--seeds", "0,1")
    outcome = cli(sample, *command, "--output-dir", tmp_path / "plain")
    assert outcome.status == 0
    assert "note: from the inverted clip and with eta 0 nothing is drawn" in outcome.out
    np.testing.assert_array_equal(frames_of["a cat-seed0.mp4"], frames_of["a cat-seed1.mp4"])
    first = frames_of["a cat-seed0.mp4"]

    # As the note says. Fewer steps besides, which neither finds nor leaves an inverted clip.
    latents = listing(finished_run.folder / "inv_latents")
    outcome = cli(
        sample,
        *command,
        *("--eta", 1, "--num-inference-steps", 2, "--num-inv-steps", 2),
        *("--output-dir", tmp_path / "noisy"),
    )
    assert outcome.status == 0
    assert "note:" not in outcome.out
    assert not np.array_equal(frames_of["a cat-seed0.mp4"], frames_of["a cat-seed1.mp4"])
    assert not np.array_equal(frames_of["a cat-seed0.mp4"], first)
    # The inversion's own number of steps counts, though the run has an inverted clip.
    outcome = cli(sample, *command, "--num-inv-steps", 2, "--output-dir", tmp_path / "coarse")
    assert outcome.status == 0
    assert not np.array_equal(frames_of["a cat-seed0.mp4"], first)
    assert listing(finished_run.folder / "inv_latents") == latents


def test_prompt_negative_prompt_and_guidance_decide_the_pixels(
    finished_run, cli, tmp_path, frames_of
):
    changes = {
        "plain": [],
        "negative": ["--negative-prompt", "a ball, blurry"],
        "guided less": ["--guidance-scale", 5],
    }
    for name, change in changes.items():
        outcome = cli(
            sample,
            *("--run", finished_run.folder, "--prompt", "a cat", *change),
            *("--output-dir", tmp_path / name),
        )
        assert outcome.status == 0
        changes[name] = frames_of["a cat.mp4"]
    assert not np.array_equal(changes["plain"], changes["negative"])
    assert not np.array_equal(changes["plain"], changes["guided less"])
    settings = json.loads((tmp_path / "negative/a cat.json").read_text())
    assert settings["negative_prompt"] == "a ball, blurry"
    assert settings["guidance_scale"] == 12.5, "what is not given is as the run has it"


@pytest.mark.parametrize("noise", [[], ["--random-noise"]], ids=["inverted clip", "random noise"])
def test_batches_give_the_pixels_of_one_at_a_time(noise, finished_run, cli, tmp_path, frames_of):
    prompts = ["a cat", "a dog", "a ball is moving", "a bird", "a fish"]
    videos = {}
    # All at a time, three and then two more, and one by one.
    for batch_size in (8, 3, 1):
        outcome = cli(
            sample,
            *("--run", finished_run.folder, *noise, "--batch-size", batch_size),
            *(part for prompt in prompts for part in ("--prompt", prompt)),
            *("--output-dir", tmp_path / str(batch_size)),
        )
        assert outcome.status == 0
        videos[batch_size] = np.stack([frames_of[f"{prompt}.mp4"] for prompt in prompts])
    assert not np.array_equal(videos[1][0], videos[1][1])
    for batch_size in (8, 3):
        # Sums are taken in another order, so that a value may round to the level next to it.
        difference = np.abs(videos[batch_size].astype(int) - videos[1])
        assert difference.max() <= 1
        assert difference.mean() < 0.01


def test_an_earlier_checkpoint_can_be_sampled_from(run_copy, cli, frames_of):
    command = ("--run", run_copy, "--prompt", "a dog")
    assert cli(sample, *command).status == 0
    latest = frames_of["a dog.mp4"]
    outcome = cli(sample, *command, "--step", 3)
    assert outcome.status == 0
    assert f"wrote {run_copy / 'samples/sample-3/a dog.mp4'}" in outcome.out
    assert not np.array_equal(frames_of["a dog.mp4"], latest), "other weights"
    inverted = np.load(run_copy / "inv_latents/ddim_latent-3.npy")
    assert inverted.dtype == np.float32
    assert not np.array_equal(inverted, np.load(run_copy / "inv_latents/ddim_latent-6.npy"))


def test_a_run_outlives_its_clip_and_its_place(run_copy, cli, material, tmp_path):
    config = yaml.safe_load((run_copy / "config.yaml").read_text())
    config["train_data"]["video_path"] = "/no/longer/there.mp4"
    (run_copy / "config.yaml").write_text(yaml.safe_dump(config))
    outcome = cli(sample, "--run", run_copy, "--prompt", "a dog", "--output-dir", tmp_path / "out")
    assert outcome.status == 0
    assert "the contact sheet goes without the clip: /no/longer/there.mp4" in outcome.out
    assert (tmp_path / "out/contact-sheet.png").is_file()

    # A checkpoint without an inverted clip needs the clip.
    outcome = cli(sample, "--run", run_copy, "--prompt", "a dog", "--step", 3)
    assert outcome.status == 1
    assert "/no/longer/there.mp4: no such video" in outcome.err
    assert not (run_copy / "samples/sample-3").exists()


def test_a_prompt_named_like_an_overview_is_not_lost(finished_run, cli, tmp_path, frames_of):
    command = ("--run", finished_run.folder, "--output-dir", tmp_path)
    assert cli(sample, *command, "--prompt", "side-by-side").status == 0
    [record] = tmp_path.glob("*.json")
    # The overview has the clip beside the sample, the sample has not.
    assert frames_of[f"{record.stem}.mp4"].shape == (4, 256, 256, 3)


def test_a_prompt_that_is_too_long_is_quoted_where_it_is_cut(finished_run, cli, tmp_path):
    prompt = "a square " * 40 + "is moving to the very end"
    outcome = cli(
        sample, "--run", finished_run.folder, "--prompt", prompt, "--output-dir", tmp_path
    )
    assert outcome.status == 0
    warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1, "once, and not at every batch"
    assert "77 are read" in warnings[0]
    assert warnings[0].endswith("is moving to the very end'")
    [video] = tmp_path.glob("a square *.mp4")
    assert len(video.name) < 130


def test_prompts_of_any_script_are_text(finished_run, cli, tmp_path):
    # A space of Japanese, a joiner of Persian, and an emoji joined from two: Python's
    # str.isprintable is false for each.
    prompts = ["猫\u3000走る", "\u0645\u06cc\u200c\u0631\u0648\u062f", "\U0001f469\u200d\U0001f680"]
    outcome = cli(
        sample,
        *("--run", finished_run.folder, "--output-dir", tmp_path),
        *(part for prompt in prompts for part in ("--prompt", prompt)),
    )
    assert outcome.status == 0, outcome.err
    assert {path.stem for path in tmp_path.glob("*.json")} == set(prompts)


def test_a_file_with_a_byte_order_mark_has_the_prompts_that_one_sees(finished_run, cli, tmp_path):
    # Windows' editors write one, and no one sees it.
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8-sig")
    outcome = cli(
        sample,
        *("--run", finished_run.folder, "--prompts", tmp_path / "prompts.txt"),
        *("--output-dir", tmp_path / "edits"),
    )
    assert outcome.status == 0
    assert (tmp_path / "edits/a cat.mp4").is_file()


# Input that cannot work.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(
            ["--run", "{tmp}/missing"],
            ["--run: ", "missing is not a run of tav_jax.tune"],
            id="run",
        ),
        pytest.param(
            ["--run", "{run}/checkpoints/6"], ["is not a run of tav_jax.tune"], id="below a run"
        ),
        pytest.param(
            ["--run", "{tmp}/untuned"], ["has no checkpoint yet; run tav_jax.tune"], id="untuned"
        ),
        pytest.param(
            ["--run", "{run}", "--step", "5"], ["no checkpoint 5; the newest is 6"], id="step"
        ),
        pytest.param(
            ["--run", "{run}", "--step", "-1"], ["no checkpoint -1"], id="step below nothing"
        ),
        pytest.param(
            ["--run", "{run}", "--prompts", "{tmp}/promts.txt"],
            ["--prompts: ", "promts.txt", "No such file"],
            id="prompts file",
        ),
        pytest.param(
            ["--run", "{run}", "--prompts", "{tmp}/empty.txt"],
            ["empty.txt has no prompts; write one a line"],
            id="no prompts in the file",
        ),
        pytest.param(
            ["--run", "{run}", "--prompts", "{tmp}/picture.png"],
            ["--prompts: ", "picture.png"],
            id="a file that is no text",
        ),
        pytest.param(
            ["--run", "{run}", "--prompts", "{tmp}"], ["--prompts: ", "directory"], id="a folder"
        ),
        pytest.param(
            [
                *("--run", "{run}", "--num-inference-steps", "0", "--num-inv-steps", "1000"),
                *("--eta", "2", "--guidance-scale", "-1", "--batch-size", "0"),
            ],
            [
                "--num-inference-steps: Input should be greater than or equal to 1 (got 0)",
                "--num-inv-steps: Input should be less than or equal to 999 (got 1000)",
                "--eta: Input should be less than or equal to 1 (got 2.0)",
                "--guidance-scale: Input should be greater than or equal to 0 (got -1.0)",
                "--batch-size 0: expected 1",
            ],
            id="numbers",
        ),
        pytest.param(
            ["--run", "{run}", "--prompt", "not UTF-8 in a terminal: \udcff"],
            ["\\udcff"],
            id="a prompt that is no text",
        ),
        pytest.param(
            ["--run", "{run}", "--output-dir", "{tmp}/picture.png"],
            ["picture.png"],
            id="an output folder that is a file",
        ),
    ],
)
def test_wrong_input_ends_in_clear_lines_and_leaves_nothing(
    arguments, expected, finished_run, cli, tmp_path, compiled
):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    (tmp_path / "untuned").mkdir()
    shutil.copy(finished_run.folder / "config.yaml", tmp_path / "untuned")
    before = listing(tmp_path) | listing(finished_run.folder)
    arguments = [part.format(tmp=tmp_path, run=finished_run.folder) for part in arguments]
    outcome = cli(sample, "--prompt", "a whale", *arguments)
    assert outcome.status == 1
    assert outcome.err.startswith("error: ")
    for part in expected:
        assert part in outcome.err
    assert "wrote" not in outcome.out
    assert listing(tmp_path) | listing(finished_run.folder) == before
    assert "jit(ddim_sample)" not in compiled


def test_without_prompts_it_is_said_how_to_give_them(finished_run, cli):
    outcome = cli(sample, "--run", finished_run.folder)
    assert outcome.status == 1
    assert outcome.err == "error: no prompts: give --prompt TEXT or --prompts FILE\n"


@pytest.mark.parametrize("seeds", ["a,b", "0;1", "0,", "1.5", "0,99999999999999999999"])
def test_seeds_that_are_none_are_quoted(seeds, finished_run, capsys):
    with pytest.raises(SystemExit) as ended:
        sample.main(["--run", str(finished_run.folder), "--prompt", "a", "--seeds", seeds])
    assert ended.value.code == 2
    assert f"'{seeds}': expected numbers" in capsys.readouterr().err


def test_a_wrong_input_ends_a_process_with_status_1_and_no_traceback(start):
    process = start("-m", "tav_jax.sample", "--run", "missing", "--prompt", "a cat")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert err == "error: --run: missing is not a run of tav_jax.tune: no config.yaml\n"
    assert out == ""


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        sample.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "python -m tav_jax.sample --run outputs/man-skiing --prompt" in said


def test_a_run_is_sampled_with_dpm_solver_too(run_copy, cli, tmp_path):
    command = ("--run", run_copy, "--prompt", "a cat", "--output-dir", tmp_path / "new")
    assert cli(sample, *command, "--sampler", "dpm_solver").status == 0
    assert json.loads((tmp_path / "new/a cat.json").read_text())["sampler"] == "dpm_solver"
    ours = read_video(tmp_path / "new/a cat.mp4")
    assert not np.array_equal(ours, read_video(run_copy / "samples/sample-6/a cat.mp4"))
    # The same by another sampler is another video.
    refused = cli(sample, *command)
    assert refused.status == 1
    assert "sampler 'dpm_solver' there, 'ddim' here" in refused.err


def test_a_record_that_names_no_sampler_is_of_ddim(run_copy, cli):
    record = run_copy / "samples/sample-6/a cat.json"
    settings = json.loads(record.read_text())
    assert settings.pop("sampler") == "ddim"
    record.write_text(json.dumps(settings))
    outcome = cli(sample, "--run", run_copy, "--prompt", "a cat")
    assert outcome.out.startswith("1 of 1 videos are there already")


def test_noise_at_every_step_is_for_ddim_alone(run_copy, cli):
    command = ("--run", run_copy, "--prompt", "a cat", "--sampler", "dpm_solver", "--eta", 1)
    outcome = cli(sample, *command)
    assert outcome.status == 1
    assert outcome.err.startswith("error: eta 1.0: of the samplers only ddim")
