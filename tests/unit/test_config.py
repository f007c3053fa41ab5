import re
from dataclasses import fields, replace

import pytest
import yaml
from small_configs import RUN as SMALLEST

from tav_jax.runs.changes import EXECUTION_KEYS, differences
from tav_jax.runs.config import (
    MEANINGLESS_KEYS,
    UNSET,
    LoraFile,
    TrainData,
    TuneConfig,
    ValidationData,
    dump_config,
    load_config,
    parse_config,
    with_absolute_paths,
)

# A run as the original release's files describe one: every key of theirs, in their spelling.
ORIGINAL = """
pretrained_model_path: "./checkpoints/stable-diffusion-v1-4"
output_dir: "./outputs/rabbit"
train_data:
  video_path: "data/rabbit.mp4"
  prompt: "a rabbit is eating"
  n_sample_frames: 8
  width: 64
  height: 64
  sample_start_idx: 4
  sample_frame_rate: 3
validation_data:
  prompts:
    - "a tiger is eating"
    - "a rabbit is eating, cartoon style"
  video_length: 8
  width: 64
  height: 64
  num_inference_steps: 10
  guidance_scale: 12.5
  use_inv_latent: True
  num_inv_steps: 10
learning_rate: 3e-5
train_batch_size: 1
max_train_steps: 6
checkpointing_steps: 1000
validation_steps: 3
trainable_modules:
  - "attn1.to_q"
  - "attn2.to_q"
  - "attn_temp"
seed: 33
mixed_precision: fp16
use_8bit_adam: False
gradient_checkpointing: True
enable_xformers_memory_efficient_attention: True
"""


@pytest.fixture
def write(tmp_path):
    """Writes a config file: text as it stands, or settings over the smallest there are."""

    def write_config(content=None, **settings):
        path = tmp_path / "run.yaml"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            text = yaml.safe_dump(SMALLEST | settings) if content is None else content
            path.write_text(text, encoding="utf-8")
        return path

    return write_config


@pytest.fixture
def message(write):
    """Returns what is said about settings that are refused."""

    def refuse(content=None, *, overrides=(), **settings):
        with pytest.raises(ValueError) as caught:  # noqa: PT011, the caller looks at all of it
            load_config(write(content, **settings), overrides)
        return str(caught.value)

    return refuse


def offenders(message):
    """The keys that a message lists, in its order."""
    return re.findall(r"^  ([\w.]+): ", message, re.MULTILINE)


def test_a_file_of_the_original_release_reads_unchanged(write):
    config, notes = load_config(write(ORIGINAL))
    assert config == TuneConfig(
        pretrained_model_path="./checkpoints/stable-diffusion-v1-4",
        output_dir="./outputs/rabbit",
        train_data=TrainData(
            video_path="data/rabbit.mp4",
            prompt="a rabbit is eating",
            n_sample_frames=8,
            width=64,
            height=64,
            sample_start_idx=4,
            sample_frame_rate=3,
        ),
        validation_data=ValidationData(
            prompts=("a tiger is eating", "a rabbit is eating, cartoon style"),
            video_length=8,
            width=64,
            height=64,
            num_inference_steps=10,
            guidance_scale=12.5,
            use_inv_latent=True,
            num_inv_steps=10,
        ),
        learning_rate=3e-5,
        train_batch_size=1,
        max_train_steps=6,
        checkpointing_steps=1000,
        validation_steps=3,
        trainable_modules=("attn1.to_q", "attn2.to_q", "attn_temp"),
        seed=33,
        mixed_precision="fp16",
        gradient_checkpointing="blocks",
    )
    assert [note.split(":")[0] for note in notes] == [
        "enable_xformers_memory_efficient_attention",
        "mixed_precision",
    ]


def test_a_key_without_meaning_gets_one_line_with_its_reason(write):
    config, notes = load_config(write(**dict.fromkeys(MEANINGLESS_KEYS, True)))
    assert config == load_config(write())[0]
    assert len(notes) == len(MEANINGLESS_KEYS)
    for note, (key, reason) in zip(notes, MEANINGLESS_KEYS.items(), strict=True):
        assert note.startswith(f"{key}:")
        assert reason in note


