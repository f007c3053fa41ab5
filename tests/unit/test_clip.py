"""CLIP's encoders against their formulas in NumPy, its files, and the images it is given."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from small_configs import CLIP

from tav_jax.errors import UserError
from tav_jax.models.clip_image import CLIPModel, end_of_text
from tav_jax.models.network import parameter_shapes
from tav_jax.pretrained.clip import Clip, load_clip, save_clip
from tav_jax.pretrained.clip_configs import (
    PREPROCESSOR_DEMANDS,
    read_clip_config,
    read_preprocessor_config,
    write_clip_config,
    write_preprocessor_config,
)
from tav_jax.pretrained.model import load_tokenizer
from tav_jax.pretrained.preprocess import IMAGE_MEAN, IMAGE_STD, Preprocessing, preprocess
from tav_jax.pretrained.weights import tensor_name

TOKENIZER = Path(__file__).parents[1] / "golden/base/tokenizer"
VOCABULARY, END = 2014, 2013  # of that tokenizer

# --- the network


@pytest.fixture(scope="module")
def clip_network(random_network):
    return random_network(CLIPModel, CLIP)


@pytest.fixture(scope="module")
def params(clip_network):
    """Its parameters in float64, for NumPy."""
    return {name: np.asarray(value, np.float64) for name, value in clip_network.params.items()}


ACTIVATIONS = {
    "gelu": np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def encoder(params, prefix, x, config, mask):
    """Returns what the layers give for tokens `s d`, in float64."""

    def get(name):
        return params[f"{prefix}.{name}"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt(x.var(-1, keepdims=True) + config.layer_norm_eps)
        return centred / deviation * get(f"{name}.scale") + get(f"{name}.bias")

    def linear(name, x):
        return x @ get(f"{name}.kernel") + get(f"{name}.bias")

    for i in range(config.num_hidden_layers):
        layer = f"encoder.layers.{i}"
        normed = norm(f"{layer}.layer_norm1", x)
        q, k, v = (
            np.split(linear(f"{layer}.self_attn.{name}", normed), config.num_attention_heads, -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        heads = []
        for query, key, value in zip(q, k, v, strict=True):
            scores = np.where(mask, query @ key.T / math.sqrt(query.shape[-1]), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ value)
        x = x + linear(f"{layer}.self_attn.out_proj", np.concatenate(heads, -1))
        hidden = linear(f"{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", x))
        x = x + linear(f"{layer}.mlp.fc2", ACTIVATIONS[config.hidden_act](hidden))
    return x, norm


def pooled_image(params, config, image):
    """Returns the class token's state for an image `H W 3`."""
    start, size = "vision_model.embeddings", config.patch_size
    kernel = params[f"{start}.patch_embedding.kernel"]
    tokens = [params[f"{start}.class_embedding"]]
    for top in range(0, config.image_size - size + 1, size):
        for left in range(0, config.image_size - size + 1, size):
            patch = image[top : top + size, left : left + size]
            tokens.append(np.tensordot(patch, kernel, 3))
    x = np.stack(tokens) + params[f"{start}.position_embedding.embedding"]
    _, norm = encoder(params, "vision_model", x, replace(config, num_hidden_layers=0), True)
    x, _ = encoder(params, "vision_model", norm("pre_layrnorm", x), config, True)
    return norm("post_layernorm", x[0])


def pooled_text(params, config, ids, end):
    """Returns the state of a text's token at `end`."""
    start = "text_model.embeddings"
    x = params[f"{start}.token_embedding.embedding"][ids]
    x = x + params[f"{start}.position_embedding.embedding"]
    past = np.tril(np.ones((len(ids), len(ids)), bool))
    x, norm = encoder(params, "text_model", x, config, past)
    return norm("final_layer_norm", x)[end]


