"""Tune-A-Video in JAX and Flax (Wu et al. 2023, arXiv:2212.11565).

    import tav_jax as tav

    model = tav.load_model("stable-diffusion-v1-4", dtype="bfloat16")
    frames = tav.read_frames("man-skiing.mp4", n_sample_frames=8, width=512, height=512)
    tuned = tav.tune_clip(model, frames, "a man is skiing")
    videos = tav.edit_clip(tuned, frames, ["spider man is skiing on the beach, cartoon style"])

Pure functions and values below that: networks are pytrees (`Network`), the tuning state is one
pytree (`TrainState`), and nothing is jitted but in `tav_jax.pipeline`.
"""

import logging

# transformers is here for its tokenizer alone, and says at every import that PyTorch is missing.
logging.getLogger("transformers").addFilter(
    lambda record: "PyTorch was not found" not in record.getMessage()
)

from tav_jax.diffusion.sampling import ddim_invert, ddim_sample, dpm_solver_sample  # noqa: E402
from tav_jax.diffusion.schedule import (  # noqa: E402
    NoiseSchedule,
    add_noise,
    ddim_inverse_step,
    ddim_step,
    ddim_timesteps,
    make_schedule,
    velocity,
)
from tav_jax.models.attention.frame_attention import sparse_causal_attention  # noqa: E402
from tav_jax.models.network import Network, init_network, parameter_shapes  # noqa: E402
from tav_jax.models.vae import sample_posterior  # noqa: E402
from tav_jax.parallel.sharding import make_mesh, on_mesh  # noqa: E402
from tav_jax.pipeline import (  # noqa: E402
    compile_train_step,
    decode_latents,
    edit_clip,
    encode_frames,
    encode_prompts,
    invert_latents,
    posterior_mean_latents,
    random_latents,
    sample_latents,
    tune_clip,
)
from tav_jax.pretrained.model import (  # noqa: E402
    Model,
    load_model,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    load_vae,
    save_model,
    save_unet,
    tokenize,
)
from tav_jax.training.optimizer import (  # noqa: E402
    TRAINABLE_MODULES,
    label_params,
    make_lr_schedule,
    make_optimizer,
)
from tav_jax.training.train_step import (  # noqa: E402
    NoisedBatch,
    TrainState,
    apply_gradients,
    denoising_loss,
    draw_batch,
    init_state,
    loss_and_gradients,
    train_step,
)
from tav_jax.video.read import read_frames, to_pixel_values  # noqa: E402
from tav_jax.video.sheets import contact_sheet, side_by_side  # noqa: E402
from tav_jax.video.write import to_frames, write_image, write_video  # noqa: E402

__all__ = [
    "TRAINABLE_MODULES",
    "Model",
    "Network",
    "NoiseSchedule",
    "NoisedBatch",
    "TrainState",
    "add_noise",
    "apply_gradients",
    "compile_train_step",
    "contact_sheet",
    "ddim_inverse_step",
    "ddim_invert",
    "ddim_sample",
    "ddim_step",
    "ddim_timesteps",
    "decode_latents",
    "denoising_loss",
    "dpm_solver_sample",
    "draw_batch",
    "edit_clip",
    "encode_frames",
    "encode_prompts",
    "init_network",
    "init_state",
    "invert_latents",
    "label_params",
    "load_model",
    "load_text_encoder",
    "load_tokenizer",
    "load_unet",
    "load_vae",
    "loss_and_gradients",
    "make_lr_schedule",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "on_mesh",
    "parameter_shapes",
    "posterior_mean_latents",
    "random_latents",
    "read_frames",
    "sample_latents",
    "sample_posterior",
    "save_model",
    "save_unet",
    "side_by_side",
    "sparse_causal_attention",
    "to_frames",
    "to_pixel_values",
    "tokenize",
    "train_step",
    "tune_clip",
    "velocity",
    "write_image",
    "write_video",
]