def test_the_defaults_are_those_of_the_paper_and_the_release(write):
    config, notes = load_config(write())
    assert notes == []
    assert config.learning_rate == 3e-5
    assert (config.adam_beta1, config.adam_beta2, config.adam_weight_decay) == (0.9, 0.999, 1e-2)
    assert config.max_grad_norm == 1.0
    assert config.trainable_modules == ("attn1.to_q", "attn2.to_q", "attn_temp")
    assert config.attention_scope == "sparse_causal"
    assert config.validation_data.guidance_scale == 12.5
    assert config.validation_data.use_inv_latent


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(parse_config(SMALLEST), id="defaults"),
        pytest.param(parse_config(yaml.safe_load(ORIGINAL.partition("use_8bit")[0])), id="release"),
        pytest.param(
            parse_config(
                SMALLEST
                | {
                    "learning_rate": 1e-7,
                    "mixed_precision": False,
                    "resume_from_checkpoint": "runs/a: b/checkpoints/300",
                    "validation_data": {
                        "prompts": [
                            "滑雪的熊猫 🐼",
                            "no",
                            "3e-5",
                            " a: b # c ",
                            '"',
                            "",
                            "two\nlines",
                        ],
                        "negative_prompt": "über",
                    },
                }
            ),
            id="awkward texts",
        ),
    ],
)
def test_what_is_dumped_reads_back_the_same(config, write):
    read, _ = load_config(write(dump_config(config)))
    assert read == config
    assert differences(read, config) == {}


def test_the_dump_is_complete():
    tree = yaml.safe_load(dump_config(parse_config(SMALLEST)))
    names = [field.name for field in fields(TuneConfig)]
    assert list(tree) == [name for name in names if name not in UNSET], "as in earlier versions"
    every = parse_config(
        SMALLEST
        | {"loras": ["a.safetensors"], "embeddings": ["b.pt"], "prompt_syntax": "weighted"}
        | {"log": "tensorboard"}
    )
    assert list(yaml.safe_load(dump_config(every))) == names
    assert list(tree["train_data"]) == [field.name for field in fields(TrainData)]
    names = [field.name for field in fields(ValidationData)]
    assert list(tree["validation_data"]) == [name for name in names if name != "prompt_syntax"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param(["max_train_steps=3"], {"max_train_steps": 3}, id="number"),
        pytest.param(["learning_rate=3e-5"], {"learning_rate": 3e-5}, id="YAML's string 3e-5"),
        pytest.param(["scale_lr=true"], {"scale_lr": True}, id="truth"),
        pytest.param(["mixed_precision=no"], {"mixed_precision": "no"}, id="YAML's false no"),
        pytest.param(["train_data.prompt=a b=c"], {"train_data.prompt": "a b=c"}, id="equals sign"),
        pytest.param(
            ["train_data.n_sample_frames=4", "validation_data.video_length=4"],
            {"train_data.n_sample_frames": 4, "validation_data.video_length": 4},
            id="nested",
        ),
        pytest.param(
            ["validation_data.prompts=[a cat, a dog]"],
            {"validation_data.prompts": ("a cat", "a dog")},
            id="list into a section that the file lacks",
        ),
        pytest.param(["seed=1", "seed=2"], {"seed": 2}, id="the last counts"),
        pytest.param(
            ["resume_from_checkpoint=null"], {"resume_from_checkpoint": None}, id="nothing"
        ),
        pytest.param(["resume_from_checkpoint=latest"], {"resume_from_checkpoint": None}, id="own"),
    ],
)
def test_overrides_win_over_the_file(overrides, expected, write):
    config, _ = load_config(write(seed=7), overrides)
    for path, value in expected.items():
        found = config
        for part in path.split("."):
            found = getattr(found, part)
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        pytest.param("max_train_steps", "expected key=value", id="no value"),
        pytest.param("=3", "expected key=value", id="no key"),
        pytest.param("output_dir.x=3", "'output_dir' holds a value", id="keys below a value"),
        pytest.param("trainable_modules=[attn1", "trainable_modules", id="no YAML"),
        pytest.param("train_data=3", "train_data: Input should be", id="a value for a section"),
        pytest.param("max_train_step=3", "did you mean max_train_steps", id="misspelt"),
        pytest.param("max_train_steps=many", "max_train_steps: Input should be", id="no number"),
    ],
)
def test_a_wrong_override_is_quoted(override, expected, message):
    assert expected in message(overrides=[override])


