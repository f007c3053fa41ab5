"""Settings from YAML and `key=value`: types, bounds, and messages that name the nearest key.

The bounds of all numbers that a user may give are here, so that files and command lines refuse the
same, before any work is done.
"""

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from tav_jax.errors import UserError
from tav_jax.reading import Key, parse_yaml, read_yaml
from tav_jax.text import SURROGATE, brief, shorten

T = TypeVar("T")

MOST_OF_A_KIND = 3  # wrong items of a list, or unknown keys of a section, that are explained

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Of all dataclasses of settings: no unknown key, and no number that is not finite."""

SIZE_FACTOR = 8  # sides must be multiples of this, as in the published pipeline
MOST_PIXELS = 2**31  # of a clip: 8 GB as 8-bit colours


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not true or false")
    return value


def _is_path(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("Input should be a path")
    try:
        Path(value).expanduser()
    except RuntimeError:
        raise ValueError("There is no such user, whose home ~ would mean") from None
    return value


Integer = Annotated[int, BeforeValidator(_no_truth)]
Number = Annotated[float, BeforeValidator(_no_truth)]

Frames = Annotated[Integer, Field(ge=1, le=4096)]
Side = Annotated[Integer, Field(ge=1, le=8192)]
Size = Annotated[Side, Field(multiple_of=SIZE_FACTOR)]
BatchSize = Annotated[Integer, Field(ge=1, le=256)]
Steps = Annotated[Integer, Field(ge=1, le=10**7)]
StepsFromZero = Annotated[Integer, Field(ge=0, le=10**7)]
Count = Annotated[Integer, Field(ge=1, le=10**6)]
Seed = Annotated[Integer, Field(ge=0, lt=2**63)]  # what a JAX key can be made of
NumSteps = Annotated[Integer, Field(ge=1, le=999)]
GuidanceScale = Annotated[Number, Field(ge=0, le=1000)]
Share = Annotated[Number, Field(ge=0, le=1)]
Decay = Annotated[Number, Field(ge=0, lt=1)]
Rate = Annotated[Number, Field(ge=1e-12, le=1000)]  # 0 would learn nothing
LoraScale = Annotated[Number, Field(ge=-100, le=100)]
Positive = Annotated[Number, Field(gt=0)]
Fps = Annotated[Number, Field(ge=0.1, le=1000)]
Text = Annotated[str, Field(max_length=10_000)]
PathText = Annotated[str, AfterValidator(_is_path)]


def merge_trees(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a tree in which the values of `changes` replace those of `tree`, key by key."""
    merged = dict(tree)
    for key, value in changes.items():
        if isinstance(old := merged.get(key), dict) and isinstance(value, dict):
            value = merge_trees(old, value)
        merged[key] = value
    return merged


def read_tree(
    path: str | Path, overrides: Sequence[str] = (), settings: type | None = None
) -> dict[str, Any]:
    """Return a YAML file's keys and values; raises as `load_config` does, before any checks."""
    tree = read_yaml(Path(path), "--config")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, as in configs/man-skiing.yaml")
    return override(tree, overrides, settings)


def override(
    tree: dict[str, Any], overrides: Sequence[str], settings: type | None = None
) -> dict[str, Any]:
    """Return the tree with each `key=value` put into it.

    Args:
        tree: Keys and values, which are changed in place.
        overrides: `key=value`. The value is YAML, unless the key's is a text: then it is the text.
        settings: The dataclass of the settings, which tells whose values are texts.

    Raises:
        UserError: some are not of that form; all are listed.
    """
    problems = [problem for each in overrides if (problem := _set(tree, each, settings))]
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


def parse(settings: type[T], tree: Any, where: str) -> T:
    """Return a pydantic dataclass from nested dictionaries.

    Args:
        settings: The dataclass.
        tree: Nested dictionaries.
        where: Where they are from: the file's name.

    Raises:
        WrongSettingsError: keys or values are wrong; all are listed.
    """
    try:
        return TypeAdapter(settings).validate_python(tree)
    except ValidationError as error:
        raise WrongSettingsError(where, explain(error, settings, tree, where)) from None


def wrong_option(option: str, kind: Any, value: Any) -> str | None:
    """Return what is wrong about the value of an option, or None.

    Args:
        option: The option's name.
        kind: The bounds of its value: a type of this module.
        value: The value. None is not wrong: the option was not given.
    """
    if value is not None:
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            expected = {
                "greater_than_equal": "expected {ge} or more",
                "less_than_equal": "expected at most {le}",
            }.get(problem["type"], problem["msg"])
            return f"{option} {brief(value)}: {expected.format(**problem.get('ctx', {}))}"
    return None


