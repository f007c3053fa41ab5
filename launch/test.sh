#!/usr/bin/env bash
# Sets everything up and runs all checks and tests, on any machine with Python 3.11 or newer:
# under twenty minutes on two CPU cores.
#   bash launch/test.sh
# Tests against PyTorch run if it is installed in .venv (`.venv/bin/pip install '.[interop]'`).
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m venv .venv
.venv/bin/pip install --quiet --editable '.[test]'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python tests/golden.py tests/golden
.venv/bin/python -m pytest -n 2 --dist worksteal tests
