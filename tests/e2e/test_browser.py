"""Pages in a real browser without a network: the preference study and the pages of runs.

They need playwright (the extra `browser`) and Chromium, which the system brings.
"""

import csv
import json

import numpy as np
import pytest
import yaml

from tav_jax import evaluate, report
from tav_jax.video.write import write_video

PROMPTS = [f"prompt {number}" for number in range(9)] + ["<script>document.title='ran'</script>"]


@pytest.fixture
def study(tmp_path):
    """Returns the page of a study of ten pairs."""
    rng = np.random.default_rng(0)
    rows = []
    for number, prompt in enumerate(PROMPTS):
        rows.append((f"{number}.mp4", prompt))
        for system in ("ours", "theirs"):
            (tmp_path / system).mkdir(exist_ok=True)
            frames = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
            write_video(tmp_path / system / f"{number}.mp4", frames, fps=4)
    with (tmp_path / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("video", "prompt"), *rows])
    page = tmp_path / "study.html"
    systems = [f"--system={name}={tmp_path / name}" for name in ("ours", "theirs")]
    table = f"--prompts={tmp_path / 'prompts.csv'}"
    assert evaluate.main([*systems, table, f"--study={page}", "--study-seed=4"]) == 0
    return page


def prompt_of(page):
    return page.locator("#prompt").inner_text().strip("“”")


def choose(page, question, side):
    page.locator(f"button[data-question={question}][data-side={side}]").click()


def save(page, folder):
    with page.expect_download() as download:
        page.get_by_role("button", name="Save the answers").click()
    file = folder / download.value.suggested_filename
    download.value.save_as(file)
    return file


def test_ten_pairs_are_answered_by_clicks_and_give_the_table(new_context, study, tmp_path, capsys):
    page = new_context().new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(study.as_uri())
    seen = []
    for number in range(10):
        assert page.locator("#count").inner_text() == f"Pair {number + 1} of 10"
        videos = page.locator("#videos video")
        assert videos.count() == 2
        page.wait_for_function(
            "() => [...document.querySelectorAll('#videos video')].every(v => v.videoWidth === 32)"
        )
        assert page.locator("#next").is_disabled(), "both questions come first"
        seen.append(prompt_of(page))
        choose(page, "quality", "left")
        choose(page, "faithfulness", "left" if number < 5 else "right")
        choose(page, "faithfulness", "right")  # another mind
        page.locator("#next").click()
    assert sorted(seen) == sorted(PROMPTS)
    assert seen != PROMPTS, "in random order"
    assert page.title() == "Which video is better?", "a prompt stays text"
    answers = save(page, tmp_path)
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]

    with answers.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert [row["prompt"] for row in rows[::2]] == seen
    # What the table must say, from the exported sides.
    lefts = sum(row["left"] == "ours" for row in rows if row["question"] == "quality")
    assert 0 < lefts < 10
    capsys.readouterr()
    assert evaluate.main(["--answers", str(answers)]) == 0
    table = capsys.readouterr().out
    for question, ours in (("quality", lefts), ("faithfulness", 10 - lefts)):
        first, second = ("ours", "theirs") if ours >= 5 else ("theirs", "ours")
        share = f"{10 * max(ours, 10 - ours):.2f} %"
        assert f"| {question} | {first} | {second} | {share} |" in table


def test_keys_answer_and_progress_is_kept(new_context, study, tmp_path):
    page = new_context().new_page()
    page.goto(study.as_uri())
    first = prompt_of(page)
    for key in ("1", "2", "Enter", "2", "2", "Enter", "Backspace"):
        page.keyboard.press(key)
    assert page.locator("#count").inner_text() == "Pair 2 of 10"
    page.reload()
    assert page.locator("#count").inner_text() == "Pair 2 of 10", "where it was left"
    page.keyboard.press("Backspace")
    assert prompt_of(page) == first
    pressed = page.locator("button[aria-pressed=true]")
    assert [pressed.nth(index).get_attribute("data-side") for index in range(2)] == [
        "left",
        "right",
    ]
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    for _ in range(8):
        for key in ("1", "1", "Enter"):
            page.keyboard.press(key)
    answers = save(page, tmp_path)
    with answers.open() as file:
        rows = list(csv.DictReader(file))
    expected = ["left", "right", "right", "right"] + ["left"] * 16
    assert [row["answer"] for row in rows] == expected
    assert len({row["rater"] for row in rows}) == 1


def test_touch_works_on_a_small_screen(new_context, study, tmp_path):
    page = new_context(viewport={"width": 360, "height": 640}, has_touch=True).new_page()
    page.goto(study.as_uri())
    for question in ("quality", "faithfulness"):
        page.locator(f"button[data-question={question}][data-side=right]").tap()
    page.locator("#next").tap()
    assert page.locator("#count").inner_text() == "Pair 2 of 10"
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing is cut off"
    page.screenshot(path=tmp_path / "small.png")


# Pages of runs.

TIMES = "[...document.querySelectorAll('video')].map(video => video.currentTime)"
SCRIPT = "<script>alert(1)</script>"
LONG = "a cat, " * 1_430 + "</script><b>"


