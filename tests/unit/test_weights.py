import json
import re
import resource
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tav_jax.errors import UserError
from tav_jax.models.clip import CLIPTextModel
from tav_jax.models.network import in_modules, parameter_shapes
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.models.vae import AutoencoderKL
from tav_jax.pretrained.configs import read_text_config, read_unet_config, read_vae_config
from tav_jax.pretrained.sd_v1_4 import CONFIGS
from tav_jax.pretrained.weights import (
    TEMPORAL,
    choose_weights,
    inflate,
    merge,
    parameter_name,
    read_tensors,
    save_tensors,
    shard_names,
    tensor_name,
    to_parameter,
    to_tensor,
)

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden"
STEM = "diffusion_pytorch_model"

NETWORKS = {
    "unet": (UNet3DConditionModel, read_unet_config),
    "vae": (AutoencoderKL, read_vae_config),
    "text_encoder": (CLIPTextModel, read_text_config),
}


def shape(*axes):
    return jax.ShapeDtypeStruct(axes, jnp.float32)


def numbered(*axes):
    return np.arange(np.prod(axes), dtype=np.float32).reshape(axes)


# --- rename


@pytest.mark.parametrize(
    ("published", "rank", "ours"),
    [
        pytest.param("conv_in.weight", 4, "conv_in.kernel", id="convolution"),
        pytest.param("conv_in.bias", 1, "conv_in.bias", id="bias"),
        pytest.param("conv_norm_out.weight", 1, "conv_norm_out.scale", id="group norm"),
        pytest.param("attn1.to_out.0.weight", 2, "attn1.to_out.0.kernel", id="linear in a list"),
        pytest.param(
            "text_model.embeddings.token_embedding.weight",
            2,
            "text_model.embeddings.token_embedding.embedding",
            id="token embedding",
        ),
        pytest.param(
            "text_model.embeddings.position_embedding.weight",
            2,
            "text_model.embeddings.position_embedding.embedding",
            id="position embedding",
        ),
        pytest.param("time_embedding.linear_1.weight", 2, "time_embedding.linear_1.kernel", id="t"),
        pytest.param("a.class_embedding", 1, "a.class_embedding", id="a vector of no layer"),
        pytest.param("logit_scale", 0, "logit_scale", id="a scalar of no module"),
    ],
)
def test_a_published_name_and_ours_are_each_others_translation(published, rank, ours):
    assert parameter_name(published, rank) == ours
    assert tensor_name(ours) == published


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("query.weight", "to_q.kernel"),
        ("key.bias", "to_k.bias"),
        ("value.weight", "to_v.kernel"),
        ("proj_attn.weight", "to_out.0.kernel"),
        ("proj_attn.bias", "to_out.0.bias"),
    ],
)
def test_names_from_before_diffusers_0_17_mean_the_new_ones(old, new):
    path = "decoder.mid_block.attentions.0"
    rank = 2 if old.endswith("weight") else 1
    assert parameter_name(f"{path}.{old}", rank) == f"{path}.{new}"


# --- re-lay out


def test_a_convolution_moves_from_out_in_kh_kw_to_kh_kw_in_out():
    tensor = numbered(5, 4, 3, 2)
    _, kernel = to_parameter("conv.weight", tensor)
    assert kernel.shape == (3, 2, 4, 5)
    assert all(
        kernel[kh, kw, i, o] == tensor[o, i, kh, kw] for o, i, kh, kw in np.ndindex(tensor.shape)
    )


def test_a_linear_layer_moves_from_out_in_to_in_out():
    np.testing.assert_array_equal(
        to_parameter("proj.weight", np.float32([[1, 2, 3], [4, 5, 6]]))[1],
        [[1, 4], [2, 5], [3, 6]],
    )


@pytest.mark.parametrize(
    "name",
    ["token_embedding.weight", "position_embedding.weight", "norm.weight", "norm.bias"],
)
def test_embeddings_and_vectors_stay_as_they_are(name):
    tensor = numbered(3, 2) if "embedding" in name else numbered(6)
    np.testing.assert_array_equal(to_parameter(name, tensor)[1], tensor)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        pytest.param("norm.weight", (6,), id="rank 1"),
        pytest.param("norm.bias", (6,), id="bias"),
        pytest.param("proj.weight", (3, 2), id="rank 2"),
        pytest.param("token_embedding.weight", (3, 2), id="embedding"),
        pytest.param("conv.weight", (5, 4, 3, 2), id="rank 4"),
        pytest.param("conv.weight", (5, 4, 1, 1), id="pointwise"),
    ],
)
def test_a_tensor_comes_back_from_the_round_trip_as_it_was(name, axes):
    tensor = numbered(*axes)
    back_name, back = to_tensor(*to_parameter(name, tensor))
    assert back_name == name
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, tensor)


