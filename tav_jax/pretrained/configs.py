"""Published JSON configs -> ours, and back.

Each attribute is read, known to say nothing about the arithmetic, or demanded to have the one
value that we compute; anything else is refused by name rather than computed wrongly. What is read
has a type and bounds, since anybody may have written it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from tav_jax.diffusion.schedule import NoiseSchedule, make_schedule
from tav_jax.errors import UserError
from tav_jax.models.clip import CLIPTextConfig
from tav_jax.models.clip_image import CLIPConfig, CLIPVisionConfig
from tav_jax.models.unet import UNetConfig
from tav_jax.models.vae import VAEConfig
from tav_jax.pretrained.preprocess import Preprocessing
from tav_jax.text import brief, shorten

if TYPE_CHECKING:
    from tav_jax.pretrained.published_json import EncoderJson, PublishedJson

Published = Mapping[str, Any]

# Values a published attribute may have: the first is what we compute, and stands for absence.
UNET_DEMANDS: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock3DCrossAttn", "UNetMidBlock2DCrossAttn"),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
}
UNET_IRRELEVANT = {
    "addition_embed_type_num_heads",  # of an addition_embed_type, which is refused
    "dropout",  # of training from scratch
    "attention_head_dim",  # read, unless num_attention_heads is there
    "num_attention_heads",
    "upcast_attention",  # our scores and softmax are float32 always
}
VAE_DEMANDS: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
VAE_IRRELEVANT = {
    "force_upcast",  # float16 overflows in some autoencoders; bfloat16 and float32 do not
    "sample_size",
}
SCHEDULER_DEMANDS: dict[str, tuple[Any, ...]] = {
    "rescale_betas_zero_snr": (False,),
    "thresholding": (False,),
    "trained_betas": (None,),
}
TEXT_DEMANDS: dict[str, tuple[Any, ...]] = {
    "model_type": ("clip_text_model",),
    "use_attention_mask": (False,),
}
VISION_DEMANDS: dict[str, tuple[Any, ...]] = {
    "model_type": ("clip_vision_model",),
    "num_channels": (3,),
}
PREPROCESSOR_DEMANDS: dict[str, tuple[Any, ...]] = {
    "default_to_square": (False,),
    "do_center_crop": (True,),
    "do_normalize": (True,),
    "do_pad": (False, None),
    "do_rescale": (True,),
    "do_resize": (True,),
    "feature_extractor_type": ("CLIPFeatureExtractor", None),
    "image_processor_type": ("CLIPImageProcessor", "CLIPImageProcessorFast", None),
    "resample": (3,),  # bicubic
}
PREPROCESSOR_IRRELEVANT = {
    "data_format",  # of the arrays that transformers returns
    "do_convert_rgb",  # our frames are RGB
    "processor_class",
}

MOST_PROBLEMS = 20  # that one message lists
MOST_KINDS = 3  # of unknown blocks that are named

DOWN_BLOCKS = {"CrossAttnDownBlock": True, "DownBlock": False}
UP_BLOCKS = {"CrossAttnUpBlock": True, "UpBlock": False}


def read_unet_config(published: Published, where: str = "unet/config.json") -> UNetConfig:
    """Return our config of a 2D or 3D U-Net.

    Raises:
        UserError: attributes are missing, or ask for what we do not compute; all are listed.
    """
    # Imported here and below because pydantic takes a tenth of a second.
    from tav_jax.pretrained.published_json import UNetJson

    read = _Reader(published, where)
    read.demand(UNET_DEMANDS)
    down_attention = read.blocks("down_block_types", DOWN_BLOCKS)
    up_attention = read.blocks("up_block_types", UP_BLOCKS)
    # The published name is a misnomer that stayed: the number is a count of heads.
    if published.get("num_attention_heads"):
        published = {**published, "attention_head_dim": published["num_attention_heads"]}
    json = read.parse(UNetJson, published)
    if json is not None:
        widths, heads = json.block_out_channels, json.attention_head_dim
        if len(heads) == 1:
            heads = heads * len(widths)
        read.levels("down_block_types as down_attention", down_attention, len(widths))
        read.levels("up_block_types as up_attention", up_attention, len(widths))
        read.levels("attention_head_dim as num_attention_heads", heads, len(widths))
        for width, count in zip(widths, heads, strict=False):
            if width % count or width % json.norm_num_groups:
                groups = f"{count} heads and {json.norm_num_groups} groups"
                read.problem(f"width {width}: not divisible by {groups}")
    known = {*UNET_IRRELEVANT, "cross_attention_dim", "use_linear_projection", "norm_eps"}
    read.finish({*known, "flip_sin_to_cos", "freq_shift", "sample_size"})
    assert json is not None
    assert down_attention is not None
    assert up_attention is not None
    return UNetConfig(
        in_channels=json.in_channels,
        out_channels=json.out_channels,
        block_out_channels=tuple(widths),
        down_attention=down_attention,
        up_attention=up_attention,
        num_attention_heads=tuple(heads),
        layers_per_block=json.layers_per_block,
        cross_attention_dim=json.cross_attention_dim,
        norm_num_groups=json.norm_num_groups,
        norm_eps=json.norm_eps,
        use_linear_projection=json.use_linear_projection,
        flip_sin_to_cos=json.flip_sin_to_cos,
        freq_shift=json.freq_shift,
        sample_size=json.sample_size[0],
    )


def write_unet_config(config: UNetConfig) -> dict[str, Any]:
    """Return the published JSON of a U-Net.

    With temporal attention it is a 3D one, as the original Tune-A-Video saves it; without, the
    image U-Net's.
    """
    d = "3D" if config.temporal_attention else "2D"
    down = {attends: name for name, attends in DOWN_BLOCKS.items()}
    up = {attends: name for name, attends in UP_BLOCKS.items()}
    heads = config.num_attention_heads
    return {
        "_class_name": f"UNet{d}ConditionModel",
        "_diffusers_version": "0.11.1",
        "act_fn": "silu",
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else list(heads),
        "block_out_channels": list(config.block_out_channels),
        "center_input_sample": False,
        "class_embed_type": None,
        "cross_attention_dim": config.cross_attention_dim,
        "down_block_types": [f"{down[attends]}{d}" for attends in config.down_attention],
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "flip_sin_to_cos": config.flip_sin_to_cos,
        "freq_shift": config.freq_shift,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_scale_factor": 1,
        "mid_block_type": f"UNetMidBlock{d}CrossAttn",
        "norm_eps": config.norm_eps,
        "norm_num_groups": config.norm_num_groups,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "out_channels": config.out_channels,
        "resnet_time_scale_shift": "default",
        # The published pipeline compares it with 64 when it is made.
        "sample_size": config.sample_size,
        "up_block_types": [f"{up[attends]}{d}" for attends in config.up_attention],
        "upcast_attention": False,
        "use_linear_projection": config.use_linear_projection,
    }


def write_vae_config(config: VAEConfig) -> dict[str, Any]:
    """Return the published JSON of an AutoencoderKL."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.11.1",
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def write_text_config(config: CLIPTextConfig) -> dict[str, Any]:
    """Return the published JSON of a CLIPTextModel."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        # transformers takes the state of the last token for a pooled output, which is not used.
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
        "hidden_act": config.hidden_act,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.layer_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
    }


def read_vae_config(published: Published, where: str = "vae/config.json") -> VAEConfig:
    """Return our config of an AutoencoderKL; raises as `read_unet_config` does."""
    from tav_jax.pretrained.published_json import VaeJson

    read = _Reader(published, where)
    read.demand(VAE_DEMANDS)
    down = read.blocks("down_block_types", {"DownEncoderBlock": False})
    up = read.blocks("up_block_types", {"UpDecoderBlock": False})
    json = read.parse(VaeJson, published)
    if json is not None:
        widths = json.block_out_channels
        read.levels("down_block_types", down, len(widths))
        read.levels("up_block_types", up, len(widths))
        for width in widths:
            if width % json.norm_num_groups:
                read.problem(f"width {width}: not divisible by {json.norm_num_groups} groups")
    read.finish({*VAE_IRRELEVANT, "scaling_factor"})
    assert json is not None
    return VAEConfig(
        in_channels=json.in_channels,
        out_channels=json.out_channels,
        latent_channels=json.latent_channels,
        block_out_channels=tuple(widths),
        layers_per_block=json.layers_per_block,
        norm_num_groups=json.norm_num_groups,
        scaling_factor=json.scaling_factor,
    )


def read_text_config(
    published: Published, where: str = "text_encoder/config.json"
) -> CLIPTextConfig:
    """Return our config of a CLIPTextModel; raises as `read_unet_config` does.

    transformers writes dozens of attributes about generation into every config, which say nothing
    here, so only what would change the states is looked at.
    """
    from tav_jax.pretrained.published_json import TextJson

    read = _Reader(published, where)
    read.demand(TEXT_DEMANDS)
    json = read.parse(TextJson, published)
    read.heads(json)
    read.finish(set(published))
    assert json is not None
    return CLIPTextConfig(**json.model_dump())


def read_clip_config(published: Published, where: str = "config.json") -> CLIPConfig:
    """Return our config of a CLIPModel; raises as `read_unet_config` does.

    As in `read_text_config`, only what would change the features is looked at.
    """
    from tav_jax.pretrained.published_json import ClipJson, ClipTextJson, ClipVisionJson

    read = _Reader(published, where)
    read.demand({"model_type": ("clip",)})
    json = read.parse(ClipJson, published)
    read_text = read.section(_encoder_section(published, "text_config"))
    read_text.demand(TEXT_DEMANDS)
    text = read_text.parse(ClipTextJson, read_text.published)
    read_text.heads(text)
    read_vision = read.section(_encoder_section(published, "vision_config"))
    read_vision.demand(VISION_DEMANDS)
    vision = read_vision.parse(ClipVisionJson, read_vision.published)
    read_vision.heads(vision)
    if vision is not None and vision.patch_size > vision.image_size:
        read_vision.problem(f"patch_size: {vision.patch_size} is over image_size")
    read.finish(set(published))
    assert json is not None
    assert text is not None
    assert vision is not None
    return CLIPConfig(
        text_config=CLIPTextConfig(**text.model_dump(exclude={"eos_token_id"})),
        vision_config=CLIPVisionConfig(**vision.model_dump()),
        projection_dim=json.projection_dim,
        eos_token_id=text.eos_token_id,
    )


def _encoder_section(published: Published, name: str) -> str:
    """Return the name of the section that has the shape of an encoder.

    transformers before 4.27 wrote two. The one with `_dict` in its name has what differs from the
    defaults, and transformers prefers it.
    """
    return name if published.get(f"{name}_dict") is None else f"{name}_dict"


def write_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """Return the published JSON of a CLIPModel."""
    text = asdict(config.text_config) | {
        "model_type": "clip_text_model",
        "eos_token_id": config.eos_token_id,
        "projection_dim": config.projection_dim,
    }
    vision = asdict(config.vision_config) | {
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "projection_dim": config.projection_dim,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.projection_dim,
        "text_config": text,
        "vision_config": vision,
    }


def read_preprocessor_config(
    published: Published, where: str = "preprocessor_config.json"
) -> Preprocessing:
    """Return how a CLIPImageProcessor prepares images; raises as `read_unet_config` does."""
    from tav_jax.pretrained.published_json import PreprocessorJson

    read = _Reader(published, where)
    read.demand(PREPROCESSOR_DEMANDS)
    json = read.parse(PreprocessorJson, published)
    if json is not None and json.crop_size > json.size:
        read.problem(f"crop_size: {json.crop_size} is over size, the shortest edge: {json.size}")
    read.finish(PREPROCESSOR_IRRELEVANT)
    assert json is not None
    return Preprocessing(
        size=json.size,
        crop_size=json.crop_size,
        rescale_factor=json.rescale_factor,
        image_mean=(json.image_mean[0], json.image_mean[1], json.image_mean[2]),
        image_std=(json.image_std[0], json.image_std[1], json.image_std[2]),
    )


def write_preprocessor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the published JSON of a CLIPImageProcessor."""
    side = preprocessing.crop_size
    flags = ("do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize")
    return {
        "crop_size": {"height": side, "width": side},
        **dict.fromkeys(flags, True),
        "image_mean": list(preprocessing.image_mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(preprocessing.image_std),
        "resample": 3,
        "rescale_factor": preprocessing.rescale_factor,
        "size": {"shortest_edge": preprocessing.size},
    }


def read_schedule(
    published: Published, where: str = "scheduler/scheduler_config.json"
) -> NoiseSchedule:
    """Return the schedule of any published scheduler's config; raises as `read_unet_config` does.

    Only the betas and the prediction type are read: v1-4 names PNDM there, the method samples
    with DDIM whatever it says, and clipping is off whatever it says.
    """
    from tav_jax.pretrained.published_json import ScheduleJson

    read = _Reader(published, where)
    read.demand(SCHEDULER_DEMANDS)
    json = read.parse(ScheduleJson, published)
    read.finish(set(published))
    assert json is not None
    return make_schedule(**json.model_dump())


def check_tokenizer_config(published: Published, where: str) -> None:
    """Raise `UserError` if a tokenizer's JSON has values of other types than transformers reads."""
    from tav_jax.pretrained.published_json import TokenizerJson

    _check(TokenizerJson, published, where)


def check_index(published: Published, where: str = "model_index.json") -> None:
    """Raise `UserError` if a model's index does not name a library and a class for each part."""
    from tav_jax.pretrained.published_json import IndexJson

    _check(IndexJson, published, where)


Json = TypeVar("Json", bound="PublishedJson")


def _check(model: type["PublishedJson"], published: Published, where: str) -> None:
    read = _Reader(published, where)
    read.parse(model, published)
    read.finish(set(published))


class _Reader:
    """Reads attributes and gathers what is wrong, to say all of it at once."""

    def __init__(self, published: Published, where: str):
        self.published = published
        self.where = where
        self.prefix = ""
        self.seen: set[str] = set()
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        self.problems.append(f"  {self.prefix}{text}")

    def section(self, name: str) -> "_Reader":
        """Return a reader of an object in this one, whose problems are this one's too."""
        published = self.published.get(name)
        if not isinstance(published, Mapping | None):
            self.problem(f"{name}: {brief(published)} is no object")
        reader = _Reader(published if isinstance(published, Mapping) else {}, self.where)
        reader.prefix, reader.problems = f"{self.prefix}{name}.", self.problems
        return reader

    def heads(self, json: "EncoderJson | None") -> None:
        """Note that an encoder's width does not divide over its heads; None has been noted."""
        if json is not None and json.hidden_size % json.num_attention_heads:
            self.problem(
                f"hidden_size: {json.hidden_size} is not divisible by "
                f"{json.num_attention_heads} num_attention_heads"
            )

    def parse(self, model: type[Json], published: Published) -> Json | None:
        """Return the attributes that are read, or None if some are wrong. Null means absent."""
        from pydantic import ValidationError

        from tav_jax.settings import explain

        self.seen |= set(model.model_fields)
        given = {name: published.get(name) for name in model.model_fields}
        try:
            return model.model_validate({k: v for k, v in given.items() if v is not None})
        except ValidationError as error:
            for name, text in explain(error, model):
                self.problem(f"{name}: {text}")
        return None

    def blocks(self, name: str, known: Mapping[str, bool]) -> tuple[bool, ...] | None:
        """Return whether each block of a list attends, by its class name without 2D or 3D.

        None if some are not supported.
        """
        published = self.published.get(name)
        names = published if isinstance(published, list | tuple) else []
        kinds = [str(kind).removesuffix("2D").removesuffix("3D") for kind in names]
        unknown = sorted(set(kinds) - set(known))
        for kind in unknown[:MOST_KINDS]:
            self.problem(f"{name}: {shorten(kind, 60)} is not supported, only {', '.join(known)}")
        return None if unknown else tuple(known[kind] for kind in kinds)

    def levels(self, name: str, values: Sequence[Any] | None, levels: int) -> None:
        """Note that there is not one value for each level; None has been noted already."""
        if values is not None and len(values) != levels:
            self.problem(f"{name}: expected {levels} levels, got {brief(list(values))}")

    def demand(self, demands: Mapping[str, tuple[Any, ...]]) -> None:
        for name, values in demands.items():
            self.seen.add(name)
            if self.published.get(name, values[0]) not in values:
                got = brief(self.published[name])
                self.problem(f"{name}: {got} is not supported, only {values[0]!r}")

    def finish(self, known: set[str]) -> None:
        """Raise if anything was wrong, or if an attribute that we do not know is switched on."""
        for name in sorted(set(self.published) - self.seen - known):
            if not name.startswith("_") and self.published[name] not in (None, False):
                got = brief(self.published[name])
                self.problem(f"{shorten(name, 60)}: not known to us, so {got} is refused")
        if len(self.problems) > MOST_PROBLEMS:
            more = len(self.problems) - MOST_PROBLEMS
            self.problems[MOST_PROBLEMS:] = [f"  and {more} more"]
        if self.problems:
            raise UserError(f"{self.where}: not supported:\n" + "\n".join(self.problems))
