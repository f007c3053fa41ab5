"""Tune-A-Video in JAX and Flax (Wu et al. 2023, arXiv:2212.11565).

    import tav_jax as tav

    model = tav.load_model("CompVis/stable-diffusion-v1-4", dtype="bfloat16")
    frames = tav.read_frames("man-skiing.mp4", n_sample_frames=8, width=512, height=512)
    tuned = tav.tune_clip(model, frames, "a man is skiing")
    videos = tav.edit_clip(tuned, frames, ["spider man is skiing on the beach, cartoon style"])

Below these calls everything is a pure function or a value: networks are pytrees (`Network`), the
tuning state is one pytree (`TrainState`), and only `tav_jax.pipeline` jits anything.

Names are imported at their first use, so that `import tav_jax` is quick.
"""

import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # This is `python -m tav_jax.tune` or another command. Ctrl-C during its imports, which take
    # seconds, ends it without a traceback. `tav_jax.stopping` takes over afterwards.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

if TYPE_CHECKING:
    # For editors and type checkers, which do not follow `__getattr__`.
    from tav_jax.diffusion.guidance import (
        guide as guide,
    )
    from tav_jax.diffusion.samplers import (
        Sampler as Sampler,
    )
    from tav_jax.diffusion.samplers import (
        ddim as ddim,
    )
    from tav_jax.diffusion.samplers import (
        ddim_inverse as ddim_inverse,
    )
    from tav_jax.diffusion.samplers import (
        dpm_solver as dpm_solver,
    )
    from tav_jax.diffusion.sampling import (
        ddim_invert as ddim_invert,
    )
    from tav_jax.diffusion.sampling import (
        ddim_sample as ddim_sample,
    )
    from tav_jax.diffusion.sampling import (
        dpm_solver_sample as dpm_solver_sample,
    )
    from tav_jax.diffusion.sampling import (
        run_steps as run_steps,
    )
    from tav_jax.diffusion.schedule import (
        NoiseSchedule as NoiseSchedule,
    )
    from tav_jax.diffusion.schedule import (
        add_noise as add_noise,
    )
    from tav_jax.diffusion.schedule import (
        ddim_inverse_step as ddim_inverse_step,
    )
    from tav_jax.diffusion.schedule import (
        ddim_step as ddim_step,
    )
    from tav_jax.diffusion.schedule import (
        ddim_timesteps as ddim_timesteps,
    )
    from tav_jax.diffusion.schedule import (
        make_schedule as make_schedule,
    )
    from tav_jax.diffusion.schedule import (
        velocity as velocity,
    )
    from tav_jax.errors import (
        NotLearningError as NotLearningError,
    )
    from tav_jax.errors import (
        UserError as UserError,
    )
    from tav_jax.evaluation.score_videos import (
        score_videos as score_videos,
    )
    from tav_jax.models.attention.frame_attention import (
        sparse_causal_attention as sparse_causal_attention,
    )
    from tav_jax.models.network import (
        Network as Network,
    )
    from tav_jax.models.network import (
        init_network as init_network,
    )
    from tav_jax.models.network import (
        parameter_shapes as parameter_shapes,
    )
    from tav_jax.models.vae import (
        sample_posterior as sample_posterior,
    )
    from tav_jax.parallel.sharding import (
        make_mesh as make_mesh,
    )
    from tav_jax.parallel.sharding import (
        on_mesh as on_mesh,
    )
    from tav_jax.pipeline import (
        compile_train_step as compile_train_step,
    )
    from tav_jax.pipeline import (
        decode_latents as decode_latents,
    )
    from tav_jax.pipeline import (
        edit_clip as edit_clip,
    )
    from tav_jax.pipeline import (
        encode_frames as encode_frames,
    )
    from tav_jax.pipeline import (
        encode_prompts as encode_prompts,
    )
    from tav_jax.pipeline import (
        invert_latents as invert_latents,
    )
    from tav_jax.pipeline import (
        posterior_mean_latents as posterior_mean_latents,
    )
    from tav_jax.pipeline import (
        random_latents as random_latents,
    )
    from tav_jax.pipeline import (
        sample_latents as sample_latents,
    )
    from tav_jax.pipeline import (
        tune_clip as tune_clip,
    )
    from tav_jax.pretrained.model import (
        Model as Model,
    )
    from tav_jax.pretrained.model import (
        load_model as load_model,
    )
    from tav_jax.pretrained.model import (
        load_text_encoder as load_text_encoder,
    )
    from tav_jax.pretrained.model import (
        load_tokenizer as load_tokenizer,
    )
    from tav_jax.pretrained.model import (
        load_unet as load_unet,
    )
    from tav_jax.pretrained.model import (
        load_vae as load_vae,
    )
    from tav_jax.pretrained.model import (
        save_model as save_model,
    )
    from tav_jax.pretrained.model import (
        save_unet as save_unet,
    )
    from tav_jax.pretrained.model import (
        tokenize as tokenize,
    )
    from tav_jax.training.optimizer import (
        TRAINABLE_MODULES as TRAINABLE_MODULES,
    )
    from tav_jax.training.optimizer import (
        label_params as label_params,
    )
    from tav_jax.training.optimizer import (
        make_lr_schedule as make_lr_schedule,
    )
    from tav_jax.training.optimizer import (
        make_optimizer as make_optimizer,
    )
    from tav_jax.training.train_step import (
        NoisedBatch as NoisedBatch,
    )
    from tav_jax.training.train_step import (
        TrainState as TrainState,
    )
    from tav_jax.training.train_step import (
        apply_gradients as apply_gradients,
    )
    from tav_jax.training.train_step import (
        denoising_loss as denoising_loss,
    )
    from tav_jax.training.train_step import (
        draw_batch as draw_batch,
    )
    from tav_jax.training.train_step import (
        init_state as init_state,
    )
    from tav_jax.training.train_step import (
        loss_and_gradients as loss_and_gradients,
    )
    from tav_jax.training.train_step import (
        train_step as train_step,
    )
    from tav_jax.video.read import (
        read_frames as read_frames,
    )
    from tav_jax.video.read import (
        to_pixel_values as to_pixel_values,
    )
    from tav_jax.video.sheets import (
        contact_sheet as contact_sheet,
    )
    from tav_jax.video.sheets import (
        side_by_side as side_by_side,
    )
    from tav_jax.video.write import (
        show_video as show_video,
    )
    from tav_jax.video.write import (
        to_frames as to_frames,
    )
    from tav_jax.video.write import (
        write_image as write_image,
    )
    from tav_jax.video.write import (
        write_video as write_video,
    )

