#!/usr/bin/env bash
# Sets everything up and shows the whole idea once, on any machine with Python 3.11 or newer: tunes
# the base model that comes with the package on a shipped clip and edits it.
#   bash launch/quickstart.sh
# A minute and a half on two CPU cores after the installation, and 2 GB of memory.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m venv .venv
.venv/bin/pip install --quiet --editable .
.venv/bin/python -m tav_jax.tune --config configs/quickstart.yaml
