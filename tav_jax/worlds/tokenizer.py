"""A CLIP tokenizer for the small vocabulary of a world."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer


def byte_pair_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the byte-pair merges that make each word one token.

    The most frequent pair is merged first. Of equally frequent pairs, the first in alphabetical
    order is merged. The tokenizers library picks among them at random, so a resumed training would
    split words differently than before.
    """
    merges: list[tuple[str, str]] = []
    spelt = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    while pairs := Counter(pair for parts in spelt for pair in pairwise(parts)):
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((left, right))
        for parts in spelt:
            for i in range(len(parts) - 1):
                if parts[i : i + 2] == [left, right]:
                    parts[i : i + 2] = [left + right]
    return merges


def write_tokenizer(folder: Path, words: Sequence[str], max_length: int) -> CLIPTokenizer:
    """Write a byte-pair tokenizer in CLIP's files, and return it.

    Any text that is not in `words` is split into its bytes.

    Args:
        folder: Where the files are written.
        words: The words that become one token each.
        max_length: Tokens of a prompt, including the start and end tokens.
    """
    merges = byte_pair_merges(words)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["".join(merge) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )
    return CLIPTokenizer.from_pretrained(folder)