# --- v1-4


@pytest.mark.parametrize("part", NETWORKS)
def test_every_tensor_of_v1_4_is_exactly_one_parameter(part):
    published = json.loads((TESTS / "sd-v1-4-tensors.json").read_text())[part]
    module_class, read_config = NETWORKS[part]
    shapes = {
        name: leaf.shape
        for name, leaf in parameter_shapes(module_class, read_config(CONFIGS[part])).items()
        if not in_modules(name, TEMPORAL)
    }
    # `broadcast_to` makes tensors of the true shapes that hold no memory.
    mapped = [
        (name, *to_parameter(name, np.broadcast_to(np.float32(0), axes)))
        for name, axes in published.items()
        if name != "text_model.embeddings.position_ids"
    ]
    assert len(mapped) == {"unet": 686, "vae": 248, "text_encoder": 196}[part]
    assert sorted(name for _, name, _ in mapped) == sorted(shapes)
    assert {name: value.shape for _, name, value in mapped} == shapes


def test_the_3d_network_of_v1_4_trains_74_million_parameters():
    shapes = parameter_shapes(UNet3DConditionModel, read_unet_config(CONFIGS["unet"]))
    temporal = {name for name in shapes if in_modules(name, TEMPORAL)}
    blocks = {name.split(".transformer_blocks.0.")[0] for name in temporal}
    assert len(blocks) == 16
    # Each block: to_q, to_k, to_v without bias, to_out with, norm_temp's scale and bias.
    assert len(temporal) == 16 * 7
    trained = [n for n in shapes if in_modules(n, ["attn1.to_q", "attn2.to_q", "attn_temp"])]
    assert sum(np.prod(shapes[name].shape) for name in trained) == 74_354_880


# --- merge

SHAPES = {
    "conv.kernel": shape(3, 2, 4, 5),
    "conv.bias": shape(5),
    "attn.to_q.kernel": shape(4, 6),
    "norm_temp.scale": shape(6),
}
TENSORS = {
    "conv.weight": numbered(5, 4, 3, 2),
    "conv.bias": numbered(5),
    "attn.to_q.weight": numbered(6, 4),
    "norm_temp.weight": numbered(6),
}


def test_merging_gives_every_parameter_in_its_layout():
    params = merge(SHAPES, TENSORS.items())
    assert params.keys() == SHAPES.keys()
    for name, value in params.items():
        assert isinstance(value, jax.Array)
        assert value.shape == SHAPES[name].shape
        assert value.dtype == jnp.float32
    np.testing.assert_array_equal(params["attn.to_q.kernel"], TENSORS["attn.to_q.weight"].T)


def test_merging_does_not_care_about_the_order_of_the_tensors():
    forwards = merge(SHAPES, TENSORS.items())
    backwards = merge(SHAPES, reversed(TENSORS.items()))
    assert all(np.array_equal(forwards[name], backwards[name]) for name in SHAPES)


def test_merging_lists_everything_missing_left_over_and_misshapen_at_once():
    tensors = {
        "conv.weight": numbered(3, 2, 4, 5),  # laid out as ours already
        "attn.to_k.weight": numbered(6, 4),
        "attn.to_q.weight": numbered(4, 6),
        "lora.up.weight": numbered(6, 2),
        "conv.bias": numbered(5),
    }
    with pytest.raises(ValueError, match="not the network of its config") as error:
        merge(SHAPES, tensors.items(), where="here/unet")
    assert str(error.value).splitlines() == [
        "here/unet: not the network of its config:",
        "  left over: attn.to_k.weight [6, 4]",
        "  left over: lora.up.weight [6, 2]",
        "  missing: norm_temp.weight [6]",
        "  wrong shape: attn.to_q.weight [4, 6], expected [6, 4]",
        "  wrong shape: conv.weight [3, 2, 4, 5], expected [5, 4, 3, 2]",
    ]


def test_two_tensors_for_one_parameter_are_refused():
    both = {"attn.query.weight": numbered(6, 4)} | TENSORS
    with pytest.raises(ValueError, match=r"attn\.(query|to_q)\.weight"):
        merge(SHAPES, both.items())


