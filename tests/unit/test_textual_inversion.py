"""Learnt words: the forms of their files, their tokens in prompts, and what is refused."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tav_jax.errors import UserError
from tav_jax.pipeline import encode_prompts
from tav_jax.pretrained.model import load_model, load_text_encoder, load_tokenizer, tokenize
from tav_jax.pretrained.prompts import prompt_tokens
from tav_jax.pretrained.textual_inversion import TABLE, read_embeddings

BASE = Path(__file__).parents[1] / "golden/base"
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE / "tokenizer")


@pytest.fixture(scope="module")
def width():
    return load_text_encoder(BASE / "text_encoder").config.hidden_size


def vectors(count, width):
    return RNG.normal(size=(count, width)).astype(np.float32)


def write(path, word, values):
    save_file({word: values}, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory, width):
    """A model with a word of three vectors and one of a single one, and both words' vectors."""
    folder = tmp_path_factory.mktemp("words")
    three, one = vectors(3, width), vectors(1, width)[0]
    files = [
        write(folder / "a.safetensors", "<cat>", three),
        write(folder / "b.safetensors", "easynegative", one),
    ]
    return load_model(BASE, embeddings=files), three, one


def test_a_word_stands_for_all_of_its_tokens(model, tokenizer):
    loaded, three, one = model
    first = len(tokenizer)
    ids = tokenize(loaded, ["a <cat> is EasyNegative", "a cat"])
    assert ids.shape == (2, 77)
    a, is_ = tokenizer("a is", add_special_tokens=False).input_ids
    assert [*ids[0, 1:8]] == [a, first, first + 1, first + 2, is_, first + 3, 2013]
    np.testing.assert_array_equal(ids[1], tokenize(load_model(BASE), ["a cat"])[0])
    table = np.asarray(loaded.text_encoder.params[TABLE])
    np.testing.assert_array_equal(table[first:], [*three, one])
    assert loaded.text_encoder.config.vocab_size == len(table) == first + 4


def test_what_a_word_takes_counts_when_a_prompt_is_cut(model):
    loaded, *_ = model
    prompt = "a " * 73 + "<cat>"
    with pytest.warns(UserWarning, match="prompt of 78 tokens, 77 are read; cut off: '<cat>_2'"):
        (ids,) = tokenize(loaded, [prompt])
    assert ids[-1] == loaded.tokenizer.eos_token_id
    weighted = prompt_tokens(loaded, [prompt, "(<cat>:1.2)"], "weighted")
    assert weighted.ids.shape == (2, 2, 77)
    np.testing.assert_allclose(weighted.weights[1, 0, 1:4], 1.2)
    assert encode_prompts(loaded, [prompt], syntax="weighted").shape[1] == 154


def test_forms_of_files_are_read(tokenizer, width, tmp_path):
    torch = pytest.importorskip("torch")
    value = torch.tensor(vectors(2, width))
    web_ui = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": value.clone().requires_grad_()},
        "name": "my-style",
        "step": 4999,
        "sd_checkpoint": "4bdfc29c",
        "sd_checkpoint_name": None,
    }
    torch.save(web_ui, tmp_path / "web.pt")
    torch.save(web_ui | {"name": None}, tmp_path / "named-by-file.pt")
    torch.save({"<word>": value[0].bfloat16()}, tmp_path / "learned_embeds.bin")
    write(tmp_path / "by-file.safetensors", "emb_params", value.numpy())
    files = ["web.pt", "named-by-file.pt", "learned_embeds.bin", "by-file.safetensors"]
    read = read_embeddings([tmp_path / name for name in files], tokenizer, width)
    assert [one.word for one in read] == ["my-style", "named-by-file", "<word>", "by-file"]
    assert read[0].tokens == ["my-style", "my-style_1"]
    for index in (0, 1, 3):
        np.testing.assert_array_equal(read[index].vectors, value.numpy())
    np.testing.assert_allclose(read[2].vectors, value[:1].numpy(), rtol=1e-2)


def write_pickled(path, tree):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(tree, 2))


class Runs:
    def __reduce__(self):
        return os.system, ("touch harm",)


def test_other_files_are_refused_in_one_line_each(tokenizer, width, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = vectors(2, width)
    save_file({"a": good, "b": good}, "two.safetensors")
    save_file({"clip_l": good, "clip_g": good}, "sdxl.safetensors")
    save_file({}, "none.safetensors")
    for name, word, values in [
        ("known", "cat", good),
        ("word", "style", good),
        ("case", "Cat", good),
        ("wide", "<x>", vectors(1, width + 1)),
        ("nan", "<x>", good * np.nan),
        ("blank", " ", good),
        ("cube", "<x>", good[None]),
        ("many", "<x>", vectors(76, width)),
        ("long", "x" * 201, good),
    ]:
        write(f"{name}.safetensors", word, values)
    Path("cut.safetensors").write_bytes(Path("two.safetensors").read_bytes()[:60])
    write_pickled("harm.pt", {"string_to_param": {"*": Runs()}, "name": "x"})
    write_pickled("number.pt", {"string_to_param": {"*": 3}, "name": "x"})
    write_pickled("shape.pt", {"string_to_param": [1], "name": "x"})
    write_pickled("keys.pt", {3: 4})
    expected = {
        "two.safetensors": "not an embedding of one word: it has a, b",
        "sdxl.safetensors": "an embedding of SDXL, which is not supported",
        "none.safetensors": "not an embedding of one word: it has nothing",
        "known.safetensors": "the tokenizer has a word 'cat' already",
        "word.safetensors": "the tokenizer has a word 'style' already",
        "case.safetensors": "the tokenizer has a word 'Cat' already",
        "wide.safetensors": f"its embeddings are {width + 1} wide, those of the text encoder",
        "nan.safetensors": "not all values of '<x>' are finite",
        "blank.safetensors": "' ' is no word",
        "cube.safetensors": "'<x>' has no vectors",
        "many.safetensors": "'<x>' has 76 vectors; a prompt takes 75",
        "long.safetensors": "is no word",
        "cut.safetensors": "damaged or cut off",
        "harm.pt": "system, which no weights need",
        "number.pt": "'x' has no vectors",
        "shape.pt": "'x' has no vectors",
        "keys.pt": "3 is no word",
        "missing.pt": "No such file",
    }
    with pytest.raises(UserError) as error:
        read_embeddings(list(expected), tokenizer, width)
    lines = str(error.value).splitlines()
    assert len(lines) == len(expected)
    for line, (name, message) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"{name}: ")
        assert message in line
    assert not Path("harm").exists()


def test_one_word_is_learnt_once(tokenizer, width, tmp_path):
    one = write(tmp_path / "1.safetensors", "<x>", vectors(2, width))
    for word in ("<x>", "<X>", "<x>_1"):
        two = write(tmp_path / "2.safetensors", word, vectors(1, width))
        with pytest.raises(UserError, match=r"2\.safetensors: the tokenizer has a word"):
            read_embeddings([one, two], tokenizer, width)
