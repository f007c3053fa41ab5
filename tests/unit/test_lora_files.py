"""LoRAs: files of every naming give the same weights, and what we cannot add is refused by name."""

import json
import os
import pickle
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import small_configs
from safetensors.numpy import load_file, save_file

from tav_jax.errors import UserError
from tav_jax.models.clip import CLIPTextModel
from tav_jax.models.network import parameter_shapes
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.pretrained.lora import change_of, read_loras
from tav_jax.pretrained.model import load_model, load_text_encoder
from tav_jax.pretrained.weights import to_parameter

BASE = Path(__file__).parents[1] / "golden/base"
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYER = "text_model.encoder.layers.1"
# By network and module: out, in and sides of the kernel.
LAYERS = {
    ("unet", f"{BLOCK}.attn1.to_q"): (8, 8),
    ("unet", f"{BLOCK}.attn2.to_k"): (8, 8),
    ("unet", f"{BLOCK}.attn2.to_out.0"): (8, 8),
    ("unet", f"{BLOCK}.ff.net.0.proj"): (64, 8),
    ("unet", f"{BLOCK}.ff.net.2"): (8, 32),
    ("unet", "mid_block.attentions.0.proj_in"): (16, 16, 1, 1),
    ("unet", "up_blocks.0.resnets.1.conv1"): (16, 24, 3, 3),
    ("unet", "down_blocks.0.downsamplers.0.conv"): (8, 8, 3, 3),
    ("unet", "time_embedding.linear_1"): (32, 8),
    ("text_encoder", f"{LAYER}.self_attn.q_proj"): (8, 8),
    ("text_encoder", f"{LAYER}.mlp.fc1"): (16, 8),
}
RANK, ALPHA = 4, 1.0
SHAPES = {
    "unet": parameter_shapes(UNet3DConditionModel, small_configs.UNET),
    "text_encoder": parameter_shapes(CLIPTextModel, small_configs.TEXT),
}


def factors_of(shape, rng, rank=RANK):
    out, inputs, *sides = shape
    up = rng.normal(size=(out, rank, *(1 for _ in sides))).astype(np.float32)
    return rng.normal(size=(rank, inputs, *sides)).astype(np.float32), up


@pytest.fixture(scope="module")
def factors():
    rng = np.random.default_rng(0)
    return {layer: factors_of(shape, rng) for layer, shape in LAYERS.items()}


def kohya(factors):
    tensors = {}
    for (network, module), (down, up) in factors.items():
        start = "lora_unet_" if network == "unet" else "lora_te_"
        layer = start + module.replace(".", "_")
        tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        tensors[f"{layer}.alpha"] = np.float32(ALPHA)
    return tensors, {"ss_network_dim": "4"}


def old_diffusers(factors):
    tensors = {}
    for (network, module), (down, up) in factors.items():
        *path, leaf = module.removesuffix(".0").split(".") if "attn" in module else [module]
        layer = f"{network}.{module}.lora"
        if "attn1" in module or "attn2" in module:
            layer = f"{network}.{'.'.join(path)}.processor.{leaf}_lora"
        elif network == "text_encoder":
            layer = f"{network}.{module}.lora_linear_layer"
        tensors |= {f"{layer}.down.weight": down, f"{layer}.up.weight": up}
        tensors[f"{layer}.alpha"] = np.array([ALPHA], np.float32)
    return tensors, {"format": "pt"}


def peft(factors, **settings):
    tensors = {}
    for (network, module), (down, up) in factors.items():
        layer = f"{network}.{module}"
        tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    # Another alpha than the pattern's, so that the pattern shows.
    metadata = {"unet.r": 8, "unet.lora_alpha": ALPHA, "text_encoder.lora_alpha": 3 * ALPHA}
    metadata["text_encoder.alpha_pattern"] = {"self_attn.q_proj": ALPHA, "mlp.fc1": ALPHA}
    return tensors, {"lora_adapter_metadata": json.dumps(metadata | settings)}


FORMATS = {"kohya": kohya, "old diffusers": old_diffusers, "PEFT": peft}