def test_only_the_modules_that_may_lack_may_be_missing():
    tensors = {name: value for name, value in TENSORS.items() if "norm_temp" not in name}
    assert "norm_temp.scale" not in merge(SHAPES, tensors.items(), may_lack=("norm_temp",))
    with pytest.raises(ValueError, match=r"missing: norm_temp\.weight \[6\]"):
        merge(SHAPES, tensors.items(), may_lack=("attn_temp",))
    del tensors["conv.bias"]
    with pytest.raises(ValueError, match=r"missing: conv\.bias \[5\]") as error:
        merge(SHAPES, tensors.items(), may_lack=("norm_temp",))
    assert "norm_temp" not in str(error.value)


def test_a_module_that_may_lack_is_still_read_where_it_is():
    assert "norm_temp.scale" in merge(SHAPES, TENSORS.items(), may_lack=("norm_temp",))


def test_position_ids_are_passed_over_and_nothing_like_them():
    for tower in ("text_model", "vision_model"):
        ignored = (f"{tower}.embeddings.position_ids", numbered(1, 77))
        assert merge(SHAPES, [*TENSORS.items(), ignored]).keys() == SHAPES.keys()
    with pytest.raises(ValueError, match=r"left over: embeddings\.position_ids"):
        merge(SHAPES, [*TENSORS.items(), ("embeddings.position_ids", numbered(1, 7))])


@pytest.mark.parametrize("name", ["conv.kernel", "conv.anything", "weight"])
def test_a_weight_is_found_by_its_published_name_only(name):
    tensors = dict(TENSORS)
    tensors[name] = tensors.pop("conv.weight")
    with pytest.raises(ValueError, match=rf"left over: {name} .*\n  missing: conv\.weight"):
        merge(SHAPES, tensors.items())


@pytest.mark.parametrize("stored", ["float16", "float32", "bfloat16", "float64"])
def test_each_parameter_takes_the_type_that_its_name_asks_for(stored):
    def dtype_of(name):
        return "float32" if "to_q" in name else "bfloat16"

    kind = getattr(ml_dtypes, stored, None) or np.dtype(stored)
    params = merge(SHAPES, ((n, t.astype(kind)) for n, t in TENSORS.items()), dtype_of=dtype_of)
    types = {name: value.dtype.name for name, value in params.items()}
    assert types == {name: dtype_of(name) for name in SHAPES}
    # Whole numbers below 256 are the same in every one of these types.
    np.testing.assert_array_equal(params["conv.kernel"].transpose(3, 2, 0, 1), numbered(5, 4, 3, 2))


@pytest.mark.parametrize(
    ("name", "modules", "inside"),
    [
        ("blocks.0.attn1.to_q.kernel", ["attn1.to_q"], True),
        ("blocks.0.attn1.to_q.kernel", ["attn2.to_q", "attn1"], True),
        ("attn1.to_q.kernel", ["attn1"], True),
        ("blocks.0.xattn1.to_q.kernel", ["attn1.to_q"], False),
        ("blocks.0.attn1.to_qkv.kernel", ["attn1.to_q"], False),
        ("blocks.0.norm1.scale", ["scale"], False),
        ("blocks.0.norm1.scale", [], False),
    ],
)
def test_a_module_is_named_by_whole_steps_of_its_path(name, modules, inside):
    assert in_modules(name, modules) is inside


# --- inflate

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
SPATIAL = {f"{BLOCK}.attn1.to_q.kernel": shape(8, 8)}
FRESH = {
    f"{BLOCK}.attn_temp.to_q.kernel": shape(8, 8),
    f"{BLOCK}.attn_temp.to_k.kernel": shape(8, 8),
    f"{BLOCK}.attn_temp.to_v.kernel": shape(8, 8),
    f"{BLOCK}.attn_temp.to_out.0.kernel": shape(8, 8),
    f"{BLOCK}.attn_temp.to_out.0.bias": shape(8),
    f"{BLOCK}.norm_temp.scale": shape(8),
    f"{BLOCK}.norm_temp.bias": shape(8),
}
IMAGE_PARAMS = {name: jnp.full(leaf.shape, 7.0) for name, leaf in SPATIAL.items()}


def inflated(seed=0, **options):
    return inflate(IMAGE_PARAMS, SPATIAL | FRESH, jax.random.key(seed), **options)


def test_inflation_adds_what_is_missing_and_touches_nothing_else():
    params = inflated()
    assert params.keys() == (SPATIAL | FRESH).keys()
    assert all(params[name] is value for name, value in IMAGE_PARAMS.items())
    assert all(params[name].shape == leaf.shape for name, leaf in FRESH.items())


