"""What a base model is trained on."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8


@dataclass(frozen=True)
class TrainingSet:
    """Captioned scenes, each drawn at several times.

    Args:
        frames: A clip of each scene.
        silhouettes: Share of each latent pixel that the scene's subject covers, from 0 to 1.
        captions: The captions of each scene, equally many for all.
    """

    frames: UInt8[np.ndarray, "n f H W 3"]
    silhouettes: Float32[np.ndarray, "n f h w"]
    captions: list[list[str]]
