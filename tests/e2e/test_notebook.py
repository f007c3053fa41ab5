"""The notebook is what its script says, and runs from top to bottom without a network."""

import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

REPOSITORY = Path(__file__).parents[2]
NOTEBOOK = REPOSITORY / "notebooks/tav_jax.ipynb"


def test_the_notebook_is_that_of_its_script():
    sys.path.insert(0, str(REPOSITORY / "launch"))
    try:
        from notebook import SCRIPT, notebook_of
    finally:
        sys.path.pop(0)
    made = notebook_of(SCRIPT.read_text())
    assert nbformat.read(NOTEBOOK, as_version=4) == made, "run python launch/notebook.py"
    assert not any(cell.get("outputs") for cell in made.cells)


def test_it_runs_from_top_to_bottom(start, tmp_path):
    """With a few steps instead of 40, 50 and 20."""
    text = NOTEBOOK.read_text()
    for setting, few in (
        ("max_train_steps=40", "max_train_steps=2"),
        (
            "num_inference_steps=50 if ON_ACCELERATOR else 20",
            "num_inv_steps=2, num_inference_steps=2",
        ),
    ):
        assert text.count(setting) == 1
        text = text.replace(setting, few)
    notebook = tmp_path / "few_steps.ipynb"
    notebook.write_text(text)
    process = start("-m", "IPython", "--colors=nocolor", notebook)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, out + err
    assert "Traceback" not in out + err
    videos = sorted((tmp_path / "edits").glob("*.mp4"))
    assert len(videos) == 3
    assert out.count("edits/") == 3
