"""CLIP with the same random weights, and its images, in transformers and here."""

import copy
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPProcessor, CLIPTokenizer

from tav_jax.evaluation.clip_features import image_features, text_features
from tav_jax.models.clip_image import CLIPModel
from tav_jax.pretrained.clip import load_clip, save_clip
from tav_jax.pretrained.clip_configs import read_clip_config, read_preprocessor_config
from tav_jax.pretrained.model import load_network
from tav_jax.pretrained.preprocess import preprocess

TOKENIZER = Path(__file__).parents[1] / "golden/base/tokenizer"
VOCABULARY, END = 2014, 2013  # of that tokenizer

# Relative, of norms. Both sides compute in float32, so that only the order of sums differs.
FORWARD = 1e-5
# Products, norms and sums are rounded to 8 bits (measured: below 0.7 %).
BFLOAT16 = 2e-2

OPENAI = {
    "text_config": {
        "vocab_size": VOCABULARY,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 11,
        "hidden_act": "quick_gelu",
        "eos_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "image_size": 30,  # three patches of 8, and 6 pixels that no patch has
        "patch_size": 8,
        "hidden_act": "quick_gelu",
    },
    "projection_dim": 9,
}
LAION = {
    "text_config": OPENAI["text_config"]
    | {"hidden_act": "gelu", "eos_token_id": 40, "layer_norm_eps": 1e-3, "num_hidden_layers": 1},
    "vision_config": OPENAI["vision_config"]
    | {"hidden_act": "gelu", "image_size": 42, "patch_size": 14, "num_attention_heads": 2},
    "projection_dim": 10,
}
BOTH = pytest.mark.parametrize("sizes", [OPENAI, LAION], ids=["as OpenAI's", "as LAION's"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def their_model(sizes):
    """Returns a CLIPModel in which every parameter matters, none at its start of one or zero."""
    network = transformers.CLIPModel(transformers.CLIPConfig(**sizes))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                around = 1.0 if name.endswith("norm.weight") else 0.0
                parameter.copy_(around + 0.3 * torch.randn_like(parameter))
            elif parameter.ndim:
                # Otherwise attention would be uniform: transformers begins with small weights.
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
        network.logit_scale.fill_(1.7)
    return network.eval().requires_grad_(False)


def our_model(folder, dtype="float32"):
    published = json.loads((folder / "config.json").read_text())
    return load_network(CLIPModel, read_clip_config(published), folder, "model", None, dtype)


@BOTH
def test_features_and_scores_are_those_of_transformers(tmp_path, sizes, jit):
    theirs = their_model(sizes)
    theirs.save_pretrained(tmp_path)
    ours = our_model(tmp_path)
    side = sizes["vision_config"]["image_size"]
    pixels = torch.randn(3, side, side, 3)
    # The end of the second text comes twice, and of the third one never.
    ids = torch.randint(50, VOCABULARY, (3, 11))
    ids[0, 7] = ids[1, 4] = ids[1, 6] = 40

    images = jit(lambda network, x: network.bind().image_features(x))(ours, pixels.numpy())
    texts = jit(lambda network, x: network.bind().text_features(x))(ours, ids.numpy())
    pixels = pixels.permute(0, 3, 1, 2)
    assert relative_error(images.pooled, theirs.vision_model(pixels).pooler_output) < FORWARD
    assert relative_error(texts.pooled, theirs.text_model(ids).pooler_output) < FORWARD
    both = theirs(input_ids=ids, pixel_values=pixels)
    units = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images[0], texts[0])]
    assert relative_error(units[0], both.image_embeds) < FORWARD
    assert relative_error(units[1], both.text_embeds) < FORWARD
    scores = jnp.exp(ours.params["logit_scale"]) * units[0] @ units[1].T
    assert relative_error(scores, both.logits_per_image) < FORWARD


# --- folders


def processor(side):
    """Returns transformers' tokenizer and images, which are `side` pixels wide."""
    images = CLIPImageProcessorPil(size=side, crop_size=side)
    return CLIPProcessor(images, CLIPTokenizer.from_pretrained(TOKENIZER))


def save(folder, network):
    """Writes a folder with all that OpenAI's has."""
    network.save_pretrained(folder)
    both = processor(network.config.vision_config.image_size)
    both.image_processor.save_pretrained(folder)
    both.tokenizer.save_pretrained(folder)
    return both


