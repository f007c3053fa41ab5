import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tav_jax.models.clip import CLIPTextConfig
from tav_jax.models.unet import UNetConfig
from tav_jax.models.vae import VAEConfig
from tav_jax.pretrained.configs import (
    SCHEDULER_DEMANDS,
    UNET_DEMANDS,
    VAE_DEMANDS,
    read_schedule,
    read_text_config,
    read_unet_config,
    read_vae_config,
    write_unet_config,
)
from tav_jax.pretrained.sd_v1_4 import CONFIGS

GOLDEN = Path(__file__).parents[1] / "golden"

# The whole files of CompVis/stable-diffusion-v1-4, and others as far as they differ from them.
UNET_V1_4 = CONFIGS["unet"] | {"_diffusers_version": "0.2.2"}
UNET_V1_5 = UNET_V1_4 | {"_diffusers_version": "0.6.0"}
UNET_V2_1_BASE = UNET_V1_4 | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "upcast_attention": True,
    "use_linear_projection": True,
}
# Every argument of UNet2DConditionModel in diffusers 0.42, as training v1-5 today exports them.
UNET_EXPORT = UNET_V1_5 | {
    "_diffusers_version": "0.42.1",
    "_name_or_path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": False,
    "use_linear_projection": False,
}

VAE_V1_4 = CONFIGS["vae"] | {"_diffusers_version": "0.2.2"}
VAE_EXPORT = VAE_V1_4 | {
    "_diffusers_version": "0.42.1",
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}

TEXT_V1_4 = CONFIGS["text_encoder"] | {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "torch_dtype": "float32",
    "transformers_version": "4.21.0.dev0",
}
TEXT_V2_1_BASE = TEXT_V1_4 | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
# transformers 5 says `dtype` where 4 said `torch_dtype`.
TEXT_EXPORT = {k: v for k, v in TEXT_V1_4.items() if k not in ("torch_dtype", "dropout")} | {
    "dtype": "float16",
    "transformers_version": "5.23.0",
}

PNDM_V1_4 = CONFIGS["scheduler"] | {
    "_diffusers_version": "0.7.0.dev0",
    "clip_sample": False,
}
EULER_V2 = PNDM_V1_4 | {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.10.2",
    "prediction_type": "v_prediction",
}
DDIM_EXPORT = PNDM_V1_4 | {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.42.1",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "thresholding": False,
    "timestep_spacing": "leading",
}
EULER_EXPORT = EULER_V2 | {
    "_diffusers_version": "0.42.1",
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "rescale_betas_zero_snr": False,
    "sigma_max": None,
    "sigma_min": None,
    "timestep_spacing": "linspace",
    "timestep_type": "discrete",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}

OURS_V1_4 = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280, 1280),
    down_attention=(True, True, True, False),
    up_attention=(False, True, True, True),
    num_attention_heads=(8, 8, 8, 8),
    layers_per_block=2,
    cross_attention_dim=768,
    norm_num_groups=32,
    norm_eps=1e-5,
    use_linear_projection=False,
    flip_sin_to_cos=True,
    freq_shift=0.0,
)
OURS_V2_1_BASE = replace(
    OURS_V1_4,
    num_attention_heads=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
)


# --- the U-Net


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        pytest.param(UNET_V1_4, OURS_V1_4, id="v1-4"),
        pytest.param(UNET_V1_5, OURS_V1_4, id="v1-5"),
        pytest.param(UNET_V2_1_BASE, OURS_V2_1_BASE, id="2.1-base"),
        pytest.param(UNET_EXPORT, OURS_V1_4, id="an export of today"),
    ],
)
def test_published_unets_are_read(published, ours):
    assert read_unet_config(published) == ours


def test_a_3d_network_is_read_like_the_image_network_that_it_comes_from():
    image, video = (
        json.loads((GOLDEN / kind / "unet" / "config.json").read_text())
        for kind in ("base", "tuned")
    )
    assert video["_class_name"] == "UNet3DConditionModel"
    assert read_unet_config(video) == read_unet_config(image)


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("norm_eps", 1e-6, {"norm_eps": 1e-6}),
        ("flip_sin_to_cos", False, {"flip_sin_to_cos": False}),
        ("freq_shift", 1, {"freq_shift": 1.0}),
        ("freq_shift", 0.5, {"freq_shift": 0.5}),
        ("layers_per_block", 3, {"layers_per_block": 3}),
        ("attention_head_dim", [8, 8, 16, 16], {"num_attention_heads": (8, 8, 16, 16)}),
    ],
)
def test_an_attribute_that_we_compute_is_taken_over(name, value, ours):
    assert read_unet_config(UNET_V1_4 | {name: value}) == replace(OURS_V1_4, **ours)


