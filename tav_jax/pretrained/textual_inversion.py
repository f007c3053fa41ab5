"""Textual inversion: words whose embeddings were learnt (Gal et al. 2022, arXiv:2208.01618).

| file                                 | content                                              |
|--------------------------------------|------------------------------------------------------|
| `learned_embeds.safetensors`, `.bin` | one tensor, `[d]` or `[n, d]`, named like the word   |
| AUTOMATIC1111's `.pt`                | `string_to_param["*"]`, and the word in `name`       |
| AUTOMATIC1111's `.safetensors`       | `emb_params`; the word is the file's name            |

A word of n vectors is n tokens: `word`, `word_1`, ..., as in diffusers. In a prompt the word stands
for all of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tav_jax.errors import UserError
from tav_jax.models.clip import CLIPTextModel
from tav_jax.models.network import Network
from tav_jax.pretrained.pickled import read_tree
from tav_jax.pretrained.weights import read_safetensors
from tav_jax.text import brief, shorten

TABLE = "text_model.embeddings.token_embedding.embedding"
MOST_VECTORS = 75  # that a prompt has room for
MOST_CHARACTERS = 200  # of a word


class Embedding(NamedTuple):
    """A learnt word with the embeddings of its tokens, `[n, d]`."""

    word: str
    vectors: np.ndarray

    @property
    def tokens(self) -> list[str]:
        """Return the names of its tokens."""
        return [self.word, *(f"{self.word}_{n}" for n in range(1, len(self.vectors)))]


def read_embeddings(files: Sequence[str | Path], tokenizer: Any, width: int) -> list[Embedding]:
    """Return the embeddings of files, which a model can take.

    Args:
        files: The files.
        tokenizer: The model's tokenizer.
        width: Width of the text encoder's states.

    Raises:
        UserError: Files are missing, damaged, of another kind or for another model, or the model
            has such a word already. All are listed.
    """
    known = set(tokenizer.get_vocab()) if files else set()
    embeddings, problems = [], []
    for path in files:
        try:
            embedding = _read_embedding(Path(path))
            # A word of the vocabulary ends in `</w>`. The tokenizer reads all in lower case.
            taken = [
                token
                for token in embedding.tokens
                if {token, f"{token}</w>", token.lower(), f"{token.lower()}</w>"} & known
            ]
            if taken:
                raise UserError(f"{path}: the tokenizer has a word {brief(taken[0])} already")
            if embedding.vectors.shape[1] != width:
                raise UserError(
                    f"{path}: its embeddings are {embedding.vectors.shape[1]} wide, those of the "
                    f"text encoder {width}"
                )
        except UserError as error:
            problems.append(str(error))
            continue
        known |= {name for token in embedding.tokens for name in (token, token.lower())}
        embeddings.append(embedding)
    if problems:
        raise UserError("\n".join(problems))
    return embeddings


def add_embeddings(
    tokenizer: Any, text_encoder: Network[CLIPTextModel], embeddings: Sequence[Embedding]
) -> tuple[Network[CLIPTextModel], dict[int, tuple[int, ...]]]:
    """Return a text encoder that embeds learnt words, and the ids of each by its first one.

    Args:
        tokenizer: The tokenizer, to which the words are added.
        text_encoder: The text encoder.
        embeddings: What `read_embeddings` gives.
    """
    table = np.asarray(text_encoder.params[TABLE])
    words = {}
    for embedding in embeddings:
        tokenizer.add_tokens(embedding.tokens)
        ids = tuple(tokenizer.convert_tokens_to_ids(embedding.tokens))
        words[ids[0]] = ids
        if (more := max(ids) + 1 - len(table)) > 0:
            table = np.concatenate([table, np.zeros((more, table.shape[1]), table.dtype)])
        table = table.copy()
        table[list(ids)] = embedding.vectors.astype(table.dtype)
    if not embeddings:
        return text_encoder, {}
    params = text_encoder.params | {TABLE: jnp.asarray(table)}
    return text_encoder.with_config(vocab_size=len(table)).with_params(params), words


def _read_embedding(path: Path) -> Embedding:
    where = shorten(str(path), 150)
    if path.suffix == ".safetensors":
        tree: Mapping[Any, Any] = read_safetensors(path)[0]
        if set(tree) == {"emb_params"}:
            tree = {path.stem: tree["emb_params"]}
    else:
        tree = read_tree(path)
    if "string_to_param" in tree:
        vectors = tree["string_to_param"]
        word = tree.get("name") or path.stem
        vectors = vectors.get("*") if isinstance(vectors, Mapping) else None
    elif {"clip_l", "clip_g"} & tree.keys():
        raise UserError(f"{where}: an embedding of SDXL, which is not supported")
    elif len(tree) == 1:
        ((word, vectors),) = tree.items()
    else:
        names = ", ".join(shorten(str(name), 60) for name in list(tree)[:3])
        raise UserError(f"{where}: not an embedding of one word: it has {names or 'nothing'}")
    if not isinstance(word, str) or not word.strip() or len(word) > MOST_CHARACTERS:
        raise UserError(f"{where}: {brief(word)} is no word for an embedding")
    if not isinstance(vectors, np.ndarray) or vectors.ndim not in (1, 2) or not vectors.size:
        raise UserError(f"{where}: not an embedding: {brief(word)} has no vectors")
    vectors = np.asarray(vectors if vectors.ndim == 2 else vectors[None])
    if vectors.dtype != jnp.bfloat16 and vectors.dtype.kind != "f":
        raise UserError(f"{where}: {brief(word)} is {vectors.dtype}, no type of weights")
    if len(vectors) > MOST_VECTORS:
        raise UserError(f"{where}: {brief(word)} has {len(vectors)} vectors; a prompt takes 75")
    vectors = vectors.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise UserError(f"{where}: not all values of {brief(word)} are finite")
    return Embedding(word, vectors)