def write(path, tensors, metadata=None):
    save_file({k: np.asarray(v) for k, v in tensors.items()}, path, metadata)
    return path


def changes(files):
    """Returns all that LoRAs add, by network and parameter."""
    loras = read_loras(files, small_configs.TEXT, small_configs.UNET)
    found = {}
    for network, shapes in SHAPES.items():
        change = change_of([getattr(lora, network) for lora in loras])
        found |= {(network, name): change(name) for name in shapes}
    return {key: value for key, value in found.items() if value is not None}


def expected_changes(factors, scale):
    """Sums over the rank, one after another, in float64."""
    found = {}
    for (network, module), (down, up) in factors.items():
        sides = down.shape[2:]
        delta = np.zeros((len(up), *down.shape[1:]))
        for r in range(len(down)):
            column = np.asarray(up, np.float64)[:, r].reshape(-1, *(1 for _ in down.shape[1:]))
            delta += scale * column * down[r].astype(np.float64)
        assert delta.shape[2:] == sides
        name, value = to_parameter(f"{module}.weight", delta)
        found[network, name] = value
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_every_naming_gives_alpha_over_rank_times_the_product(name, factors, tmp_path):
    path = write(tmp_path / "x.safetensors", *FORMATS[name](factors))
    found, expected = changes([(path, 1.0)]), expected_changes(factors, ALPHA / RANK)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == np.float32
        assert found[key].shape == SHAPES[key[0]][key[1]].shape
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6)


def test_files_of_one_lora_give_equal_weights(factors, tmp_path):
    found = [
        changes([(write(tmp_path / f"{name}.safetensors", *make(factors)), 0.7)])
        for name, make in FORMATS.items()
    ]
    for other in found[1:]:
        for key, value in found[0].items():
            np.testing.assert_allclose(other[key], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("alpha", "factor"), [(1.0, 0.25), (4.0, 1.0), (0.0, 1.0), (None, 1.0), (-2, -0.5)]
)
def test_alpha_is_divided_by_the_rank(alpha, factor, tmp_path):
    module = f"lora_unet_{BLOCK}.attn1.to_q".replace(".", "_")
    tensors = {
        f"{module}.lora_down.weight": np.eye(4, 8, dtype=np.float32),
        f"{module}.lora_up.weight": np.eye(8, 4, dtype=np.float32),
    }
    if alpha is not None:
        tensors[f"{module}.alpha"] = np.array(alpha)  # an integer may be one, too
    (value,) = changes([(write(tmp_path / "x.safetensors", tensors), 1.0)]).values()
    np.testing.assert_array_equal(value, factor * np.diag([1.0] * 4 + [0.0] * 4))


def test_metadata_of_peft_is_read(factors, tmp_path):
    layer = ("unet", f"{BLOCK}.attn1.to_q")
    one = {layer: factors[layer]}
    base = expected_changes(one, 1.0)

    def scale(**settings):
        path = write(tmp_path / "x.safetensors", *peft(one, **settings))
        ((key, value),) = changes([(path, 1.0)]).items()
        return float(np.mean(value / base[key]))

    assert scale(**{"unet.lora_alpha": 6}) == pytest.approx(1.5)
    assert scale(**{"unet.lora_alpha": 6, "unet.use_rslora": True}) == pytest.approx(3.0)
    assert scale(**{"unet.alpha_pattern": {"attn1.to_q": 8, "attn2.to_q": 1}}) == pytest.approx(2.0)
    assert scale(**{"unet.alpha_pattern": {"n1.to_q": 8}}) == pytest.approx(0.25)
    for wrong, message in (
        ({"unet.lora_alpha": "many"}, "lora_alpha is 'many', no number"),
        ({"unet.lora_alpha": 10**400}, "lora_alpha is a number of 1329 bits, no number"),
        ({"unet.lora_alpha": True}, "lora_alpha is True, no number"),
        ({"unet.lora_alpha": float("nan")}, "lora_alpha is nan, no number"),
        ({"unet.alpha_pattern": {"to_q": []}}, r"lora_alpha is \[\], no number"),
        ({"unet.use_dora": True}, "DoRA is not supported"),
    ):
        with pytest.raises(UserError, match=f"x.safetensors: .*{message}"):
            scale(**wrong)


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_names_of_the_first_loras_are_read(prefix, factors, tmp_path):
    """Of diffusers 0.11 to 0.16: no prefix, and the U-Net's names in the text encoder."""
    unet, text = ("unet", f"{BLOCK}.attn2.to_out.0"), ("text_encoder", f"{LAYER}.self_attn.q_proj")
    (down, up), (text_down, text_up) = factors[unet], factors[text]
    tensors = {
        f"{prefix}{BLOCK}.attn2.processor.to_out_lora.down.weight": down,
        f"{prefix}{BLOCK}.attn2.processor.to_out_lora.up.weight": up,
        f"text_encoder.{LAYER}.self_attn.to_q_lora.down.weight": text_down,
        f"text_encoder.{LAYER}.self_attn.to_q_lora.up.weight": text_up,
    }
    found = changes([(write(tmp_path / "x.safetensors", tensors), 1.0)])
    expected = expected_changes({layer: factors[layer] for layer in (unet, text)}, 1.0)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6)


