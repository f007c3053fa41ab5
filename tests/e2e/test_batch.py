"""`python launch/batch_sample.py`: a plan of runs, prompts and seeds."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def batch_sample():
    spec = importlib.util.spec_from_file_location("batch_sample", LAUNCH / "batch_sample.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["batch_sample"] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["batch_sample"]


@pytest.fixture
def runs(finished_run, tmp_path):
    """Two finished runs, `first` and `second`, that a test may write to."""
    return [shutil.copytree(finished_run.folder, tmp_path / name) for name in ("first", "second")]


@pytest.fixture
def write_plan(tmp_path, monkeypatch):
    """Writes a plan that names its runs relative to the working directory, as people do."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="plan.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return write


def videos(run, step=6):
    """The videos of a run that are not the run's own."""
    own = {"a ball is moving", "a square is moving, cartoon style", "a cat", "side-by-side"}
    return {path.stem for path in (run / f"samples/sample-{step}").glob("*.mp4")} - own


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def settings_of(run, stem):
    return json.loads((run / f"samples/sample-6/{stem}.json").read_text())


def test_every_prompt_and_seed_is_sampled_from_every_run(batch_sample, runs, write_plan, cli):
    plan = write_plan(
        """
        runs: [first, second]
        prompts: ["a dog", "Ein Bär 🐻"]
        seeds: [0, 1]
        use_inv_latent: false
        negative_prompt: dark
        """
    )
    outcome = cli(batch_sample, plan)
    assert outcome.status == 0
    stems = {f"{prompt}-seed{seed}" for prompt in ("a dog", "Ein Bär 🐻") for seed in (0, 1)}
    for run in runs:
        assert videos(run) == stems
        assert f"{run.name}: 4 videos" in outcome.out
        for stem in stems:
            assert f"wrote {run.name}/samples/sample-6/{stem}.mp4" in outcome.out
            settings = settings_of(run, stem)
            assert settings["negative_prompt"] == "dark"
            assert settings["num_inv_steps"] is None
            assert settings["guidance_scale"] == 12.5, "as the run has it"
    assert outcome.out.endswith("8 videos written, 0 were there already\n")


def test_a_plan_run_again_makes_what_is_missing(batch_sample, runs, write_plan, cli, compiled):
    plan = write_plan("runs: [first, second]\nprompts: [a cat, a dog]\n")
    outcome = cli(batch_sample, plan)
    assert outcome.status == 0
    # The run's own settings, so that its own sample of a prompt is the one that is asked for.
    assert outcome.out.endswith("2 videos written, 2 were there already\n")
    assert [videos(run) for run in runs] == [{"a dog"}, {"a dog"}]

    (runs[1] / "samples/sample-6/a dog.mp4").unlink()
    before = [listing(run) for run in runs]
    compiled.clear()
    outcome = cli(batch_sample, plan)
    assert outcome.out.endswith("1 videos written, 3 were there already\n")
    assert listing(runs[0]) == before[0]
    assert videos(runs[1]) == {"a dog"}
    assert "jit(ddim_sample)" not in compiled


def test_a_table_has_a_line_for_each_video(batch_sample, runs, write_plan, cli):
    plan = write_plan(
        "run,prompt,seed,guidance_scale,use_inv_latent\n"
        'first,"a dog, running",,,\n'
        "first,a fish,3,7.5,false\n"
        "second,a bird,,,\n"
        "first,a fish,3,7.5,false\n",
        "plan.csv",
    )
    outcome = cli(batch_sample, plan)
    assert outcome.status == 0
    assert videos(runs[0]) == {"a dog, running", "a fish-seed3"}
    assert videos(runs[1]) == {"a bird"}
    assert outcome.out.endswith("3 videos written, 0 were there already\n"), "asked for twice"
    fish, dog = (settings_of(runs[0], stem) for stem in ("a fish-seed3", "a dog, running"))
    assert (fish["seed"], fish["guidance_scale"], fish["num_inv_steps"]) == (3, 7.5, None)
    assert (dog["seed"], dog["guidance_scale"], dog["num_inv_steps"]) == (33, 12.5, 3)


