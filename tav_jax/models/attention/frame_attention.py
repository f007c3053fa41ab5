"""What a frame's self-attention sees: sparse-causal as in the paper, or its alternatives."""

from collections.abc import Callable

from einops import rearrange
from jax import Array
from jaxtyping import Float

from tav_jax.models.attention.dispatch import AttentionImplementation, group_attention
from tav_jax.models.attention.key_groups import Heads
from tav_jax.models.frame_collectives import all_frames, first_frame, previous_frame


def sparse_causal_attention(
    query: Heads, key: Heads, value: Heads, implementation: AttentionImplementation = "auto"
) -> Heads:
    """Return each frame's attention over the tokens of frame 0 and of the previous frame.

    Wu et al. 2023 (arXiv:2212.11565), section 3.2: Q = W_Q z_i, K = W_K [z_0, z_{i-1}],
    V = W_V [z_0, z_{i-1}]. Frame 0 has no previous frame. It sees itself twice, which gives the
    same result as once.
    """
    keys, values = ((first_frame(x), previous_frame(x)) for x in (key, value))
    return group_attention(query, keys, values, implementation)


def spatial_attention(
    query: Heads,
    key: Float[Array, "b g m heads k"],
    value: Float[Array, "b g m heads k"],
    implementation: AttentionImplementation = "auto",
) -> Heads:
    """Return each frame's attention over its own keys, or over the keys of one shared frame."""
    return group_attention(query, (key,), (value,), implementation)


def first_frame_attention(
    query: Heads, key: Heads, value: Heads, implementation: AttentionImplementation = "auto"
) -> Heads:
    """Return each frame's attention over the tokens of frame 0 alone."""
    return group_attention(query, (first_frame(key),), (first_frame(value),), implementation)


def full_attention(
    query: Heads, key: Heads, value: Heads, implementation: AttentionImplementation = "auto"
) -> Heads:
    """Return each token's attention over every token of every frame."""
    key, value = (
        rearrange(all_frames(x), "b f n heads k -> b 1 (f n) heads k") for x in (key, value)
    )
    return group_attention(query, (key,), (value,), implementation)


FRAME_ATTENTION: dict[str, Callable[..., Heads]] = {
    "sparse_causal": sparse_causal_attention,
    "spatial": spatial_attention,
    "first_frame": first_frame_attention,
    "full": full_attention,
}