def test_a_file_may_have_two_axes_for_a_convolution_and_halves(factors, tmp_path):
    layer = ("unet", "mid_block.attentions.0.proj_in")
    tensors, metadata = peft({layer: factors[layer]})
    flat = {key: value[..., 0, 0].astype(np.float16) for key, value in tensors.items()}
    found = changes([(write(tmp_path / "x.safetensors", flat, metadata), 1.0)])
    (expected,) = expected_changes({layer: factors[layer]}, 0.25).values()
    np.testing.assert_allclose(found["unet", f"{layer[1]}.kernel"], expected, atol=1e-2)


def params_of(network):
    return {name: np.asarray(value) for name, value in network.params.items()}


def test_a_model_is_loaded_with_several_at_their_scales(tmp_path):
    plain = load_model(BASE)
    names = ("down_blocks.0.attentions.0.proj_in", f"{BLOCK}.attn1.to_q")
    text = "text_model.encoder.layers.0.mlp.fc2"
    rng = np.random.default_rng(1)
    both = []
    for number in range(2):
        made = {}
        for network, module in (*(("unet", name) for name in names), ("text_encoder", text)):
            *sides, inputs, out = getattr(plain, network).params[f"{module}.kernel"].shape
            made[network, module] = factors_of((out, inputs, *sides), rng)
        both.append((write(tmp_path / f"{number}.safetensors", *kohya(made)), made))
    loras = [(both[0][0], 0.8), (both[1][0], -0.5)]
    model = load_model(BASE, loras=loras)
    change = expected_changes(both[0][1], 0.2)
    for key, value in expected_changes(both[1][1], -0.125).items():
        change[key] = change[key] + value
    for network in ("unet", "text_encoder"):
        before, after = (params_of(getattr(one, network)) for one in (plain, model))
        assert before.keys() == after.keys()
        for name, value in before.items():
            added = change.get((network, name))
            if added is None:
                np.testing.assert_array_equal(after[name], value)
            else:
                np.testing.assert_allclose(after[name], value + added, rtol=1e-6, atol=1e-6)

    # In halves, each sum is rounded once.
    read = read_loras(loras, model.text_encoder.config, model.unet.config)
    exact = params_of(model.text_encoder)
    half = load_text_encoder(BASE / "text_encoder", dtype="bfloat16", loras=read)
    for name, value in params_of(half).items():
        np.testing.assert_array_equal(value, exact[name].astype(jnp.bfloat16))


# What is refused.


def refusal(path, *others):
    with pytest.raises(UserError) as error:
        read_loras([(path, 1.0), *others], small_configs.TEXT, small_configs.UNET)
    return str(error.value)