def test_the_temporal_output_starts_at_zero_its_bias_too():
    params = inflated()
    assert not params[f"{BLOCK}.attn_temp.to_out.0.kernel"].any()
    assert not params[f"{BLOCK}.attn_temp.to_out.0.bias"].any()


def test_the_temporal_norm_starts_as_plain_normalisation():
    params = inflated()
    assert (params[f"{BLOCK}.norm_temp.scale"] == 1).all()
    assert (params[f"{BLOCK}.norm_temp.bias"] == 0).all()


def test_temporal_projections_start_uniform_within_one_over_the_root_of_the_width():
    params = inflated()
    drawn = [np.asarray(params[f"{BLOCK}.attn_temp.to_{which}.kernel"]) for which in "qkv"]
    for kernel in drawn:
        assert np.abs(kernel).max() <= 8**-0.5
        assert kernel.std() == pytest.approx((8 * 3) ** -0.5, rel=0.25)
    assert len({kernel.tobytes() for kernel in drawn}) == 3


def test_inflation_is_determined_by_its_key():
    first, again, other = inflated(0), inflated(0), inflated(1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    name = f"{BLOCK}.attn_temp.to_q.kernel"
    assert not np.array_equal(first[name], other[name])


def test_inflation_gives_each_parameter_its_type():
    params = inflated(dtype_of=lambda name: "float32" if "to_q" in name else "bfloat16")
    for name in FRESH:
        assert params[name].dtype == ("float32" if "to_q" in name else "bfloat16")


@pytest.mark.parametrize(
    "name",
    [f"{BLOCK}.attn1.to_k.kernel", "conv_in.kernel", f"{BLOCK}.attn_temporal.to_q.kernel"],
)
def test_inflation_refuses_to_invent_anything_but_temporal_parameters(name):
    with pytest.raises(ValueError, match=f"only temporal parameters .* not {re.escape(name)}"):
        inflate(IMAGE_PARAMS, SPATIAL | {name: shape(8, 8)}, jax.random.key(0))


def test_a_tuned_network_goes_through_inflation_unchanged():
    params = inflated()
    assert inflate(params, SPATIAL | FRESH, jax.random.key(5)) == params


# --- which file is read

WHOLE = f"{STEM}.safetensors"
WHOLE_FP16 = f"{STEM}.fp16.safetensors"
INDEX = f"{STEM}.safetensors.index.json"
BIN = f"{STEM}.bin"


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        pytest.param([WHOLE], None, WHOLE, id="the one there is"),
        pytest.param([WHOLE, WHOLE_FP16, INDEX, BIN], None, WHOLE, id="whole before all"),
        pytest.param([WHOLE_FP16, INDEX, BIN], None, INDEX, id="plain shards before fp16"),
        pytest.param([WHOLE_FP16, BIN], None, WHOLE_FP16, id="fp16 before pickled"),
        pytest.param([BIN, f"{STEM}.fp16.bin"], None, BIN, id="plain pickled before fp16"),
        pytest.param([f"{STEM}.fp16.bin"], None, f"{STEM}.fp16.bin", id="pickled fp16"),
        pytest.param([f"{BIN}.index.json"], None, f"{BIN}.index.json", id="pickled shards"),
        pytest.param([WHOLE, WHOLE_FP16], "fp16", WHOLE_FP16, id="variant before plain"),
        pytest.param([WHOLE, INDEX, BIN], "fp16", None, id="no such variant"),
        pytest.param([WHOLE, f"{STEM}.fp16.bin"], "fp16", f"{STEM}.fp16.bin", id="pickled variant"),
        pytest.param(
            [WHOLE, f"{STEM}.safetensors.index.fp16.json"],
            "fp16",
            f"{STEM}.safetensors.index.fp16.json",
            id="shards of a variant as diffusers names them",
        ),
        pytest.param(
            [f"{STEM}.fp16.safetensors.index.json"],
            None,
            f"{STEM}.fp16.safetensors.index.json",
            id="shards of a variant as others name them",
        ),
        pytest.param([f"{STEM}.ema.safetensors"], None, None, id="other variants only if asked"),
        pytest.param(
            [WHOLE, f"{STEM}.ema.safetensors"], "ema", f"{STEM}.ema.safetensors", id="any variant"
        ),
        pytest.param(["config.json", "model.safetensors"], None, None, id="another stem"),
        pytest.param([], None, None, id="nothing"),
    ],
)
def test_weights_are_chosen_safe_before_pickled_plain_before_fp16_whole_before_sharded(
    names, variant, chosen
):
    assert choose_weights(names, STEM, variant) == chosen
    assert choose_weights(reversed(names), STEM, variant) == chosen


