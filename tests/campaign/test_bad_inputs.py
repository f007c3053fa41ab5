"""Inputs from strangers: each wrong one is refused in one short line, early, and leaves nothing.

The programs run in this process through their `main`, on a model, a run and plans of which one
thing is wrong. The line names the offender, has at most 500 characters, and none that a terminal
obeys.
"""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from small_run import settings_of_a_run

from tav_jax import batch, sample, tune
from tav_jax.bench import __main__ as bench
from tav_jax.runs.config import dump_config, parse_config
from tav_jax.runs.samples import Sample
from tav_jax.runs.sampling_settings import SamplingSettings
from tav_jax.text import UNPRINTABLE
from tav_jax.training.checkpoints import save_items
from tav_jax.worlds import experiments, pretrain, text_to_image

ROOT = Path(__file__).parents[2]
BASE = ROOT / "tests/golden/base"
HANGS = 300  # seconds after which an input is taken to wait for ever; none takes one

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a model, a clip, a config and a run; not to be written to."""
    folder = tmp_path_factory.mktemp("material")
    shutil.copytree(BASE, folder / "model")
    settings = settings_of_a_run(folder, folder / "model") | {"max_train_steps": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text(dump_config(parse_config(settings)))
    save_items(folder / "run/checkpoints", 1, trained={"weight": np.zeros(2, np.float32)})
    return folder


@pytest.fixture
def settings(material, tmp_path):
    """The settings of a new run, to be made wrong."""
    tree = yaml.safe_load((material / "config.yaml").read_text())
    return tree | {"output_dir": str(tmp_path / "new")}


@pytest.fixture
def model(material, tmp_path):
    """A copy of the model, to be damaged. Replace its files: they are links."""
    return Path(shutil.copytree(material / "model", tmp_path / "model", copy_function=os.link))


@pytest.fixture
def run(material, tmp_path):
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(material / "run", tmp_path / "run"))


def replace(path: Path, content: str | bytes) -> None:
    """Writes a file in the place of a link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if not path.is_symlink()
    }


@contextmanager
def an_end():
    """Ends what waits for ever, such as the reader of a pipe."""

    def stop(number, frame):
        raise TimeoutError("it waits for ever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Runs a program, and checks that it refuses its input as it should."""

    def run_program(program, arguments, *names, several=False):
        monkeypatch.chdir(tmp_path)
        before = snapshot(tmp_path)
        capsys.readouterr()
        with an_end():
            try:
                status = program.main([str(one) for one in arguments])
            except SystemExit as ended:  # argparse's
                status = ended.code
        out, err = capsys.readouterr()
        assert status in (1, 2), err
        check_line(err, *names, several=several)
        assert "wrote" not in out
        assert snapshot(tmp_path) == before, "it leaves something behind"

    return run_program


def check_line(err: str, *names: str, several: bool = False) -> None:
    """Checks what was printed. If several things are wrong, there may be several lines."""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    line = err.removesuffix("\n")
    assert several or "\n" not in line, "one line"
    assert len(line) <= 500
    assert not UNPRINTABLE.search(line)
    assert "Traceback" not in line
    for name in names:
        assert name in line


# Settings in YAML: every key with values of other types and out of bounds.

LONG = "x" * 100_000
NO_INTEGER = [True, "many", 1.5, [1], {"a": 1}, float("nan"), -(10**30), 10**30]
NO_NUMBER = [True, "fast", [1], {}, float("nan"), float("inf"), "1e400", -1, LONG]
NO_TEXT = [3, True, ["a"], {"a": "b"}, 1.5]
NO_PATH = [*NO_TEXT, "", "a\0b", "~nosuchuser/x"]
NO_CHOICE = ["sawtooth", 3, ["a"], LONG]
NO_TRUTH = ["maybe", 3, [True], None]
NO_TEXTS = ["a", 3, {"a": "b"}, [3], [["a"]], [None] * 1000]
NO_SECTION = [3, "a", [1], None, {f"unknown{index}": 1 for index in range(1000)}]

WRONG_VALUES = {
    "pretrained_model_path": NO_PATH,
    "output_dir": NO_PATH,
    "train_data": NO_SECTION,
    "train_data.video_path": NO_PATH,
    "train_data.prompt": [*NO_TEXT, None, LONG],
    "train_data.n_sample_frames": [*NO_INTEGER, None, 0, 5000],
    "train_data.width": [*NO_INTEGER, 0, 12, 10**9],
    "train_data.height": [*NO_INTEGER, 0, 12, 10**9],
    "train_data.sample_start_idx": [*NO_INTEGER, -1],
    "train_data.sample_frame_rate": [*NO_INTEGER, 0],
    "train_data.sampling": NO_CHOICE,
    "train_data.fit": NO_CHOICE,
    "validation_data": NO_SECTION,
    "validation_data.prompts": NO_TEXTS,
    "validation_data.negative_prompt": [*NO_TEXT, LONG],
    "validation_data.num_inference_steps": [*NO_INTEGER, 0, 1000],
    "validation_data.num_inv_steps": [*NO_INTEGER, 0, 1000],
    "validation_data.sampler": NO_CHOICE,
    "validation_data.guidance_scale": [*NO_NUMBER, 1e30],
    "validation_data.eta": [*NO_NUMBER, 1.5],
    "validation_data.use_inv_latent": NO_TRUTH,
    "validation_data.video_length": [*NO_INTEGER, 0, 10**9],
    "validation_data.video_format": NO_CHOICE,
    "validation_data.fps": [*NO_NUMBER, 0, 10**9, 1e-9],
    "validation_steps": [*NO_INTEGER, 0],
    "trainable_modules": NO_TEXTS,
    "train_batch_size": [*NO_INTEGER, 0, 10**6],
    "max_train_steps": [*NO_INTEGER, -1],
    "learning_rate": [*NO_NUMBER, 0, 1e30],
    "scale_lr": NO_TRUTH,
    "lr_scheduler": NO_CHOICE,
    "lr_warmup_steps": [*NO_INTEGER, -1],
    "adam_beta1": [*NO_NUMBER, 1],
    "adam_beta2": [*NO_NUMBER, 1],
    "adam_weight_decay": [*NO_NUMBER, 1e30],
    "adam_epsilon": [*NO_NUMBER, 0],
    "max_grad_norm": [*NO_NUMBER, 0],
    "gradient_accumulation_steps": [*NO_INTEGER, 0],
    "attention": NO_CHOICE,
    "gradient_checkpointing": NO_CHOICE,
    "memory_limit_gb": [*NO_NUMBER, 0],
    "checkpointing_steps": [*NO_INTEGER, 0],
    "resume_from_checkpoint": NO_PATH,
    "mixed_precision": NO_CHOICE,
    "seed": [*NO_INTEGER, -1, 2**63],
    "attention_scope": NO_CHOICE,
    "mesh": NO_SECTION[:-1],
    "mesh.data": [*NO_INTEGER, 0, -2],
    "mesh.frames": [*NO_INTEGER, 0, -2],
    "mesh.fsdp": [*NO_INTEGER, 0, -2],
    "revision": [*NO_TEXT, LONG],
    "variant": [*NO_TEXT, LONG],
}


def name_of(value: object) -> str:
    text = repr(value).encode("unicode_escape").decode()
    return text if len(text) < 30 else f"{text[:20]}...{len(text)}"


def put(tree: dict, key: str, value: object) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[name] = value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param(key, value, id=f"{key}={name_of(value)}")
        for key, values in WRONG_VALUES.items()
        for value in values
    ],
)
def test_a_wrong_value_of_a_setting(key, value, settings, refused, tmp_path):
    put(settings, key, value)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings, width=10**6))
    # In a section or in a list of a thousand items several things are wrong, each in its line.
    section = key in ("train_data", "validation_data", "mesh")
    several = section or (isinstance(value, list) and len(value) > 100)
    arguments = ["--config", tmp_path / "c.yaml"]
    refused(tune, arguments, key.split(".")[-1], "c.yaml", several=several)


