"""The instructions of a compiled program, read from its HLO text."""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    """Type of an array: bits of an element and sides."""

    element: str
    bits: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Return the bytes of all elements."""
        return self.size * self.bits // 8


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Args:
        name: Unique in its computation.
        type: Text of the result's type.
        op: Name of the operation.
        arguments: Text between its parentheses.
        attributes: Text behind them.
        is_root: Whether its result is the computation's.
    """

    name: str
    type: str
    op: str
    arguments: str
    attributes: str
    is_root: bool

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Return the names of the operands, each once."""
        return tuple(dict.fromkeys(self.operand_names()))

    def operand_names(self) -> list[str]:
        """Return the names of the operands in their order, each as often as it is given."""
        return _NAME.findall(self.arguments)

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Return the result's array, or the arrays of a tuple."""
        return parse_arrays(self.type)

    @property
    def bytes(self) -> int:
        """Return the bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    def called(self, *attributes: str) -> list[str]:
        """Return the names of the computations that these attributes hold."""
        found: list[str] = []
        for attribute in attributes:
            if value := re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes):
                found += _NAME.findall(value[1])
        return found


Computation = dict[str, Instruction]


def parse_arrays(type_: str) -> tuple[Array, ...]:
    """Return the arrays of a type as HLO text writes it: one array, or a tuple of them."""
    return tuple(
        Array(element, int(bits or 8), tuple(int(side) for side in sides.split(",") if side))
        for element, bits, sides in _ARRAY.findall(type_)
    )


def parse_module(text: str) -> tuple[dict[str, Computation], str]:
    """Return the computations of a module by name, and the name of the one that it starts with.

    Args:
        text: HLO text: `compiled.as_text()`.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in text.splitlines():
        if opening := _COMPUTATION.match(line):
            current = computations[opening[2]] = {}
            if opening[1]:
                entry = opening[2]
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _parse(line)):
            current[instruction.name] = instruction
    return computations, entry


def _parse(line: str) -> Instruction | None:
    """Return the instruction that a line of HLO text holds."""
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    root, name, type_, op = found.groups()
    end, depth = found.end(), 1
    while depth and end < len(line):
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    arguments = line[found.end() : end - 1]
    return Instruction(name, type_, op, arguments, line[end:], root is not None)
