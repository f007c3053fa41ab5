"""Kernels of a program that is compiled for a GPU, and the work of each, from its HLO text.

Each instruction of a compiled program that is no bookkeeping starts one kernel. A kernel reads its
operands and writes its results, each once.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from tav_jax.bench.hlo_text import Computation, Instruction, parse_module

KernelKind = Literal["matrix_product", "convolution", "attention", "other"]
KINDS: tuple[KernelKind, ...] = ("matrix_product", "convolution", "attention", "other")

# Instructions that start no kernel. The second half of an asynchronous operation ends in -done.
_FREE = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "constant",
    "after-all",
    "opt-barrier",
    "add-dependency",
    "partition-id",
    "replica-id",
    "async-update",
}
# Operations that read only a part of their first operand, as large as their result.
_READS_A_PART = {"dynamic-slice", "gather"}
_LIBRARIES: tuple[tuple[str, KernelKind], ...] = (
    ("__cublas", "matrix_product"),
    ("__cudnn$fmha", "attention"),
    ("__cudnn$conv", "convolution"),
)


class Kernel(NamedTuple):
    """One kernel of a program.

    Args:
        kind: What it computes.
        name: Of its HLO instruction.
        bytes: Bytes that it reads and writes.
        flops: Operations of its matrix products and convolutions; a multiply-add is two.
        bits: Width of the numbers that it multiplies.
        runs: How often one run of the program starts it.
    """

    kind: KernelKind
    name: str
    bytes: int
    flops: int
    bits: int
    runs: int


def read_kernels(text: str) -> list[Kernel]:
    """Return the kernels that a program starts on one GPU, in the order of the text.

    A loop's body counts as often as it runs. Only a loop over timesteps has a trip count that the
    compiler does not know. Of a program with such a loop, one step is counted, without what comes
    before and after the loop. Of alternative branches, the one that moves most counts. Operations
    between devices count as kernels of kind "other".

    Args:
        text: A compiled program as HLO text: `compiled.as_text()`.
    """
    module = _Module(text)
    steps = [
        list(module.kernels(body, 1))
        for instruction in module.computations[module.entry].values()
        if instruction.op == "while" and _trip_count(instruction) is None
        for body in instruction.called("body")
    ]
    return max(steps, key=total_bytes) if steps else list(module.kernels(module.entry, 1))


def total_bytes(kernels: Sequence[Kernel], kind: KernelKind | None = None) -> int:
    """Return the bytes that kernels of one kind, or all, move in one run of a program."""
    return sum(kernel.bytes * kernel.runs for kernel in kernels if kind in (None, kernel.kind))


class _Module:
    """The computations of an HLO module by name."""

    def __init__(self, text: str):
        self.computations, self.entry = parse_module(text)

    def kernels(self, name: str, runs: int) -> Iterator[Kernel]:
        """Yield the kernels of a computation that is run `runs` times, and of all it calls."""
        computation = self.computations[name]
        for instruction in computation.values():
            match instruction.op:
                case op if op in _FREE or op.endswith("-done"):
                    pass
                case "while":
                    for body in instruction.called("body"):
                        yield from self.kernels(body, runs * (_trip_count(instruction) or 1))
                case "call" | "async-start":
                    for callee in instruction.called("to_apply", "calls"):
                        yield from self.kernels(callee, runs)
                case "conditional":
                    yield from self._largest_branch(instruction, runs)
                case _:
                    yield self._kernel(instruction, computation)._replace(runs=runs)

    def _largest_branch(self, instruction: Instruction, runs: int) -> list[Kernel]:
        branches = instruction.called(
            "branch_computations", "true_computation", "false_computation"
        )
        return max((list(self.kernels(branch, runs)) for branch in branches), key=total_bytes)

    def _kernel(self, instruction: Instruction, computation: Computation) -> Kernel:
        """Return the kernel of one instruction, as if it ran once."""
        operands = [computation[name] for name in instruction.operands]
        kind, flops = self._flops(instruction, operands)
        bits = operands[0].arrays[0].bits if operands and operands[0].arrays else 0
        if instruction.op == "fusion":
            moved = self._fusion_bytes(instruction, operands)
        elif instruction.op in _READS_A_PART:
            moved = 2 * instruction.bytes + sum(index.bytes for index in operands[1:])
        elif instruction.op == "dynamic-update-slice":
            moved = 2 * operands[1].bytes
        elif instruction.op.endswith("-start") and instruction.op != "all-reduce-start":
            moved = instruction.bytes  # the result's tuple has the operands too
        else:
            moved = _result_bytes(instruction, kind) + sum(each.bytes for each in operands)
        return Kernel(kind, instruction.name, moved, flops, bits, runs=1)

    def _flops(
        self, instruction: Instruction, operands: Sequence[Instruction]
    ) -> tuple[KernelKind, int]:
        """Return what an instruction computes, and the operations of its products."""
        match instruction.op:
            case "dot":
                contracted = _integers(r"lhs_contracting_dims=\{([^}]*)\}", instruction)
                return "matrix_product", _product_flops(instruction, operands[0], contracted)
            case "convolution":
                return "convolution", _convolution_flops(instruction, operands)
            case "fusion":
                return self._fusion_flops(instruction)
            case "custom-call":
                return _library_flops(instruction, operands)
        return "other", 0

    def _fusion_flops(self, fusion: Instruction) -> tuple[KernelKind, int]:
        """Return the kind of the first product in a fusion, and the operations of all."""
        kinds: list[KernelKind] = []
        total = 0
        for callee in fusion.called("calls"):
            body = self.computations[callee]
            for inner in body.values():
                if inner.op in ("dot", "convolution", "fusion"):
                    kind, flops = self._flops(inner, [body[name] for name in inner.operands])
                    total += flops
                    kinds += [kind] if kind != "other" else []
        return (kinds[0] if kinds else "other"), total

    def _fusion_bytes(self, fusion: Instruction, operands: Sequence[Instruction]) -> int:
        """Return the bytes that a fusion moves; of sliced or updated arrays only that part."""
        body = self.computations[fusion.called("calls")[0]]
        root = next(inner for inner in body.values() if inner.is_root)
        results = [body[name] for name in root.operands] if root.op == "tuple" else [root]
        moved = 0
        for result in results:
            result = _behind_bitcasts(result, body)
            updates = result.op == "dynamic-update-slice"
            moved += body[result.operands[1]].bytes if updates else result.bytes
        parameters = {
            int(inner.arguments): inner for inner in body.values() if inner.op == "parameter"
        }
        given = list(fusion.operands)
        for number, name in enumerate(fusion.operand_names()):
            whole = operands[given.index(name)].bytes
            moved += min(whole, _read_bytes(parameters[number], body))
        return moved


def _trip_count(loop: Instruction) -> int | None:
    """Return how often a loop's body runs; None if the compiler does not know."""
    found = re.search(r'"known_trip_count":\s*\{"n":\s*"(\d+)"', loop.attributes)
    return int(found[1]) if found else None