def test_all_wrong_overrides_are_quoted_at_once(message):
    said = message(overrides=["max_train_steps", "seed=1", "output_dir.x=3"])
    assert "'max_train_steps'" in said
    assert "'output_dir.x=3'" in said


@pytest.mark.parametrize("text", ["3e-5", "3.0e-05", "'3e-5'", "0.00003"])
def test_a_rate_is_a_float_however_it_is_written(text, write):
    config, _ = load_config(write(f"{yaml.safe_dump(SMALLEST)}\nlearning_rate: {text}\n"))
    assert config.learning_rate == 3e-5
    assert isinstance(config.learning_rate, float)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("no", "no", id="YAML's false"),
        pytest.param('"no"', "no", id="quoted"),
        pytest.param("null", "no", id="nothing"),
        pytest.param("bf16", "bf16", id="bf16"),
        pytest.param("fp16", "fp16", id="fp16"),
    ],
)
def test_precision_may_stand_unquoted(text, expected, write):
    config, notes = load_config(write(f"{yaml.safe_dump(SMALLEST)}\nmixed_precision: {text}\n"))
    assert config.mixed_precision == expected
    assert any("computed as bf16" in note for note in notes) == (expected == "fp16")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--config: no such file .*man-sking\.yaml"):
        load_config(tmp_path / "man-sking.yaml")
    with pytest.raises(FileNotFoundError, match="--config: no such file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param("train_data: [1, 2\n", "not YAML", id="a bracket left open"),
        pytest.param("train_data:\n\tprompt: a\n", "not YAML.*line 2", id="tabs"),
        pytest.param("a: 1\n---\nb: 2\n", "not YAML", id="two documents"),
        pytest.param("a: !!python/object/apply:os.getcwd []\n", "not YAML", id="code"),
        pytest.param(b"\xff\xd8\xff\xe0\x00\x10JFIF", "not YAML", id="a picture"),
        pytest.param("", "expected keys and values", id="empty"),
        pytest.param("# nothing yet\n", "expected keys and values", id="only comments"),
        pytest.param("- a\n- b\n", "expected keys and values", id="a list"),
        pytest.param("just words\n", "expected keys and values", id="a text"),
    ],
)
def test_a_file_of_another_form_is_refused_in_one_line(content, expected, message):
    said = message(content)
    assert re.search(f"run.yaml: .*{expected}", said)
    assert len(said.splitlines()) == 1


def test_every_offender_is_listed_at_once(message):
    said = message(
        sed=1,
        max_train_steps=-1,
        learning_rate="fast",
        lr_scheduler="sawtooth",
        attention_scope="everywhere",
        trainable_modules="attn_temp",
        mixed_precision="fp8",
        adam_beta1=1,
        train_data={"video_path": "clip.mp4", "width": 100, "height": 36, "frames": 8},
        validation_data={"prompts": ["a", 3], "eta": 2, "video_format": "avi", "guidence_scale": 7},
        pretrained_model_path=None,
    )
    expected = [
        "adam_beta1",
        "attention_scope",
        "learning_rate",
        "lr_scheduler",
        "max_train_steps",
        "mixed_precision",
        "pretrained_model_path",
        "sed",
        "train_data.frames",
        "train_data.height",
        "train_data.prompt",
        "train_data.width",
        "trainable_modules",
        "validation_data.eta",
        "validation_data.guidence_scale",
        "validation_data.prompts.1",
        "validation_data.video_format",
    ]
    assert offenders(said) == expected
    first, *lines = said.splitlines()
    assert first.endswith("run.yaml:")
    assert len(lines) == len(expected), "a line an offender"
    assert lines[expected.index("train_data.prompt")] == "  train_data.prompt: missing"
    assert "(got 'fast')" in lines[expected.index("learning_rate")]