def test_a_table_of_a_spreadsheet_is_read(batch_sample, runs, write_plan, cli, tmp_path):
    # Excel puts a byte order mark before the first column's name.
    (tmp_path / "plan.csv").write_text("run,prompt\r\nfirst,a cat\r\n", encoding="utf-8-sig")
    outcome = cli(batch_sample, "plan.csv")
    assert outcome.status == 0
    assert outcome.out.endswith("0 videos written, 1 were there already\n")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        pytest.param("plan.yaml", "runs: [first\n", ["not YAML"], id="no YAML"),
        pytest.param("plan.yaml", "", ["expected the keys runs and prompts"], id="empty"),
        pytest.param("plan.yaml", "- first\n", ["expected the keys"], id="a list"),
        pytest.param("plan.yaml", "runs: []\nprompts: []\n", ["it asks for nothing"], id="nothing"),
        pytest.param(
            "plan.yaml", "run: first\n", ["expected lists under runs, prompts"], id="no lists"
        ),
        pytest.param(
            "plan.yaml", "runs: [first]\nprompts: a cat\n", ["lists under prompts"], id="a text"
        ),
        pytest.param(
            "plan.yaml",
            "runs: [first, 3]\nprompts: [a cat, null]\nseeds: [x]\neta: 2\nguidence_scale: 7\n",
            ["run: ", "prompt: ", "seed: ", "eta: ", "guidence_scale: "],
            id="every wrong value",
        ),
        pytest.param(
            "plan.csv",
            "run,prompt,eta,sed\nfirst,a cat,2,\n,a dog,,\nfirst,a,b,c,d\nfirst,,,4\n",
            ["line 2, eta: ", "line 3, run: ", "line 4, None: ", "line 5, prompt: ", "line 5, sed"],
            id="every wrong line",
        ),
        pytest.param("plan.csv", "run,prompt\n", ["it asks for nothing"], id="only a header"),
        pytest.param(
            "plan.yaml",
            "runs: [first, mising, {tmp}]\nprompts: [a dog]\n",
            ["mising is not a run of tav_jax.tune", "{tmp} is not a run"],
            id="every wrong run",
        ),
        pytest.param(
            "plan.yaml",
            "runs: [first]\nprompts: [a dog]\nseeds: [99999999999999999999]\nuse_inv_latent: false",
            ["99999999999999999999"],
            id="a seed that is too long",
        ),
    ],
)
def test_a_wrong_plan_ends_in_lines_before_anything_is_sampled(
    name, text, expected, batch_sample, runs, write_plan, cli, tmp_path, compiled
):
    plan = write_plan(text.replace("{tmp}", str(tmp_path)), name)
    before = listing(tmp_path)
    outcome = cli(batch_sample, plan)
    assert outcome.status == 1
    assert outcome.err.startswith("error: ")
    for part in expected:
        assert part.replace("{tmp}", str(tmp_path)) in outcome.err
    assert "wrote" not in outcome.out
    assert listing(tmp_path) == before
    assert "jit(ddim_sample)" not in compiled


def test_a_video_of_other_settings_stops_the_plan_before_it_begins(
    batch_sample, runs, write_plan, cli, tmp_path
):
    # The second run's "a cat" is there, with the run's own guidance.
    plan = write_plan("run,prompt,guidance_scale\nfirst,a dog,\nsecond,a cat,3\n", "plan.csv")
    before = listing(tmp_path)
    outcome = cli(batch_sample, plan)
    assert outcome.status == 1
    assert "guidance_scale 12.5 there, 3.0 here" in outcome.err
    assert listing(tmp_path) == before


def test_a_plan_that_is_not_there_is_named(batch_sample, cli, tmp_path):
    outcome = cli(batch_sample, tmp_path / "paln.yaml")
    assert outcome.status == 1
    assert "paln.yaml: cannot be read" in outcome.err
    assert cli(batch_sample, tmp_path).status == 1
    outcome = cli(batch_sample, tmp_path / "paln.yaml", "--batch-size", 0)
    assert outcome.err == "error: --batch-size 0: expected 1 or more\n"


def test_the_script_runs_as_a_script_and_its_help_shows_an_example(start):
    out, err = (process := start(LAUNCH / "batch_sample.py", "--help")).communicate()
    assert (process.returncode, err) == (0, "")
    assert "example: python launch/batch_sample.py plan.yaml" in out