@pytest.fixture
def run_page(run_copy):
    """Returns the page of a run of which prompts and caption are to do harm."""
    samples = run_copy / "samples/sample-6"
    for stem, prompt in (("a ball is moving", SCRIPT), ("a cat", LONG)):
        record = json.loads((samples / f"{stem}.json").read_text())
        (samples / f"{stem}.json").write_text(json.dumps(record | {"prompt": prompt}))
    config = yaml.safe_load((run_copy / "config.yaml").read_text())
    config["train_data"]["prompt"] = f"{SCRIPT} moves"
    (run_copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert report.main([str(run_copy)]) == 0
    return run_copy / "report.html"


def open_page(new_context, path, **options):
    """Opens a page in which nothing plays by itself, when its videos are there."""
    page = new_context(reduced_motion="reduce", **options).new_page()
    page.goto(path.as_uri())
    page.wait_for_function(
        "() => [...document.querySelectorAll('video')].every(v => v.readyState >= 2)"
    )
    return page


def test_one_button_and_one_scrubber_move_all_videos(new_context, run_page):
    page = open_page(new_context, run_page)
    videos = page.locator("video").count()
    assert videos == 4
    assert page.evaluate(TIMES) == [0.0] * videos
    assert page.locator("button").count() == page.locator("input").count() == 1

    page.get_by_role("button", name="Play").click()
    page.wait_for_function(f"() => {TIMES}.every(time => time > 0)")
    # One second of video, which begins again.
    page.evaluate(f"window.highest = Math.max(...{TIMES})")
    page.wait_for_function(
        f"() => {{ const now = Math.max(...{TIMES}); const again = now < window.highest;"
        " window.highest = Math.max(now, window.highest); return again; }"
    )
    page.get_by_role("button", name="Pause").click()
    stopped = page.evaluate(TIMES)
    page.wait_for_timeout(300)
    assert page.evaluate(TIMES) == stopped

    page.locator("#scrubber").fill("2")
    assert page.evaluate(TIMES) == [2.5 / 4] * videos, "in the middle of the third frame at 4"
    assert page.locator("#frame").inner_text() == "frame 3 of 4"


def test_keys_play_and_step(new_context, run_page):
    page = open_page(new_context, run_page)
    steps = ("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("ArrowLeft", 1)
    for key, frame in (*steps, ("ArrowLeft", 1)):
        page.keyboard.press(key)
        assert page.locator("#frame").inner_text() == f"frame {frame} of 4"
        assert page.evaluate(TIMES) == [(frame - 0.5) / 4] * 4
    page.keyboard.press("Space")
    page.wait_for_function(f"() => {TIMES}.every(time => time > 0.3)")
    page.keyboard.press("Space")
    assert page.locator("#play").inner_text() == "Play"
    # On the button itself a space is the button's.
    page.locator("#play").focus()
    page.keyboard.press("Space")
    assert page.locator("#play").inner_text() == "Pause"


def test_prompts_of_a_page_stay_text_and_nothing_is_asked_of_a_network(new_context, run_page):
    context = new_context()
    page = context.new_page()
    asked, alerts, errors = [], [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(run_page.as_uri())
    # What moves at once, unless the reader wants no motion.
    page.wait_for_function(f"() => {TIMES}.length === 4 && {TIMES}.every(time => time > 0)")
    captions = page.locator("figcaption").all_text_contents()
    assert captions[:4] == [f"{SCRIPT} moves", "a square is moving, cartoon style", SCRIPT, LONG]
    assert page.title() == f"{SCRIPT} moves"
    assert page.locator("main script, main b").count() == 0
    assert page.locator("figcaption").nth(3).bounding_box()["height"] < 200
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    assert not alerts
    assert not errors


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_of_a_run_fits_a_phone(new_context, run_page, tmp_path, scheme):
    phone = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "color_scheme": scheme}
    page = open_page(new_context, run_page, **phone)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing is cut off"
    page.locator("#play").tap()
    page.wait_for_function(f"() => {TIMES}.every(time => time > 0)")
    luminance = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert (min(luminance) > 200) == (scheme == "light")
    page.screenshot(path=tmp_path / "page.png", full_page=True)


def test_runs_of_other_rates_play_in_one_page(new_context, run_page, finished_run, tmp_path):
    config = yaml.safe_load((run_page.parent / "config.yaml").read_text())
    config["validation_data"]["fps"] = 2.0
    (run_page.parent / "config.yaml").write_text(yaml.safe_dump(config))
    both = tmp_path / "both.html"
    assert report.main([str(finished_run.folder), str(run_page.parent), f"--output={both}"]) == 0
    page = open_page(new_context, both)
    assert page.locator("video").count() == 8
    # The second run's clip has two seconds, all others one.
    page.locator("#scrubber").fill("7")
    assert page.locator("#frame").inner_text() == "frame 8 of 8"
    times = page.evaluate(TIMES)
    assert times[4] == 7.5 / 4
    assert all(time == pytest.approx(1, abs=0.01) for time in times[:4] + times[5:])