@pytest.mark.parametrize("size", [0, -8, 4, 100, 511, 12.5, "wide"])
@pytest.mark.parametrize("section", ["train_data", "validation_data"])
def test_sides_are_multiples_of_eight(section, size, message):
    settings = {"width": size, "height": size}
    if section == "train_data":
        settings |= SMALLEST["train_data"]
    said = message(**{section: settings})
    assert offenders(said) == [f"{section}.height", f"{section}.width"]
    assert f"(got {size!r})" in said


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        pytest.param("learnig_rate", "learning_rate", id="a letter missing"),
        pytest.param("max_training_steps", "max_train_steps", id="another word"),
        pytest.param("n_sample_frames", "train_data.n_sample_frames", id="a section too high"),
        pytest.param("prompts", "validation_data.prompts", id="of a section"),
        pytest.param("train_data.promt", "train_data.prompt", id="within a section"),
        pytest.param("train_data.video_length", "validation_data.video_length", id="other section"),
        pytest.param("validation_data.seed", "seed", id="a section too deep"),
        # Names that both sections have: the one is meant where the key stands.
        pytest.param("train_data.widht", "train_data.width", id="width of training"),
        pytest.param("train_data.hight", "train_data.height", id="height of training"),
        pytest.param("validation_data.widht", "validation_data.width", id="width of validation"),
    ],
)
def test_an_unknown_key_gets_the_nearest_real_name_with_its_path(wrong, right, message):
    assert f"{wrong}: unknown key; did you mean {right}?" in message(overrides=[f"{wrong}=8"])


def test_a_key_like_no_other_is_still_named(message):
    said = message(qqqq=1)
    assert offenders(said) == ["qqqq"]
    assert "did you mean" not in said


def test_keys_that_are_no_words_are_listed(message):
    assert offenders(message(f"{yaml.safe_dump(SMALLEST)}\n3: 4\n")) == ["3"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({"video_length": 4}, ["video_length 4 is not 8"], id="frames"),
        pytest.param(
            {"width": 64, "height": 256},
            ["width 64 is not 512", "height 256 is not 512"],
            id="both sides",
        ),
    ],
)
def test_the_inverted_clip_demands_its_own_size(settings, expected, message, write):
    said = message(validation_data=settings)
    for part in ["validation_data:", *expected, "use_inv_latent: false"]:
        assert part in said
    config, _ = load_config(write(validation_data=settings | {"use_inv_latent": False}))
    assert config.validation_data.use_inv_latent is False


def test_the_size_of_the_clip_may_be_repeated(write):
    load_config(write(validation_data={"width": 512, "height": 512, "video_length": 8}))


def test_differences_name_each_key_with_both_values():
    there = parse_config(SMALLEST)
    here = replace(
        there,
        seed=5,
        train_data=replace(there.train_data, n_sample_frames=4),
        validation_data=replace(there.validation_data, prompts=("a cat",)),
    )
    assert sorted(differences(here, there).values()) == [
        "seed: 0 there, 5 here",
        "train_data.n_sample_frames: 8 there, 4 here",
        "validation_data.prompts: () there, ('a cat',) here",
    ]
    assert differences(there, there) == {}


@pytest.mark.parametrize(
    ("written", "read"),
    [("true", "blocks"), ("false", "none"), ("full", "full"), ("auto", "auto")],
)
def test_the_originals_switch_of_gradient_checkpointing_names_a_preset(tmp_path, written, read):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    config, _ = load_config(path, [f"gradient_checkpointing={written}"])
    assert config.gradient_checkpointing == read


@pytest.mark.parametrize(("written", "read"), [("auto", None), ("8", 8.0), ("29.97", 29.97)])
def test_the_rate_of_videos_is_a_number_or_auto(tmp_path, written, read):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    config, _ = load_config(path, [f"validation_data.fps={written}"])
    assert config.validation_data.fps == read
    assert load_config(path)[0].validation_data.fps is None, "auto is the default"


@pytest.mark.parametrize("fps", ["fast", "0", "-8", ".inf", ".nan"])
def test_rates_that_are_none_are_refused(message, fps):
    assert offenders(message(overrides=[f"validation_data.fps={fps}"])) == ["validation_data.fps"]


