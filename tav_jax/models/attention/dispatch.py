"""Attention over groups of keys: one definition, several implementations, and their choice.

Sparse-causal attention has two groups of keys: those of frame 0, which all frames share, and those
of the previous frame. The implementations differ in speed and memory:

| name      | what it does                                                                     |
|-----------|----------------------------------------------------------------------------------|
| `einsum`  | keeps all scores in memory together: the definition, easy to read                |
| `by_head` | one head of one frame at a time, which fits in a processor's cache: for CPUs     |
| `chunked` | a running softmax over blocks of keys, forward and backward: bounded memory      |
| `fused`   | one kernel: cuDNN's on a GPU, `pallas_tpu` on a TPU. Layers whose type or width  |
|           | the kernel does not support are computed as under `auto`                         |
| `auto`    | what `choose_implementation` returns for the platform, type, width and lengths   |
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
from tav_jax.models import backend
from tav_jax.models.attention.by_head import attention_by_head
from tav_jax.models.attention.chunked import chunked_attention
from tav_jax.models.attention.einsum import einsum_attention
from tav_jax.models.attention.key_groups import Groups, Heads, join_groups, merged_attention

AttentionScope = Literal["sparse_causal", "spatial", "first_frame", "full"]
AttentionImplementation = Literal["auto", "einsum", "by_head", "chunked", "fused"]

# On a CPU, `by_head` is the faster one from this many scores a head, 64 x 64.
MIN_SCORES_BY_HEAD = 4096
# `einsum` and `by_head` are used up to this many scores at a time: 256 MB in float32.
MAX_SCORES_AT_ONCE = 2**26
# A kernel is the faster one from this many queries. Below, all frames' scores are a few megabytes.
MIN_QUERIES_FUSED = 512
# Up to this many frames a GPU moves fewer bytes for temporal attention element by element.
MAX_FRAMES_ELEMENTWISE = 32
CUDNN_MAX_WIDTH = 128  # the widest head that cuDNN supports before Hopper
TPU_MAX_WIDTH = 160  # the widest head for which the blocks of `flash_attention` fit on the chip


def group_attention(
    query: Heads, keys: Groups, values: Groups, implementation: AttentionImplementation = "auto"
) -> Heads:
    """Return `attention` of each frame's queries over the keys of all groups together.

    Args:
        query: Queries of each frame.
        keys: Keys of each group. Either a group has as many frames as `query`, and each frame
            sees its own keys. Or it has one frame, which all frames see.
        values: Values of each group, in the shapes of `keys`.
        implementation: A name from the table above.

    Raises:
        UserError: `implementation` is "fused", and this platform has no kernel.
    """
    target, width = backend.platform(), query.shape[-1]
    if implementation == "fused" and target not in KERNELS:
        raise UserError(f"attention: fused: there is no such kernel on a {target}; use auto")
    if implementation == "auto" or (
        implementation == "fused" and not kernel_supports(target, query.dtype, width)
    ):
        lengths = [key.shape[2] for key in keys]
        implementation = choose_implementation(target, query.dtype, query.shape, lengths)
    return IMPLEMENTATIONS[implementation](query, keys, values)


def kernel_supports(platform: str, dtype: DTypeLike, width: int) -> bool:
    """Tell whether the platform has a kernel, and it supports heads of this type and width."""
    if platform == "gpu":
        return jnp.dtype(dtype).itemsize == 2 and width % 8 == 0 and width <= CUDNN_MAX_WIDTH
    return platform == "tpu" and width <= TPU_MAX_WIDTH


def choose_implementation(
    platform: str, dtype: DTypeLike, query_shape: tuple[int, ...], key_lengths: Sequence[int]
) -> AttentionImplementation:
    """Return the fastest implementation that fits in memory, for one layer.

    Args:
        platform: "cpu", "gpu" or "tpu".
        dtype: Type of the queries.
        query_shape: Their shape: b, f, q, heads and k.
        key_lengths: Number of keys that a query sees in each group.
    """
    *batch, queries, heads, width = query_shape
    scores = queries * sum(key_lengths)
    if platform == "cpu":
        if scores < MIN_SCORES_BY_HEAD:
            return "einsum"
        return "by_head" if scores <= MAX_SCORES_AT_ONCE else "chunked"
    if queries >= MIN_QUERIES_FUSED and kernel_supports(platform, dtype, width):
        return "fused"
    return "einsum" if math.prod(batch) * heads * scores <= MAX_SCORES_AT_ONCE else "chunked"


def attends_elementwise(implementation: AttentionImplementation, *, frames: int) -> bool:
    """Tell whether temporal attention is to be computed by `attention_over_frames`.

    Args:
        implementation: As asked for.
        frames: Number of frames that each position attends to.
    """
    return (
        implementation == "auto"
        and backend.platform() == "gpu"
        and frames <= MAX_FRAMES_ELEMENTWISE
    )


def cudnn_attention(query: Heads, keys: Groups, values: Groups) -> Heads:
    """Return `group_attention` by cuDNN, which keeps scores on the chip.

    JAX (0.10 to 0.12) refuses the backward pass if the number of queries or of keys is odd, and
    the text has 77 tokens. So odd lengths are padded by one. The padded key is masked by the
    sequence length. The padded query's output is cut off, so it contributes no gradient.
    """
    rows, key, value = join_groups(query, keys, values)
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
    """Return `group_attention` by our kernel for TPUs, which keeps scores on the chip."""
    # Imported here, since machines without a TPU need no Pallas.
    from tav_jax.models.attention.pallas_tpu import flash_attention

    return merged_attention(query, keys, values, attend=flash_attention)


KERNELS = {"gpu": cudnn_attention, "tpu": pallas_attention}
IMPLEMENTATIONS: dict[str, Callable[[Heads, Groups, Groups], Heads]] = {
    "einsum": einsum_attention,
    "by_head": attention_by_head,
    "chunked": partial(merged_attention, attend=chunked_attention),
    "fused": lambda *heads: KERNELS[backend.platform()](*heads),
}
