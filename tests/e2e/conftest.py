"""A small model's folder, a clip, runs on both, and the command lines."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import jax
import pytest
import yaml
from small_model import write_clip, write_model

from tav_jax import tune

REPOSITORY = Path(__file__).parents[2]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Without these it asks its maker's servers at every start.
SILENT = ["disable-background-networking", "disable-component-update", "disable-sync"]
BROWSER_OPTIONS = [f"--{name}" for name in ("no-sandbox", "disable-gpu", "disable-quic", *SILENT)]
BROWSER_PATIENCE = 600_000  # milliseconds

_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **info: (
        _compiled.append(str(info.get("fun_name"))) if "backend_compile" in event else None
    )
)


@pytest.fixture
def compiled() -> list[str]:
    """The programs compiled since the test began."""
    _compiled.clear()
    return _compiled


@pytest.fixture(scope="session")
def bench_report(users_environment) -> Callable[..., dict]:
    """Runs bench in a process of its own, in which a TPU's or GPU's compiler may be loaded."""

    def run(*arguments: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-m", "tav_jax.bench", "--json", *arguments],
            env=users_environment | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@dataclass(frozen=True)
class Material:
    """A model's folder, a clip, and the settings of a run on both."""

    model: Path
    clip: Path
    settings: dict


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("material")
    model, clip = folder / "model", folder / "moving square.mp4"
    write_model(model)
    write_clip(clip)
    settings = {
        "pretrained_model_path": str(model),
        "train_data": {
            "video_path": str(clip),
            "prompt": "a square is moving",
            "n_sample_frames": 4,
            "width": 32,
            "height": 32,
            "sample_start_idx": 1,
            "sample_frame_rate": 2,
        },
        "validation_data": {
            "prompts": ["a ball is moving", "a square is moving, cartoon style", "a cat"],
            "num_inference_steps": 3,
            "num_inv_steps": 3,
        },
        # Steps 4 and 6 are validated and steps 3 and 6 saved, so that a run can be stopped
        # between the two.
        "max_train_steps": 6,
        "checkpointing_steps": 3,
        "validation_steps": 4,
        "learning_rate": 3e-3,
        "gradient_checkpointing": False,
        "mesh": {"frames": 1},
        "seed": 33,
    }
    return Material(model, clip, settings)


@pytest.fixture
def write_config(material: Material, tmp_path: Path) -> Callable[..., Path]:
    """Writes a config over the material, `output_dir` being `tmp_path / "run"`; returns its path.

    A value given as a dictionary is put over the section of that name, None removes a key.
    """

    def write(**changes: object) -> Path:
        settings = {"output_dir": str(tmp_path / "run")} | material.settings
        for name, value in changes.items():
            old = settings.get(name)
            settings[name] = old | value if isinstance(old, dict) else value
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
        return path

    return write


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command line in this process: `cli(tav_jax.tune, "--config", path)`."""

    def run(module: ModuleType, *args: object) -> Outcome:
        capsys.readouterr()
        status = module.main([str(arg) for arg in args])
        return Outcome(status, *capsys.readouterr())

    return run


@dataclass(frozen=True)
class FinishedRun:
    """A run that nothing has interrupted; not to be written to."""

    folder: Path
    config: Path
    out: str


@pytest.fixture(scope="session")
def finished_run(material: Material, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "finished.yaml"
    config.write_text(yaml.safe_dump({"output_dir": str(folder / "run")} | material.settings))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert tune.main(["--config", str(config)]) == 0
    return FinishedRun(folder / "run", config, said.getvalue())


@contextlib.contextmanager
def processes(folder: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts `python ARGS...` in processes of their own, as a user would; ends them at last."""
    common = os.environ | {
        # Some are killed, and would leave half a program in the folder that all tests share.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9",
        # As this process, or it would load none of the programs that this one has compiled. XLA
        # also shares a matrix product out by the number of devices, and rounds accordingly.
        "JAX_NUM_CPU_DEVICES": str(jax.config.jax_num_cpu_devices),
        "PYTHONUNBUFFERED": "1",  # what a process said before it was killed is heard
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    started = []
    # As in a terminal, where Ctrl-C is heard; what starts the tests may have it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(*args: object, environment: Mapping[str, str] = common) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, *map(str, args)],
            env={**common, **environment},
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate(timeout=600)


@pytest.fixture
def start_alone(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts processes that a test has for itself."""
    with processes(tmp_path) as run:
        yield run


@pytest.fixture
def start(start_alone: Callable, finished_run: FinishedRun) -> Callable[..., subprocess.Popen]:
    """Starts processes that a test has for itself. They load what the finished run has compiled."""
    return start_alone


@pytest.fixture(scope="module")
def start_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """Starts processes that all tests of a file share."""
    with processes(tmp_path_factory.mktemp("processes")) as run:
        yield run


@pytest.fixture
def run_copy(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may write to."""
    return Path(shutil.copytree(finished_run.folder, tmp_path / "run"))


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium. It needs playwright, the extra `browser`."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    options = {"executable_path": CHROMIUM, "args": BROWSER_OPTIONS, "timeout": BROWSER_PATIENCE}
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(**options)
        yield browser
        browser.close()


@pytest.fixture
def new_context(browser):
    """Opens a browser's window of its own, which waits long enough for any machine."""
    contexts = []

    def new(**options):
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(BROWSER_PATIENCE)
        return contexts[-1]

    yield new
    for context in contexts:
        context.close()
