"""LoRAs, learnt words and the prompts with them, against diffusers and transformers."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from tav_jax.models.network import in_modules
from tav_jax.pipeline import encode_prompts
from tav_jax.pretrained.model import load_model
from tav_jax.pretrained.weights import TEMPORAL, to_tensor

BASE = Path(__file__).parents[1] / "golden/base"
RANK, ALPHA = 4, 2.0


def pipeline():
    return StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)


def lora_factors(pipe):
    """Returns random factors of linear layers and convolutions, by network and module."""
    ends = {
        "unet": ("to_q", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "conv_shortcut"),
        "text_encoder": ("q_proj", "out_proj", "fc1"),
    }
    found = {}
    for network, layers in ends.items():
        for name, module in getattr(pipe, network).named_modules():
            weight = getattr(module, "weight", None)
            if name.endswith(layers) and weight is not None and weight.ndim in (2, 4):
                sides = (1,) * (weight.ndim - 2)
                down = torch.randn(RANK, *weight.shape[1:]) / 4
                found[network, name] = down, torch.randn(weight.shape[0], RANK, *sides) / 4
    return found


def write_lora(path, factors, naming):
    tensors, metadata = {}, {"format": "pt"}
    for (network, module), (down, up) in factors.items():
        if naming == "kohya":
            full = module if network == "unet" or "text_model" in module else f"text_model.{module}"
            layer = f"{'lora_unet' if network == 'unet' else 'lora_te'}_{full}".replace(".", "_")
            tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
            tensors[f"{layer}.alpha"] = torch.tensor(ALPHA)
        else:
            layer = f"{network}.{module}"
            tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
            parts = {"r": RANK, "lora_alpha": ALPHA, "target_modules": [module]}
            settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            for key, value in parts.items():
                key = f"{network}.{key}"
                settings[key] = settings.get(key, []) + value if type(value) is list else value
            metadata["lora_adapter_metadata"] = json.dumps(settings)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)


@pytest.mark.parametrize("naming", ["kohya", "PEFT"])
def test_a_lora_gives_the_weights_that_diffusers_fuses(naming, tmp_path):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    pipe = pipeline()
    factors = lora_factors(pipe)
    assert len(factors) > 30
    if naming == "kohya":  # whose convolutions diffusers takes for SDXL's
        factors = {key: value for key, value in factors.items() if "conv" not in key[1]}
    write_lora(tmp_path / "style.safetensors", factors, naming)
    pipe.load_lora_weights(tmp_path, weight_name="style.safetensors")
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    ours = load_model(BASE, loras=[(tmp_path / "style.safetensors", 0.7)])
    plain = load_model(BASE)
    changed = 0
    for network in ("unet", "text_encoder"):
        theirs = {
            name.removeprefix("text_model."): value.numpy()
            for name, value in getattr(pipe, network).state_dict().items()
        }
        before = getattr(plain, network).params
        for name, value in getattr(ours, network).params.items():
            if in_modules(name, TEMPORAL):
                continue
            published, tensor = to_tensor(name, np.asarray(value))
            expected = theirs[published.removeprefix("text_model.")]
            np.testing.assert_allclose(tensor, expected, rtol=1e-5, atol=1e-5, err_msg=name)
            changed += not np.array_equal(value, before[name])
    assert changed == len(factors)


@pytest.mark.parametrize("count", [1, 3])
def test_a_learnt_word_is_encoded_as_in_transformers(count, tmp_path):
    """With resized embeddings; a word of several vectors is written out in the prompt."""
    pipe = pipeline()
    torch.manual_seed(1)
    encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
    vectors = torch.randn(count, encoder.config.hidden_size)
    save_file({"<cat>": vectors}, tmp_path / "learned_embeds.safetensors")
    words = ["<cat>", *(f"<cat>_{n}" for n in range(1, count))]
    assert tokenizer.add_tokens(words) == count
    encoder.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        encoder.get_input_embeddings().weight[-count:] = vectors
    prompts = ["a <cat> is moving", "<cat>", "no word, but a<cat>b", "a cat"]
    written = [prompt.replace("<cat>", " ".join(words)) for prompt in prompts]
    padding = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
    theirs = encoder.eval()(tokenizer(written, **padding).input_ids).last_hidden_state
    model = load_model(BASE, embeddings=[tmp_path / "learned_embeds.safetensors"])
    ours = encode_prompts(model, prompts)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_long_prompt_is_encoded_as_its_chunks_in_transformers():
    pipe = pipeline()
    tokenizer, encoder = pipe.tokenizer, pipe.text_encoder.eval()
    prompt = "a is " * 50
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    rows = []
    for start in (0, 75):
        row = [tokenizer.bos_token_id, *ids[start : start + 75], tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (77 - len(row)))
    with torch.no_grad():
        theirs = encoder(torch.tensor(rows)).last_hidden_state.reshape(1, 154, -1)
    ours = encode_prompts(load_model(BASE), [prompt], syntax="weighted")
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=5e-6)
