"""Bytes that the devices of a compiled program send each other, counted in its HLO text."""

import math
import re
from collections import Counter

import jax

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

# `%name = type kind(`, where the type is one array or a tuple of them.
_OPERATION = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
# TPU programs write an asynchronous operation three times: started, under way and done.
# These two patterns mark the second and the third.
_REPEATED = re.compile(r"\A\s*%async_collective_fusion|AsyncCollectiveDone")


def collective_bytes(program: jax.stages.Compiled) -> dict[str, int]:
    """Return the bytes of all results of collective operations on each device, by kind.

    A loop's body counts once: for a sampling loop, this is what is sent before it and in one step.

    Args:
        program: A compiled program, for devices that are here or not.

    Returns:
        Bytes by the HLO name of the operation; kinds that do not occur are left out.
    """
    totals: Counter[str] = Counter()
    for computation in (program.as_text() or "").split("\n\n"):
        if _REPEATED.search(computation):
            continue
        for types, kind, started in _OPERATION.findall(computation):
            arrays = _ARRAY.findall(types)
            if started and kind != "all-reduce":
                # The result of a start is a tuple of its operands, its results and scalar counters.
                data = [(element, sides) for element, sides in arrays if sides]
                arrays = data[len(data) // 2 :]
            totals[kind] += sum(_bytes(*each) for each in arrays)
    return dict(totals)


def _bytes(element: str, sides: str) -> int:
    bits = 8 if element == "pred" else int(_BITS.findall(element)[0])
    return math.prod(int(side) for side in sides.split(",") if side) * bits // 8
