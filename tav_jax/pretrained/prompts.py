r"""Prompts as tokens: plain, or with weights and of any length.

Weighted prompts are written as AUTOMATIC1111's web UI reads them:

| text                           | meaning                                              |
|--------------------------------|------------------------------------------------------|
| `(a cat)`                      | a weight of 1.1; `((a cat))` of 1.21                 |
| `(a cat:1.3)`                  | a weight of 1.3; weights within others are multiplied |
| `[a cat]`                      | a weight of 1 / 1.1                                  |
| `\(`, `\)`, `\[`, `\]`, `\\` | the character itself                                 |

An open bracket that is never closed reaches to the end; a closing one without an open one is text.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from tav_jax.errors import UserError
from tav_jax.pretrained.model import Model, frame_tokens, token_ids, tokenize
from tav_jax.text import brief, shorten

PromptSyntax = Literal["plain", "weighted"]

ROUND, SQUARE = 1.1, 1 / 1.1
MOST_WEIGHT = 100.0

_PART = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<text>[^\\()\[\]:]+|[\\:])"
)


class PromptTokens(NamedTuple):
    """Tokens of prompts in chunks of the text encoder's length.

    Args:
        ids: Ids of the tokens, with beginning, end and padding in each chunk.
        weights: The weight of each token.
    """

    ids: Int32[np.ndarray, "b chunks s"]
    weights: Float32[np.ndarray, "b chunks s"]


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Return a weighted prompt's texts with their weights; neighbours of one weight are joined."""
    texts: list[str] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each open bracket's text starts
    ranges: list[tuple[int, int, float]] = []
    for found in _PART.finditer(prompt):
        text, bracket = found.group(), found["bracket"]
        if found["escaped"]:
            texts.append(found["escaped"])
        elif bracket in opened:
            opened[bracket].append(len(texts))
        elif found["weight"] and opened["("]:
            ranges.append((opened["("].pop(), len(texts), float(found["weight"])))
        elif bracket == ")" and opened["("]:
            ranges.append((opened["("].pop(), len(texts), ROUND))
        elif bracket == "]" and opened["["]:
            ranges.append((opened["["].pop(), len(texts), SQUARE))
        else:
            texts.append(text)
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        ranges += [(start, len(texts), factor) for start in opened[bracket]]
    weights = np.ones(len(texts))
    with np.errstate(over="ignore", invalid="ignore"):
        for start, stop, factor in ranges:
            weights[start:stop] *= factor
    parts: list[tuple[list[str], float]] = []
    for text, weight in zip(texts, weights.tolist(), strict=True):
        if not parts or parts[-1][1] != weight:
            parts.append(([], weight))
        parts[-1][0].append(text)
    return [("".join(pieces), weight) for pieces, weight in parts]


def prompt_tokens(
    model: Model, prompts: Sequence[str], syntax: PromptSyntax = "plain", chunks: int = 1
) -> PromptTokens:
    """Return the tokens of prompts, in as many chunks as the longest needs.

    Args:
        model: The model.
        prompts: The prompts.
        syntax: "plain" takes every character as it is, and cuts what is longer than one chunk, with
            a warning. "weighted": see above.
        chunks: Number of chunks at least.

    Raises:
        UserError: A weight is larger than any that is supported.
    """
    if syntax == "plain":
        ids = tokenize(model, prompts)[:, None]
        return PromptTokens(ids, np.ones(ids.shape, np.float32))
    length = model.text_encoder.config.max_position_embeddings
    room = length - 2  # without beginning and end
    read = [_weighted_ids(model, prompt) for prompt in prompts]
    count = max([chunks, *(-(-len(ids) // room) for ids, _ in read)])
    ids = np.empty((len(prompts), count, length), np.int32)
    weights = np.ones((len(prompts), count, length), np.float32)
    for row, (all_ids, all_weights) in enumerate(read):
        for chunk in range(count):
            part = slice(chunk * room, (chunk + 1) * room)
            some = all_ids[part]
            ids[row, chunk] = frame_tokens(model.tokenizer, some, length)
            weights[row, chunk, 1 : 1 + len(some)] = all_weights[part]
    return PromptTokens(ids, weights)


def count_chunks(model: Model, prompts: Sequence[str], syntax: PromptSyntax) -> int:
    """Return how many chunks prompts have. Errors are those of `prompt_tokens`."""
    return 1 if syntax == "plain" else prompt_tokens(model, prompts, syntax).ids.shape[1]


def _weighted_ids(model: Model, prompt: str) -> tuple[list[int], list[float]]:
    ids, weights = [], []
    for text, weight in parse_weights(prompt):
        if not abs(weight) <= MOST_WEIGHT:
            raise UserError(
                f"prompt {brief(prompt)}: {brief(shorten(text, 40))} has a weight of {weight:g}; "
                f"at most {MOST_WEIGHT:g} is supported"
            )
        some = token_ids(model, text)
        ids += some
        weights += [weight] * len(some)
    return ids, weights