FRAMES = np.random.default_rng(0).integers(0, 256, (5, 53, 71, 3), np.uint8)
PROMPTS = ["a panda", "a man is skiing on the moon, comic style, at night, in the rain", ""]


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:prompt of")  # one is longer than 11 tokens
def test_a_folders_features_are_those_of_transformers(tmp_path, sizes, dtype):
    sizes = sizes | {"text_config": sizes["text_config"] | {"eos_token_id": END}}
    theirs = their_model(sizes)
    both = save(tmp_path, theirs)
    images = both(images=list(FRAMES), return_tensors="pt")
    texts = both(text=PROMPTS, padding=True, truncation=True, max_length=11, return_tensors="pt")

    clip = load_clip(tmp_path, dtype=dtype)
    bound = FORWARD if dtype == "float32" else BFLOAT16
    ours = image_features(clip, FRAMES, batch_size=3)
    assert relative_error(ours.projected, theirs.get_image_features(**images).pooler_output) < bound
    ours = text_features(clip, PROMPTS, batch_size=3)
    assert relative_error(ours.projected, theirs.get_text_features(**texts).pooler_output) < bound
    assert clip.scale == pytest.approx(np.exp(1.7), rel=1e-6), "float32 in any case"


def test_transformers_opens_what_we_save(tmp_path):
    theirs = their_model(OPENAI)
    both = save(tmp_path / "theirs", theirs)
    save_clip(tmp_path / "ours", load_clip(tmp_path / "theirs"))
    again, info = transformers.CLIPModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    opened = CLIPImageProcessorPil.from_pretrained(tmp_path / "ours")
    assert opened.to_dict() == both.image_processor.to_dict()


def test_buffers_of_positions_in_older_files_are_no_weights(tmp_path):
    their_model(OPENAI).save_pretrained(tmp_path)
    names = our_model(tmp_path).params.keys()
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for tower, positions in (("text", 11), ("vision", 10)):
        tensors[f"{tower}_model.embeddings.position_ids"] = torch.arange(positions)[None]
    save_file(tensors, path, metadata={"format": "pt"})
    assert our_model(tmp_path).params.keys() == names


@pytest.mark.parametrize(
    "published",
    [
        pytest.param(OPENAI | {"text_config_dict": None, "vision_config_dict": None}, id="null"),
        pytest.param({}, id="all defaults"),
        pytest.param(
            # As ViT-L/14's file has it. What a `_dict` leaves out is the default, not the other's.
            OPENAI
            | {
                "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
                "vision_config_dict": {"hidden_size": 1024, "num_attention_heads": 16},
            },
            id="two of each",
        ),
    ],
)
def test_a_config_is_read_as_transformers_does(published):
    # transformers writes into the sections that it is given, which other tests read.
    theirs = transformers.CLIPConfig.from_dict(copy.deepcopy(published))
    ours = read_clip_config({"model_type": "clip"} | published)
    assert ours.projection_dim == theirs.projection_dim
    assert ours.eos_token_id == theirs.text_config.eos_token_id
    for name in ("text_config", "vision_config"):
        for key, value in vars(getattr(ours, name)).items():
            assert value == getattr(getattr(theirs, name), key), f"{name}.{key}"


# --- images

# Height, width.
ODD_SIZES = [
    (480, 854), (854, 480), (224, 224), (224, 301), (225, 224), (223, 224), (97, 131), (131, 97),
    (50, 50), (1, 3), (240, 427), (427, 241), (333, 1000), (719, 1281), (256, 256), (480, 480),
    (226, 339), (37, 224), (600, 601), (449, 448),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_are_prepared_as_transformers_does(tmp_path, mode):
    theirs = CLIPImageProcessorPil()
    theirs.save_pretrained(tmp_path)
    ours = read_preprocessor_config(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    draw = np.random.default_rng(0)
    for height, width in ODD_SIZES:
        # Small noise, enlarged, so that there are edges and ramps, and whites and blacks.
        small = draw.normal(128, 90, (height // 7 + 1, width // 5 + 1, 3)).clip(0, 255)
        image = Image.fromarray(small.astype(np.uint8)).resize((width, height)).convert(mode)
        expected = theirs(image, return_tensors="np").pixel_values[0]
        frames = np.asarray(image.convert("RGB"))[None]
        (prepared,) = preprocess(frames, ours)
        np.testing.assert_allclose(prepared.transpose(2, 0, 1), expected, atol=1e-6, rtol=0)


def test_another_size_of_the_crop_and_other_means_are_prepared_as_transformers_does(tmp_path):
    published = {
        "crop_size": 17,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.5, 0.25, 0.1],
        "image_std": [0.5, 0.2, 1.0],
        "resample": 3,
        "rescale_factor": 0.005,
        "size": 24,
    }
    theirs = CLIPImageProcessorPil(**published)
    ours = read_preprocessor_config(published)
    expected = theirs(list(FRAMES), return_tensors="np").pixel_values
    prepared = preprocess(FRAMES, ours).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(prepared, expected, atol=1e-6, rtol=0)
