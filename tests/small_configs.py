"""Configs of networks, and settings of a run, that are as small as the tests allow.

The U-Net has two levels, both attentions and a skip of each kind. A program of it compiles in a few
seconds.
"""

from tav_jax.models.clip import CLIPTextConfig
from tav_jax.models.clip_image import CLIPConfig, CLIPVisionConfig
from tav_jax.models.unet import UNetConfig
from tav_jax.models.vae import VAEConfig

UNET = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(8, 16),
    down_attention=(True, False),
    up_attention=(False, True),
    num_attention_heads=(2, 4),
    layers_per_block=1,
    cross_attention_dim=8,
    norm_num_groups=4,
    norm_eps=1e-5,
    use_linear_projection=False,
    flip_sin_to_cos=True,
    freq_shift=0.0,
)
VAE = VAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    scaling_factor=0.25,
    frames_per_chunk=2,
)
TEXT = CLIPTextConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=7,
    layer_norm_eps=1e-5,
    hidden_act="quick_gelu",
)
CLIP = CLIPConfig(
    text_config=TEXT,
    vision_config=CLIPVisionConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        layer_norm_eps=1e-5,
        hidden_act="gelu",
        image_size=11,  # two patches of 5, and a row and a column that no patch has
        patch_size=5,
    ),
    projection_dim=6,
    eos_token_id=20,
)

# The keys of a run's config that have no default.
RUN = {
    "pretrained_model_path": "model",
    "output_dir": "run",
    "train_data": {"video_path": "clip.mp4", "prompt": "a man is skiing"},
}
