"""Every command that README and docs show is accepted by the program that it names."""

import argparse
import importlib
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tav_jax.runs.config import load_config

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / "README.md", ROOT / "BUILD_NOTES.md"),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "configs").rglob("*.md")),
]
# Configs name their own command in a comment.
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def commands() -> list[str]:
    """Returns the lines of all shell blocks, each once, without comments."""
    blocks = [
        block
        for document in DOCUMENTS
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL)
    ]
    blocks += [re.sub(r"(?m)^#\s?", "", path.read_text()) for path in CONFIGS]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = (shlex.join(shlex.split(line, comments=True)) for line in lines if runs_something(line))
    return list(dict.fromkeys(found))


def runs_something(line: str) -> bool:
    return re.match(r"(\w+=\S+ )*(srun .*|\S*/)?(python|bash|sbatch) ", line.strip()) is not None


class Parsed(BaseException):
    """Stops a program when its arguments have been read. Nothing catches it on the way."""


def read_arguments(monkeypatch, main, arguments: list[str]) -> argparse.Namespace:
    def stopping_after(parse):
        def parse_and_stop(parser, given=None):
            raise Parsed(parse(parser, given))

        return parse_and_stop

    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping_after(parse))
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(Parsed) as parsed:
        main()
    return parsed.value.args[0]


def find_main(words: list[str]):
    """Returns the function that `python WORDS` calls, and its arguments."""
    if words[0] == "-m":
        name, arguments = words[1], words[2:]
        is_package = (ROOT / name.replace(".", "/") / "__main__.py").is_file()
        name = f"{name}.__main__" if is_package else name
    else:
        assert (ROOT / words[0]).is_file()
        name, arguments = Path(words[0]).stem, words[1:]
        name = "tav_jax.batch" if name == "batch_sample" else name
    return importlib.import_module(name).main, arguments


def test_commands_are_found():
    found = commands()
    assert len(found) > 30
    assert "bash launch/test.sh" in found
    assert any(command.startswith("srun") for command in found)


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_documents_is_accepted(command, monkeypatch):
    words = shlex.split(command)
    if ">" in words:
        words = words[: words.index(">")]
    for word in words:
        if word.startswith(("configs/", "launch/", "tests/")):
            assert (ROOT / word).exists(), word
    programs = [index for index, word in enumerate(words) if word.endswith("python")]
    if not programs or words[programs[0] + 1 : programs[0] + 3] == ["-m", "pytest"]:
        return
    if "tests/parity/speed.py" in words and find_spec("torch") is None:
        pytest.skip("needs PyTorch")
    main, arguments = find_main(words[programs[0] + 1 :])
    parsed = read_arguments(monkeypatch, main, arguments)
    if main.__module__ == "tav_jax.tune":
        load_config(ROOT / parsed.config, parsed.overrides)