Q = f"lora_unet_{BLOCK}.attn1.to_q".replace(".", "_")
TEMPORAL = f"lora_unet_{BLOCK}.attn_temp.to_q".replace(".", "_")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({f"{Q}.dora_scale": (8,)}, f"DoRA is not supported: {Q}.dora_scale"),
        ({"unet.x.lora_magnitude_vector": (8,)}, "DoRA is not supported: unet.x.lora_magn"),
        ({f"{Q}.hada_w1_a": (8, 4)}, f"LoHa is not supported: {Q}.hada_w1_a"),
        ({f"{Q}.lokr_w1": (8, 4)}, f"LoKr is not supported: {Q}.lokr_w1"),
        ({f"{Q}.lora_mid.weight": (4, 4, 3, 3)}, "LoCon with Tucker's decomposition is not"),
        ({"lora_te2_x.lora_up.weight": (8, 4)}, "SDXL is not supported: lora_te2_x.lora_up"),
        ({"text_encoder_2.x.lora_A.weight": (8, 4)}, "SDXL is not supported: text_encoder_2"),
        ({"lora_unet_sideways.lora_up.weight": (8, 4)}, "unknown: lora_unet_sideways.lora_up"),
        ({f"{TEMPORAL}.alpha": ()}, f"unknown: {TEMPORAL}.alpha"),
        ({"transformer.x.lora_A.weight": (8, 4)}, "unknown: transformer.x.lora_A.weight"),
        ({f"{Q}.diff": (8, 8)}, f"unknown: {Q}.diff"),
        ({f"{Q}.lora_down.weight": (4, 9)}, f"wrong shape: {Q}.lora_down.weight [4, 9], [8, 4]"),
        ({f"{Q}.lora_down.weight": (4, 8, 3, 3)}, f"wrong shape: {Q}.lora_down.weight"),
        ({f"{Q}.lora_down.weight": (4,)}, f"wrong shape: {Q}.lora_down.weight"),
        ({f"{Q}.lora_down.weight": (0, 8), f"{Q}.lora_up.weight": (8, 0)}, "wrong shape"),
        ({f"{Q}.lora_up.weight": (9, 4)}, f"wrong shape: {Q}.lora_down.weight [4, 8], [9, 4]"),
        ({f"{Q}.lora_up.weight": (8, 5)}, f"the factors' ranks differ: {Q}.lora_down.weight"),
        ({f"{Q}.lora_up.weight": None}, f"without a factor: {Q}."),
        ({f"{Q}.alpha": (2,)}, f"more than one number: {Q}.alpha"),
        ({f"{Q}.lora_down.weight": np.full((4, 8), np.nan)}, f"values are finite: {Q}.lora_down"),
        ({f"{Q}.alpha": np.float32(np.inf)}, f"values are finite: {Q}.alpha"),
        ({f"unet.{BLOCK}.attn1.to_q.lora_A.weight": (4, 8)}, "twice, under two names: unet."),
    ],
)
def test_what_cannot_be_added_is_refused_by_its_name(more, expected, factors, tmp_path):
    layer = ("unet", f"{BLOCK}.attn1.to_q")
    tensors, _ = kohya({layer: factors[layer]})
    for key, value in more.items():
        is_shape = isinstance(value, tuple)
        tensors[key] = np.ones(value, np.float32) if is_shape else value
    path = write(tmp_path / "x.safetensors", {k: v for k, v in tensors.items() if v is not None})
    said = refusal(path)
    assert said.startswith(f"{path}: not a LoRA that this model takes:\n")
    assert expected in said
    assert len(said.splitlines()) == 2


def test_text_states_of_sdxl_are_named(factors, tmp_path):
    key = f"unet.{BLOCK}.attn2.to_k.lora_"
    tensors = {f"{key}A.weight": np.ones((4, 2048)), f"{key}B.weight": np.ones((8, 4))}
    path = write(tmp_path / "x.safetensors", {k: v.astype("f") for k, v in tensors.items()})
    assert "  the text states of SDXL, which is not supported: " in refusal(path)


