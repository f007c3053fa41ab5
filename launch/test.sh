#!/usr/bin/env bash
# Sets everything up and runs checks and tests, on any machine with Python 3.11 or newer.
#   bash launch/test.sh            linter, types, reference cases and most tests
#   bash launch/test.sh --quick    linter and the tests that take no time: an answer within a minute
#   bash launch/test.sh --all      everything, as CI runs it; reference cases compiled as users do
# docs/testing.md says what is in each and how long it takes. Tests against PyTorch run if it is
# installed in .venv (`.venv/bin/pip install '.[interop]'`). PYTHON names another interpreter, VENV
# another folder for the environment.
set -euo pipefail
cd "$(dirname "$0")/.."

workers=2
case "${1-}" in
    "") selection=(-m "not full") ;;
    --quick) selection=(-m quick) ;;
    --all)
        # Its tests often wait for processes of their own, and leave a core to a third worker.
        workers=3
        # CI's log then says what takes its time.
        selection=(--ignore tests/parity/test_reference_cases.py --durations 30)
        ;;
    *)
        echo "usage: bash launch/test.sh [--quick | --all]" >&2
        exit 2
        ;;
esac

venv=${VENV:-.venv}
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet --editable '.[test]'
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
if [[ "${1-}" != --quick ]]; then
    "$venv/bin/mypy"
fi
"$venv/bin/python" -m pytest -n "$workers" --dist worksteal "${selection[@]}" tests
