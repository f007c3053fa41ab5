"""Published JSON configs -> ours, and back.

Each attribute is read, known to say nothing about the arithmetic, or demanded to have the one
value that we compute; anything else is refused by name rather than computed wrongly.
"""

from collections.abc import Mapping
from typing import Any

from tav_jax.diffusion.schedule import NoiseSchedule, make_schedule
from tav_jax.errors import UserError
from tav_jax.models.clip import ACTIVATIONS, CLIPTextConfig
from tav_jax.models.unet import UNetConfig
from tav_jax.models.vae import VAEConfig

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

DOWN_BLOCKS = {"CrossAttnDownBlock": True, "DownBlock": False}
UP_BLOCKS = {"CrossAttnUpBlock": True, "UpBlock": False}


def read_unet_config(published: Published, where: str = "unet/config.json") -> UNetConfig:
    """Return our config of a 2D or 3D U-Net.

    Raises:
        UserError: attributes are missing, or ask for what we do not compute; all are listed.
    """
    read = _Reader(published, where)
    read.demand(UNET_DEMANDS)
    widths = tuple(read.need("block_out_channels", [0]))
    # The published name is a misnomer that stayed: the number is a count of heads.
    heads = published.get("num_attention_heads") or read.need("attention_head_dim", 1)
    heads = tuple(heads) if isinstance(heads, list | tuple) else (heads,) * len(widths)
    config = UNetConfig(
        in_channels=read.need("in_channels", 0),
        out_channels=read.need("out_channels", 0),
        block_out_channels=widths,
        down_attention=read.blocks("down_block_types", DOWN_BLOCKS),
        up_attention=read.blocks("up_block_types", UP_BLOCKS),
        num_attention_heads=heads,
        layers_per_block=read.integer("layers_per_block"),
        cross_attention_dim=read.integer("cross_attention_dim"),
        norm_num_groups=read.need("norm_num_groups", 1),
        norm_eps=published.get("norm_eps", 1e-5),
        use_linear_projection=published.get("use_linear_projection", False),
        flip_sin_to_cos=published.get("flip_sin_to_cos", True),
        freq_shift=float(published.get("freq_shift", 0)),
        sample_size=published.get("sample_size") or 64,
    )
    for name in ("down_attention", "up_attention", "num_attention_heads"):
        if len(getattr(config, name)) != len(widths):
            read.problem(f"{name}: expected {len(widths)} levels, got {getattr(config, name)}")
    for width, count in zip(widths, heads, strict=False):
        if not count or not config.norm_num_groups:
            read.problem("attention_head_dim and norm_num_groups: expected 1 or more")
        elif width % count or width % config.norm_num_groups:
            read.problem(
                f"width {width}: not divisible by {count} heads and {config.norm_num_groups} groups"
            )
    known = {*UNET_IRRELEVANT, "cross_attention_dim", "use_linear_projection", "norm_eps"}
    read.finish({*known, "flip_sin_to_cos", "freq_shift", "sample_size"})
    return config


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
    read = _Reader(published, where)
    read.demand(VAE_DEMANDS)
    read.blocks("down_block_types", {"DownEncoderBlock": False})
    read.blocks("up_block_types", {"UpDecoderBlock": False})
    config = VAEConfig(
        in_channels=read.need("in_channels", 0),
        out_channels=read.need("out_channels", 0),
        latent_channels=read.need("latent_channels", 0),
        block_out_channels=tuple(read.need("block_out_channels", [0])),
        layers_per_block=read.integer("layers_per_block"),
        norm_num_groups=read.need("norm_num_groups", 1),
        # v1-4's own config is older than the attribute.
        scaling_factor=published.get("scaling_factor", 0.18215),
    )
    read.finish({*VAE_IRRELEVANT, "scaling_factor"})
    return config


