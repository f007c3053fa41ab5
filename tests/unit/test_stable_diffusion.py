import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tav_jax.models.clip import CLIPTextModel
from tav_jax.models.compute import ComputeOptions
from tav_jax.models.network import in_modules, init_network
from tav_jax.pretrained.hub import find_folder
from tav_jax.pretrained.model import (
    load_model,
    load_tokenizer,
    load_unet,
    save_model,
    save_unet,
    tokenize,
)
from tav_jax.pretrained.weights import TEMPORAL, save_tensors

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
BASE = GOLDEN / "base"
CLIP_TOKENIZER = ROOT.parent / "shared" / "clip-tokenizer"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"
PARTS = ["scheduler", "text_encoder", "tokenizer", "unet", "vae"]


@pytest.fixture(scope="module")
def model():
    return load_model(BASE)


@pytest.fixture
def folder(tmp_path):
    """A copy of the base model to damage."""
    return Path(shutil.copytree(BASE, tmp_path / "model"))


def same_params(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert np.asarray(value).tobytes() == np.asarray(theirs[name]).tobytes(), name


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# --- a whole model


def test_a_folder_gives_its_networks_tokenizer_and_schedule(model):
    assert model.text_encoder.config.hidden_size == model.unet.config.cross_attention_dim == 16
    assert model.vae.config.block_out_channels == (8, 8, 16)
    assert model.unet.config.block_out_channels == (8, 16, 16, 24)
    assert model.schedule.prediction_type == "epsilon"
    assert model.schedule.alphas_cumprod.shape == (1000,)
    assert len(model.tokenizer) == model.text_encoder.config.vocab_size
    for network, weights in (
        (model.text_encoder, TEXT_WEIGHTS),
        (model.vae, VAE_WEIGHTS),
        (model.unet, UNET_WEIGHTS),
    ):
        published = load_file(BASE / weights)
        stored = sum(t.size for n, t in published.items() if not n.endswith("position_ids"))
        loaded = sum(p.size for n, p in network.params.items() if not in_modules(n, TEMPORAL))
        assert loaded == stored


def test_an_image_network_is_inflated_by_the_key_that_is_given(model):
    again, other = load_unet(BASE / "unet"), load_unet(BASE / "unet", key=jax.random.key(1))
    same_params(model.unet.params, again.params)
    drawn = {
        name
        for name, value in other.params.items()
        if not np.array_equal(value, again.params[name])
    }
    assert drawn == {n for n in other.params if re.search(r"attn_temp\.to_[qkv]\.kernel", n)}


def test_a_tuned_network_is_read_with_its_temporal_attention():
    tuned = load_unet(GOLDEN / "tuned" / "unet")
    assert jnp.abs(tuned.params[next(n for n in tuned.params if "attn_temp.to_out" in n)]).max() > 0
    same_params(tuned.params, load_unet(GOLDEN / "tuned" / "unet", key=jax.random.key(1)).params)


def test_a_tuned_network_may_not_lack_its_temporal_attention(tmp_path):
    tuned = Path(shutil.copytree(GOLDEN / "tuned" / "unet", tmp_path / "unet"))
    lost = "mid_block.attentions.0.transformer_blocks.0.attn_temp.to_q.weight"
    edit_tensors(tuned / "diffusion_pytorch_model.safetensors", lambda tensors: tensors.pop(lost))
    with pytest.raises(ValueError, match=rf"missing: {re.escape(lost)} \[24, 24\]"):
        load_unet(tuned)


def test_parameters_are_stored_in_bfloat16_but_for_the_modules_kept_in_float32():
    model = load_model(BASE, dtype="bfloat16", float32_modules=["attn1.to_q", "attn_temp"])
    for network in (model.text_encoder, model.vae, model.unet):
        assert network.compute.dtype == "bfloat16"
        for name, value in network.params.items():
            wide = in_modules(name, ["attn1.to_q", "attn_temp"])
            assert value.dtype == ("float32" if wide else "bfloat16"), name


def test_how_the_network_computes_is_chosen_at_loading():
    unet = load_model(
        BASE, attention_scope="full", attention="chunked", gradient_checkpointing="full"
    ).unet
    assert unet.config.attention_scope == "full"
    assert unet.compute == ComputeOptions("chunked", "full")
    plain = load_unet(BASE / "unet")
    assert plain.config == replace(unet.config, attention_scope="sparse_causal")
    assert plain.compute == ComputeOptions()


def test_a_model_takes_another_unet_and_keeps_the_rest(model):
    tuned = load_unet(GOLDEN / "tuned" / "unet")
    changed = model.with_unet(tuned)
    assert changed.unet is tuned
    assert (changed.vae, changed.tokenizer) == (model.vae, model.tokenizer)


def test_half_precision_files_are_read_if_there_are_no_others(folder, model):
    for path in folder.glob("*/*.safetensors"):
        halves = {name: tensor.astype(np.float16) for name, tensor in load_file(path).items()}
        save_file(halves, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})

    def halved(params):
        return {
            name: value if in_modules(name, TEMPORAL) else value.astype("float16").astype("float32")
            for name, value in params.items()
        }

    plain, variant = load_model(folder), load_model(folder, variant="fp16")
    for path in folder.glob("*/*model.safetensors"):
        path.unlink()
    only_halves = load_model(folder)
    for part in ("text_encoder", "vae", "unet"):
        params = getattr(model, part).params
        same_params(getattr(plain, part).params, params)
        same_params(getattr(variant, part).params, halved(params))
        same_params(getattr(only_halves, part).params, halved(params))


