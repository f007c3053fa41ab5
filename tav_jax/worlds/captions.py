"""What the captions of all drawn worlds have in common."""

from bisect import bisect
from collections.abc import Mapping
from itertools import accumulate
from typing import TypeVar

Form = TypeVar("Form", bound=tuple[bool, ...])
"""For each part of a scene whether a caption names it."""


def choose_form(shares: Mapping[Form, float], number: float) -> Form:
    """Return a form of captions.

    Args:
        shares: How often each form is chosen. The sum is 1.
        number: A random number from 0 to 1.
    """
    index = bisect(list(accumulate(shares.values())), number)
    return list(shares)[min(index, len(shares) - 1)]