@pytest.mark.parametrize("name", ["flip_sin_to_cos", "freq_shift", "norm_eps"])
def test_an_attribute_that_is_absent_has_diffusers_default(name):
    without = {key: value for key, value in UNET_V1_4.items() if key != name}
    assert read_unet_config(without) == OURS_V1_4


def test_a_true_head_count_goes_before_the_misnamed_one():
    published = UNET_V1_4 | {"num_attention_heads": [5, 10, 20, 20], "attention_head_dim": 64}
    assert read_unet_config(published).num_attention_heads == (5, 10, 20, 20)


@pytest.mark.parametrize("name", UNET_DEMANDS)
def test_a_demanded_attribute_of_the_unet_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"\n  {name}: 'other' is not supported, only "):
        read_unet_config(UNET_V1_4 | {name: "other"})


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in UNET_DEMANDS.items() for value in values]
)
def test_a_demanded_attribute_of_the_unet_may_say_what_we_compute(name, value):
    assert read_unet_config(UNET_V1_4 | {name: value}) == OURS_V1_4


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        pytest.param("class_embed_type", "timestep", "'timestep'", id="labels"),
        pytest.param("only_cross_attention", True, "True", id="cross only"),
        pytest.param("dual_cross_attention", True, "True", id="two contexts"),
        pytest.param("resnet_time_scale_shift", "scale_shift", "'scale_shift'", id="scale shift"),
        pytest.param("addition_embed_type", "text_time", "'text_time'", id="SDXL"),
        pytest.param("transformer_layers_per_block", [1, 2, 10], r"\[1, 2, 10\]", id="SDXL depth"),
        pytest.param("mid_block_type", None, "None", id="no middle"),
        pytest.param("conv_in_kernel", 1, "1", id="pointwise entrance"),
    ],
)
def test_a_network_of_another_kind_is_refused(name, value, message):
    with pytest.raises(ValueError, match=f"{name}: {message} is not supported"):
        read_unet_config(UNET_V1_4 | {name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"down_block_types": ["AttnDownBlock2D"] * 4},
            "down_block_types: AttnDownBlock is not supported, only CrossAttnDownBlock, DownBlock",
            id="unknown block",
        ),
        pytest.param(
            {"up_block_types": ["UpBlock2D"] * 3},
            "up_attention: expected 4 levels, got",
            id="a level too few",
        ),
        pytest.param(
            {"attention_head_dim": [5, 10, 20]},
            "num_attention_heads: expected 4 levels, got",
            id="a head count too few",
        ),
        pytest.param({"layers_per_block": [2, 2, 2, 1]}, "layers_per_block: one number", id="list"),
        pytest.param({"cross_attention_dim": [768] * 4}, "cross_attention_dim: one", id="contexts"),
        pytest.param(
            {"attention_head_dim": 7},
            "width 320: not divisible by 7 heads and 32 groups",
            id="heads do not divide",
        ),
        pytest.param(
            {"norm_num_groups": 48},
            "width 1280: not divisible by 8 heads and 48 groups",
            id="groups do not divide",
        ),
        pytest.param({"cross_attention_dim": None}, "cross_attention_dim: missing", id="null"),
    ],
)
def test_a_unet_that_does_not_add_up_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read_unet_config(UNET_V1_4 | changes)


@pytest.mark.parametrize(
    "name",
    [
        "in_channels",
        "out_channels",
        "block_out_channels",
        "down_block_types",
        "up_block_types",
        "attention_head_dim",
        "layers_per_block",
        "cross_attention_dim",
        "norm_num_groups",
    ],
)
def test_an_attribute_without_a_default_must_be_there(name):
    without = {key: value for key, value in UNET_V1_4.items() if key != name}
    with pytest.raises(ValueError, match=f"{name}: missing"):
        read_unet_config(without)


