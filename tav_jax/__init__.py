"""Tune-A-Video in JAX and Flax (Wu et al. 2023, arXiv:2212.11565)."""

import logging

# transformers is here for its tokenizer alone, and says at every import that PyTorch is missing.
logging.getLogger("transformers").addFilter(
    lambda record: "PyTorch was not found" not in record.getMessage()
)

from tav_jax.partition import TRAINABLE_MODULES  # noqa: E402
from tav_jax.pipeline import decode_latents, encode_prompts  # noqa: E402
from tav_jax.sampling import ddim_invert, ddim_sample  # noqa: E402