# --- what is wrong with a folder


@pytest.mark.parametrize("missing", [["vae"], ["tokenizer", "unet"], PARTS], ids=" ".join)
def test_subfolders_that_are_missing_are_all_named(folder, missing):
    for part in missing:
        shutil.rmtree(folder / part)
    with pytest.raises(FileNotFoundError, match="not a Stable Diffusion folder") as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    named = re.findall(r"no (\w+)", str(error.value))
    assert sorted(named) == missing


@pytest.mark.parametrize(
    ("weights", "name", "shape"),
    [
        pytest.param(UNET_WEIGHTS, "conv_in.weight", r"\[8, 4, 3, 3\]", id="unet"),
        pytest.param(VAE_WEIGHTS, "quant_conv.bias", r"\[8\]", id="vae"),
        pytest.param(
            TEXT_WEIGHTS, "text_model.final_layer_norm.weight", r"\[16\]", id="text encoder"
        ),
    ],
)
def test_a_tensor_that_is_missing_is_named_with_its_folder(folder, weights, name, shape):
    edit_tensors(folder / weights, lambda tensors: tensors.pop(name))
    where = re.escape(str((folder / weights).parent))
    with pytest.raises(ValueError, match=rf"{where}: not the network.*\n  missing: {name} {shape}"):
        load_model(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    edit_tensors(
        folder / UNET_WEIGHTS, lambda t: t.update({"conv_in.weight": np.zeros((8, 9, 3, 3))})
    )
    expected = r"wrong shape: conv_in\.weight \[8, 9, 3, 3\], expected \[8, 4, 3, 3\]"
    with pytest.raises(ValueError, match=expected):
        load_model(folder)


CONFIGS = [
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("text", ["<html>", ""], ids=["a web page", "empty"])
def test_a_config_that_is_not_json_is_named(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder / name))}: not JSON"):
        load_model(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_no_json_object_is_named(folder, name):
    (folder / name).write_text("[]")
    with pytest.raises(ValueError, match=re.escape(str(folder / name))):
        load_model(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_missing_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(name)}: no such file"):
        load_model(folder)


def test_a_config_that_is_not_supported_is_named(folder):
    edit_json(folder / "unet" / "config.json", class_embed_type="timestep")
    where = re.escape(str(folder / "unet" / "config.json"))
    with pytest.raises(ValueError, match=rf"{where}: not supported:\n  class_embed_type"):
        load_model(folder)


def test_weights_that_are_missing_are_said_with_the_variant_looked_for(folder):
    with pytest.raises(FileNotFoundError, match=r"text_encoder: no model\.fp16\.safetensors"):
        load_model(folder, variant="fp16")


def test_a_text_encoder_of_another_width_than_the_unet_takes_is_refused(folder, model):
    config = replace(model.text_encoder.config, hidden_size=24, intermediate_size=24)
    wider = init_network(CLIPTextModel, config, jax.random.key(0))
    save_tensors(folder / TEXT_WEIGHTS, wider.params)
    edit_json(folder / "text_encoder" / "config.json", hidden_size=24, intermediate_size=24)
    with pytest.raises(ValueError, match="text encoder gives states 24 wide, the U-Net takes 16"):
        load_model(folder)


def test_a_unet_that_takes_other_channels_than_the_autoencoder_gives_is_refused(folder):
    edit_json(folder / "unet" / "config.json", in_channels=9)  # as for inpainting
    edit_tensors(
        folder / UNET_WEIGHTS,
        lambda t: t.update({"conv_in.weight": np.zeros((8, 9, 3, 3), np.float32)}),
    )
    with pytest.raises(ValueError, match=r"9.*4|4.*9"):
        load_model(folder)


@pytest.mark.parametrize(
    "missing", [["vocab.json"], ["merges.txt"], ["merges.txt", "vocab.json"]], ids=" ".join
)
def test_a_tokenizer_without_its_vocabulary_is_refused(folder, missing):
    # transformers makes one of two words without a warning, to which every prompt is the same.
    for name in missing:
        (folder / "tokenizer" / name).unlink()
    with pytest.raises((ValueError, OSError), match=re.escape(str(folder / "tokenizer"))):
        load_tokenizer(folder / "tokenizer")


# --- saving


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="float32"),
        pytest.param({"dtype": "bfloat16"}, id="bfloat16"),
        pytest.param({"dtype": "bfloat16", "float32_modules": ["attn_temp"]}, id="both"),
    ],
)
def test_a_saved_unet_is_loaded_bit_for_bit(tmp_path, options):
    unet = load_unet(GOLDEN / "tuned" / "unet", **options)
    save_unet(tmp_path / "run" / "unet", unet)
    again = load_unet(tmp_path / "run" / "unet", **options)
    assert again.config == unet.config
    assert again.compute == unet.compute
    same_params(again.params, unet.params)


