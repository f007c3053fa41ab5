"""What one start compiles, later ones load from disk."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tav_jax.console import command

REPOSITORY = Path(__file__).parents[2]
KEPT = "tav_jax/compiled"
# By which all other tests share what they compile.
SESSIONS_OWN = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES",
)


def tune(config, output_dir, caches) -> tuple[set[str], set[str]]:
    """Runs `tav_jax.tune` as a user would; returns the programs it loaded and those it compiled."""
    environment = {name: value for name, value in os.environ.items() if name not in SESSIONS_OWN}
    environment |= {
        "XDG_CACHE_HOME": str(caches),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_DEBUG_LOG_MODULES": "jax._src.compiler",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    arguments = ["-m", "tav_jax.tune", "--config", str(config), f"output_dir={output_dir}"]
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = re.findall(r"Persistent compilation cache hit for '(\w+)'", done.stderr)
    compiled = re.findall(r"PERSISTENT COMPILATION CACHE MISS for '(\w+)'", done.stderr)
    return set(loaded), set(compiled)


def test_a_second_start_compiles_nothing(write_config, tmp_path):
    config = write_config(max_train_steps=2, validation_steps=2, checkpointing_steps=2)
    caches = tmp_path / "caches"
    slow = {"jit_train_step", "jit_ddim_invert", "jit_ddim_sample"}

    _, compiled = tune(config, tmp_path / "first", caches)
    assert slow < compiled
    kept = {path.name for path in (caches / KEPT).iterdir()}

    loaded, compiled = tune(config, tmp_path / "second", caches)
    assert slow < loaded
    assert not compiled
    assert {path.name for path in (caches / KEPT).iterdir()} == kept


@pytest.fixture
def folder_after_a_command(monkeypatch, tmp_path):
    """Runs a command; returns where its programs are kept, and mends the settings afterwards."""
    before = {name.lower(): jax.config.values[name.lower()] for name in SESSIONS_OWN}
    jax.config.update("jax_compilation_cache_dir", None)
    for name in SESSIONS_OWN:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def run() -> str | None:
        assert command(lambda argv: None)([]) == 0
        return jax.config.jax_compilation_cache_dir

    yield run
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache(folder_after_a_command, monkeypatch, tmp_path):
    assert folder_after_a_command() == str(tmp_path / KEPT)
    assert (tmp_path / KEPT).is_dir()


def test_without_xdg_that_is_in_the_home(folder_after_a_command, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder_after_a_command() == str(tmp_path / ".cache" / KEPT)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        pytest.param("jax_compilation_cache_dir", "/else", "/else", id="a folder of one's own"),
        pytest.param("jax_compilation_cache_dir", "", None, id="no folder"),
        pytest.param("jax_enable_compilation_cache", False, None, id="no cache"),
    ],
)
def test_the_users_choice_stays(
    name, value, expected, folder_after_a_command, monkeypatch, tmp_path
):
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        assert folder_after_a_command() == expected
    finally:
        jax.config.update(name, before)
    assert not any(tmp_path.iterdir())


def test_a_home_that_cannot_be_written_to_is_no_failure(
    folder_after_a_command, monkeypatch, tmp_path, capsys
):
    (tmp_path / "tav_jax").write_text("a file where the folder would be")
    assert folder_after_a_command() is None
    assert capsys.readouterr().err == ""
