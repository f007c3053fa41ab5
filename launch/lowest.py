"""Print constraints for pip under which every package has the lowest version that we admit.

    python launch/lowest.py > lowest.txt
    pip install --constraint lowest.txt '.[test]'

The versions are the lower bounds in `pyproject.toml`, of the package and of the extra `test`.
"""

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

for requirement in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]):
    if bound := re.match(r"([\w-]+)(?:\[.*\])?>=([\w.]+)", requirement):
        print(f"{bound[1]}=={bound[2]}")