def test_an_inflated_unet_is_saved_as_a_3d_one(tmp_path, model):
    save_unet(str(tmp_path), model.unet)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "UNet3DConditionModel"
    same_params(load_unet(tmp_path, key=jax.random.key(9)).params, model.unet.params)


def test_a_saved_unet_has_the_names_shapes_types_and_mark_of_the_published_file(tmp_path):
    save_unet(tmp_path, load_unet(GOLDEN / "tuned" / "unet"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]

    def contents(folder):
        path = folder / "diffusion_pytorch_model.safetensors"
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata(), {n: (s.get_shape(), s.get_dtype()) for n, s in slices.items()}

    assert contents(tmp_path) == contents(GOLDEN / "tuned" / "unet")


# --- prompts


def test_prompts_become_ids_padded_to_the_length_of_the_text_encoder(model):
    ids = tokenize(model, ["a photo of a cat", ""])
    start, end = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    assert ids.shape == (2, 77)
    assert ids.dtype == np.int32
    assert (ids[:, 0] == start).all()
    assert (ids[1, 1:] == end).all()
    assert model.tokenizer.decode(ids[0], skip_special_tokens=True) == "a photo of a cat"


def test_a_prompt_that_just_fits_is_read_without_a_warning(model):
    ids = tokenize(model, ["a " * 75])
    assert np.count_nonzero(ids == model.tokenizer.eos_token_id) == 1


def test_a_prompt_that_is_too_long_is_cut_with_a_warning_that_quotes_the_rest(model):
    with pytest.warns(UserWarning, match="79 tokens, 77 are read; cut off: 'photo of'") as warned:
        ids = tokenize(model, ["a photo", "a " * 75 + "photo of"])
    assert len(warned) == 1
    assert ids[1, -1] == model.tokenizer.eos_token_id
    assert (ids[1, 1:-1] == ids[0, 1]).all()


def test_padding_is_the_tokenizers_own(folder, model):
    # Stable Diffusion 2 pads with "!", number 0.
    edit_json(folder / "tokenizer" / "tokenizer_config.json", pad_token="!")
    edit_json(folder / "tokenizer" / "special_tokens_map.json", pad_token="!")
    padded = replace(model, tokenizer=load_tokenizer(folder / "tokenizer"))
    (ids,) = tokenize(padded, ["a"])
    assert ids[2] == model.tokenizer.eos_token_id
    assert (ids[3:] == model.tokenizer.convert_tokens_to_ids("!")).all()


@pytest.mark.skipif(not CLIP_TOKENIZER.is_dir(), reason="CLIP's vocabulary is not here")
def test_clips_vocabulary_gives_clips_ids(model):
    clip = replace(model, tokenizer=load_tokenizer(CLIP_TOKENIZER))
    (ids,) = tokenize(clip, ["a photo of a cat"])
    assert ids[:7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (ids[7:] == 49407).all()


# --- the Hub

COMMIT = "1" * 40
CLUTTER = [
    "README.md",
    "v1-4-pruned.ckpt",
    "safety_checker/model.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "text_encoder/pytorch_model.bin",
    "text_encoder/flax_model.msgpack",
]
ALWAYS = sorted(
    str(path.relative_to(BASE))
    for path in BASE.rglob("*")
    if path.suffix == ".json" or path.parent.name == "tokenizer"
)
SHARDS = [f"diffusion_pytorch_model-{i:05}-of-00002.safetensors" for i in (1, 2)]

CLIP_PROCESSOR = ["config.json", "merges.txt", "preprocessor_config.json", "vocab.json"]
CLIP_WEIGHTS = "model.safetensors"
CLIP_CLUTTER = ["README.md", "pytorch_model.bin", "flax_model.msgpack", "onnx/model.safetensors"]


def with_fp16(name):
    return name.replace(".safetensors", ".fp16.safetensors")


def hub_repositories():
    """Name, then path and content, of each repository that the stand-in has."""
    plain = {name: (BASE / name).read_bytes() for name in ALWAYS}
    plain |= {name: (BASE / name).read_bytes() for name in (UNET_WEIGHTS, VAE_WEIGHTS)}
    plain |= {TEXT_WEIGHTS: (BASE / TEXT_WEIGHTS).read_bytes()}
    plain |= dict.fromkeys(CLUTTER, b"never to be read")
    weights = (UNET_WEIGHTS, VAE_WEIGHTS, TEXT_WEIGHTS)
    both = plain | {with_fp16(name): plain[name] for name in weights}
    half = {with_fp16(name) if name in weights else name: both[name] for name in plain}
    index = {"weight_map": {"conv_in.weight": SHARDS[0], "conv_in.bias": SHARDS[1]}}
    sharded = {name: data for name, data in plain.items() if name != UNET_WEIGHTS}
    sharded[f"{UNET_WEIGHTS}.index.json"] = json.dumps(index).encode()
    sharded |= {f"unet/{name}": name.encode() for name in [*SHARDS, "an-old-shard.safetensors"]}
    return {
        "me/plain": plain,
        "me/both": both,
        "me/both-again": both,
        "me/half": half,
        "me/sharded": sharded,
        "me/never-asked-for": plain,
        "me/clip": dict.fromkeys([*CLIP_PROCESSOR, CLIP_WEIGHTS, *CLIP_CLUTTER], b"{}"),
        "me/processor": dict.fromkeys([*CLIP_PROCESSOR, CLIP_WEIGHTS, *CLIP_CLUTTER], b"[]"),
    }


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as its client asks of it: list of files, commit, files."""

    repositories = hub_repositories()

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        match self.path.partition("?")[0].strip("/").split("/"):
            case ["api", "models", *name, ("tree" | "revision") as kind, _] if (
                files := self.repositories.get("/".join(name))
            ):
                tree = [{"type": "file", "path": p, "size": 1, "oid": ""} for p in files]
                info = {"id": "/".join(name), "sha": COMMIT, "siblings": []}
                self.answer(json.dumps(tree if kind == "tree" else info).encode())
            case [user, name, "resolve", _, *path]:
                self.answer(self.repositories[f"{user}/{name}"]["/".join(path)])
            case _:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

    def answer(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", hashlib.sha256(content).hexdigest())
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


FIND = """
import json, sys, time
time.sleep = lambda seconds: None  # the client waits longer before every further try
from tav_jax.pretrained.hub import CLIP_STEMS, find_folder
kinds = {
    "me/clip": dict(option="clip", stems=CLIP_STEMS, index="config.json"),
    "me/no-clip": dict(option="clip", stems=CLIP_STEMS, index="config.json"),
    "me/processor": dict(option="processor", stems={}, index="preprocessor_config.json"),
}
answers = []
for repo, variant in json.loads(sys.argv[1]):
    try:
        answers.append(str(find_folder(repo, variant=variant, **kinds.get(repo, {}))))
    except BaseException as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


def find_elsewhere(requests, **environment):
    """Return what `find_folder` returns for each repository and variant, or its error.

    It runs in a process of its own, because the client reads its environment once.
    """
    result = subprocess.run(
        [sys.executable, "-c", FIND, json.dumps(requests)],
        env=os.environ | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The environment that leads to the Hub and what it answered; by then the Hub is gone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
    }
    requests = [
        ["me/plain", None],
        ["me/both", None],
        ["me/both-again", "fp16"],
        ["me/half", None],
        ["me/sharded", None],
        ["me/unknown", None],
        ["me/clip", None],
        ["me/processor", None],
        ["me/no-clip", None],
    ]
    try:
        answers = find_elsewhere(requests, **environment)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    return environment, {repo: answer for (repo, _), answer in zip(requests, answers, strict=True)}


PLAIN_WEIGHTS = [UNET_WEIGHTS, VAE_WEIGHTS, TEXT_WEIGHTS]
FP16_WEIGHTS = [with_fp16(name) for name in PLAIN_WEIGHTS]
SHARDED_WEIGHTS = [
    f"{UNET_WEIGHTS}.index.json",
    *(f"unet/{name}" for name in SHARDS),
    VAE_WEIGHTS,
    TEXT_WEIGHTS,
]


@pytest.mark.parametrize(
    ("repo", "weights"),
    [
        pytest.param("me/plain", PLAIN_WEIGHTS, id="plain"),
        pytest.param("me/both", PLAIN_WEIGHTS, id="plain where fp16 is there too"),
        pytest.param("me/both-again", FP16_WEIGHTS, id="fp16 where it is asked for"),
        pytest.param("me/half", FP16_WEIGHTS, id="fp16 where it is all there is"),
        pytest.param("me/sharded", SHARDED_WEIGHTS, id="sharded"),
    ],
)
def test_of_a_repository_only_what_will_be_read_is_downloaded(hub, repo, weights):
    _, answers = hub
    assert files_in(answers[repo]) == sorted([*ALWAYS, *weights])


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


def test_of_clip_the_weights_are_downloaded_and_of_another_ones_processor_none(hub):
    _, answers = hub
    assert files_in(answers["me/clip"]) == sorted([*CLIP_PROCESSOR, CLIP_WEIGHTS])
    assert files_in(answers["me/processor"]) == CLIP_PROCESSOR
    kind, message = answers["me/no-clip"]
    assert kind == "MissingFileError"
    assert message.startswith("clip: no folder 'me/no-clip', nor such a model on the Hub")


def test_a_downloaded_model_loads_like_the_folder(hub, model):
    _, answers = hub
    downloaded = load_model(answers["me/plain"])
    for part in ("text_encoder", "vae", "unet"):
        same_params(getattr(downloaded, part).params, getattr(model, part).params)


def one_line_without(repo, answer):
    """Check that one line says that no model was found, and return the line."""
    kind, message = answer
    assert kind == "MissingFileError"
    assert message.startswith(f"pretrained_model_path: no folder '{repo}', nor such a model")
    assert len(message.splitlines()) == 1
    return message


def test_an_id_that_the_hub_does_not_know_is_one_line_that_says_so(hub):
    _, answers = hub
    message = one_line_without("me/unknown", answers["me/unknown"])
    # The Hub was asked, and answered.
    assert "outgoing traffic has been disabled" not in message


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({"HF_HUB_OFFLINE": "1"}, id="told to stay offline"),
        pytest.param({}, id="the network is down"),
    ],
)
def without_hub(request, hub):
    """What is answered to a repository that the cache has and to one that it lacks."""
    environment, _ = hub
    requests = [["me/plain", None], ["me/never-asked-for", None], ["me/clip", None]]
    return find_elsewhere(requests, **environment, **request.param)