def test_all_problems_are_in_one_message_under_the_name_of_the_file():
    published = UNET_V1_4 | {
        "act_fn": "gelu",
        "brightness": 3,
        "down_block_types": ["CrossAttnDownBlock2D", "KDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "encoder_hid_dim": 1280,
        "in_channels": None,
    }
    with pytest.raises(ValueError, match=r"^here/config\.json: not supported:\n") as error:
        read_unet_config(published, "here/config.json")
    assert sorted(str(error.value).splitlines()[1:]) == [
        "  act_fn: 'gelu' is not supported, only 'silu'",
        "  brightness: not known to us, so 3 is refused",
        "  down_block_types: KDownBlock is not supported, only CrossAttnDownBlock, DownBlock",
        "  encoder_hid_dim: 1280 is not supported, only None",
        "  in_channels: missing",
    ]


@pytest.mark.parametrize("value", [True, 1, "on", [False]])
def test_an_unknown_attribute_that_is_switched_on_is_refused(value):
    for read, published in ((read_unet_config, UNET_V1_4), (read_vae_config, VAE_V1_4)):
        with pytest.raises(ValueError, match="novelty: not known to us"):
            read(published | {"novelty": value})


@pytest.mark.parametrize("value", [None, False])
def test_an_unknown_attribute_that_is_switched_off_says_nothing(value):
    assert read_unet_config(UNET_V1_4 | {"novelty": value}) == OURS_V1_4
    assert read_vae_config(VAE_V1_4 | {"novelty": value}) == read_vae_config(VAE_V1_4)


# --- back to the published form


def tuned_config():
    return json.loads((GOLDEN / "tuned" / "unet" / "config.json").read_text())


def test_the_written_config_is_the_published_one():
    published = tuned_config()
    written = write_unet_config(read_unet_config(published))
    # The default size of an image is the pipeline's business: see the next test.
    written.pop("sample_size", None), published.pop("sample_size")
    assert written == published
    assert list(written) == sorted(written), "in the published order"
    assert json.loads(json.dumps(written)) == written


def test_the_written_config_has_a_sample_size_for_the_published_pipeline():
    # TuneAVideoPipeline.__init__ computes `unet.config.sample_size < 64`, which fails for None.
    assert isinstance(write_unet_config(OURS_V1_4).get("sample_size"), int)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(OURS_V1_4, id="v1-4"),
        pytest.param(OURS_V2_1_BASE, id="2.1-base"),
        pytest.param(
            replace(
                OURS_V1_4,
                block_out_channels=(32, 64),
                down_attention=(False, True),
                up_attention=(True, True),
                num_attention_heads=(1, 2),
                layers_per_block=1,
                norm_eps=1e-6,
                flip_sin_to_cos=False,
                freq_shift=1.0,
            ),
            id="everything else",
        ),
    ],
)
def test_a_written_config_is_read_as_it_was(config):
    written = json.loads(json.dumps(write_unet_config(config)))
    assert written["_class_name"] == "UNet3DConditionModel"
    assert read_unet_config(written) == config


def test_the_attention_scope_is_not_part_of_the_written_config():
    changed = replace(OURS_V1_4, attention_scope="full")
    assert write_unet_config(changed) == write_unet_config(OURS_V1_4)


def test_one_head_count_for_all_levels_is_written_as_one_number():
    assert write_unet_config(OURS_V1_4)["attention_head_dim"] == 8
    assert write_unet_config(OURS_V2_1_BASE)["attention_head_dim"] == [5, 10, 20, 20]


# --- the autoencoder

OURS_VAE = VAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    norm_num_groups=32,
    scaling_factor=0.18215,
)


@pytest.mark.parametrize("published", [VAE_V1_4, VAE_EXPORT], ids=["v1-4", "an export of today"])
def test_published_autoencoders_are_read(published):
    config = read_vae_config(published)
    assert config == OURS_VAE
    assert config.downsampling == 8


def test_the_scaling_factor_is_the_autoencoders_own():
    assert read_vae_config(VAE_EXPORT | {"scaling_factor": 0.13025}).scaling_factor == 0.13025


@pytest.mark.parametrize("name", VAE_DEMANDS)
def test_a_demanded_attribute_of_the_autoencoder_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"\n  {name}: 'other' is not supported, only "):
        read_vae_config(VAE_V1_4 | {name: "other"})


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in VAE_DEMANDS.items() for value in values]
)
def test_a_demanded_attribute_of_the_autoencoder_may_say_what_we_compute(name, value):
    assert read_vae_config(VAE_V1_4 | {name: value}) == OURS_VAE


