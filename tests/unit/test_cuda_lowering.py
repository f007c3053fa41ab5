"""Attention lowers for an NVIDIA GPU, forward and backward, at every length it is chosen for.

JAX traces and lowers for CUDA without a GPU. Only its question for the cuDNN version needs one, and
is answered by `assume_cudnn`.
"""

import jax
import jax.numpy as jnp
import pytest

from tav_jax.bench.topology import assume_cudnn
from tav_jax.models.attention.dispatch import choose_implementation, group_attention
from tav_jax.models.attention.frame_attention import sparse_causal_attention, spatial_attention


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    """Give JAX and our dispatch the answers that they would get on an H100 with cuDNN."""
    monkeypatch.setattr("tav_jax.models.backend.platform", lambda: "gpu")
    with assume_cudnn():
        yield


def lowered(attend, *shapes):
    """Return the text of a loss and its gradients, lowered for CUDA."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def loss(*inputs):
        return jnp.sum(jnp.square(attend(*inputs).astype(jnp.float32)))

    step = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(inputs)))))
    return step.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()


def uses_cudnn(text):
    return "fmhaSoftmax" in text and "fmhaSoftmaxBackward" in text


@pytest.mark.parametrize("length", [1, 2, 3, 77, 78, 154])
@pytest.mark.parametrize("width", [40, 80])
def test_the_text_s_keys_have_any_length(length, width):
    query, keys = (1, 8, 1024, 8, width), (1, 1, length, 8, width)
    assert choose_implementation("gpu", "bfloat16", query, [length]) == "fused"
    assert uses_cudnn(lowered(spatial_attention, query, keys, keys))


@pytest.mark.parametrize("frames", [1, 2, 3, 8, 24])
@pytest.mark.parametrize("tokens", [4096, 31 * 33])
def test_frames_look_at_each_other_on_any_grid(frames, tokens):
    heads = (1, frames, tokens, 8, 40)
    assert uses_cudnn(lowered(sparse_causal_attention, heads, heads, heads))


@pytest.mark.parametrize("frames", [1, 3])
def test_one_frame_s_odd_queries_look_at_an_odd_text(frames):
    query, keys = (1, frames, 31 * 33, 8, 40), (1, 1, 77, 8, 40)
    assert uses_cudnn(lowered(spatial_attention, query, keys, keys))


def test_a_kernel_that_is_asked_for_takes_what_it_can_and_leaves_the_rest():
    def fused(query, key, value):
        return group_attention(query, (key,), (value,), "fused")

    narrow, wide = (1, 4096, 7, 8, 40), (1, 64, 7, 8, 160)
    assert uses_cudnn(lowered(fused, narrow, narrow, narrow))
    assert not uses_cudnn(lowered(fused, wide, wide, wide))
