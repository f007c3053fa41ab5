#!/usr/bin/env bash
# Compares the installed packages with the known advisories, by pip-audit. A minute, no GPU.
#   bash launch/audit.sh               packages in .venv
#   VENV=.venv-newest bash launch/audit.sh
# Exit status: 0 nothing is known, 1 an advisory is listed, 3 no database can be reached from here.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
"${PYTHON:-python3}" -m venv .venv-audit
.venv-audit/bin/pip install --quiet pip-audit
audit() { .venv-audit/bin/pip-audit --progress-spinner off --timeout 10 "$@"; }

for service in pypi osv; do
    # pip-audit ends well where it could look up nothing, so ask for a version with many advisories.
    if audit --service "$service" --no-deps --disable-pip --requirement <(echo "pillow==8.0.0") \
        2>&1 | grep -q "CVE-\|GHSA-\|PYSEC-"; then
        for packages in "$venv"/lib/python*/site-packages; do
            audit --service "$service" --skip-editable --path "$packages"
        done
        exit 0
    fi
done
echo "no database of advisories can be reached from here: nothing was audited"
exit 3
