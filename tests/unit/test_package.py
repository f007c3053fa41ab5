"""What `import tav_jax` costs and gives, and what the package declares that it needs."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import tav_jax as tav

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = {"jax", "transformers", "matplotlib", "av", "mediapy", "orbax", "torch", "diffusers"}
HEAVY |= {"pydantic"}


def modules_after(code):
    """Returns which heavy modules a fresh process has imported after running `code`."""
    report = (
        f"{code}\nimport json, sys\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(result.stdout))


def test_importing_the_package_imports_nothing_heavy():
    assert modules_after("import tav_jax; tav_jax.__version__") == set()


def test_the_whole_functional_api_needs_jax_alone():
    assert modules_after("import tav_jax\nfor n in tav_jax.__all__: getattr(tav_jax, n)") == {"jax"}


def test_every_public_name_is_there_and_former_names_still_work():
    assert set(tav.__all__) <= set(dir(tav))
    assert tav.Draw is tav.NoisedBatch
    assert tav.clean_latents is tav.posterior_mean_latents
    assert not hasattr(tav, "no_such_name")


def distribution(requirement):
    return re.split(r"[\[<>=~! ;]", requirement)[0].lower().replace("_", "-")


def test_every_import_of_the_package_is_a_declared_dependency():
    declared = {distribution(line) for line in PYPROJECT["project"]["dependencies"]}
    extras = PYPROJECT["project"]["optional-dependencies"]
    optional = [line for name in ("interop", "eval", "log", "demo") for line in extras[name]]
    allowed = declared | {distribution(line) for line in optional}
    imported = set()
    for path in (ROOT / "tav_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    others = imported - set(sys.stdlib_module_names) - {"tav_jax"}
    known = packages_distributions()
    missing = {
        module
        for module in others
        if not {name.lower().replace("_", "-") for name in known.get(module, [module])} & allowed
    }
    assert not missing


def test_console_scripts_name_functions_that_exist():
    for target in PYPROJECT["project"]["scripts"].values():
        module, _, function = target.partition(":")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", ["pretrain", "experiments", "text_to_image"])
def test_the_commands_of_the_drawn_world_still_have_their_former_names(name):
    result = subprocess.run(
        [sys.executable, "-m", f"tav_jax.scenes.{name}", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"python -m tav_jax.worlds.{name}" in result.stdout