# Files that are no settings.


def bomb(depth: int, start: str = "[", end: str = "]") -> str:
    """Returns YAML whose last alias stands for 10^depth values."""
    lines = [f"a0: &a0 {start}{', '.join('abcdefghij')}{end}"]
    for level in range(1, depth):
        items = ", ".join(
            [f"*a{level - 1}"] * 10
            if start == "["
            else [f"{key}: *a{level - 1}" for key in "abcdefghij"]
        )
        lines.append(f"a{level}: &a{level} {start}{items}{end}")
    return "\n".join([*lines, f"seed: *a{depth - 1}"])


NO_YAML = {
    "aliases that multiply": (bomb(9), "aliases"),
    "aliases that multiply under keys": (bomb(9, "{", "}"), "aliases"),
    "aliases that multiply a little": (bomb(6), "aliases"),
    "an alias of itself": ("seed: &a [*a]", "itself, line 1"),
    "an alias of itself as a section": ("mesh: &a\n  data: *a", "itself, line 2"),
    "an alias of nothing": ("seed: *nothing", "line 1"),
    "ten thousand brackets": ("seed: " + "[" * 10_000, "line 1"),
    "ten thousand braces": ("seed: " + "{a: " * 10_000, "line 1"),
    "three hundred sections": ("\n".join(f"{' ' * n}a:" for n in range(300)), "within each other"),
    "a key twice": ("seed: 1\nmax_train_steps: 2\nseed: 3", "'seed' is there twice, line 3"),
    "a key twice in a section": ("train_data:\n  width: 8\n  width: 16", "'width'"),
    "a key twice in braces": ("mesh: {data: 1, data: 1}", "'data'"),
    "a key twice, once quoted": ("seed: 1\n'seed': 1", "'seed' is there twice, line 2"),
    "a section twice": ("mesh: {}\nmesh: {}", "'mesh'"),
    "a list as a key": ("[a, b]: 1", "line 1"),
    "a number of 5000 digits": ("seed: " + "9" * 5000, "line 1"),
    "a date that is none": ("seed: 2001-99-99", "line 1"),
    "bytes that are none": ('seed: !!binary "a"', "line 1"),
    "no number, tagged as one": ("seed: !!int many", "line 1"),
    "no truth, tagged as one": ("scale_lr: !!bool many", "line 1"),
    "no date, tagged as one": ("seed: !!timestamp many", "line 1"),
    "an object of Python": ("seed: !!python/object/apply:os.getcwd []", "line 1"),
    "half a character": ('seed: "\\ud800"', "line 1"),
    "half a character in a key": ('"\\udfff": 1', "line 1"),
    "two documents": ("seed: 1\n---\nseed: 2", "line 2"),
    "a tab": ("train_data:\n\tprompt: a", "line 2"),
    "an open quote": ('seed: "1', "line"),
    "an open bracket": ("seed: [1", "line"),
    "a null character": ("seed: 1\0", "c.yaml"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "UTF-8"),
    "Latin-1": ("seed: 1\nprompt: caf\xe9".encode("latin-1"), "line 2"),
    "a picture": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "UTF-8"),
    "empty": ("", "keys and values"),
    "a list": ("- a", "keys and values"),
    "a text": ("a", "keys and values"),
    "a number": ("3", "keys and values"),
    "a merge of no mapping": ("<<: 3", "line 1"),
    "a merge of itself": ("a: &a\n  <<: *a", "itself, line 2"),
}


@pytest.mark.parametrize(("content", "name"), NO_YAML.values(), ids=NO_YAML)
def test_a_file_that_is_no_settings(content, name, refused, tmp_path):
    replace(tmp_path / "c.yaml", content)
    refused(tune, ["--config", tmp_path / "c.yaml"], name, "c.yaml")