def test_an_autoencoder_of_other_blocks_is_refused():
    other = {"down_block_types": ["AttnDownEncoderBlock2D"] * 4, "latents_mean": [0.1] * 4}
    with pytest.raises(ValueError, match=r"vae/config\.json: not supported") as error:
        read_vae_config(VAE_V1_4 | other)
    assert "down_block_types: AttnDownEncoderBlock is not supported" in str(error.value)
    assert "latents_mean: [0.1, 0.1, 0.1, 0.1] is not supported" in str(error.value)


# --- the text encoder


@pytest.mark.parametrize(
    ("published", "width", "layers", "heads", "activation"),
    [
        pytest.param(TEXT_V1_4, 768, 12, 12, "quick_gelu", id="v1-4"),
        pytest.param(TEXT_V2_1_BASE, 1024, 23, 16, "gelu", id="2.1-base"),
        pytest.param(TEXT_EXPORT, 768, 12, 12, "quick_gelu", id="an export of today"),
    ],
)
def test_published_text_encoders_are_read(published, width, layers, heads, activation):
    assert read_text_config(published) == CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        layer_norm_eps=1e-5,
        hidden_act=activation,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "xlm-roberta"}, "model_type: 'xlm-roberta' is not supported"),
        ({"use_attention_mask": True}, "use_attention_mask: True is not supported"),
        ({"hidden_act": "relu"}, "hidden_act: 'relu' is none of quick_gelu, gelu"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"vocab_size": None}, "vocab_size: missing"),
    ],
)
def test_a_text_encoder_of_another_kind_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read_text_config(TEXT_V1_4 | changes)


def test_all_problems_of_a_text_encoder_are_in_one_message():
    with pytest.raises(ValueError, match=r"text_encoder/config\.json: not supported") as error:
        read_text_config({"model_type": "t5"})
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == [
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    ]


# --- the schedule


def alphas_cumprod(betas):
    return np.cumprod(1 - betas)


SCALED = alphas_cumprod(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
LINEAR = alphas_cumprod(np.linspace(0.0001, 0.02, 1000))


@pytest.mark.parametrize(
    ("published", "alphas", "final", "prediction_type"),
    [
        pytest.param(PNDM_V1_4, SCALED, SCALED[0], "epsilon", id="PNDM of v1-4"),
        pytest.param(EULER_V2, SCALED, SCALED[0], "v_prediction", id="Euler of 2"),
        pytest.param(DDIM_EXPORT, SCALED, 1.0, "epsilon", id="DDIM of today"),
        pytest.param(EULER_EXPORT, SCALED, SCALED[0], "v_prediction", id="Euler of today"),
        pytest.param({"_class_name": "DDIMScheduler"}, LINEAR, 1.0, "epsilon", id="all defaults"),
        pytest.param(
            DDIM_EXPORT | {"beta_schedule": "linear", "num_train_timesteps": 50},
            alphas_cumprod(np.linspace(0.00085, 0.012, 50)),
            1.0,
            "epsilon",
            id="50 linear betas",
        ),
    ],
)
def test_published_schedules_are_read_whatever_scheduler_they_name(
    published, alphas, final, prediction_type
):
    schedule = read_schedule(published)
    np.testing.assert_allclose(schedule.alphas_cumprod, alphas, rtol=1e-6)
    assert float(schedule.final_alpha_cumprod) == pytest.approx(final, rel=1e-6)
    assert schedule.prediction_type == prediction_type


@pytest.mark.parametrize("name", SCHEDULER_DEMANDS)
def test_a_demanded_attribute_of_the_scheduler_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"\n  {name}: 'other' is not supported, only "):
        read_schedule(PNDM_V1_4 | {name: "other"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas: \[0\.1, 0\.2\] is not supported"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: True is not supported"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule: 'squaredcos_cap_v2' is neither"),
        ({"prediction_type": "sample"}, "prediction_type: 'sample' is neither"),
    ],
)
def test_a_schedule_that_we_do_not_compute_is_refused(changes, message):
    with pytest.raises(ValueError, match=rf"scheduler_config\.json: not supported:\n  {message}"):
        read_schedule(PNDM_V1_4 | changes)


def test_all_problems_of_a_schedule_are_in_one_message():
    changes = {"beta_schedule": "sigmoid", "prediction_type": "sample", "trained_betas": [0.1]}
    with pytest.raises(ValueError, match="not supported") as error:
        read_schedule(PNDM_V1_4 | changes)
    assert len(str(error.value).splitlines()) == 1 + len(changes)