def test_all_offenders_of_all_files_are_in_one_message(factors, tmp_path):
    tensors, _ = kohya(factors)
    many = {f"lora_unet_layer_{n}.alpha": np.float32(1) for n in range(40)}
    one = write(tmp_path / "1.safetensors", tensors | many | {f"{Q}.hada_w1_a": np.ones(3)})
    two = write(tmp_path / "2.safetensors", tensors | {f"{Q}.dora_scale": np.ones(3)})
    said = refusal(one, (two, 1.0), (tmp_path / "none.safetensors", 1.0))
    assert said.splitlines() == [
        f"{one}: not a LoRA that this model takes:",
        f"  LoHa is not supported: {Q}.hada_w1_a",
        "  unknown: lora_unet_layer_0.alpha, lora_unet_layer_1.alpha, lora_unet_layer_10.alpha "
        "and 37 more",
        f"{two}: not a LoRA that this model takes:",
        f"  DoRA is not supported: {Q}.dora_scale",
        f"{tmp_path / 'none.safetensors'}: No such file",
    ]


def test_a_product_that_is_not_finite_is_named(tmp_path):
    huge = {f"{Q}.lora_down.weight": np.full((4, 8), 1e30, np.float32)}
    huge[f"{Q}.lora_up.weight"] = np.full((8, 4), 1e30, np.float32)
    path = write(tmp_path / "x.safetensors", huge)
    with pytest.raises(UserError, match=r"x\.safetensors: what it adds to .*attn1\.to_q\.weight"):
        changes([(path, 1.0)])


def write_pickled(path, tree):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(tree, 2))
    return path


class Runs:
    def __reduce__(self):
        return os.system, ("touch harm",)


def test_other_files_are_refused_in_one_line(factors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = write(tmp_path / "good.safetensors", *kohya(factors)).read_bytes()
    checkpoint = load_file(BASE / "unet/diffusion_pytorch_model.safetensors")
    files = {
        "cut.safetensors": good[:3000],
        "header.safetensors": good[:5],
        "page.safetensors": b"<html>404</html>",
        "empty.safetensors": b"",
        "page.bin": b"<html>404</html>",
    }
    for name, content in files.items():
        Path(name).write_bytes(content)
    write("unet.safetensors", checkpoint)
    write("word.safetensors", {"<cat>": np.ones(8, np.float32)})
    write("none.safetensors", {})
    write_pickled("harm.bin", {f"{Q}.lora_up.weight": Runs()})
    write_pickled("list.bin", [1, 2])
    expected = {
        **dict.fromkeys(("cut.safetensors", "header.safetensors"), "damaged or cut off"),
        **dict.fromkeys(("page.safetensors", "empty.safetensors"), "damaged or cut off"),
        **dict.fromkeys(("page.bin", "list.bin"), "not a file of plain tensors"),
        "harm.bin": "system, which no weights need",
        "unet.safetensors": "not a LoRA: it has conv_in.bias",
        "word.safetensors": "not a LoRA: it has <cat>",
        "none.safetensors": "not a LoRA: it has no tensors",
        "missing.bin": "No such file",
    }
    for name, message in expected.items():
        said = refusal(Path(name))
        assert said.startswith(f"{name}: ")
        assert message in said
        assert "\n" not in said
    assert not Path("harm").exists()


def test_a_pickled_file_of_pytorch_is_read(factors, tmp_path):
    torch = pytest.importorskip("torch")
    tensors, _ = kohya(factors)
    torch.save({k: torch.tensor(v) for k, v in tensors.items()}, tmp_path / "x.bin")
    half = {k: torch.tensor(v).bfloat16() for k, v in tensors.items()}
    torch.save(half, tmp_path / "half.bin")
    found, expected = changes([(tmp_path / "x.bin", 1.0)]), expected_changes(factors, 0.25)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6)
    for key, value in changes([(tmp_path / "half.bin", 1.0)]).items():
        np.testing.assert_allclose(value, expected[key], atol=0.1)


def test_a_file_that_is_changed_is_read_or_refused(factors, tmp_path):
    content = write(tmp_path / "good.safetensors", *peft(factors)).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    path = tmp_path / "x.safetensors"
    for case in range(150):
        changed = bytearray(content[: rng.integers(1, len(content))] if case % 5 == 0 else content)
        for place in rng.integers(min(header, len(changed)), size=rng.integers(1, 4)):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        with suppress(UserError):
            changes([(path, 1.0)])


def test_no_lora_reads_no_shapes():
    assert read_loras([], replace(small_configs.TEXT), small_configs.UNET) == []
    assert change_of([])("conv_in.kernel") is None