def test_transformers_calls_its_pickled_files_pytorch_model():
    names = ["pytorch_model.bin", "config.json"]
    assert choose_weights(names, "model") == "pytorch_model.bin"
    assert choose_weights([*names, "model.safetensors"], "model") == "model.safetensors"
    assert choose_weights(names, STEM) is None


# --- reading of files


def read(folder, variant=None):
    return dict(read_tensors(folder, STEM, variant))


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "base" / "unet" / WHOLE)


@pytest.fixture
def sharded(tmp_path, tensors):
    """The base U-Net over three files and an index, as diffusers' `max_shard_size` writes it."""
    shards = [f"{STEM}-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {name: shards[i % 3] for i, name in enumerate(tensors)}
    for shard in shards:
        save_file({k: v for k, v in tensors.items() if weight_map[k] == shard}, tmp_path / shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def test_a_whole_file_is_read_to_the_last_tensor(tensors):
    read_back = read(GOLDEN / "base" / "unet")
    assert read_back.keys() == tensors.keys()
    assert all(np.array_equal(read_back[name], tensors[name]) for name in tensors)


def test_shards_give_together_what_the_whole_file_gives(sharded, tensors):
    assert len(shard_names(sharded / INDEX)) == 3
    read_back = read(sharded)
    assert read_back.keys() == tensors.keys()
    assert all(np.array_equal(read_back[name], tensors[name]) for name in tensors)


def test_shards_that_are_not_there_are_all_named_before_any_is_read(sharded):
    for number in (1, 3):
        (sharded / f"{STEM}-{number:05}-of-00003.safetensors").unlink()
    first, third = (rf"{STEM}-{i:05}-of-00003\.safetensors" for i in (1, 3))
    with pytest.raises(FileNotFoundError, match=rf"index\.json names .*: {first}, {third};"):
        next(read_tensors(sharded, STEM))


@pytest.mark.parametrize("text", ["{", "{}", "[]"], ids=["cut off", "no weight_map", "a list"])
def test_a_damaged_index_is_an_error_that_names_it(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(ValueError, match=re.escape(INDEX)):
        read(sharded)


def test_a_variant_is_read_only_if_it_is_the_only_one_or_asked_for(tmp_path):
    save_file({"bias": np.float16([1, 2])}, tmp_path / WHOLE_FP16)
    assert read(tmp_path)["bias"].dtype == np.float16
    save_file({"bias": np.float32([3, 4])}, tmp_path / WHOLE)
    assert read(tmp_path)["bias"].tolist() == [3, 4]
    assert read(tmp_path, "fp16")["bias"].tolist() == [1, 2]


def test_bfloat16_tensors_are_read_and_merged_bit_for_bit(tmp_path):
    values = np.float32([[1.5, -3e38], [2**-126, 0.1]]).astype(ml_dtypes.bfloat16)
    save_file({"proj.weight": values}, tmp_path / WHOLE)
    shapes = {"proj.kernel": shape(2, 2)}
    narrow = merge(shapes, read_tensors(tmp_path, STEM), dtype_of=lambda name: "bfloat16")
    wide = merge(shapes, read_tensors(tmp_path, STEM))
    assert narrow["proj.kernel"].dtype == jnp.bfloat16
    assert np.asarray(narrow["proj.kernel"]).T.tobytes() == values.tobytes()
    assert np.array_equal(np.asarray(wide["proj.kernel"]).T, values.astype(np.float32))


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        pytest.param(None, rf"no {STEM}\.safetensors, nor shards or \.bin", id="plain"),
        pytest.param("fp16", rf"no {STEM}\.fp16\.safetensors", id="variant"),
    ],
)
def test_a_folder_without_weights_says_what_was_looked_for(tmp_path, variant, message):
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(tmp_path))}: {message}"):
        read(tmp_path, variant)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="cut off in the tensors"),
        pytest.param(lambda data: data[:1000], id="cut off in the header"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"<html>404 Not Found</html>", id="a web page"),
        pytest.param(lambda data: b"version https://git-lfs.github.com/spec/v1\n", id="a pointer"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, damage):
    data = (GOLDEN / "base" / "unet" / WHOLE).read_bytes()
    (tmp_path / WHOLE).write_bytes(damage(data))
    with pytest.raises(ValueError, match=rf"{re.escape(WHOLE)}: damaged or cut off .*again$"):
        read(tmp_path)