def read_text_config(
    published: Published, where: str = "text_encoder/config.json"
) -> CLIPTextConfig:
    """Return our config of a CLIPTextModel; raises as `read_unet_config` does.

    transformers writes dozens of attributes about generation into every config, which say nothing
    here, so only what would change the states is looked at.
    """
    read = _Reader(published, where)
    read.demand({"model_type": ("clip_text_model",), "use_attention_mask": (False,)})
    hidden_act = published.get("hidden_act", "quick_gelu")
    if hidden_act not in ACTIVATIONS:
        read.problem(f"hidden_act: '{hidden_act}' is none of {', '.join(ACTIVATIONS)}")
        hidden_act = "gelu"
    config = CLIPTextConfig(
        vocab_size=read.need("vocab_size", 0),
        hidden_size=read.need("hidden_size", 0),
        intermediate_size=read.need("intermediate_size", 0),
        num_hidden_layers=read.need("num_hidden_layers", 0),
        num_attention_heads=read.need("num_attention_heads", 0),
        max_position_embeddings=read.need("max_position_embeddings", 0),
        layer_norm_eps=published.get("layer_norm_eps", 1e-5),
        hidden_act=hidden_act,
    )
    read.finish(set(published))
    return config


def read_schedule(
    published: Published, where: str = "scheduler/scheduler_config.json"
) -> NoiseSchedule:
    """Return the schedule of any published scheduler's config; raises as `read_unet_config` does.

    Only the betas and the prediction type are read: v1-4 names PNDM there, the method samples
    with DDIM whatever it says, and clipping is off whatever it says.
    """
    read = _Reader(published, where)
    read.demand(SCHEDULER_DEMANDS)
    beta_schedule = published.get("beta_schedule", "linear")
    if beta_schedule not in ("linear", "scaled_linear"):
        read.problem(f"beta_schedule: '{beta_schedule}' is neither linear nor scaled_linear")
    prediction_type = published.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        read.problem(f"prediction_type: '{prediction_type}' is neither epsilon nor v_prediction")
    read.finish(set(published))
    return make_schedule(
        num_train_timesteps=published.get("num_train_timesteps", 1000),
        beta_start=published.get("beta_start", 0.0001),
        beta_end=published.get("beta_end", 0.02),
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        set_alpha_to_one=published.get("set_alpha_to_one", True),
    )


class _Reader:
    """Reads attributes and gathers what is wrong, to say all of it at once."""

    def __init__(self, published: Published, where: str):
        self.published = published
        self.where = where
        self.seen: set[str] = set()
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        self.problems.append(f"  {text}")

    def need(self, name: str, stand_in: Any) -> Any:
        """Return an attribute that must be there; `stand_in` lets the reading go on without."""
        self.seen.add(name)
        if self.published.get(name) is None:
            self.problem(f"{name}: missing")
            return stand_in
        return self.published[name]

    def integer(self, name: str) -> int:
        value = self.need(name, 1)
        if not isinstance(value, int):
            self.problem(f"{name}: one number for all levels is supported, got {value}")
            return 1
        return value

    def blocks(self, name: str, known: Mapping[str, bool]) -> tuple[bool, ...]:
        """Return whether each block of a list attends, by its class name without 2D or 3D."""
        kinds = [kind.removesuffix("2D").removesuffix("3D") for kind in self.need(name, [])]
        for kind in sorted(set(kinds) - set(known)):
            self.problem(f"{name}: {kind} is not supported, only {', '.join(known)}")
        return tuple(known.get(kind, False) for kind in kinds)

    def demand(self, demands: Mapping[str, tuple[Any, ...]]) -> None:
        for name, values in demands.items():
            self.seen.add(name)
            if self.published.get(name, values[0]) not in values:
                self.problem(
                    f"{name}: {self.published[name]!r} is not supported, only {values[0]!r}"
                )

    def finish(self, known: set[str]) -> None:
        """Raise if anything was wrong, or if an attribute that we do not know is switched on."""
        for name in sorted(set(self.published) - self.seen - known):
            if not name.startswith("_") and self.published[name] not in (None, False):
                self.problem(f"{name}: not known to us, so {self.published[name]!r} is refused")
        if self.problems:
            raise UserError(f"{self.where}: not supported:\n" + "\n".join(self.problems))