def test_every_setting_makes_a_difference():
    config = parse_config(SMALLEST)
    for field in fields(TuneConfig):
        if field.name in EXECUTION_KEYS:
            # Only in time and memory: a run may go on under another.
            another = replace(config, **{field.name: _another(config, field)})
            assert another != config
            assert differences(another, config) == {}
        elif field.name not in ("train_data", "validation_data", "mesh"):
            changed = replace(config, **{field.name: _another(config, field)})
            [line] = differences(changed, config).values()
            assert line.startswith(f"{field.name}: ")
    for size in fields(config.mesh):
        another = replace(config, mesh=replace(config.mesh, **{size.name: 3}))
        assert another != config
        assert differences(another, config) == {}
    for section in ("train_data", "validation_data"):
        for field in fields(getattr(config, section)):
            if field.name in ("video_length", "width", "height"):
                continue  # bound to each other by the inverted clip's size
            changed = replace(
                getattr(config, section),
                **{field.name: _another(getattr(config, section), field)},
            )
            [line] = differences(replace(config, **{section: changed}), config).values()
            assert line.startswith(f"{section}.{field.name}: ")


def _another(settings, field):
    """Another valid value of a field."""
    choices = {
        "lr_scheduler": "cosine",
        "attention_scope": "full",
        "attention": "chunked",
        "gradient_checkpointing": "blocks",
        "memory_limit_gb": 8.0,
        "sampler": "dpm_solver",
        "mixed_precision": "bf16",
        "sampling": "uniform",
        "fit": "crop",
        "video_format": "gif",
        "fps": 12.0,
        "loras": (LoraFile("another"),),
        "prompt_syntax": "weighted",
        "log": ("wandb",),
    }
    value = getattr(settings, field.name)
    if field.name in choices:
        return choices[field.name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, "another")
    if isinstance(value, str) or value is None:
        return "another"
    return value + 1 if isinstance(value, int) else value / 2 + 0.1


def test_a_lora_is_a_path_or_a_path_with_a_scale(write):
    loras = ["a.safetensors", {"path": "b.bin", "scale": -0.5}]
    config, _ = load_config(write(loras=loras))
    assert config.loras == (LoraFile("a.safetensors", 1.0), LoraFile("b.bin", -0.5))
    assert load_config(write(dump_config(config)))[0] == config
    assert load_config(write(), ["loras=[a.safetensors]"])[0].loras == config.loras[:1]


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        (3, "loras.0"),
        ({"scale": 1}, "loras.0.path"),
        ({"path": "a", "scale": "much"}, "loras.0.scale"),
        ({"path": "a", "scale": float("nan")}, "loras.0.scale"),
        ({"path": "", "scale": 1}, "loras.0.path"),
        ({"path": "a", "weight": 1}, "loras.0.weight"),
    ],
)
def test_what_is_no_lora_is_refused(wrong, key, message):
    assert offenders(message(loras=[wrong])) == [key]


def test_absolute_paths_are_the_same_from_any_directory(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = with_absolute_paths(parse_config(SMALLEST | {"resume_from_checkpoint": "a/1"}))
    assert config.pretrained_model_path == str(tmp_path / "model")
    assert config.output_dir == str(tmp_path / "run")
    assert config.train_data.video_path == str(tmp_path / "clip.mp4")
    assert config.resume_from_checkpoint == str(tmp_path / "a/1")
    assert with_absolute_paths(config) == config

    hub = parse_config(SMALLEST | {"pretrained_model_path": "CompVis/v1-4", "output_dir": "~/run"})
    config = with_absolute_paths(hub)
    assert config.pretrained_model_path == "CompVis/v1-4", "no folder, so an id on the Hub"
    assert config.output_dir == str(tmp_path / "home/run")
    assert config.resume_from_checkpoint is None


def test_a_seed_that_no_key_can_be_made_of_is_refused(message):
    # jax.random.key takes 64 bits and raises OverflowError beyond.
    assert offenders(message(seed=2**64)) == ["seed"]


def test_a_rate_without_bound_is_refused(message):
    assert offenders(message(overrides=["learning_rate=.inf"])) == ["learning_rate"]
