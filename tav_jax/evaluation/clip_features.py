"""CLIP's features of frames and prompts, in batches of one size.

With a current mesh, a batch is sharded over all its devices. Then shard the network first, once:
`replace(clip, network=shard(clip.network))`. Otherwise every batch sends it to the devices.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from jaxtyping import Shaped, UInt8

from tav_jax.models.clip_image import CLIPModel, Features
from tav_jax.models.network import Network
from tav_jax.parallel.sharding import batch_sharding, gather_to_host, shard
from tav_jax.pretrained.clip import Clip
from tav_jax.pretrained.model import pad_tokens
from tav_jax.pretrained.preprocess import preprocess

BATCH_SIZE = 8
"""Frames or prompts that the network takes at once: as many as the paper's clips have frames."""


@jax.jit
def _image_features(network: Network[CLIPModel], batch: jax.Array) -> Features:
    # By default GPUs and TPUs round the factors of float32 products, and scores would depend on it.
    with jax.default_matmul_precision("float32"):
        return network.bind().image_features(batch)


@jax.jit
def _text_features(network: Network[CLIPModel], batch: jax.Array) -> Features:
    with jax.default_matmul_precision("float32"):
        return network.bind().text_features(batch)


def image_features(
    clip: Clip, frames: UInt8[np.ndarray, "n H W 3"], *, batch_size: int = BATCH_SIZE
) -> Features:
    """Return the features of frames, as NumPy arrays.

    Args:
        clip: The model.
        frames: Frames of one size.
        batch_size: Frames in a batch. On a mesh it should be a multiple of the number of devices.
            The last batch is filled up, so that one program serves any number of frames.
    """
    prepare = partial(preprocess, preprocessing=clip.preprocessing)
    return _in_batches(partial(_image_features, clip.network), frames, batch_size, prepare)


def text_features(clip: Clip, prompts: Sequence[str], *, batch_size: int = BATCH_SIZE) -> Features:
    """Return the features of prompts, as NumPy arrays.

    Args:
        clip: The model.
        prompts: Texts. Tokens beyond the text encoder's length are cut off, with a warning.
        batch_size: Prompts in a batch, see `image_features`.
    """
    length = clip.network.config.text_config.max_position_embeddings
    ids = pad_tokens(clip.tokenizer, prompts, length)
    return _in_batches(partial(_text_features, clip.network), ids, batch_size)


def _in_batches(
    run: Callable[..., Features],
    items: Shaped[np.ndarray, "n *axes"],
    batch_size: int,
    prepare: Callable[[np.ndarray], np.ndarray] = lambda batch: batch,
) -> Features:
    """Return the features of items. While one batch is computed, the next one is prepared."""
    outputs = []
    for start in range(0, len(items), batch_size):
        batch = prepare(items[start : start + batch_size])
        filling = [(0, batch_size - len(batch))] + [(0, 0)] * (batch.ndim - 1)
        outputs.append(run(shard(np.pad(batch, filling), batch_sharding)))
    parts = zip(*gather_to_host(outputs), strict=True)
    return Features(*(np.concatenate(part)[: len(items)] for part in parts))