def check_options(*options: tuple[str, Any, Any]) -> None:
    """Raise `UserError` with all that is wrong about options, as `wrong_option` takes them."""
    if problems := [problem for option in options if (problem := wrong_option(*option))]:
        raise UserError("\n".join(problems))


def _set(tree: dict[str, Any], override: str, settings: type | None) -> str | None:
    """Put one `key=value` into a tree, or return the reason why that is impossible."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"'{shorten(override, 100)}': expected key=value, as in max_train_steps=300"
    if SURROGATE.search(override):
        return f"{brief(override)}: not text in the terminal's encoding"
    *path, leaf = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            return f"'{shorten(override, 100)}': '{part}' holds a value, not keys"
    kinds = _kinds(settings, [*path, leaf])
    if str in kinds and not (type(None) in kinds and text in ("", "~", "null")):
        value: Any = text
    else:
        try:
            value = parse_yaml(text, f"'{shorten(override, 100)}'")
        except UserError as error:
            return str(error).replace("not YAML", "not a YAML value", 1)
    tree.pop(leaf, None)  # the key itself knows the line of the file
    tree[leaf] = value
    return None


def _kinds(settings: Any, path: Sequence[str]) -> tuple[Any, ...]:
    """Return the types that the value of a key may have; none if there is no such key."""
    for part in path:
        if not is_dataclass(settings):
            return ()
        settings = get_type_hints(settings).get(part)
    return get_args(settings) if get_origin(settings) in (Union, UnionType) else (settings,)


def explain(
    error: ValidationError, settings: Any, tree: Any = None, where: str = ""
) -> list[tuple[str, str]]:
    """Return each wrong key with what is wrong about it.

    Of a list's items, and of the unknown keys of a section, the first three are explained.

    Args:
        error: What pydantic raised.
        settings: The type that was asked for.
        tree: What was validated. If its keys are `Key`s, their lines are said.
        where: The name of the file whose lines need no name.
    """
    known = list(_known_keys(settings)) if is_dataclass(settings) else []
    problems: list[tuple[str, str]] = []
    counts: Counter[tuple] = Counter()
    for problem in error.errors(include_url=False, include_context=False):
        *section, name = problem["loc"] or ("",)
        if isinstance(name, int) or problem["type"] == "unexpected_keyword_argument":
            counts[tuple(section)] += 1
            if counts[tuple(section)] > MOST_OF_A_KIND:
                continue
        key = ".".join(_short(part) for part in problem["loc"])
        problems.append((key, _explain_one(problem, key, known) + _line(tree, problem, where)))
    for section_path, count in counts.items():
        if count > MOST_OF_A_KIND:
            key = ".".join(map(str, section_path))
            problems.append((key, f"and {count - MOST_OF_A_KIND} more of them are wrong"))
    return problems


def _short(part: int | str) -> str:
    return shorten(str(part), 50)


def _line(tree: Any, problem: Any, where: str) -> str:
    """Return the words that say on which line of which file a wrong value is."""
    found = None
    for part in problem["loc"]:
        if isinstance(tree, dict):
            keys = [key for key in tree if key == part or str(key) == part]
            found = next((key for key in keys if isinstance(key, Key)), found if keys else None)
            tree = tree[keys[0]] if keys else None
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
    if found is None or problem["type"] == "missing":
        return ""
    return f", line {found.line}" + ("" if where.startswith(found.file) else f" of {found.file}")


def _explain_one(problem: Any, key: str, known: Sequence[str]) -> str:
    if problem["type"] == "unexpected_keyword_argument":
        by_name = {path.split(".")[-1]: path for path in known}
        name = _short(problem["loc"][-1])
        # The right name in the wrong section; misspelt there; misspelt elsewhere.
        near = [by_name[name]] if name in by_name else []
        near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        near = near or [by_name[n] for n in difflib.get_close_matches(name, by_name, 1, 0.5)]
        hint = f"did you mean {near[0]}?" if near else "configs/ shows the keys there are"
        return f"unknown key; {hint}"
    if problem["type"] == "missing":
        return "missing"
    message = shorten(problem["msg"].removeprefix("Value error, "))
    got = brief(problem["input"])
    if not key or (problem["type"] == "value_error" and got in message):
        return message
    return f"{message} (got {got})"


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
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value
