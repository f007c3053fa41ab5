"""The shapes of `tiny-figures`' networks."""

from tav_jax.worlds.networks import unet_config, vae_config

VAE = vae_config((16, 32, 64))
UNET = unet_config((48, 96, 128), sample_size=16)
