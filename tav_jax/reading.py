"""Read text, YAML and JSON from files that anybody may have written.

Pipes and devices are refused before they are opened. Text is UTF-8 whatever the locale. Keys may
not be given twice. YAML may not be nested or multiplied by aliases beyond measure.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from tav_jax.errors import MissingFileError, UserError
from tav_jax.text import SURROGATE, brief, shorten

MOST_BYTES = 64 * 2**20  # of a text; v1-4's largest one, its vocabulary, has 1 MB
MOST_RECORD_BYTES = 2**32  # of a record that grows with the work
MOST_DEPTH = 32  # of values within values in YAML
MOST_ALIASED = 100_000  # values of a YAML file, if each alias is counted as what it stands for


def why_not_a_file(path: Path) -> str | None:
    """Return what a path is instead of a regular file, or None if it is one."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "No such file"
    except OSError as error:
        return error.strerror or "cannot be read"
    except ValueError:  # a null character
        return "No such file"
    if stat.S_ISREG(mode):
        return None
    return "a directory, not a file" if stat.S_ISDIR(mode) else "a pipe or device, not a file"


def require_file(path: Path) -> None:
    """Raise `UserError` unless a path is a regular file. Opening a pipe would wait for ever."""
    if problem := why_not_a_file(path):
        kind = MissingFileError if problem == "No such file" else UserError
        raise kind(f"{path}: {problem}")


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Return the text of a file.

    Args:
        path: The file.
        most: Most bytes that it may have.

    Raises:
        UserError: It is no regular file, too large, or not UTF-8.
    """
    require_file(path)
    if (size := path.stat().st_size) > most:
        raise UserError(f"{path}: {size} bytes are too many for a text")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: not UTF-8 text (line {line}: {error.reason})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        MissingFileError: There is no such file.
        UserError: It is not JSON, no object, or has a key twice.
    """
    if why_not_a_file(path) == "No such file":
        raise MissingFileError(f"{path}: no such file; is the download complete?")
    return parse_json(read_text(path), str(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Return the object that JSON text describes. Errors are those of `read_json`."""
    try:
        tree = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise UserError(f"{where}: not JSON that we read: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({shorten(str(error))})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{where}: not a JSON object, but {type(tree).__name__}")
    return tree


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{brief(twice)} is there twice")
    return tree


def read_yaml(path: Path, option: str) -> Any:
    """Return the content of a YAML file.

    Args:
        path: The file.
        option: The command line's name for it, for messages.

    Raises:
        UserError: There is no such file, or it is not YAML.
    """
    if why_not_a_file(path) == "No such file" or path.is_dir():
        raise MissingFileError(f"{option}: no such file {path}")
    require_file(path)
    try:
        text = read_text(path)
    except UserError as error:
        raise UserError(f"{path}: not YAML: {str(error).removeprefix(f'{path}: ')}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Return the content of YAML text. Its keys are `Key`s.

    Args:
        text: The text.
        where: What messages call it: the file's name.

    Raises:
        UserError: It is not YAML, or has a key twice, or has too many values within each other.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _build(loader, node, where)
    except _RefusedError as error:
        raise UserError(f"{where}: {error}") from None
    except yaml.MarkedYAMLError as error:
        why = shorten(", ".join(part for part in (error.context, error.problem) if part))
        line = _line(error.problem_mark or error.context_mark)
        raise UserError(f"{where}: not YAML: {why}, {line}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{where}: not YAML: {shorten(str(error))}") from None
    finally:
        if loader is not None:
            loader.dispose()


class Key(str):
    """A key of a YAML file that knows the file and its line."""

    file: str
    line: int


class _RefusedError(Exception):
    """YAML that we do not take."""

    def __init__(self, problem: str, mark: Any):
        super().__init__(f"{problem}, {_line(mark)}")


def _line(mark: Any) -> str:
    return f"line {mark.line + 1}" if mark else ""


class _Loader(yaml.SafeLoader):
    """A loader that counts: how deep a value is, and how many values it is with its aliases."""

    depth = 0
    has_aliases = False

    def __init__(self, text: str):
        super().__init__(text)
        self.sizes: dict[int, int] = {}
        self.flattened: set[int] = set()

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            self.has_aliases = True
            node = super().compose_node(parent, index)
            if id(node) not in self.sizes:
                raise _RefusedError("an alias of itself", mark)
            return node
        self.depth += 1
        if self.depth > MOST_DEPTH:
            problem = f"more than {MOST_DEPTH} values within each other"
            raise _RefusedError(problem, mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        size = 1
        if isinstance(node, yaml.SequenceNode):
            size += sum(self.sizes[id(one)] for one in node.value)
        elif isinstance(node, yaml.MappingNode):
            size += sum(self.sizes[id(one)] for pair in node.value for one in pair)
        self.sizes[id(node)] = size
        if self.has_aliases and size > MOST_ALIASED:
            problem = f"its aliases stand for more than {MOST_ALIASED} values"
            raise _RefusedError(problem, mark)
        return node


def _build(loader: _Loader, node: yaml.Node, where: str) -> Any:
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_build(loader, one, where) for one in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        if id(node) not in loader.flattened:  # else it stands for an alias and has been here
            _refuse_repeated_keys(loader, node, where)
            loader.flatten_mapping(node)
            loader.flattened.add(id(node))
        tree: dict[Key, Any] = {}
        for key_node, value in node.value:
            key = _key(loader, key_node, where)
            tree.pop(key, None)  # of a merged mapping, whose key has another line
            tree[key] = _build(loader, value, where)
        return tree
    try:
        value = loader.construct_object(node, deep=True)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise _RefusedError(
            f"a value that cannot be read ({shorten(str(error), 100)})", node.start_mark
        ) from None
    if isinstance(value, str) and (half := SURROGATE.search(value)):
        raise _RefusedError(f"half a character, {brief(half.group())}", node.start_mark)
    return value


def _refuse_repeated_keys(loader: _Loader, node: yaml.MappingNode, where: str) -> None:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag != "tag:yaml.org,2002:merge":
            key = _key(loader, key_node, where)
            if key in seen:
                raise _RefusedError(f"the key {brief(key)} is there twice", key_node.start_mark)
            seen.add(key)


def _key(loader: _Loader, node: yaml.Node, where: str) -> Key:
    if not isinstance(node, yaml.ScalarNode):
        raise _RefusedError("a key that is no word", node.start_mark)
    key = Key(_build(loader, node, where) if node.tag.endswith(":str") else node.value)
    key.file, key.line = where, node.start_mark.line + 1
    return key
