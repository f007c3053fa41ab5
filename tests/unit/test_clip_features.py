"""Features of frames and prompts in batches, on one device and on eight."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_configs import CLIP

from tav_jax.evaluation import clip_features
from tav_jax.evaluation.clip_features import image_features, text_features
from tav_jax.models.clip_image import CLIPModel
from tav_jax.parallel import sharding
from tav_jax.parallel.sharding import batch_sharding, make_mesh, on_mesh, shard
from tav_jax.pretrained.clip import Clip
from tav_jax.pretrained.model import load_tokenizer, pad_tokens
from tav_jax.pretrained.preprocess import Preprocessing, preprocess

TOKENIZER = Path(__file__).parents[1] / "golden/base/tokenizer"
VOCABULARY, END = 2014, 2013  # of that tokenizer
ROUNDING = 1e-5  # programs for other shapes and shards sum in another order

FRAMES = np.random.default_rng(0).integers(0, 256, (7, 19, 26, 3), np.uint8)
PROMPTS = ["a panda", "a man", ""]


@pytest.fixture(scope="module")
def clip(random_network):
    text = replace(CLIP.text_config, vocab_size=VOCABULARY)
    network = random_network(CLIPModel, replace(CLIP, text_config=text, eos_token_id=END))
    return Clip(load_tokenizer(TOKENIZER), network, Preprocessing(size=13, crop_size=11))


def assert_same(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        assert isinstance(one, np.ndarray)
        np.testing.assert_allclose(one, other, atol=ROUNDING)


def test_frames_have_the_features_that_the_network_gives_them_one_by_one(clip, jit):
    run = jit(lambda network, x: network.bind().image_features(x))
    pixels = preprocess(FRAMES, clip.preprocessing)
    alone = [run(clip.network, frame[None]) for frame in pixels]
    expected = [np.concatenate(part) for part in zip(*alone, strict=True)]
    assert expected[0].shape == (7, 6)
    assert expected[1].shape == (7, 12)
    assert_same(image_features(clip, FRAMES, batch_size=3), expected)


def test_prompts_have_the_features_that_the_network_gives_them(clip, jit):
    run = jit(lambda network, x: network.bind().text_features(x))
    expected = run(clip.network, pad_tokens(clip.tokenizer, PROMPTS, 7))
    assert_same(text_features(clip, PROMPTS, batch_size=2), expected)


def test_one_program_serves_any_number_of_frames_and_of_prompts(clip):
    image_features(clip, FRAMES, batch_size=4)
    text_features(clip, PROMPTS, batch_size=4)
    compiled = [clip_features._image_features, clip_features._text_features]
    before = [function._cache_size() for function in compiled]
    for n in (1, 4, 5, 7):
        assert len(image_features(clip, FRAMES[:n, :-2], batch_size=4).pooled) == n
    for n in (1, 2, 3):
        assert len(text_features(clip, PROMPTS[:n], batch_size=4).pooled) == n
    assert [function._cache_size() for function in compiled] == before


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=["data", "all axes"])
def test_each_device_of_a_mesh_takes_its_part_of_a_batch(clip, sizes, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 1)  # so that even these parameters are
    expected_images = image_features(clip, FRAMES)
    expected_texts = text_features(clip, PROMPTS)
    mesh = make_mesh(dict(zip(("data", "frames", "fsdp"), sizes, strict=True)), frames=8)
    with on_mesh(mesh):
        batch = shard(np.zeros((8, 11, 11, 3), np.float32), batch_sharding)
        assert {piece.data.shape for piece in batch.addressable_shards} == {(1, 11, 11, 3)}
        sharded = replace(clip, network=shard(clip.network))
        kernel = sharded.network.params["visual_projection.kernel"]
        assert kernel.addressable_shards[0].data.shape == (12, 6 // sizes[2])
        images = clip_features._image_features(sharded.network, batch)
        assert len(images.projected.sharding.device_set) == 8
        assert_same(image_features(sharded, FRAMES), expected_images)
        assert_same(text_features(sharded, PROMPTS), expected_texts)
        # Five frames do not divide over eight devices: all compute all of them.
        assert_same(image_features(sharded, FRAMES, batch_size=5), expected_images)


def test_frames_that_fill_no_batch_leave_no_trace(clip):
    alone = image_features(clip, FRAMES[:1])
    first, _ = image_features(clip, FRAMES)
    np.testing.assert_array_equal(alone.projected[0], first[0])


@pytest.mark.parametrize(
    ("run", "batch"),
    [
        (clip_features._image_features, np.zeros((2, 11, 11, 3), np.float32)),
        (clip_features._text_features, np.zeros((2, 7), np.int32)),
    ],
    ids=["images", "texts"],
)
def test_no_product_is_rounded_on_gpus_and_tpus(clip, run, batch):
    program = run.lower(clip.network, batch).as_text()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 10
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
