"""Types and bounds of what is read of published JSON, which anybody may have written."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
)

from tav_jax.models.clip import ACTIVATIONS
from tav_jax.pretrained.preprocess import IMAGE_MEAN, IMAGE_STD
from tav_jax.text import brief


def _one_number(value: Any) -> Any:
    if isinstance(value, list | tuple):
        raise ValueError("one number for all levels is supported")
    return value


def _each_level(value: Any) -> Any:
    """Return a list, of one item if one number is meant for all levels."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _one_of(*values: str, sentence: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value not in values:
            raise ValueError(f"{brief(value)} {sentence}")
        return value

    return BeforeValidator(check)


# Far beyond what any published network has, and far below what would exhaust memory.
Channels = Annotated[StrictInt, Field(ge=1, le=2**16)]
Width = Annotated[StrictInt, Field(ge=2, le=2**16, multiple_of=2)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=8)]
LayersPerBlock = Annotated[StrictInt, Field(ge=1, le=16), BeforeValidator(_one_number)]
Layers = Annotated[StrictInt, Field(ge=1, le=128)]
Heads = Annotated[StrictInt, Field(ge=1, le=1024)]
Epsilon = Annotated[float, Field(gt=0, le=1, strict=True)]
Beta = Annotated[float, Field(gt=0, lt=1, strict=True)]
MlpWidth = Annotated[StrictInt, Field(ge=1, le=2**18)]
VocabSize = Annotated[StrictInt, Field(ge=3, le=10**7)]
TextLength = Annotated[StrictInt, Field(ge=3, le=2**16)]
Pixels = Annotated[StrictInt, Field(ge=1, le=2**12)]
Mean = Annotated[float, Field(ge=-1, le=1, strict=True)]
Deviation = Annotated[float, Field(gt=0, le=1, strict=True)]
Names = Annotated[list[StrictStr], Field(max_length=8)]


class PublishedJson(BaseModel):
    """Attributes that are read. Others are looked at in `tav_jax.pretrained.configs`."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class UNetJson(PublishedJson):
    """What is read of a U-Net's config."""

    block_out_channels: Widths
    attention_head_dim: Annotated[list[Heads], BeforeValidator(_each_level)]
    in_channels: Channels
    out_channels: Channels
    down_block_types: Names
    up_block_types: Names
    layers_per_block: LayersPerBlock
    cross_attention_dim: Annotated[Channels, BeforeValidator(_one_number)]
    norm_num_groups: Channels
    norm_eps: Epsilon = 1e-5
    use_linear_projection: StrictBool = False
    flip_sin_to_cos: StrictBool = True
    freq_shift: Annotated[float, Field(ge=0, lt=1.5, strict=True)] = 0.0
    sample_size: Annotated[list[Channels], Field(max_length=2), BeforeValidator(_each_level)] = [64]


class VaeJson(PublishedJson):
    """What is read of an AutoencoderKL's config."""

    in_channels: Annotated[StrictInt, Field(ge=3, le=3)]  # red, green and blue
    out_channels: Annotated[StrictInt, Field(ge=3, le=3)]
    latent_channels: Annotated[StrictInt, Field(ge=1, le=1024)]
    block_out_channels: Widths
    down_block_types: Names
    up_block_types: Names
    layers_per_block: LayersPerBlock
    norm_num_groups: Channels
    # v1-4's own config is older than the attribute.
    scaling_factor: Annotated[float, Field(gt=0, le=1000, strict=True)] = 0.18215


class EncoderJson(PublishedJson):
    """What is read of the layers of CLIP's encoders."""

    hidden_size: Channels
    intermediate_size: MlpWidth
    num_hidden_layers: Layers
    num_attention_heads: Heads
    layer_norm_eps: Epsilon = 1e-5
    hidden_act: Annotated[
        str, _one_of(*ACTIVATIONS, sentence=f"is none of {', '.join(ACTIVATIONS)}")
    ] = "quick_gelu"


class TextJson(EncoderJson):
    """What is read of a CLIPTextModel's config."""

    vocab_size: VocabSize
    max_position_embeddings: TextLength


class ClipTextJson(TextJson):
    """What is read of a text encoder in a CLIPModel's config.

    Such a file may leave out what has transformers' default, which is ViT-B/32's value.
    """

    hidden_size: Channels = 512
    intermediate_size: MlpWidth = 2048
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 8
    vocab_size: VocabSize = 49408
    max_position_embeddings: TextLength = 77
    eos_token_id: Annotated[StrictInt, Field(ge=0, le=10**7)] = 49407


class ClipVisionJson(EncoderJson):
    """What is read of an image encoder in a CLIPModel's config."""

    hidden_size: Channels = 768
    intermediate_size: MlpWidth = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 12
    image_size: Pixels = 224
    patch_size: Pixels = 32


class ClipJson(PublishedJson):
    """What is read of a CLIPModel's config beside its sections."""

    projection_dim: Channels = 512


def _side(*keys: str) -> BeforeValidator:
    """Return a validator of one length, for which files have a number or an object."""

    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if set(value) != set(keys) or any(one != value[keys[0]] for one in value.values()):
            raise ValueError(f"{brief(value)} is not supported, only one {' and '.join(keys)}")
        return value[keys[0]]

    return BeforeValidator(check)


class PreprocessorJson(PublishedJson):
    """What is read of a CLIPImageProcessor's config."""

    size: Annotated[Pixels, _side("shortest_edge")] = 224
    crop_size: Annotated[Pixels, _side("height", "width")] = 224
    rescale_factor: Annotated[float, Field(gt=0, le=1, strict=True)] = 1 / 255
    image_mean: Annotated[list[Mean], Field(min_length=3, max_length=3)] = list(IMAGE_MEAN)
    image_std: Annotated[list[Deviation], Field(min_length=3, max_length=3)] = list(IMAGE_STD)


class ScheduleJson(PublishedJson):
    """What is read of any scheduler's config."""

    num_train_timesteps: Annotated[StrictInt, Field(ge=2, le=100_000)] = 1000
    beta_start: Beta = 0.0001
    beta_end: Beta = 0.02
    beta_schedule: Annotated[
        Literal["linear", "scaled_linear"],
        _one_of("linear", "scaled_linear", sentence="is neither linear nor scaled_linear"),
    ] = "linear"
    prediction_type: Annotated[
        Literal["epsilon", "v_prediction"],
        _one_of("epsilon", "v_prediction", sentence="is neither epsilon nor v_prediction"),
    ] = "epsilon"
    set_alpha_to_one: StrictBool = True


def _is_token(value: Any) -> Any:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or len(text) > 1000:
        raise ValueError("Input should be a token, or an object with its content")
    return value


Token = Annotated[Any, AfterValidator(_is_token)]


class TokenizerJson(PublishedJson):
    """What transformers reads of a tokenizer's configs."""

    bos_token: Token = None
    eos_token: Token = None
    unk_token: Token = None
    pad_token: Token = None
    tokenizer_class: StrictStr | None = None
    add_prefix_space: StrictBool | None = None
    do_lower_case: StrictBool | None = None
    errors: StrictStr | None = None


Component = Annotated[list[StrictStr | None], Field(min_length=2, max_length=2)]


class IndexJson(PublishedJson):
    """The library and the class of each part of a model."""

    scheduler: Component | None = None
    text_encoder: Component | None = None
    tokenizer: Component | None = None
    unet: Component | None = None
    vae: Component | None = None
