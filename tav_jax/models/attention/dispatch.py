"""Attention between frames, over groups of keys, in several implementations of one definition.

Attention looks here at groups of keys: in sparse-causal attention those of frame 0, which all
frames share, and those of the frame before. The implementations differ in what they keep:

| name      | what it does                                                                     |
|-----------|----------------------------------------------------------------------------------|
| `einsum`  | all scores in memory together: the readable truth                                |
| `by_head` | one head of one frame at a time, each within a processor's cache: for CPUs       |
| `chunked` | a running softmax over blocks of keys, forward and backward: bounded memory      |
| `fused`   | one kernel: cuDNN's on a GPU, `pallas_tpu` on a TPU; what it does not take, by   |
|           | type or width, as `auto`                                                         |
| `auto`    | what `choose_implementation` says for the platform, type, width and lengths      |
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from tav_jax.errors import UserError
from tav_jax.models.attention.by_head import attention_by_head
from tav_jax.models.attention.chunked import chunked_attention
from tav_jax.models.attention.einsum import einsum_attention
from tav_jax.models.attention.key_groups import Groups, Heads, joined, merged_attention

AttentionScope = Literal["sparse_causal", "spatial", "first_frame", "full"]
AttentionImplementation = Literal["auto", "einsum", "by_head", "chunked", "fused"]

# Scores of one head, 64 x 64, from which a loop over heads pays on a CPU.
SCORES_WORTH_A_LOOP = 4096
# Scores of a layer that may exist together, in float32 256 MB.
SCORES_AT_ONCE = 2**26
# Queries from which starting a kernel pays; below it, all frames' scores are a few megabytes.
QUERIES_WORTH_A_KERNEL = 512
CUDNN_WIDTH = 128  # the widest head that cuDNN takes before Hopper
TPU_WIDTH = 160  # the widest head of which `flash_attention`'s blocks fit on the chip


def group_attention(
    query: Heads, keys: Groups, values: Groups, implementation: AttentionImplementation = "auto"
) -> Heads:
    """Returns `attention` of each frame's queries over the keys of all groups together.

    Args:
        keys, values: A group has as many frames as the query, each seen by that frame alone, or
            one, which all frames see and which is not copied for each where that can be helped.

    Raises:
        ValueError: "fused", and there is no kernel for this platform.
    """
    here, width = platform(), query.shape[-1]
    if implementation == "fused" and here not in KERNELS:
        raise UserError(f"attention: fused: there is no such kernel on a {here}; use auto")
    if implementation == "auto" or (
        implementation == "fused" and not kernel_takes(here, query.dtype, width)
    ):
        lengths = [key.shape[2] for key in keys]
        implementation = choose_implementation(here, query.dtype, query.shape, lengths)
    return IMPLEMENTATIONS[implementation](query, keys, values)


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": of the mesh in force, else of JAX's default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def kernel_takes(platform: str, dtype: DTypeLike, width: int) -> bool:
    """Tells whether the platform's kernel, if it has one, takes heads of this type and width."""
    if platform == "gpu":
        return jnp.dtype(dtype).itemsize == 2 and width % 8 == 0 and width <= CUDNN_WIDTH
    return platform == "tpu" and width <= TPU_WIDTH


def choose_implementation(
    platform: str, dtype: DTypeLike, query_shape: tuple[int, ...], key_lengths: Sequence[int]
) -> AttentionImplementation:
    """Returns the fastest implementation that fits, for one layer.

    Args:
        query_shape: b, f, q, heads and k.
        key_lengths: Keys that a query sees, by group.
    """
    *batch, queries, heads, width = query_shape
    scores = queries * sum(key_lengths)
    if platform == "cpu":
        if scores < SCORES_WORTH_A_LOOP:
            return "einsum"
        return "by_head" if scores <= SCORES_AT_ONCE else "chunked"
    if queries >= QUERIES_WORTH_A_KERNEL and kernel_takes(platform, dtype, width):
        return "fused"
    return "einsum" if math.prod(batch) * heads * scores <= SCORES_AT_ONCE else "chunked"


def cudnn_attention(query: Heads, keys: Groups, values: Groups) -> Heads:
    """Return `group_attention` by cuDNN, which keeps scores on the chip.

    JAX (0.10 to 0.12) refuses the backward pass where the number of queries or of keys is odd, and
    the text has 77 tokens. So odd lengths are padded by one: padded keys are hidden by their
    length, and what padded queries give is cut off, so that no gradient comes from them.
    """
    rows, key, value = joined(query, keys, values)
    queries, length = rows.shape[1], key.shape[1]
    out = jax.nn.dot_product_attention(
        _pad_to_even(rows),
        _pad_to_even(key),
        _pad_to_even(value),
        key_value_seq_lengths=jnp.full(len(key), length, jnp.int32) if length % 2 else None,
        implementation="cudnn",
    )
    return out[:, :queries].reshape(query.shape)


def _pad_to_even(rows: Float[Array, "b n heads k"]) -> Float[Array, "b n2 heads k"]:
    return jnp.pad(rows, ((0, 0), (0, rows.shape[1] % 2), (0, 0), (0, 0)))


def pallas_attention(query: Heads, keys: Groups, values: Groups) -> Heads:
    """Returns `group_attention` by our kernel for TPUs, which keeps scores on the chip."""
    # Only here: what has no TPU need not import Pallas.
    from tav_jax.models.attention.pallas_tpu import flash_attention

    return merged_attention(query, keys, values, attend=flash_attention)


KERNELS = {"gpu": cudnn_attention, "tpu": pallas_attention}
IMPLEMENTATIONS: dict[str, Callable[[Heads, Groups, Groups], Heads]] = {
    "einsum": einsum_attention,
    "by_head": attention_by_head,
    "chunked": partial(merged_attention, attend=chunked_attention),
    "fused": lambda *heads: KERNELS[platform()](*heads),
}
