"""Means over clips with the interval of their bootstrap."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 4000


class Interval(NamedTuple):
    """A mean over clips, and the interval that holds 95 % of the bootstrap means."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


def bootstrap(per_clip: Sequence[float]) -> Interval:
    """Return the mean over clips with its percentile interval, by drawing clips with replacement.

    Efron & Tibshirani 1993, chapter 13. Of one clip the interval is the mean alone.
    """
    values = np.asarray(per_clip, np.float64)
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_over_clips(by_clip: Mapping[str, Sequence[float]]) -> Interval:
    """Return the mean of the clips' means with its interval.

    Args:
        by_clip: The values of each clip's videos.
    """
    return bootstrap([float(np.mean(values)) for values in by_clip.values()])