def test_images_have_the_features_of_the_formula(clip_network, params, jit):
    images = np.random.default_rng(1).standard_normal((2, 11, 11, 3)).astype(np.float32)
    ours = jit(lambda network, x: network.bind().image_features(x))(clip_network, images)
    pooled = np.stack([pooled_image(params, CLIP.vision_config, image) for image in images])
    np.testing.assert_allclose(ours.pooled, pooled, atol=1e-5)
    projected = pooled @ params["visual_projection.kernel"]
    np.testing.assert_allclose(ours.projected, projected, atol=1e-5)


def test_texts_have_the_features_of_the_formula(clip_network, params, jit):
    ids = np.array([[1, 5, 20, 31, 20, 3, 0], [20, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 20]])
    ours = jit(lambda network, x: network.bind().text_features(x))(clip_network, ids)
    pooled = np.stack(
        [
            pooled_text(params, CLIP.text_config, row, end)
            for row, end in zip(ids, (2, 0, 6), strict=True)
        ]
    )
    np.testing.assert_allclose(ours.pooled, pooled, atol=1e-5)
    projected = pooled @ params["text_projection.kernel"]
    np.testing.assert_allclose(ours.projected, projected, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "eos_token_id", "end"),
    [
        pytest.param([48, 3, 5, 49, 49, 49], 49, 3, id="the first one"),
        pytest.param([48, 3, 5, 40, 49, 40], 40, 3, id="not the largest id"),
        pytest.param([48, 3, 5, 49, 0, 0], 2, 3, id="2 means the largest id"),
        pytest.param([48, 2, 5, 49, 49, 2], 2, 3, id="2 means the largest id, though a 2 is there"),
    ],
)
def test_a_text_ends_at(ids, eos_token_id, end):
    assert end_of_text(jnp.array([ids]), eos_token_id).tolist() == [end]


def test_bfloat16_stays_near_float32(clip_network, jit):
    images = np.random.default_rng(1).standard_normal((2, 11, 11, 3)).astype(np.float32)
    features = jit(lambda network, x: network.bind().image_features(x))
    wide = features(clip_network, images).projected
    narrow = features(clip_network.with_compute(dtype="bfloat16"), images).projected
    assert narrow.dtype == jnp.float32
    error = np.linalg.norm(narrow - wide) / np.linalg.norm(wide)
    assert 1e-4 < error < 2e-2, "bfloat16 has 8 bits"


VIT_B_32 = {
    "model_type": "clip",
    "projection_dim": 512,
    "text_config": {"model_type": "clip_text_model", "eos_token_id": 2},
    "vision_config": {"model_type": "clip_vision_model"},
}
VIT_L_14 = {
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
}
VIT_H_14 = {
    "model_type": "clip",
    "projection_dim": 1024,
    "text_config": {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
    },
    "vision_config": {
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "patch_size": 14,
    },
}


@pytest.mark.parametrize(
    ("published", "parameters", "tokens", "eos_token_id"),
    [
        pytest.param(VIT_B_32, 151_277_313, 50, 2, id="ViT-B/32"),
        pytest.param(VIT_L_14, 427_616_513, 257, 49407, id="ViT-L/14"),
        pytest.param(VIT_H_14, 986_109_441, 257, 49407, id="ViT-H/14"),
    ],
)
def test_published_models_have_as_many_parameters(published, parameters, tokens, eos_token_id):
    config = read_clip_config(published)
    shapes = parameter_shapes(CLIPModel, config)
    assert sum(math.prod(leaf.shape) for leaf in shapes.values()) == parameters
    name = "vision_model.embeddings.position_embedding.embedding"
    assert shapes[name].shape == (tokens, config.vision_config.hidden_size)
    assert config.eos_token_id == eos_token_id
    assert config.text_config.hidden_act == config.vision_config.hidden_act
    assert read_clip_config(write_clip_config(config)) == config