ODD_VALUES = {
    "hexadecimal digits": ("\n\nseed: 0x" + "f" * 50_000, "seed: Input", "line 3"),
    "a date": ("seed: 2001-01-01", "seed: Input", "line 1"),
    "bytes": ("seed: !!binary aGVsbG8=", "seed: Input", "line 1"),
    "a set": ("seed: !!set {a, b}", "seed: Input", "line 1"),
    "a text of 100,000 letters": (f"seed: {LONG}", "seed: Input", "line 1"),
    "a small bomb": (bomb(4).replace("seed:", "max_train_steps:"), "max_train_steps", "line"),
    "controls of a terminal": ('seed: "\\e]0;title\\a"', "seed: Input", "\\x1b"),
    "C1 controls of a terminal": ('seed: "\\x9b31m"', "seed: Input", "\\x9b"),
    "text turned around": ('seed: "\u202eabc"', "seed: Input", "\\u202e"),
    "a key that controls the terminal": ('"\\e[31mred\\e[0m": 1', "unknown key", "\\x1b"),
    "a key that turns the text around": ('"\u202eabc": 1', "unknown key", "\\u202e"),
    "a key of 100,000 letters": (f"? {LONG}\n: 1", "unknown key", "line 1"),
    "a key that is no word": ("3: 4", "3: unknown key"),
    "a key that is nothing": ("null: 4", "null: unknown key"),
    "a misspelt key": ("\nmax_train_step: 4", "did you mean max_train_steps?, line 2"),
}


@pytest.mark.parametrize("case", ODD_VALUES.values(), ids=ODD_VALUES)
def test_an_odd_key_or_value(case, settings, refused, tmp_path):
    content, *names = case
    replace(tmp_path / "c.yaml", f"{content}\n{yaml.safe_dump(settings)}")
    several = "&a0" in content  # whose lists stand under keys of their own
    refused(tune, ["--config", tmp_path / "c.yaml"], *names, "c.yaml", several=several)


def make_pipe(path):
    os.mkfifo(path)


