"""Weighted and long prompts: how they are read, cut into chunks, and encoded."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tav_jax.errors import UserError
from tav_jax.pipeline import encode_prompts
from tav_jax.pretrained.model import load_model
from tav_jax.pretrained.prompts import count_chunks, parse_weights, prompt_tokens
from tav_jax.runs.render import split_by_chunks
from tav_jax.runs.samples import Sample
from tav_jax.runs.sampling_settings import SamplingSettings

BASE = Path(__file__).parents[1] / "golden/base"
LONG = "a is " * 52 + "a"  # 105 tokens


@pytest.fixture(scope="module")
def model():
    return load_model(BASE)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("a (cat) sits", [("a ", 1), ("cat", 1.1), (" sits", 1)]),
        ("a (cat:1.3)", [("a ", 1), ("cat", 1.3)]),
        ("(cat: 1.3 )", [("cat", 1.3)]),
        ("(cat:-.5)", [("cat", -0.5)]),
        ("a [cat]", [("a ", 1), ("cat", 1 / 1.1)]),
        ("((cat))", [("cat", 1.21)]),
        ("([cat])", [("cat", 1)]),
        ("((a:1.3) b)", [("a", 1.43), (" b", 1.1)]),
        # Brackets of two kinds may overlap.
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a [b (c", [("a ", 1), ("b ", 1 / 1.1), ("c", 1)]),
        ("a) b] c", [("a) b] c", 1)]),
        ("a :1.3) b", [("a :1.3) b", 1)]),
        (r"\(literal\] \\ \x", [(r"(literal] \ \x", 1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("[a:1.3]", [("a:1.3", 1 / 1.1)]),
        ("(a:1)(b)", [("a", 1), ("b", 1.1)]),
        ("(a)(b)", [("ab", 1.1)]),
        ("", []),
        ("()", []),
        ("(" * 3, []),
    ],
)
def test_weights_are_read_as_by_the_web_ui(prompt, expected):
    parts = parse_weights(prompt)
    assert [text for text, _ in parts] == [text for text, _ in expected]
    assert [weight for _, weight in parts] == pytest.approx([weight for _, weight in expected])


def test_its_documented_example():
    prompt = "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky)))."
    parts = [(text, round(weight, 3)) for text, weight in parse_weights(prompt)]
    assert parts == [
        *(("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55)),
        *((", sun, ", 1.1), ("sky", 1.464), (".", 1.1)),
    ]


@pytest.mark.parametrize("text", ["(" * 10_000, "(a" * 5_000, "(a)b" * 2_500, ":1" * 5_000])
def test_long_strange_prompts_are_read_at_once(text):
    assert "".join(part for part, _ in parse_weights(text)) == re.sub(r"[()]", "", text)
    parse_weights(":" + " " * 9_000)
    parse_weights("(" + ":" + "1" * 9_000)


def test_a_prompt_without_weights_is_encoded_as_a_plain_one_to_the_bit(model):
    prompts = ["a cat is moving", "", "(a square:1.0) is moving", "a ball, a hill: (red:1)"]
    plain = ["a cat is moving", "", "a square is moving", "a ball, a hill: red"]
    ours = encode_prompts(model, prompts, syntax="weighted")
    np.testing.assert_array_equal(ours, encode_prompts(model, plain))
    assert ours.shape[1] == 77


def test_brackets_are_text_in_a_plain_prompt(model):
    plain = encode_prompts(model, ["a (cat:1.3)"])
    assert (plain != encode_prompts(model, ["a cat"])).any()
    (ids,) = prompt_tokens(model, ["a (cat:1.3)"]).ids
    assert "(" in model.tokenizer.decode(ids[0])


def test_long_prompts_are_cut_into_chunks_with_beginning_and_end(model):
    words = model.tokenizer(LONG, add_special_tokens=False).input_ids
    assert len(words) == 105
    ids, weights = prompt_tokens(model, [LONG, "a cat", ""], "weighted")
    begin, end = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    assert ids.shape == weights.shape == (3, 2, 77)
    assert [*ids[0, 0]] == [begin, *words[:75], end]
    assert [*ids[0, 1, :32]] == [begin, *words[75:], end]
    assert (ids[:, :, 0] == begin).all()
    assert (ids[1:, 1, 1:] == end).all(), "empty chunks"
    states = encode_prompts(model, [LONG, "a cat"], syntax="weighted")
    assert states.shape[:2] == (2, 154)
    parts = [model.tokenizer.decode(part) for part in (words[:75], words[75:])]
    for index, part in enumerate(parts):
        (alone,) = encode_prompts(model, [part])
        chunk = states[0, 77 * index : 77 * (index + 1)]
        np.testing.assert_allclose(chunk, alone, atol=1e-6)
    with pytest.warns(UserWarning, match="prompt of 107 tokens, 77 are read"):
        encode_prompts(model, [LONG])


def test_chunks_are_counted_and_filled_up(model):
    full = "a " * 75
    assert count_chunks(model, [full], "weighted") == 1
    assert count_chunks(model, ["a", full + "cat"], "weighted") == 2
    assert count_chunks(model, [LONG], "plain") == 1
    filled = encode_prompts(model, ["a cat"], syntax="weighted", chunks=2)
    np.testing.assert_allclose(filled[:, :77], encode_prompts(model, ["a cat"]), atol=1e-6)
    np.testing.assert_allclose(filled[:, 77:], encode_prompts(model, [""]), atol=1e-6)


def test_prompts_of_other_lengths_are_not_sampled_together(model):
    settings = SamplingSettings(prompt_syntax="weighted", negative_prompt="dark")
    samples = [Sample(prompt, 1, 0, settings) for prompt in ("a", LONG, "b", 2 * LONG)]
    split = split_by_chunks(model, samples)
    assert split == [[samples[0], samples[2]], [samples[1]], [samples[3]]]
    dark = [replace(s, settings=replace(settings, negative_prompt=LONG)) for s in samples]
    assert split_by_chunks(model, dark) == [dark[:3], dark[3:]]
    plain = [replace(s, settings=SamplingSettings()) for s in samples]
    assert split_by_chunks(model, plain) == [plain]


def test_states_are_multiplied_and_their_mean_is_restored(model):
    (plain,) = np.asarray(encode_prompts(model, ["a is is a"]))
    (ours,) = np.asarray(encode_prompts(model, ["a (is:1.5) [is] a"], syntax="weighted"))
    weights = np.ones((77, 1))
    weights[2], weights[3] = 1.5, 1 / 1.1
    expected = plain * weights
    expected *= plain.mean() / expected.mean()
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_prompts_states_do_not_depend_on_the_others(model):
    alone = encode_prompts(model, ["a cat", "a dog"], syntax="weighted")
    both = encode_prompts(model, ["a cat", "a (dog:1.4)"], syntax="weighted")
    np.testing.assert_array_equal(alone[0], both[0])
    assert (alone[1] != both[1]).any()


@pytest.mark.parametrize(
    "prompt", ["(cat:101)", "(cat:-101)", "(" * 9_000 + "cat", f"(a:9{'9' * 400})"]
)
def test_weights_beyond_measure_are_refused(prompt, model):
    with pytest.raises(UserError, match=r"^prompt '.* has a weight of .*; at most 100 is support"):
        prompt_tokens(model, [prompt], "weighted")


def test_weights_that_cancel_each_other_out_are_refused(model):
    # A mean of exactly 0 needs a network whose states are 0.
    params = model.text_encoder.params
    norm = {name: 0 * value for name, value in params.items() if "final_layer_norm" in name}
    encoder = model.text_encoder.with_params(params | norm)
    with pytest.raises(UserError, match="cancel each other out"):
        encode_prompts(replace(model, text_encoder=encoder), ["(a)"], syntax="weighted")
    assert np.isfinite(encode_prompts(model, ["(a:0) [b]"], syntax="weighted")).all()
