"""Published JSON configs -> ours, and back.

Each attribute is read, known to say nothing about the arithmetic, or demanded to have the one
value that we compute; anything else is refused by name rather than computed wrongly. What is read
has a type and bounds, since anybody may have written it.
"""

from typing import TYPE_CHECKING, Any

from tav_jax.diffusion.schedule import NoiseSchedule, make_schedule
from tav_jax.models.clip import CLIPTextConfig
from tav_jax.models.unet import UNetConfig
from tav_jax.models.vae import VAEConfig
from tav_jax.pretrained.config_reader import ConfigReader, Published

if TYPE_CHECKING:
    from tav_jax.pretrained.published_json import PublishedJson

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

DOWN_BLOCKS = {"CrossAttnDownBlock": True, "DownBlock": False}
UP_BLOCKS = {"CrossAttnUpBlock": True, "UpBlock": False}


def read_unet_config(published: Published, where: str = "unet/config.json") -> UNetConfig:
    """Return our config of a 2D or 3D U-Net.

    Raises:
        UserError: attributes are missing, or ask for what we do not compute; all are listed.
    """
    # Imported here and below because pydantic takes a tenth of a second.
    from tav_jax.pretrained.published_json import UNetJson

    read = ConfigReader(published, where)
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

    read = ConfigReader(published, where)
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

    read = ConfigReader(published, where)
    read.demand(TEXT_DEMANDS)
    json = read.parse(TextJson, published)
    read.heads(json)
    read.finish(set(published))
    assert json is not None
    return CLIPTextConfig(**json.model_dump())


def read_schedule(
    published: Published, where: str = "scheduler/scheduler_config.json"
) -> NoiseSchedule:
    """Return the schedule of any published scheduler's config; raises as `read_unet_config` does.

    Only the betas and the prediction type are read: v1-4 names PNDM there, the method samples
    with DDIM whatever it says, and clipping is off whatever it says.
    """
    from tav_jax.pretrained.published_json import ScheduleJson

    read = ConfigReader(published, where)
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


def _check(model: type["PublishedJson"], published: Published, where: str) -> None:
    read = ConfigReader(published, where)
    read.parse(model, published)
    read.finish(set(published))
