"""The shapes of `tiny-scenes`' networks."""

from tav_jax.models.clip import CLIPTextConfig
from tav_jax.models.unet import UNetConfig
from tav_jax.models.vae import VAEConfig

VAE = VAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(24, 48, 64),
    layers_per_block=1,
    norm_num_groups=8,
    scaling_factor=1.0,  # the training ends with normalised latents
)

UNET = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(48, 96),
    down_attention=(True, True),
    up_attention=(True, True),
    num_attention_heads=(4, 4),
    layers_per_block=1,
    cross_attention_dim=64,
    norm_num_groups=16,
    norm_eps=1e-5,
    use_linear_projection=False,
    flip_sin_to_cos=True,
    freq_shift=0.0,
    sample_size=8,
    # An image model: each image attends only to itself. Tuning inflates it like any other.
    attention_scope="spatial",
    temporal_attention=False,
)

TEXT_ENCODER = CLIPTextConfig(
    vocab_size=1,  # replaced by the tokenizer's
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=24,  # the longest caption has 12 tokens
    layer_norm_eps=1e-5,
    hidden_act="quick_gelu",
)
