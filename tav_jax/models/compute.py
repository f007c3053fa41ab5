"""How a network computes, as opposed to what it is."""

from dataclasses import dataclass
from typing import Literal

from tav_jax.models.attention.dispatch import AttentionImplementation

GradientCheckpointing = Literal["none", "blocks", "full"]

# The type of a network's computation, by the word that configs and command lines use for it.
# JAX's devices have bfloat16, which needs no loss scaling, so "fp16" means bfloat16 too.
PRECISION_DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "bfloat16"}


@dataclass(frozen=True)
class ComputeOptions:
    """Options that affect speed, memory and rounding, but not what a network computes.

    Only the U-Net uses all of them. The autoencoder and CLIP use `dtype` alone.

    Args:
        attention_implementation: A name from the table in `tav_jax.models.attention.dispatch`.
        gradient_checkpointing: What is kept for the backward pass. The rest is computed again.
            "none" keeps everything, "blocks" the inputs of residual blocks and transformers.
            "full" keeps the same, and when a transformer is computed again it keeps only the
            inputs of that transformer's four parts.
        dtype: Type of the computation. Norm statistics and softmax are float32 in any case.
    """

    attention_implementation: AttentionImplementation = "auto"
    gradient_checkpointing: GradientCheckpointing = "none"
    dtype: str = "float32"
