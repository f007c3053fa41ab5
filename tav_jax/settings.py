"""YAML and `key=value` overrides to typed settings; messages name the nearest key."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from tav_jax.errors import MissingFileError, UserError

T = TypeVar("T")


def merge_trees(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a tree in which the values of `changes` replace those of `tree`, key by key."""
    merged = dict(tree)
    for key, value in changes.items():
        if isinstance(old := merged.get(key), dict) and isinstance(value, dict):
            value = merge_trees(old, value)
        merged[key] = value
    return merged


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return a YAML file's keys and values; raises as `load_config` does, before any checks."""
    tree = read_yaml(Path(path), "--config")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, as in configs/man-skiing.yaml")
    return override(tree, overrides)


def read_yaml(path: Path, option: str) -> Any:
    """Return the content of a YAML file.

    Args:
        path: The file.
        option: The command line's name for it, for messages.

    Raises:
        UserError: There is no such file, or it is not YAML.
    """
    if not path.is_file():
        raise MissingFileError(f"{option}: no such file {path}")
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def override(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the tree with each `key=value` put into it.

    Raises:
        UserError: some are not of that form; all are listed.
    """
    problems = [problem for each in overrides if (problem := _set(tree, each))]
    if problems:
        raise UserError("\n".join(problems))
    return tree


class WrongSettingsError(UserError):
    """Some keys or values are wrong.

    Args:
        where: Where they are from.
        problems: Each wrong key with what is wrong about it. The key is empty if a combination of
            values is wrong.
    """

    def __init__(self, where: str, problems: Sequence[tuple[str, str]]):
        lines = (f"  {key}: {text}" if key else f"  {text}" for key, text in problems)
        super().__init__(f"{where}:\n" + "\n".join(sorted(lines)))
        self.problems = problems


def parse(settings: type[T], tree: dict[str, Any], where: str) -> T:
    """Return a pydantic dataclass from nested dictionaries.

    Raises:
        WrongSettingsError: keys or values are wrong; all are listed.
    """
    try:
        return TypeAdapter(settings).validate_python(tree)
    except ValidationError as error:
        raise WrongSettingsError(where, list(_explain(error, settings))) from None


def _set(tree: dict[str, Any], override: str) -> str | None:
    """Put one `key=value` into a tree, or return the reason why that is impossible."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        return f"'{override}': expected key=value, as in max_train_steps=300"
    *path, leaf = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            return f"'{override}': '{part}' holds a value, not keys"
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        return f"'{override}': not a YAML value: {' '.join(str(error).split())}"
    return None


def _explain(error: ValidationError, settings: type) -> Iterator[tuple[str, str]]:
    known = list(_known_keys(settings))
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        yield key, _explain_one(problem, key, known)


def _explain_one(problem: Any, key: str, known: Sequence[str]) -> str:
    if problem["type"] == "unexpected_keyword_argument":
        by_name = {path.split(".")[-1]: path for path in known}
        name = str(problem["loc"][-1])
        # The right name in the wrong section; misspelt there; misspelt elsewhere.
        near = [by_name[name]] if name in by_name else []
        near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        near = near or [by_name[n] for n in difflib.get_close_matches(name, by_name, 1, 0.5)]
        hint = f"did you mean {near[0]}?" if near else "configs/ shows the keys there are"
        return f"unknown key; {hint}"
    if problem["type"] == "missing":
        return "missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{message} (got {problem['input']!r})" if key else message


def _known_keys(settings: Any, start: str = "") -> Iterator[str]:
    """Yield every key with its full path."""
    for field in fields(settings):
        yield f"{start}{field.name}"
        if is_dataclass(field.type):
            yield from _known_keys(field.type, f"{start}{field.name}.")


def flatten(tree: dict[str, Any], start: str = "") -> dict[str, Any]:
    """Return the values of a nested dictionary by their full keys, such as `train_data.prompt`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{start}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def to_plain(value: Any) -> Any:
    """Return nested dictionaries with every tuple as a list, as YAML writes it."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