NO_FILES = {
    "a pipe": (make_pipe, "pipe"),
    "a folder": (Path.mkdir, "{name}"),
    "nothing": (lambda path: None, "{name}"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "{name}"),
    "a link to itself": (lambda path: path.symlink_to(path), "{name}"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "device"),
    "a link to a pipe": (lambda path: (make_pipe(path.parent / "p"), path.symlink_to("p")), "pipe"),
}
# What takes a file: a program and its arguments, in which FILE stands for the file.
TAKES_A_FILE = {
    "config": (tune, ["--config", "FILE"]),
    "clips": (tune, ["--config", "{material}/config.yaml", "--clips", "FILE"]),
    "prompts": (sample, ["--run", "{material}/run", "--prompts", "FILE"]),
    "plan": (batch, ["FILE"]),
    "experiment": (experiments, ["--config", "FILE"]),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("option", TAKES_A_FILE)
def test_what_is_no_file(kind, option, material, refused, tmp_path):
    make, name = NO_FILES[kind]
    make(tmp_path / "stranger.yaml")
    program, arguments = TAKES_A_FILE[option]
    filled = [one.format(material=material).replace("FILE", "stranger.yaml") for one in arguments]
    refused(program, filled, name.format(name="stranger.yaml"), "stranger.yaml")


@pytest.mark.parametrize("option", TAKES_A_FILE)
@pytest.mark.parametrize("content", [b"\xff\xfe\x00a", b"", b"\n \n"], ids=["no text", "", "blank"])
def test_a_file_without_text(content, option, material, refused, tmp_path):
    replace(tmp_path / "stranger.yaml", content)
    program, arguments = TAKES_A_FILE[option]
    filled = [one.format(material=material).replace("FILE", "stranger.yaml") for one in arguments]
    refused(program, filled, "stranger.yaml")


# key=value.

OVERRIDES = {
    "max_train_steps": "expected key=value",
    "=3": "expected key=value",
    LONG: "expected key=value",
    "output_dir.x=3": "'output_dir' holds a value",
    "train_data.width.x=3": "'width' holds a value",
    "seed=[1": "'seed=[1'",
    "seed={a: 1": "'seed={a: 1'",
    "seed=!!python/name:os.system": "seed",
    "seed=*a": "seed",
    "seed=&a [*a]": "seed",
    f"seed={'[' * 5000}": "seed",
    f"seed={LONG}": "seed: Input",
    "seed=true": "seed: Input",
    "seed=1e400": "seed: Input",
    "mesh.data={a: 1, a: 2}": "'a' is there twice",
    "learning_rate=.inf": "learning_rate: Input should be a finite",
    "learning_rate=nan": "learning_rate: Input should be a finite",
    "learning_rate=0": "learning_rate: Input",
    "train_batch_size=1000000": "train_batch_size: Input",
    "validation_data.fps=0": "fps: Input",
    "validation_data.fps=inf": "fps: Input",
    "validation_data.guidance_scale=.inf": "guidance_scale: Input",
    "validation_data.prompts=a cat": "prompts: Input",
    "validation_data.prompts=[a, 3]": "prompts.1: Input",
    "train_data.width=1000000000": "width: Input",
    "train_data.widht=8": "did you mean train_data.width?",
    "train_data=3": "train_data: Input",
    "output_dir=": "output_dir: Input should be a path",
    "output_dir=~nosuchuser/x": "no such user",
    "pretrained_model_path=~nosuchuser/x": "no such user",
    "resume_from_checkpoint=~nosuchuser/x": "no such user",
    "train_data.video_path=~nosuchuser/x": "no such user",
    "train_data.prompt=\udcff": "not text",
    "\udcff=1": "not text",
    "\x1b[31m=1": "unknown key",
    f"train_data.prompt={LONG}": "prompt: String should have at most",
}


@pytest.mark.parametrize("override", OVERRIDES, ids=name_of)
def test_a_wrong_override(override, material, refused, tmp_path):
    arguments = ["--config", material / "config.yaml", "output_dir=new", override]
    refused(tune, arguments, OVERRIDES[override])


@pytest.mark.parametrize("sizes", ["n_sample_frames=4096 8192 8192", "video_length=4096 8192 8192"])
def test_a_clip_that_is_too_large_as_a_whole(sizes, material, refused):
    frames, width, height = sizes.split()
    section = "train_data" if "n_sample" in frames else "validation_data"
    values = [f"{section}.{frames}", f"{section}.width={width}", f"{section}.height={height}"]
    arguments = [*values, "validation_data.use_inv_latent=false", "output_dir=new"]
    refused(tune, ["--config", material / "config.yaml", *arguments], "4096 frames of 8192x8192")


# Clips.

CLIPS = {
    "no list": ("a: 1", "expected a list"),
    "an empty list": ("[]", "expected a list"),
    "no section": ("- 3", "expected a list"),
    "a misspelt key": ("- train_dat: {}", "did you mean train_data?, line 1"),
    "a wrong section": ("- train_data: 3", "train_data"),
    "a wrong number": ("- {}\n- seed: many", "clip 2"),
    "a key twice": ("- seed: 1\n  seed: 2", "'seed' is there twice, line 2"),
    "a folder that is none": ("- output_dir: 3", "output_dir"),
}


@pytest.mark.parametrize(("content", "name"), CLIPS.values(), ids=CLIPS)
def test_wrong_clips(content, name, material, refused, tmp_path):
    replace(tmp_path / "clips.yaml", content)
    arguments = ["--config", material / "config.yaml", "--clips", "clips.yaml"]
    refused(tune, [*arguments, "output_dir=new"], name, "clips.yaml")


# Models: the JSON of each part, key by key.

TOO_MUCH = [10**9, True, 8.5, "8", [], {}, 0, -1]
LISTS = [8, "8", [], [8.5, 8], [True, 8], [8, -8], [8] * 100, [10**9, 8], {"a": 1}, [7, 8]]
BLOCKS = [8, [], ["KDownBlock2D", "DownBlock2D"], [3, 4], ["x"] * 1000, "DownBlock2D", [LONG]]
REALS = [True, "1e-5", [1e-5], 0, -1, 1e30, float("nan"), float("inf")]

WRONG_JSON = {
    "unet/config.json": {
        "in_channels": TOO_MUCH,
        "out_channels": TOO_MUCH,
        "block_out_channels": LISTS,
        "attention_head_dim": [10**9, True, 8.5, "8", {}, -1, [0, 2], [2] * 100, [True, 2]],
        "down_block_types": BLOCKS,
        "up_block_types": BLOCKS,
        "layers_per_block": [100_000, *TOO_MUCH, [1, 2]],
        "cross_attention_dim": [*TOO_MUCH, [8, 8]],
        "norm_num_groups": TOO_MUCH,
        "norm_eps": REALS,
        "use_linear_projection": ["no", 3, [True]],
        "flip_sin_to_cos": ["no", 3, [True]],
        "freq_shift": ["1", True, -1, 4, float("nan")],
        "sample_size": ["64", True, -1, 10**9],
        "act_fn": ["gelu", 3, [1]],
        "novelty": [True, LONG, [LONG] * 10],
    },
    "vae/config.json": {
        "in_channels": TOO_MUCH,
        "out_channels": TOO_MUCH,
        "latent_channels": TOO_MUCH,
        "block_out_channels": LISTS,
        "down_block_types": BLOCKS,
        "up_block_types": BLOCKS,
        "layers_per_block": [100_000, *TOO_MUCH],
        "norm_num_groups": TOO_MUCH,
        "scaling_factor": [True, "1", [1], 0, -1, 1e30, float("nan"), float("inf")],
        "latents_mean": [[0.0] * 1000],
    },
    "text_encoder/config.json": {
        "vocab_size": TOO_MUCH,
        "hidden_size": TOO_MUCH,
        "intermediate_size": TOO_MUCH,
        "num_hidden_layers": [10**6, *TOO_MUCH],
        "num_attention_heads": [*TOO_MUCH, 7],
        "max_position_embeddings": TOO_MUCH,
        "layer_norm_eps": REALS,
        "hidden_act": ["relu", 3, ["gelu"], LONG],
        "model_type": ["t5", 3],
    },
    "scheduler/scheduler_config.json": {
        "num_train_timesteps": [10**9, 10**30, True, 8.5, "8", [], {}, 0, -1],
        "beta_start": [*REALS, 1],
        "beta_end": [*REALS, 1],
        "beta_schedule": ["sigmoid", 3, [1]],
        "prediction_type": ["sample", 3, {}],
        "set_alpha_to_one": ["no", 3, [1]],
        "trained_betas": [[0.1] * 1000],
    },
    "model_index.json": {
        "unet": [3, "unet", [], ["diffusers"], [3, 4], {"a": 1}],
        "tokenizer": [True, ["transformers", "CLIPTokenizer", "more"]],
        "scheduler": [0.5],
    },
    "tokenizer/tokenizer_config.json": {
        "bos_token": [3, ["a"], {"contents": "a"}, {"content": 3}, LONG],
        "unk_token": [True, {}],
        "tokenizer_class": [3],
        "add_prefix_space": ["no", 3],
        "errors": [3],
    },
}


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        pytest.param(file, key, value, id=f"{file}:{key}={name_of(value)}")
        for file, keys in WRONG_JSON.items()
        for key, values in keys.items()
        for value in values
    ],
)
def test_a_wrong_value_in_a_models_json(file, key, value, material, model, refused):
    path = model / file
    replace(path, json.dumps(json.loads(path.read_text("utf-8")) | {key: value}))
    arguments = ["--config", material / "config.yaml", f"pretrained_model_path={model}"]
    # Of a list several items may be wrong.
    several = isinstance(value, list) and len(value) > 1
    refused(tune, [*arguments, "output_dir=new"], key, file, several=several)