def test_names_are_the_checkpoints():
    shapes = parameter_shapes(CLIPModel, CLIP)
    names = {tensor_name(name) for name in shapes if "layers" not in name}
    assert names == {
        "logit_scale",
        "text_model.embeddings.position_embedding.weight",
        "text_model.embeddings.token_embedding.weight",
        "text_model.final_layer_norm.bias",
        "text_model.final_layer_norm.weight",
        "text_projection.weight",
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.position_embedding.weight",
        "vision_model.post_layernorm.bias",
        "vision_model.post_layernorm.weight",
        "vision_model.pre_layrnorm.bias",
        "vision_model.pre_layrnorm.weight",
        "visual_projection.weight",
    }


# --- its folder


@pytest.fixture(scope="module")
def clip(random_network):
    """A model for the tokenizer of the reference cases."""
    text = replace(CLIP.text_config, vocab_size=VOCABULARY)
    network = random_network(CLIPModel, replace(CLIP, text_config=text, eos_token_id=END))
    return Clip(load_tokenizer(TOKENIZER), network, Preprocessing(size=13, crop_size=11))


@pytest.fixture(scope="module")
def saved(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder, clip)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the folder, to be changed."""
    return shutil.copytree(saved, tmp_path / "clip")


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_saved_model_is_loaded_as_it_was(saved, clip):
    loaded = load_clip(saved)
    assert loaded.network.config == clip.network.config
    assert loaded.preprocessing == clip.preprocessing
    assert loaded.network.params.keys() == clip.network.params.keys()
    for name, value in clip.network.params.items():
        np.testing.assert_array_equal(loaded.network.params[name], value)
    assert loaded.tokenizer("a panda").input_ids == clip.tokenizer("a panda").input_ids
    assert loaded.scale == pytest.approx(math.exp(clip.network.params["logit_scale"]))


def test_in_bfloat16_the_scale_stays_float32(saved, clip):
    loaded = load_clip(saved, dtype="bfloat16")
    kinds = {name: str(value.dtype) for name, value in loaded.network.params.items()}
    assert kinds.pop("logit_scale") == "float32"
    assert set(kinds.values()) == {"bfloat16"}
    assert loaded.network.compute.dtype == "bfloat16"
    assert loaded.scale == pytest.approx(math.exp(clip.network.params["logit_scale"]))


def test_buffers_of_positions_in_older_files_are_no_weights(folder):
    def add(tensors):
        tensors["text_model.embeddings.position_ids"] = np.arange(7)[None]
        tensors["vision_model.embeddings.position_ids"] = np.arange(5)[None]

    change_tensors(folder, add)
    load_clip(folder)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        pytest.param(
            lambda tensors: tensors.pop("vision_model.pre_layrnorm.bias"),
            ["missing: vision_model.pre_layrnorm.bias [12]"],
            id="missing",
        ),
        pytest.param(
            lambda tensors: tensors.update({"vision_model.head.weight": np.zeros((2, 3), "f4")}),
            ["left over: vision_model.head.weight [2, 3]"],
            id="left over",
        ),
        pytest.param(
            lambda tensors: tensors.update({"visual_projection.kernel": np.zeros((6, 12), "f4")}),
            ["left over: visual_projection.kernel [6, 12]"],
            id="our name of a weight",
        ),
        pytest.param(
            lambda tensors: tensors.update(
                {
                    "logit_scale": np.zeros(1, "f4"),
                    "vision_model.embeddings.class_embedding": np.zeros((1, 12), "f4"),
                    "vision_model.embeddings.patch_embedding.weight": np.zeros((12, 75), "f4"),
                }
            ),
            [
                "wrong shape: logit_scale [1], expected []",
                "wrong shape: vision_model.embeddings.class_embedding [1, 12], expected [12]",
                "wrong shape: vision_model.embeddings.patch_embedding.weight [12, 75], expected "
                "[12, 3, 5, 5]",
            ],
            id="wrong shapes",
        ),
    ],
)
def test_weights_that_are_not_the_configs_are_refused(folder, change, lines):
    change_tensors(folder, change)
    with pytest.raises(UserError, match="not the network of its config") as error:
        load_clip(folder)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == lines


def test_all_that_is_wrong_in_a_config_is_in_one_message(folder):
    text = {"hidden_size": "512", "num_attention_heads": 0, "eos_token_id": 1.5}
    vision = {"model_type": "siglip_vision_model", "patch_size": 300, "hidden_act": "relu"}
    vision |= {"num_attention_heads": 7}
    path = folder / "config.json"
    change_json(path, projection_dim=True, text_config=text, vision_config=vision)
    with pytest.raises(UserError, match=re.escape(f"{path}: not supported")) as error:
        load_clip(folder)
    assert {line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]} == {
        "projection_dim",
        "text_config.eos_token_id",
        "text_config.hidden_size",
        "text_config.num_attention_heads",
        "vision_config.hidden_act",
        "vision_config.model_type",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip"}, "model_type: 'siglip' is not supported, only 'clip'"),
        ({"model_type": "clip_text_model"}, "model_type: 'clip_text_model' is not supported"),
        ({"text_config": [512]}, r"text_config: \[512\] is no object"),
        ({"vision_config_dict": "null"}, "vision_config_dict: 'null' is no object"),
        (
            {"vision_config": {"patch_size": 225}},
            "vision_config.patch_size: 225 is over image_size",
        ),
        (
            {"vision_config": {"hidden_size": 770}},
            "vision_config.hidden_size: 770 is not divisible by 12 num_attention_heads",
        ),
        ({"vision_config": {"num_channels": 4}}, "vision_config.num_channels: 4 is not supported"),
        ({"vision_config": {"image_size": [224, 224]}}, "vision_config.image_size: .*integer"),
        ({"text_config": {"use_attention_mask": True}}, "text_config.use_attention_mask: True"),
    ],
)
def test_a_model_of_another_kind_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        read_clip_config(VIT_B_32 | changes)


def test_of_two_sections_the_one_for_what_differs_is_read():
    # As in OpenAI's ViT-L/14; what it leaves out has its default, not the other section's value.
    sections = {
        "text_config": {"hidden_size": 512, "num_hidden_layers": 3, "eos_token_id": 2},
        "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
        "vision_config_dict": None,
    }
    config = read_clip_config(VIT_L_14 | sections)
    assert config.text_config.hidden_size == 768
    assert config.text_config.num_hidden_layers == 12
    assert config.eos_token_id == 49407
    assert config.vision_config.hidden_size == 1024


def test_parts_that_do_not_fit_are_all_named(folder):
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_json(folder / "config.json", text_config=text | {"vocab_size": 99, "eos_token_id": 5})
    change_json(folder / "preprocessor_config.json", crop_size=12)
    with pytest.raises(UserError, match="does not fit the encoders") as error:
        load_clip(folder)
    assert "the tokenizer has 2014 tokens, the text encoder embeds 99" in str(error.value)
    assert "ends a text with token 2013, the text encoder's eos_token_id means 5" in str(
        error.value
    )
    assert "images are cut to 12 pixels, the image encoder takes 11" in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_folder_without_a_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name}"):
        load_clip(folder)


def test_a_stable_diffusion_folder_is_no_clip():
    with pytest.raises(
        UserError, match=r"golden/base: not a folder of CLIP, it has no config\.json"
    ):
        load_clip(TOKENIZER.parent)


def test_a_single_file_is_no_folder(folder):
    with pytest.raises(UserError, match=r"clip: .*a text encoder alone in one file") as error:
        load_clip(folder / "model.safetensors")
    assert "StableDiffusionPipeline" not in str(error.value)


def test_tokenizer_and_images_may_be_described_elsewhere(folder, tmp_path, clip):
    # PickScore's folder has no processor.
    elsewhere = tmp_path / "processor"
    elsewhere.mkdir()
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.rename(elsewhere / path.name)
    with pytest.raises(FileNotFoundError, match=r"it has no preprocessor_config\.json"):
        load_clip(folder)
    loaded = load_clip(folder, processor=elsewhere)
    assert loaded.preprocessing == clip.preprocessing


# --- images


@pytest.mark.parametrize(
    "published",
    [
        pytest.param(
            {
                "crop_size": 224,
                "do_center_crop": True,
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": list(IMAGE_MEAN),
                "image_std": list(IMAGE_STD),
                "resample": 3,
                "size": 224,
            },
            id="of 2021",
        ),
        pytest.param(write_preprocessor_config(Preprocessing()), id="of today"),
        pytest.param({}, id="all defaults"),
    ],
)
def test_published_preprocessing_is_read(published):
    assert read_preprocessor_config(published) == Preprocessing()


@pytest.mark.parametrize("name", PREPROCESSOR_DEMANDS)
def test_a_demanded_attribute_of_the_preprocessing_is_refused_by_name(name):
    with pytest.raises(UserError, match=rf"\n  {name}: 'other' is not supported, only "):
        read_preprocessor_config({name: "other"})


@pytest.mark.parametrize(
    ("published", "message"),
    [
        ({"size": {"height": 224, "width": 224}}, "size: .*only one shortest_edge"),
        ({"size": {"shortest_edge": "224"}}, "size: .*integer"),
        ({"crop_size": {"height": 224, "width": 200}}, "crop_size: .*only one height and width"),
        ({"crop_size": {}}, "crop_size: .*only one height and width"),
        ({"crop_size": 300}, "crop_size: 300 is over size, the shortest edge: 224"),
        ({"image_mean": [0.5, 0.5]}, "image_mean: .*3 items"),
        ({"image_std": [0.5, 0, 0.5]}, r"image_std\.1: .*greater than 0"),
        ({"rescale_factor": True}, "rescale_factor: .*number"),
        ({"use_square_size": True}, "use_square_size: not known to us"),
    ],
)
def test_preprocessing_of_another_kind_is_refused(published, message):
    with pytest.raises(UserError, match=message):
        read_preprocessor_config(published)


def test_an_image_of_the_crops_height_is_cut_in_the_middle_and_normalised():
    columns = np.broadcast_to(np.arange(9, dtype=np.uint8).reshape(1, 1, 9, 1), (1, 4, 9, 3))
    preprocessing = Preprocessing(
        size=4, crop_size=4, image_mean=(0.0, 0.5, 0.1), image_std=(1.0, 0.5, 0.25)
    )
    prepared = preprocess(columns, preprocessing)
    assert prepared.dtype == np.float32
    expected = np.array([2, 3, 4, 5]) / 255  # of 9 columns, 2 are cut off before and 3 after
    for channel, (mean, std) in enumerate([(0, 1), (0.5, 0.5), (0.1, 0.25)]):
        for row in prepared[0, :, :, channel]:
            np.testing.assert_allclose(row, (expected - mean) / std, atol=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "resized"),
    [
        pytest.param(60, 45, (20, 15), id="portrait"),
        pytest.param(45, 61, (15, 20), id="landscape, rounded down"),
        pytest.param(7, 9, (15, 19), id="enlarged"),
        pytest.param(30, 30, (15, 15), id="square"),
    ],
)
def test_the_shorter_edge_gets_the_size(height, width, resized):
    frames = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
    plain = Preprocessing(size=15, crop_size=15, image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    by_pillow = Image.fromarray(frames[0]).resize(resized[::-1], Image.Resampling.BICUBIC)
    top, left = (resized[0] - 15) // 2, (resized[1] - 15) // 2
    expected = np.asarray(by_pillow)[top : top + 15, left : left + 15] / 255
    np.testing.assert_allclose(preprocess(frames, plain)[0], expected, atol=1e-6)


def test_a_plain_colour_stays_itself():
    frames = np.full((2, 9, 20, 3), (10, 128, 250), np.uint8)
    plain = Preprocessing(size=5, crop_size=5, image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    expected = np.broadcast_to(np.array([10, 128, 250]) / 255, (2, 5, 5, 3))
    np.testing.assert_allclose(preprocess(frames, plain), expected, atol=1e-6)
