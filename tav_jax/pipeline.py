"""The method end to end on one Model: encode, tune, invert, edit, decode."""

import jax

from tav_jax.stable_diffusion import tokenize


@jax.jit
def _encode_text(e, ids):
    return e(ids)


def encode_prompts(model, prompts):
    return _encode_text(model.text_encoder, tokenize(model, prompts))


@jax.jit
def _decode(vae, z):
    return vae.bind().decode(z)


def decode_latents(model, z):
    return _decode(model.vae, z)
