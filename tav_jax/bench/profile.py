"""Where the time of a program goes: a trace of some runs, read operation by operation."""

import gzip
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tav_jax.bench.gpu_hlo import KernelKind
from tav_jax.bench.programs import Program
from tav_jax.errors import UserError

TRACED_RUNS = 3
LARGEST = 10
ROUNDING = 0.002  # microseconds, of which a trace has three decimals

# What the names of kernels and of HLO operations contain, in the order in which they are tried.
# On a CPU, `ynn` is a library that XLA calls for matrix products.
_PARTS_OF_NAMES: tuple[tuple[KernelKind, str], ...] = (
    ("attention", r"fmha|flash|attention|sdpa"),
    ("convolution", r"conv(?!ert)|fprop|wgrad|dgrad|winograd"),
    ("matrix_product", r"gemm|gemv|matmul|nvjet|cublas|cutlass|splitk|(^|[._])dot([._]|$)|ynn"),
)


class Operation(NamedTuple):
    """Kernels of one name on a GPU, or operations of one name on a CPU, in one run of a program.

    Args:
        name: The name without the number at its end.
        kind: What it computes, as far as the name tells.
        runs: How often one run of the program starts it.
        seconds: Time of all these together.
    """

    name: str
    kind: KernelKind
    runs: float
    seconds: float


class Profile(NamedTuple):
    """Operations of one run of a program.

    Args:
        seconds: Mean time of a run while it was traced.
        operations: From the one that takes longest.
    """

    seconds: float
    operations: list[Operation]

    @property
    def busy_seconds(self) -> float:
        """Return the time of all operations. Threads of a CPU may run several at a time."""
        return sum(operation.seconds for operation in self.operations)

    def seconds_by_kind(self) -> dict[str, float]:
        """Return the time of the operations of each kind, from the one that takes longest."""
        total: dict[str, float] = defaultdict(float)
        for operation in self.operations:
            total[operation.kind] += operation.seconds
        return dict(sorted(total.items(), key=lambda item: -item[1]))


def profile_program(program: Program, compiled: jax.stages.Compiled, folder: Path) -> Profile:
    """Trace some runs of a program, after one that is not traced.

    Args:
        program: The program.
        compiled: The same, compiled for devices that are here.
        folder: Where the trace is written; TensorBoard and Perfetto read it too.

    Raises:
        UserError: JAX has written no trace, or one without operations.
    """
    runs = program.runs(compiled)
    next(runs)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python functions would fill the trace
    with jax.profiler.trace(folder, profiler_options=options):
        began = time.perf_counter()
        for _ in range(TRACED_RUNS):
            next(runs)
        seconds = (time.perf_counter() - began) / TRACED_RUNS
    operations = list(read_trace(newest_trace(folder), TRACED_RUNS))
    if not operations:
        raise UserError(f"--profile: the trace in {folder} has no operations")
    return Profile(seconds, operations)


def newest_trace(folder: Path) -> Path:
    """Return the newest trace in a folder.

    Raises:
        UserError: There is none.
    """
    traces = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise UserError(f"--profile: JAX has written no *.trace.json.gz into {folder}")
    return traces[-1]


def read_trace(path: Path, runs: int) -> Iterator[Operation]:
    """Yield the operations of one run, from the one that takes longest.

    On a GPU these are the kernels and copies on its streams. On a CPU they are the operations of
    XLA's programs. Time that an operation spends in others, as a loop does, counts for those.

    Args:
        path: A trace as JAX writes it, `*.trace.json.gz`.
        runs: How many runs of the program it has.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for name, took in _own_seconds(_operation_events(events)):
        name = re.sub(r"([._]\d+)+$", "", name)
        seconds[name] += took
        counts[name] += 1
    for name in sorted(seconds, key=lambda name: -seconds[name]):
        yield Operation(name, kind_of(name), counts[name] / runs, seconds[name] / runs)


def kind_of(name: str) -> KernelKind:
    """Return what an operation computes, as far as its name tells."""
    for kind, part in _PARTS_OF_NAMES:
        if re.search(part, name, re.IGNORECASE):
            return kind
    return "other"


def _operation_events(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events of a GPU's streams or, if there are none, of XLA's operations."""
    events = list(events)
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("ph") == "M"
        and event["name"] == "thread_name"
        and event["args"]["name"].startswith("Stream")
    }
    complete = [event for event in events if event.get("ph") == "X"]
    if streams:
        return [event for event in complete if (event["pid"], event["tid"]) in streams]
    return [event for event in complete if "hlo_op" in event.get("args", {})]


def _own_seconds(events: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yield the name of each event and its time without that of events inside it."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    for thread in threads.values():
        # The outer one first, if two begin together.
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        own = [float(event["dur"]) for event in thread]
        ends = [event["ts"] + event["dur"] for event in thread]
        outer: list[int] = []
        for index, event in enumerate(thread):
            while outer and ends[outer[-1]] + ROUNDING < ends[index]:
                outer.pop()  # it ends earlier, so this event is not inside it
            if outer:
                own[outer[-1]] -= event["dur"]
            outer.append(index)
        for event, took in zip(thread, own, strict=True):
            yield event["name"], max(took, 0.0) / 1e6
