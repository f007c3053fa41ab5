"""The shapes of `tiny-scenes`' networks."""

from tav_jax.worlds.networks import unet_config, vae_config

VAE = vae_config((24, 48, 64))
UNET = unet_config((48, 96), sample_size=8)
