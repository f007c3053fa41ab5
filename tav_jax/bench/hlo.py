"""What the devices of a compiled program send each other."""

import math
import re
from collections import Counter

import jax

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

# `%name = type kind(`, the type being one array or several.
_OPERATION = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
# TPU programs write what goes on beside computation three times: started, under way and done.
_AGAIN = re.compile(r"\A\s*%async_collective_fusion|AsyncCollectiveDone")


def collective_bytes(program: jax.stages.Compiled) -> dict[str, int]:
    """Returns by kind the bytes of results that each device has from all of them.

    A loop's body counts once: of a sampling loop this is what is sent before it and in one step.
    """
    totals: Counter[str] = Counter()
    for computation in (program.as_text() or "").split("\n\n"):
        if _AGAIN.search(computation):
            continue
        for types, kind, started in _OPERATION.findall(computation):
            arrays = _ARRAY.findall(types)
            if started and kind != "all-reduce":
                # What is started holds its operands and its results, and counters.
                data = [(element, sides) for element, sides in arrays if sides]
                arrays = data[len(data) // 2 :]
            totals[kind] += sum(_bytes(*each) for each in arrays)
    return dict(totals)


def _bytes(element: str, sides: str) -> int:
    bits = 8 if element == "pred" else int(_BITS.findall(element)[0])
    return math.prod(int(side) for side in sides.split(",") if side) * bits // 8
