"""`launch/gpu_figures.sh` at its small size: parts that run, one that fails, and what it writes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def figures(tmp_path):
    def run(parts, **environment):
        done = subprocess.run(
            ["bash", ROOT / "launch/gpu_figures.sh", "--small", tmp_path],
            env=os.environ | {"PYTHON": sys.executable, "PARTS": parts} | environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, (tmp_path / "figures.md").read_text()

    return run


def test_parts_that_run_have_tables_and_a_later_call_adds_its_own(figures):
    said, page = figures("golden")
    assert "golden-chunked: status 0" in said
    assert "| golden-auto | done |" in page
    for name in ("auto", "chunked"):
        assert re.search(rf"\| {name} \| (\d+) of \1 \| yes \| \S+ of \S+ \| \S+ \| - \|", page)

    _, page = figures("bench")
    assert "| golden-auto | done |" in page
    for program in ("encode", "decode"):
        assert re.search(rf"\| 2 \| {program} \| - (\| [\d.]+ ){{4}}\|", page)
    assert "What failed" not in page


# Stands in for Python: golden.py fails for one implementation and hangs for the other. It says at
# once what the machine is, so that the limit of time does not depend on how long JAX takes to load.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    *--machine) echo '{{"device": "a stand-in"}}'; exit ;;
    *golden.py*auto) echo broken >&2; exit 3 ;;
    *golden.py*) sleep 600 ;;
esac
exec {sys.executable} "$@"
"""


def test_a_part_that_fails_or_has_no_time_is_named_and_the_others_go_on(figures, tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    said, page = figures("golden,profile", PYTHON=str(python), LIMIT="30")
    assert "golden-auto: status 3" in said
    assert "golden-chunked: status 124" in said
    assert "### golden-auto\n\n**failed, status 3**\n\n```\nbroken\n```" in page
    assert "### golden-chunked\n\n**not done in " in page
    assert "| profile | **not started, no time left** |" in page