# The public API by heading: each name with the module that has it.
_API: dict[str, tuple[str, ...]] = {
    # The method, end to end.
    "pipeline": (
        "compile_train_step",
        "decode_latents",
        "edit_clip",
        "encode_frames",
        "encode_prompts",
        "invert_latents",
        "posterior_mean_latents",
        "random_latents",
        "sample_latents",
        "tune_clip",
    ),
    # Models and their files.
    "pretrained.model": (
        "Model",
        "load_model",
        "load_text_encoder",
        "load_tokenizer",
        "load_unet",
        "load_vae",
        "save_model",
        "save_unet",
        "tokenize",
    ),
    # Networks as values.
    "models.network": ("Network", "init_network", "parameter_shapes"),
    "models.attention.frame_attention": ("sparse_causal_attention",),
    "models.vae": ("sample_posterior",),
    # Noise schedule and samplers.
    "diffusion.schedule": (
        "NoiseSchedule",
        "add_noise",
        "ddim_inverse_step",
        "ddim_step",
        "ddim_timesteps",
        "make_schedule",
        "velocity",
    ),
    "diffusion.samplers": ("Sampler", "ddim", "ddim_inverse", "dpm_solver"),
    "diffusion.guidance": ("guide",),
    "diffusion.sampling": ("ddim_invert", "ddim_sample", "dpm_solver_sample", "run_steps"),
    # Tuning.
    "training.optimizer": (
        "TRAINABLE_MODULES",
        "label_params",
        "make_lr_schedule",
        "make_optimizer",
    ),
    "training.train_step": (
        "NoisedBatch",
        "TrainState",
        "apply_gradients",
        "denoising_loss",
        "draw_batch",
        "init_state",
        "loss_and_gradients",
        "train_step",
    ),
    # Several devices.
    "parallel.sharding": ("make_mesh", "on_mesh"),
    # Videos and images.
    "video.read": ("read_frames", "to_pixel_values"),
    "video.sheets": ("contact_sheet", "side_by_side"),
    "video.write": ("show_video", "to_frames", "write_image", "write_video"),
    # Evaluation.
    "evaluation.score_videos": ("score_videos",),
    # Errors.
    "errors": ("NotLearningError", "UserError"),
}
# Former names that still work.
_ALIASES = {"Draw": "NoisedBatch", "clean_latents": "posterior_mean_latents"}

_MODULE_OF = {name: module for module, names in _API.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    name = _ALIASES.get(name, name)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tav_jax' has no attribute '{name}'")
    return getattr(import_module(f"tav_jax.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