def test_without_the_hub_the_cache_serves_what_it_has(hub, without_hub):
    _, answers = hub
    assert without_hub[0] == answers["me/plain"]
    assert without_hub[2] == answers["me/clip"]


def test_without_the_hub_what_the_cache_lacks_is_one_line(without_hub):
    one_line_without("me/never-asked-for", without_hub[1])


@pytest.mark.parametrize(
    "path", ["./no/such/folder", "/no/such/folder", "a/b/c", "no such model"], ids=str
)
def test_a_path_that_can_be_no_id_is_one_line(path):
    with pytest.raises(FileNotFoundError, match="nor such a model on the Hub") as error:
        find_folder(path)
    assert f"'{path}'" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_folder_is_itself_and_tilde_is_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_folder(str(folder)) == folder
    assert find_folder("~/model") == folder


def test_a_saved_model_is_loaded_as_it_was(tmp_path):
    model = load_model(GOLDEN / "base")
    flat = model.unet.with_config(temporal_attention=False)
    flat = flat.with_params(
        {name: value for name, value in flat.params.items() if "_temp." not in name}
    )
    scheduler = json.loads((GOLDEN / "base/scheduler/scheduler_config.json").read_text())
    save_model(tmp_path / "copy", model.with_unet(flat), scheduler)
    again = load_model(tmp_path / "copy")
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(again, part), getattr(model, part)
        assert ours.config == theirs.config
        assert ours.params.keys() == theirs.params.keys()
        for name, value in theirs.params.items():
            np.testing.assert_array_equal(ours.params[name], value)
    prompt = ["a panda, cartoon style"]
    np.testing.assert_array_equal(tokenize(again, prompt), tokenize(model, prompt))
    np.testing.assert_array_equal(again.schedule.alphas_cumprod, model.schedule.alphas_cumprod)
