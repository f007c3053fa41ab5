"""TEMPORARY."""

import numpy as np

from tav_jax.worlds.figures.scenes import ATTRIBUTES


def read(images):
    return {name: np.full(len(images), -1) for name in ATTRIBUTES}