def _behind_bitcasts(instruction: Instruction, body: Computation) -> Instruction:
    while instruction.op == "bitcast":
        instruction = body[instruction.operands[0]]
    return instruction


def _read_bytes(array: Instruction, body: Computation) -> int:
    """Return the bytes of an array that a fusion's body reads."""
    total = 0
    for user in body.values():
        if array.name not in user.operands:
            continue
        first = user.operands[0] == array.name
        if user.op == "bitcast":
            total += _read_bytes(user, body)
        elif first and user.op in _READS_A_PART:
            total += user.bytes
        elif not (first and user.op == "dynamic-update-slice"):
            return array.bytes
    return total


def _result_bytes(instruction: Instruction, kind: KernelKind) -> int:
    """Return the bytes of the results, without the scratch memory of a library's kernel."""
    if kind == "other" or instruction.op != "custom-call":
        return instruction.bytes
    return sum(array.bytes for array in instruction.arrays if array.element not in ("s8", "u8"))


def _library_flops(call: Instruction, operands: Sequence[Instruction]) -> tuple[KernelKind, int]:
    """Return what a call of cuBLAS or cuDNN computes, and its operations."""
    found = re.search(r'custom_call_target="([^"]*)"', call.attributes)
    target = found[1] if found else ""
    kind = next((kind for start, kind in _LIBRARIES if target.startswith(start)), "other")
    match kind:
        case "matrix_product":
            contracted = _integers(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', call)
            return kind, _product_flops(call, operands[0], contracted)
        case "convolution":
            return kind, _convolution_flops(call, operands, target)
        case "attention":
            scores = _integers(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', call)
            # Scores and weighted values; the backward pass computes scores and four gradients.
            products = 5 if target.endswith("Backward") else 2
            return kind, products * 2 * math.prod(scores) * operands[0].arrays[0].shape[-1]
    return "other", 0


def _integers(pattern: str, instruction: Instruction) -> list[int]:
    found = re.search(pattern, instruction.attributes)
    return [int(number) for number in re.findall(r"\d+", found[1])] if found else []


def _product_flops(product: Instruction, left: Instruction, contracted: Sequence[int]) -> int:
    sides = left.arrays[0].shape
    return 2 * product.arrays[0].size * math.prod(sides[axis] for axis in contracted)


def _convolution_flops(
    convolution: Instruction, operands: Sequence[Instruction], target: str = ""
) -> int:
    """Return the operations of a convolution or of one of its gradients.

    Each number of the forward pass's output costs a product for each number of the kernel that
    belongs to its channel. Gradients cost the same. Products with zeros of padding are counted.
    """
    first, second = operands[0].arrays[0], operands[1].arrays[0]
    result = convolution.arrays[0]
    output, kernel = result, second
    if "BackwardInput" in target:
        output, kernel = first, second
    elif "BackwardFilter" in target:
        output, kernel = second, result
    labels = re.search(r"dim_labels=\w+_(\w+)->", convolution.attributes)
    if not labels:
        raise ValueError(f"no dim_labels: {convolution.name}")
    return 2 * output.size * kernel.size // kernel.shape[labels[1].index("o")]
