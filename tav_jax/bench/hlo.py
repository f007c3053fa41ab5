"""Bytes that the devices of a compiled program send each other, counted in its HLO text."""

import re
from collections import Counter

from tav_jax.bench.hlo_text import parse_arrays

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

# `%name = type kind(`, where the type is one array or a tuple of them.
_OPERATION = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")
# TPU programs write an asynchronous operation three times: started, under way and done.
# These two patterns mark the second and the third.
_REPEATED = re.compile(r"\A\s*%async_collective_fusion|AsyncCollectiveDone")


def collective_bytes(text: str) -> dict[str, int]:
    """Return the bytes of all results of collective operations on each device, by kind.

    A loop's body counts once: for a sampling loop, this is what is sent before it and in one step.

    Args:
        text: A compiled program as HLO text: `compiled.as_text()`.

    Returns:
        Bytes by the HLO name of the operation; kinds that do not occur are left out.
    """
    totals: Counter[str] = Counter()
    for computation in text.split("\n\n"):
        if _REPEATED.search(computation):
            continue
        for types, kind, started in _OPERATION.findall(computation):
            arrays = parse_arrays(types)
            if started and kind != "all-reduce":
                # The result of a start is a tuple of its operands, its results and scalar counters.
                data = tuple(array for array in arrays if array.shape)
                arrays = data[len(data) // 2 :]
            totals[kind] += sum(array.bytes for array in arrays)
    return dict(totals)
