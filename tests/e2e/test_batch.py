"""`python launch/batch_sample.py`: a plan of runs, prompts and seeds."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

from tav_jax.runs.batch_plan import plan_jobs, read_plan
from tav_jax.runs.batch_processes import devices_here, worker_environments
from tav_jax.runs.batch_work import write_manifest

LAUNCH = Path(__file__).parents[2] / "launch"


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


def files(folder):
    """The listing without folders, whose times claims change."""
    return {path: time for path, time in listing(folder).items() if path.is_file()}


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
    process = start(LAUNCH / "batch_sample.py", "--help")
    out, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (0, "")
    assert "examples:\n    python -m tav_jax.batch plan.yaml" in out


# The manifest.


def manifest_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_manifest_has_a_line_for_each_video(batch_sample, runs, write_plan, cli, tmp_path):
    (tmp_path / "plans").mkdir()
    plan = write_plan(
        "runs: [first, ./second/]\nprompts: [a cat, a ball is moving]", "plans/p.yaml"
    )
    outcome = cli(batch_sample, plan)
    manifest = tmp_path / "plans/p.manifest.jsonl"
    assert "wrote plans/p.manifest.jsonl\n" in outcome.out
    rows = manifest_of(manifest)
    assert [(Path(row["run"]).name, row["prompt"]) for row in rows] == [
        (run, prompt) for run in ("first", "second") for prompt in ("a cat", "a ball is moving")
    ]
    for row in rows:
        assert (row["step"], row["seed"], row["num_inv_steps"]) == (6, 33, 3)
        content = (manifest.parent / row["video"]).read_bytes()
        assert row["bytes"] == len(content)
        assert row["sha256"] == hashlib.sha256(content).hexdigest()

    before = files(tmp_path)
    assert "wrote" not in cli(batch_sample, plan).out
    assert files(tmp_path) == before, "what is up to date is left alone"

    # Whoever writes it writes the same, from wherever.
    other = tmp_path / "plans/other.jsonl"
    assert cli(batch_sample, plan, "--manifest", other).status == 0
    assert other.read_bytes() == manifest.read_bytes()

    # A video that is made anew has a new sum.
    video = manifest.parent / rows[0]["video"]
    video.write_bytes((manifest.parent / rows[1]["video"]).read_bytes())
    assert cli(batch_sample, plan).status == 0
    assert [row["sha256"] for row in manifest_of(manifest)] == [
        rows[index]["sha256"] for index in (1, 1, 2, 3)
    ]


def test_the_manifest_says_what_is_missing(runs, write_plan, tmp_path):
    jobs = plan_jobs(read_plan(Path(write_plan("runs: [first]\nprompts: [a cat, a dog]\n"))))
    missing = write_manifest(tmp_path / "new/manifest.jsonl", jobs)
    assert [path.name for path in missing] == ["a dog.mp4"]
    cat, dog = manifest_of(tmp_path / "new/manifest.jsonl")
    assert cat["bytes"] > 0
    assert (dog["prompt"], dog["bytes"], dog["sha256"]) == ("a dog", None, None)
    # Once it is there, it is no longer.
    folder = runs[0] / "samples/sample-6"
    settings = json.loads((folder / "a cat.json").read_text()) | {"prompt": "a dog"}
    (folder / "a dog.json").write_text(json.dumps(settings))
    shutil.copy(folder / "a cat.mp4", folder / "a dog.mp4")
    assert write_manifest(tmp_path / "new/manifest.jsonl", jobs) == []
    _, dog = manifest_of(tmp_path / "new/manifest.jsonl")
    assert dog["sha256"] == cat["sha256"]


@pytest.mark.parametrize(
    "manifest", ["plan.csv", "plan.csv/manifest.jsonl", "first/metrics.jsonl", "first"]
)
def test_a_manifest_is_no_other_file(manifest, batch_sample, runs, write_plan, cli, tmp_path):
    plan = write_plan("run,prompt\nfirst,a dog\n", "plan.csv")
    before = listing(tmp_path)
    outcome = cli(batch_sample, plan, "--manifest", manifest)
    assert outcome.status == 1
    assert outcome.err.startswith("error: --manifest: ")
    assert manifest.removesuffix("/manifest.jsonl") in outcome.err
    assert "name another" in outcome.err
    assert listing(tmp_path) == before


def test_videos_of_one_name_and_different_settings_are_refused(
    batch_sample, runs, write_plan, cli, tmp_path
):
    plan = write_plan(
        "run,prompt,guidance_scale\nfirst,a dog,\nfirst,a dog,3\nfirst,a fish,3\n./first,a fish,4",
        "plan.csv",
    )
    before = listing(tmp_path)
    outcome = cli(batch_sample, plan)
    assert outcome.status == 1
    assert "a dog.mp4 is asked for with different settings (guidance_scale 12.5 and 3.0)" in (
        outcome.err
    )
    assert "a fish.mp4 is asked for with different settings (guidance_scale 3.0 and 4.0)" in (
        outcome.err
    )
    assert listing(tmp_path) == before


# Several processes.


def said(process, beginning):
    """The next line of a process that begins so; what it says before is passed over."""
    for line in process.stdout:
        if line.startswith(beginning):
            return line.rstrip("\n").removeprefix(beginning)
    raise AssertionError(process.stderr.read())


def ended(process):
    """What a process that `said` has read from says until its end, and its errors."""
    # Popen.communicate would pass over what has been read ahead.
    out, err = process.stdout.read(), process.stderr.read()
    process.wait(timeout=600)
    return out, err


def test_a_fleet_makes_each_video_once_though_a_worker_is_killed(
    batch_sample, runs, write_plan, start, cli, tmp_path
):
    folder = runs[0] / "samples/sample-6"
    for path in (*folder.iterdir(), *(runs[0] / "inv_latents").iterdir()):
        path.unlink()
    prompts = [f"a square of kind {number}" for number in range(64)]
    plan = write_plan(
        f"runs: [first]\nprompts: {json.dumps(prompts)}\nseeds: [0, 1]\n"
        "num_inference_steps: 2\neta: 1\n"
    )
    command = (LAUNCH / "batch_sample.py", plan, "--batch-size", 4)
    workers = [start(*command) for _ in range(3)]
    wrote = [said(worker, "wrote ") for worker in workers]  # so that all are at work

    workers[0].kill()
    out, _ = ended(workers[0])
    wrote += [line for line in out.splitlines() if line.startswith("wrote ")]
    early = {video: video.stat() for video in folder.glob("[!.]*.mp4")}
    assert 3 <= len(early) < 100
    workers[0] = start(*command)
    for worker in workers:
        out, err = ended(worker)
        assert worker.returncode == 0, err
        wrote += [line for line in out.splitlines() if line.startswith("wrote ")]
    wrote = Counter(tmp_path / line.removeprefix("wrote ") for line in wrote)

    videos = {folder / f"{prompt}-seed{seed}.mp4" for prompt in prompts for seed in (0, 1)}
    overview = {folder / name for name in ("contact-sheet.png", "side-by-side.mp4")}
    manifest = tmp_path / "plan.manifest.jsonl"
    assert set(wrote.values()) == {1}, "none twice"
    # Between a video and the line that says so, a worker may have been killed.
    assert len(videos - wrote.keys()) <= 1
    assert wrote.keys() >= {*overview, manifest}
    for video, status in early.items():
        now = video.stat()
        assert (now.st_ino, now.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    # None missing, and nothing left of claims and of what was half written.
    records = {video.with_suffix(".json") for video in videos}
    gifs = {path.with_suffix(".gif") for path in overview if path.suffix == ".mp4"}
    assert set(folder.iterdir()) == videos | records | overview | gifs
    assert [path.name for path in (runs[0] / "inv_latents").iterdir()] == ["ddim_latent-6.npy"]
    rows = manifest_of(manifest)
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        (prompt, seed) for prompt in prompts for seed in (0, 1)
    ]
    for row in rows:
        content = (tmp_path / row["video"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert len({row["sha256"] for row in rows}) > 64, "seeds give different videos"

    before = files(tmp_path)
    outcome = cli(batch_sample, plan, "--workers", 3)
    assert outcome.status == 0
    assert outcome.out.endswith("0 videos written, 128 were there already\n")
    assert files(tmp_path) == before


@pytest.fixture
def long_plan(runs, write_plan):
    """A plan of many videos, one after the other."""
    return write_plan(
        f"runs: [first, second]\nprompts: {json.dumps([f'a dog {n}' for n in range(12)])}\n"
        "num_inference_steps: 2\n"
    )


def test_a_worker_that_dies_is_named_and_its_videos_are_made_by_the_others(
    long_plan, batch_sample, runs, start, cli
):
    fleet = start(LAUNCH / "batch_sample.py", long_plan, "--workers", 2)
    number, process = said(fleet, "worker ").split(" is process ")
    said(fleet, "wrote ")
    os.kill(int(process), signal.SIGKILL)
    out, err = ended(fleet)
    assert fleet.returncode == 1
    assert f"error: worker {number} (process {process}) ended by SIGKILL\n" in err
    assert err.endswith("no video is missing\n")
    assert "24 videos written, 0 were there already\n" in out
    assert [len(videos(run)) for run in runs] == [12, 12]
    assert cli(batch_sample, long_plan, "--workers", 2).status == 0


def test_an_interrupt_ends_all_workers_and_the_same_command_makes_the_rest(
    long_plan, batch_sample, runs, start, cli
):
    fleet = start(LAUNCH / "batch_sample.py", long_plan, "--workers", 2)
    processes = [int(said(fleet, f"worker {number} is process ")) for number in (1, 2)]
    said(fleet, "wrote ")
    fleet.send_signal(signal.SIGINT)
    _, err = ended(fleet)
    assert fleet.returncode == 130
    assert "error:" not in err
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    done = sum(len(videos(run)) for run in runs)
    assert 0 < done < 24
    outcome = cli(batch_sample, long_plan)
    assert outcome.out.endswith(f"{24 - done} videos written, {done} were there already\n")
    left = {path.name for run in runs for path in run.rglob(".*")}
    assert not left, "nothing of claims, and nothing half written"


def test_each_worker_of_a_gpu_host_has_a_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = worker_environments(2, "gpu", 4)
    assert given == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    # As a scheduler gives part of a host.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    given = worker_environments(2, "gpu", 2)
    assert given == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "GPU-5f"}]
    with pytest.raises(ValueError, match="--workers 3: each needs a GPU, and this host has 2"):
        worker_environments(3, "gpu", 2)
    with pytest.raises(ValueError, match="--workers 2: a host's tpu chips belong to one process"):
        worker_environments(2, "tpu", 4)
    assert worker_environments(3, "cpu", 1) == [{}, {}, {}]


def test_asking_for_the_devices_takes_none(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    assert devices_here() == ("cpu", 3), "it is another process that asks"
