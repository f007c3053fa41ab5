"""Which attention implementation a network uses, recorded while JAX traces the network itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from flax import nnx
from jax import Array

from tav_jax.bench.programs import Networks, clip_shapes
from tav_jax.models.attention.dispatch import IMPLEMENTATIONS
from tav_jax.models.network import Network
from tav_jax.models.transformer import BasicTransformerBlock
from tav_jax.parallel.sharding import over_frames
from tav_jax.training.memory import Size


def chosen_attention(networks: Networks, size: Size) -> dict[str, str]:
    """Return the implementation of attention between frames at each level that has it.

    The network is traced abstractly on the current mesh, so this is what a program will contain.

    Returns:
        Implementation by grid of latents, as in {"64x64": "fused"}, from the finest.
    """
    by_tokens: dict[int, str] = {}

    def trace(unet: Network, *inputs: Any) -> Array:
        module = unet.bind()
        for _, block in nnx.iter_modules(module):
            if isinstance(block, BasicTransformerBlock):
                block.attn1.attend = _recording(block.attn1.attend, by_tokens)
        return module(*inputs)

    clip = clip_shapes(networks, size)
    jax.eval_shape(over_frames(trace), networks.unet, clip.latents, clip.timesteps, clip.context)

    _, _, height, width, _ = clip.latents.shape
    chosen = {}
    for level in range(len(networks.unet.config.block_out_channels)):
        # Strided convolutions round up.
        rows, columns = -(-height // 2**level), -(-width // 2**level)
        if rows * columns in by_tokens:
            chosen[f"{columns}x{rows}"] = by_tokens[rows * columns]
    return chosen


def _recording(attend: Callable[..., Array], by_tokens: dict[int, str]) -> Callable[..., Array]:
    """Return `attend`, recording its implementation under the query's tokens in one frame."""

    def recorded(query: Array, *keys_values: Array) -> Array:
        with _record_implementations() as used:
            out = attend(query, *keys_values)
        by_tokens[query.shape[2]] = used[-1]
        return out

    return recorded


@contextmanager
def _record_implementations() -> Iterator[list[str]]:
    """Record the names of the implementations that are called, by wrapping their table."""
    used: list[str] = []
    originals = dict(IMPLEMENTATIONS)

    def wrap(name: str, attend: Callable[..., Array]) -> Callable[..., Array]:
        def wrapped(*heads: Any) -> Array:
            used.append(name)
            return attend(*heads)

        return wrapped

    IMPLEMENTATIONS.update({name: wrap(name, attend) for name, attend in originals.items()})
    try:
        yield used
    finally:
        IMPLEMENTATIONS.update(originals)