NO_JSON = {
    "a web page": b"<html>",
    "empty": b"",
    "cut off": b'{"in_channels": 4',
    "a list": b"[]",
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "a key twice": b'{"in_channels": 4, "in_channels": 4}',
    "5000 digits": b'{"in_channels": ' + b"9" * 5000 + b"}",
    "no UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("kind", NO_JSON)
@pytest.mark.parametrize("file", WRONG_JSON)
def test_a_file_of_a_model_that_is_no_json(kind, file, material, model, refused):
    replace(model / file, NO_JSON[kind])
    arguments = ["--config", material / "config.yaml", f"pretrained_model_path={model}"]
    refused(tune, [*arguments, "output_dir=new"], file)


@pytest.mark.parametrize("file", [*WRONG_JSON, UNET, VAE, TEXT, "tokenizer/vocab.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link to a device", "a link to a pipe"])
def test_what_is_no_file_in_a_model(kind, file, material, model, refused):
    (model / file).unlink()
    NO_FILES[kind][0](model / file)
    arguments = ["--config", material / "config.yaml", f"pretrained_model_path={model}"]
    refused(tune, [*arguments, "output_dir=new"], str(Path(file).parent).removesuffix("."))


NO_VOCABULARY = {
    "cut off": '{"a": 0',
    "empty": "",
    "a list": "[]",
    "texts": '{"a": "b"}',
    "a web page": "<html>",
}


@pytest.mark.parametrize("content", NO_VOCABULARY.values(), ids=NO_VOCABULARY)
def test_a_damaged_vocabulary(content, material, model, refused):
    replace(model / "tokenizer/vocab.json", content)
    arguments = ["--config", material / "config.yaml", f"pretrained_model_path={model}"]
    refused(tune, [*arguments, "output_dir=new"], "tokenizer")


def test_a_tokenizer_of_more_tokens_than_are_embedded(material, model, refused):
    vocabulary = json.loads((model / "tokenizer/vocab.json").read_text("utf-8"))
    last = max(vocabulary, key=vocabulary.__getitem__)
    replace(model / "tokenizer/vocab.json", json.dumps(vocabulary | {last: 10**6}))
    arguments = ["--config", material / "config.yaml", f"pretrained_model_path={model}"]
    refused(tune, [*arguments, "output_dir=new"], "the tokenizer has 1000001 tokens")


# Models: weights.


def header_of(data: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(text: str, body: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + body


def changed(edit):
    def damage(path):
        tensors = load_file(path)
        edit(tensors, sorted(tensors)[0])
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def number(value):
    return changed(lambda tensors, name: tensors[name].reshape(-1).__setitem__(-1, value))


def of_type(kind):
    return changed(lambda tensors, name: tensors.update({name: tensors[name].astype(kind)}))


def rewritten(edit):
    return lambda path: replace(path, edit(path.read_bytes()))


def twice_in_the_header(data: bytes) -> bytes:
    header, body = header_of(data)
    name = next(name for name in header if name != "__metadata__")
    text = json.dumps(header)
    return with_header(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}", body)


def other_type_in_the_header(data: bytes) -> bytes:
    header, body = header_of(data)
    name = sorted(set(header) - {"__metadata__"})[0]
    header[name]["dtype"] = "F8_E4M3"
    return with_header(json.dumps(header), body)


DAMAGE = {
    "NaN": (number(np.nan), "NaN or infinite"),
    "infinite": (number(np.inf), "NaN or infinite"),
    "minus infinite": (number(-np.inf), "NaN or infinite"),
    "integers": (of_type(np.int32), "has the type I32"),
    "truths": (of_type(np.bool_), "has the type BOOL"),
    "bytes": (of_type(np.uint8), "has the type U8"),
    "a tensor more": (
        changed(lambda tensors, name: tensors.update({"text_model.more": np.zeros(2, "f4")})),
        "left over: text_model.more [2]",
    ),
    "a tensor less": (changed(lambda tensors, name: tensors.pop(name)), "missing: "),
    "a tensor of another shape": (
        changed(lambda tensors, name: tensors.update({name: np.zeros((2, 3, 4), "f4")})),
        "[2, 3, 4], expected",
    ),
    "a tensor of no numbers": (
        changed(lambda tensors, name: tensors.update({name: np.zeros(0, "f4")})),
        "wrong shape",
    ),
    "half of the file": (rewritten(lambda data: data[: len(data) // 2]), "damaged or cut off"),
    "half of the header": (rewritten(lambda data: data[:200]), "damaged or cut off"),
    "nothing": (rewritten(lambda data: b""), "damaged or cut off"),
    "seven bytes": (rewritten(lambda data: data[:7]), "damaged or cut off"),
    "a web page": (rewritten(lambda data: b"<html>not found</html>"), "damaged or cut off"),
    "a pointer": (rewritten(lambda data: b"version https://git-lfs"), "damaged or cut off"),
    "a header of 2^63 bytes": (rewritten(lambda data: b"\xff" * 8 + data[8:]), "damaged"),
    "a header that is no JSON": (rewritten(lambda data: data[:8] + b"x" + data[9:]), "damaged"),
    "a header of another form": (rewritten(lambda data: with_header('{"a": 3}', b"")), "damaged"),
    "a name twice": (rewritten(twice_in_the_header), "is there twice"),
    "a type of 8 bits": (rewritten(other_type_in_the_header), "has the type F8_E4M3"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_damaged_weights(kind, file, material, model, refused):
    damage, name = DAMAGE[kind]
    damage(model / file)
    arguments = ["--config", material / "config.yaml", f"pretrained_model_path={model}"]
    refused(tune, [*arguments, "output_dir=new"], name, str(Path(file).parent))


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_short_weights_that_are_not_finite(kind, value, material, model, refused):
    tensors = {
        name: tensor.astype(getattr(ml_dtypes, kind, kind))
        for name, tensor in load_file(model / VAE).items()
    }
    tensors["quant_conv.bias"][1] = value
    (model / VAE).unlink()
    save_file(tensors, model / VAE)
    arguments = ["--config", material / "config.yaml", f"pretrained_model_path={model}"]
    refused(tune, [*arguments, "output_dir=new"], "quant_conv.bias")


INDEXES = {
    "a path upwards": ({"weight_map": {"a": "../../outside.safetensors"}}, "../../outside"),
    "an absolute path": ({"weight_map": {"a": "/etc/passwd"}}, "/etc/passwd"),
    "a path downwards": ({"weight_map": {"a": "sub/a.safetensors"}}, "sub/a"),
    "the folder": ({"weight_map": {"a": ".."}}, "'..'"),
    "no name": ({"weight_map": {"a": ""}}, "''"),
    "a number": ({"weight_map": {"a": 3}}, "damaged"),
    "a list": ({"weight_map": ["a"]}, "damaged"),
    "no map": ({}, "damaged"),
    "a file that is missing": ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors"),
}


@pytest.mark.parametrize(("index", "name"), INDEXES.values(), ids=INDEXES)
def test_a_wrong_index_of_shards(index, name, material, model, refused):
    (model / UNET).unlink()
    replace(model / f"{UNET}.index.json", json.dumps(index))
    arguments = ["--config", material / "config.yaml", f"pretrained_model_path={model}"]
    refused(tune, [*arguments, "output_dir=new"], name, "index.json")


def test_a_pickled_file_that_is_none(material, model, refused):
    (model / UNET).unlink()
    replace((model / UNET).with_suffix(".bin"), b"no pickle")
    arguments = ["--config", material / "config.yaml", f"pretrained_model_path={model}"]
    refused(tune, [*arguments, "output_dir=new"], ".bin")


def save(*names: str):
    return lambda path: save_file({name: np.zeros(2, np.float32) for name in names}, path)


SINGLE_FILES = {
    "half.safetensors": (save("model.diffusion_model.input_blocks.0.0.weight"), "its VAE and"),
    "sdxl.safetensors": (save("conditioner.embedders.0.x", "first_stage_model.x"), "an SDXL model"),
    "lora.safetensors": (save("lora_unet_down_blocks_0.lora_up.weight"), "a LoRA"),
    "unet.safetensors": (save("down_blocks.0.resnets.0.conv1.weight"), "U-Net"),
    "clip.safetensors": (save("text_model.final_layer_norm.weight"), "text encoder"),
    "other.safetensors": (save("weight"), "weights in one file"),
    "damaged.safetensors": (lambda path: path.write_bytes(b"<html>"), "damaged"),
    "model.ckpt": (lambda path: path.write_bytes(b"PK"), "no checkpoint of PyTorch 1.6 or later"),
    "model.pt": (lambda path: path.write_bytes(b"PK"), "a pickled checkpoint in one file"),
    "notes.txt": (lambda path: path.write_bytes(b"milk"), "a folder in the Hub's layout is needed"),
    "pipe.safetensors": (os.mkfifo, "a pipe"),
}


@pytest.mark.parametrize("name", SINGLE_FILES)
def test_a_file_in_the_place_of_a_models_folder(name, material, refused, tmp_path):
    make, kind = SINGLE_FILES[name]
    make(tmp_path / name)
    arguments = ["--config", material / "config.yaml", f"pretrained_model_path={name}"]
    refused(tune, [*arguments, "output_dir=new"], "pretrained_model_path", name, kind)


# The options of sample and batch.

SAMPLE_OPTIONS = {
    "--guidance-scale": ["inf", "-inf", "nan", "-1", "1e400", "1e30", "many", ""],
    "--eta": ["2", "-1", "nan", "inf", "many"],
    "--num-inference-steps": ["0", "-1", "1000", "1e3", "many", "9" * 30],
    "--num-inv-steps": ["0", "-1", "1000", "many", "9" * 30],
    "--batch-size": ["0", "-1", "1000000", "1.5", "many", "9" * 30],
    "--negative-prompt": ["\udcff", "a\udcff" * 1000, LONG],
    "--prompt": ["\udcff", "\ud800", "a\udcff" * 1000, LONG],
    "--seeds": ["a", "-1", "1,", "1.5", "9" * 30, LONG],
    "--step": ["many", "1.5", "7", "-1"],
    "--sampler": ["euler", LONG],
    "--mesh": ["frames", "frames=many", "frmes=2", "frames=0", "frames=[1", "data=1000000"],
    "--run": ["nowhere", "\x1b[31m", "."],
    "--unknown": ["1"],
}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        pytest.param(option, value, id=f"{option} {name_of(value)}")
        for option, values in SAMPLE_OPTIONS.items()
        for value in values
    ],
)
def test_a_wrong_option_of_sample(option, value, material, refused):
    arguments = ["--run", material / "run", "--prompt", "a cat", f"{option}={value}"]
    expected = "mesh" if option == "--mesh" else option
    refused(sample, arguments, expected)


def test_a_prompt_that_is_no_text_in_a_file(material, refused, tmp_path):
    replace(tmp_path / "prompts.txt", b"a cat\n\xff\xfe\n")
    arguments = ["--run", material / "run", "--prompts", "prompts.txt"]
    refused(sample, arguments, "prompts.txt", "line 2")


def test_more_videos_than_a_folder_holds(material, refused, tmp_path):
    replace(tmp_path / "prompts.txt", "\n".join(f"cat {index}" for index in range(1000)))
    seeds = ",".join(map(str, range(1000)))
    arguments = ["--run", material / "run", "--prompts", "prompts.txt", "--seeds", seeds]
    refused(sample, arguments, "1000000 videos")


PLANS = {
    "runs.yaml": ("runs: 3\nprompts: [a]", "runs"),
    "text.yaml": ("runs: [{run}]\nprompts: a cat", "prompts"),
    "empty.yaml": ("runs: []\nprompts: []", "asks for nothing"),
    "number.yaml": ("runs: [{run}]\nprompts: [3]", "prompt: ", "line 2"),
    "truth.yaml": ("runs: [{run}]\nprompts: [a]\nseeds: [true]", "seed: ", "line 3"),
    "seed.yaml": ("runs: [{run}]\nprompts: [a]\nseeds: [-1]", "seed: ", "line 3"),
    "eta.yaml": ("runs: [{run}]\nprompts: [a]\neta: 2", "eta: ", "line 3"),
    "inf.yaml": ("runs: [{run}]\nprompts: [a]\nguidance_scale: .inf", "guidance_scale: ", "line 3"),
    "misspelt.yaml": ("runs: [{run}]\nprompts: [a]\nguidence_scale: 3", "did you mean"),
    "twice.yaml": ("runs: [{run}]\nprompts: [a]\nruns: [b]", "'runs' is there twice, line 3"),
    "no run.yaml": ("runs: [nowhere]\nprompts: [a]", "nowhere is not a run"),
    "tilde.yaml": ("runs: [~nosuchuser/run]\nprompts: [a]", "run: ", "no such user"),
    "null.yaml": ('runs: ["a\\0"]\nprompts: [a]', "run: "),
    "billion.yaml": (
        f"runs: {['x'] * 1000}\nprompts: {['x'] * 1000}\nseeds: {list(range(1000))}",
        "1000000000 videos",
    ),
    "million.yaml": (
        f"runs: [{{run}}]\nprompts: {['x'] * 1000}\nseeds: {list(range(1000))}",
        "1000000 videos",
    ),
    "ten million.yaml": (
        f"runs: {['x'] * 10_000}\nprompts: {['x'] * 1000}",
        "10000000 videos",
    ),
    "bomb.yaml": (bomb(9), "aliases"),
    "half.yaml": ('runs: [{run}]\nprompts: ["\\ud800"]', "line 2"),
    "list.yaml": ("- a", "runs and prompts"),
    "key.yaml": ("runs: [{run}]\nprompts: [a]\n3: 4", "3: unknown key"),
    "eta.csv": ("run,prompt,eta\n{run},a,2\n", "line 2, eta: "),
    "nan.csv": ("run,prompt,guidance_scale\n{run},a,nan\n", "line 2, guidance_scale: "),
    "seed.csv": ("run,prompt,seed\n{run},a,many\n", "line 2, seed: "),
    "column.csv": ("run,prompt,sed\n{run},a,1\n", "line 2, sed: unknown key"),
    "cells.csv": ("run,prompt\n{run},a,b,c\n", "line 2"),
    "no run.csv": ("run,prompt\n,a\n", "line 2, run: missing"),
    "twice.csv": ("run,prompt,prompt\n{run},a,b\n", "'prompt' is there twice"),
    "huge.csv": (f"run,prompt\n{{run}},{'x' * 200_000}\n", "line 2"),
    "huge name.csv": (f"run,{'x' * 200_000}\n{{run}},a\n", "line 1"),
    "huge in quotes.csv": (f'run,prompt\n{{run}},"{"x" * 200_000}"\n', "line 2"),
    "open quote.csv": (f'run,prompt\n{{run}},"{"a,b" * 100_000}', "line 2"),
    "header.csv": ("run,prompt\n", "asks for nothing"),
    "tilde.csv": ("run,prompt\n~nosuchuser/x,a\n", "no such user"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_wrong_plan(name, material, refused, tmp_path):
    content, *names = PLANS[name]
    replace(tmp_path / name, content.replace("{run}", str(material / "run")))
    refused(batch, [name], *names)


@pytest.mark.parametrize(
    "option", ["--batch-size=0", "--batch-size=1000000", "--workers=0", "--workers=many", "--x"]
)
def test_a_wrong_option_of_batch(option, refused, tmp_path, material):
    replace(tmp_path / "plan.yaml", f"runs: [{material / 'run'}]\nprompts: [a]")
    refused(batch, ["plan.yaml", option], option.split("=")[0])


NO_MANIFEST = {
    "a text": "remember the milk",
    "numbers": "5\n",
    "cut off": '{"video": "a.mp4", "sha256": "x"',
    "another record": '{"step": 3}\n',
    "a list as a name": '{"video": [], "sha256": "x"}\n',
    "no UTF-8": b"\xff\xfe",
}


@pytest.mark.parametrize("content", NO_MANIFEST.values(), ids=NO_MANIFEST)
def test_a_manifest_that_is_none(content, material, refused, tmp_path):
    replace(tmp_path / "plan.yaml", f"runs: [{material / 'run'}]\nprompts: [a]")
    replace(tmp_path / "plan.manifest.jsonl", content)
    refused(batch, ["plan.yaml"], "--manifest", "plan.manifest.jsonl")


# The records of a run.

RECORDS = {
    "cut off": '{"prompt": ',
    "a list": "[1]",
    "a number": "5",
    "empty": "",
    "a key twice": '{"prompt": "a", "prompt": "b"}',
    "no UTF-8": b'{"prompt": "\xff"}',
    "nested": b"[" * 100_000,
    "other settings": '{"prompt": "b"}',
    "long settings": json.dumps({"prompt": LONG}),
    "settings of another kind": json.dumps({"prompt": ["x"] * 10_000}),
}


@pytest.mark.parametrize("content", RECORDS.values(), ids=RECORDS)
def test_a_damaged_record_of_a_video(content, material, refused, tmp_path):
    (tmp_path / "o").mkdir()
    replace(tmp_path / "o/a.mp4", b"a video")
    replace(tmp_path / "o/a.json", content)
    arguments = ["--run", material / "run", "--prompt", "a", "--output-dir", "o"]
    refused(sample, arguments, "o/a.")


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link to a device"])
def test_a_record_that_is_no_file(kind, material, refused, tmp_path):
    (tmp_path / "o").mkdir()
    replace(tmp_path / "o/a.mp4", b"a video")
    NO_FILES[kind][0](tmp_path / "o/a.json")
    arguments = ["--run", material / "run", "--prompt", "a", "--output-dir", "o"]
    refused(sample, arguments, "o/a.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt", 3),
        ("prompt", None),
        ("step", "one"),
        ("step", True),
        ("seed", -1),
        ("seed", 1.5),
        ("eta", 2),
        ("guidance_scale", None),
        ("sampler", "euler"),
        ("name_seed", "maybe"),
        ("novelty", 1),
    ],
)
def test_a_record_of_wrong_values_names_them(key, value):
    record = Sample("a", 5, 3, SamplingSettings()).to_record() | {key: value}
    with pytest.raises(ValueError, match=rf"a\.json:\n  {key}: .{{1,200}}$"):
        Sample.from_record(record, "a.json")


@pytest.mark.parametrize(
    "content", ["", "a: [", "seed: 1\nseed: 2", "[]", b"\xff", "seed: many", bomb(9)]
)
@pytest.mark.parametrize("program", ["tune", "sample", "batch"])
def test_a_damaged_config_of_a_run(content, program, material, run, refused, tmp_path):
    replace(run / "config.yaml", content)
    replace(tmp_path / "plan.yaml", "runs: [run]\nprompts: [a]")
    several = content == "seed: many"  # and nothing else is there
    if program == "tune":
        arguments = ["--config", material / "config.yaml", f"output_dir={run}"]
        refused(tune, arguments, "run/config.yaml", several=several)
    elif program == "sample":
        refused(sample, ["--run", run, "--prompt", "a"], "run/config.yaml", several=several)
    else:
        refused(batch, ["plan.yaml"], "run/config.yaml", several=several)


# The other programs.

BENCH_OPTIONS = [
    *("--size=1000000000", "--size=0", "--size=-8", "--size=many", "--size=8,1000000000"),
    *("--frames=1000000000", "--frames=0", "--frames=1.5", f"--frames={'9' * 30}"),
    *("--repeats=0", "--repeats=-1", "--repeats=many", "--repeats=1000000000000"),
    *("--chips=0", "--chips=1000000000000", "--precision=fp8", "--attention=none"),
    *("--attention-scope=everywhere", "--programs=none", "--mesh=frmes=2", "--mesh=frames=0"),
    *("--network=large", f"--programs={LONG}"),
]


@pytest.mark.parametrize("option", BENCH_OPTIONS, ids=name_of)
def test_a_wrong_option_of_bench(option, refused):
    refused(bench, [option], option.split("=")[0])


def test_frames_and_sides_that_are_too_large_together(refused):
    refused(bench, ["--frames=4096", "--size=8192"], "4096 frames of 8192x8192")


RECIPES = {
    "world": ["moon", "3"],
    "seed": ["-1", "true", "many", "9" * 30],
    "scenes": ["0", "1000000000", "1.5", "[1]"],
    "frames_per_scene": ["0", "200", "many"],
    "vae_steps": ["0", "many", "1e30"],
    "vae_batch": ["0", "1000000"],
    "vae_learning_rate": ["0", ".inf", ".nan", "-1", "many"],
    "kl_weight": ["-1", ".inf"],
    "prediction_type": ["sample", "3"],
    "group_share": ["2", "-1", ".nan"],
    "ema": ["1", "-1", ".nan"],
    "guidance_scale": ["-1", ".inf", ".nan"],
    "novelty": ["1"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in RECIPES.items() for value in values]
)
def test_a_wrong_number_of_a_recipe(key, value, refused):
    refused(pretrain, ["--output-dir=new", f"{key}={value}"], key)


EXPERIMENTS = {
    "frames": ("variants: {a: {}}\nframes: 1000000000", "frames: "),
    "truth": ("variants: {a: {}}\nframes: true", "frames: ", "line 2"),
    "clips": ("variants: {a: {}}\nclips: [nowhere]", "nowhere"),
    "seeds": ("variants: {a: {}}\nseeds: [-1]", "seeds.0: "),
    "no variants": ("variants: {}", "variants"),
    "variants": ("variants: [a]", "variants: "),
    "a variant's key": ("variants: {a: {etaa: 1}}", "etaa"),
    "a variant's value": ("variants: {a: {guidance_scale: .inf}}", "guidance_scale"),
    "rate": ("variants: {a: {}}\nsetting: {learning_rate: 0}", "learning_rate", "line 2"),
    "twice": ("variants: {a: {}, a: {}}", "'a' is there twice"),
}


@pytest.mark.parametrize("case", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_a_wrong_experiment(case, refused, tmp_path):
    content, *names = case
    replace(tmp_path / "e.yaml", content)
    refused(experiments, ["--config", "e.yaml", "--output-dir", "new"], *names)


@pytest.mark.parametrize(
    "option",
    [
        *("--count=0", "--count=1000000000", "--count=many", "--guidance-scale=inf"),
        *("--guidance-scale=nan", "--guidance-scale=-1", "--seed=-1", "--seed=1.5", "--x"),
    ],
)
def test_a_wrong_option_of_text_to_image(option, refused):
    refused(text_to_image, [option], option.split("=")[0])


# A few as users start them, where the locale is not UTF-8.


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["tune", "--config", "pipe"], id="a pipe"),
        pytest.param(["sample", "--run", "{run}", "--prompts", "pipe"], id="a pipe of prompts"),
        pytest.param(
            ["tune", "--config", "{config}", "train_data.prompt=一只猫"], id="an override"
        ),
        pytest.param(["tune", "--config", "chinese.yaml", "seed=many"], id="a file"),
    ],
)
def test_a_process_ends_in_one_line(arguments, material, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    text = (material / "config.yaml").read_text().replace("a square", "一只红色的圆")
    (tmp_path / "chinese.yaml").write_text(text + "一只: 1\n", encoding="utf-8")
    program, *rest = arguments
    fill = {"run": material / "run", "config": material / "config.yaml"}
    done = subprocess.run(
        [sys.executable, "-m", f"tav_jax.{program}", *(one.format(**fill) for one in rest)],
        env=os.environ
        | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 1
    check_line(done.stderr, several="chinese.yaml" in arguments)
    assert done.stdout == ""