def test_a_pickled_file_is_read_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # so that importing it fails, as if not there
    shutil.copy(GOLDEN / "tuned" / "unet" / BIN, tmp_path)
    pickled, safe = read(tmp_path), load_file(GOLDEN / "tuned" / "unet" / WHOLE)
    assert pickled.keys() == safe.keys()
    for name, tensor in safe.items():
        assert pickled[name].dtype == tensor.dtype
        np.testing.assert_array_equal(pickled[name], tensor)


def test_a_pickled_file_may_hold_trained_parameters(tmp_path):
    torch = pytest.importorskip("torch")
    values = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "parameter": torch.nn.Parameter(values),
        "with gradient": values.clone().requires_grad_(),
        "half": values.bfloat16().requires_grad_(),
        "turned": values.T.clone().requires_grad_().T,
    }
    torch.save(tensors, tmp_path / BIN)
    tensors = read(tmp_path)
    assert len(tensors) == 4
    for tensor in tensors.values():
        np.testing.assert_array_equal(tensor, values.numpy())


@pytest.mark.parametrize("kind", ["sparse", "meta", "complex", "integers", "float8"])
def test_a_pickled_tensor_that_is_no_weight_is_named(tmp_path, kind):
    torch = pytest.importorskip("torch")
    values = torch.ones(2, 3)
    tensor = {
        "sparse": values.to_sparse,
        "meta": lambda: values.to("meta"),
        "complex": lambda: values.to(torch.complex64),
        "integers": values.int,
        "float8": lambda: values.to(torch.float8_e4m3fn),
    }[kind]()
    torch.save({"to_q.weight": tensor}, tmp_path / BIN)
    with pytest.raises(UserError, match=r"\.bin: .+") as refusal:
        read(tmp_path)
    assert len(str(refusal.value)) < 500 + len(str(tmp_path))
    assert "\n" not in str(refusal.value)


# --- saving


def test_what_is_saved_is_the_published_file_again(tmp_path):
    tuned = GOLDEN / "tuned" / "unet"
    config = read_unet_config(json.loads((tuned / "config.json").read_text()))
    params = merge(parameter_shapes(UNet3DConditionModel, config), read_tensors(tuned, STEM))
    save_tensors(tmp_path / "new" / "folder" / WHOLE, params)
    ours, published = load_file(tmp_path / "new" / "folder" / WHOLE), load_file(tuned / WHOLE)
    assert ours.keys() == published.keys()
    for name, tensor in published.items():
        assert ours[name].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[name], tensor)
    with safe_open(tmp_path / "new" / "folder" / WHOLE, framework="numpy") as file:
        # diffusers 0.11 refuses a file without this mark.
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_are_saved_in_the_type_they_are_stored_in(tmp_path, dtype):
    kernel = jnp.arange(6, dtype=dtype).reshape(2, 3)
    save_tensors(tmp_path / WHOLE, {"proj.kernel": kernel})
    saved = read(tmp_path)["proj.weight"]
    assert saved.dtype == kernel.dtype
    np.testing.assert_array_equal(saved, np.asarray(kernel).T)


def save_beyond_the_disk(path):
    """Saves two megabytes where the system writes no file longer than 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        save_tensors(path, {"proj.kernel": jnp.zeros((512, 1024))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    save_tensors(tmp_path / WHOLE, {"proj.kernel": jnp.ones((2, 3))})
    before = (tmp_path / WHOLE).read_bytes()
    with pytest.raises(Exception, match=r"(?i)too large"):
        save_beyond_the_disk(tmp_path / WHOLE)
    assert [path.name for path in tmp_path.iterdir()] == [WHOLE]
    assert (tmp_path / WHOLE).read_bytes() == before


def test_a_first_write_that_fails_leaves_no_half_file(tmp_path):
    with pytest.raises(Exception, match=r"(?i)too large"):
        save_beyond_the_disk(tmp_path / WHOLE)
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_replaces_the_old_one_whole(tmp_path):
    for value in (1.0, 2.0):
        save_tensors(tmp_path / WHOLE, {"proj.kernel": jnp.full((2, 3), value)})
    assert (read(tmp_path)["proj.weight"] == 2).all()
    assert [path.name for path in tmp_path.iterdir()] == [WHOLE]
