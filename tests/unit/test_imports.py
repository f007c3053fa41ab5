"""Imports go in one direction: a package imports from those on lower floors and from itself."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "tav_jax"
FLOORS = (
    {"types", "errors", "text"},
    {"reading", "progress"},
    {"files", "settings"},
    {"digests"},
    {"models", "diffusion", "video"},
    {"parallel", "pretrained"},
    {"training"},
    {"editing"},
    {"pipeline", "stopping"},
    {"console"},
    {"runs"},
    {"evaluation"},
    {"report"},
    {"worlds", "bench", "tune", "sample", "batch", "check", "convert"},
    {"evaluate", "demo"},
    {"scenes"},  # the former names of the commands in worlds
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def imported_modules(path):
    """Yields the dotted names that a module imports, also those inside its functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_from_lower_floors_and_its_own_package_only(path):
    package = path.relative_to(PACKAGE).with_suffix("").parts[0]
    used = {name.split(".")[1] for name in imported_modules(path) if name.startswith("tav_jax.")}
    assert not {name for name in used - {package} if FLOOR[name] >= FLOOR[package]}


def test_no_modules_import_each_other_in_a_circle():
    names = {name_of(path) for path in MODULES}
    rest = {name_of(path): names & set(imported_modules(path)) for path in MODULES}
    while free := {name for name, needs in rest.items() if not needs & rest.keys() - {name}}:
        rest = {name: needs for name, needs in rest.items() if name not in free}
    assert not rest


def test_pytorch_is_imported_inside_functions_only():
    for path in MODULES:
        names = {
            name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
        }
        assert not {name for name in names if name and name.split(".")[0] == "torch"}, path
