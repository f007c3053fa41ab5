"""The programs of a run at a given size, with inputs to run or only to compile them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tav_jax.bench.flops import count_flops
from tav_jax.diffusion.schedule import NoiseSchedule
from tav_jax.models.attention.dispatch import (
    choose_implementation,
    platform,
)
from tav_jax.models.network import Network, in_modules, init_network, parameter_shapes
from tav_jax.models.unet import UNet3DConditionModel, UNetConfig
from tav_jax.models.vae import AutoencoderKL
from tav_jax.parallel.sharding import laid, storage, videos
from tav_jax.pipeline import (
    compile_train_step,
    ddim_invert_loop,
    ddim_sample_loop,
    decode_video,
    encode_video,
)
from tav_jax.pretrained import configs as published_config
from tav_jax.pretrained.model import load_model
from tav_jax.pretrained.sd_v1_4 import CONFIGS
from tav_jax.training.optimizer import TRAINABLE_MODULES, label_params, make_optimizer
from tav_jax.training.train_step import NoisedBatch, TrainState, init_state, loss_and_gradients

GUIDANCE_SCALE, LEARNING_RATE = 12.5, 3e-5  # the paper's
STEPS, TEXT_TOKENS = 50, 77

# v1-4's layout at a width that two CPU cores run in seconds.
SMALL: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [64, 128, 160, 160], "cross_attention_dim": 256},
    "vae": {"block_out_channels": [32, 64, 128, 128]},
}
NETWORKS: dict[str, dict[str, dict[str, Any]]] = {"v1-4": {}, "small": SMALL}


@dataclass(frozen=True)
class Networks:
    """What a step computes with. Parameters wait on the host, or are only shapes."""

    unet: Network[UNet3DConditionModel]
    vae: Network[AutoencoderKL]
    schedule: NoiseSchedule

    def with_unet_config(self, **changes: Any) -> "Networks":
        """Returns the same parameters under a config of the U-Net with some fields changed."""
        return replace(self, unet=self.unet.with_config(**changes))


def load_networks(folder: str, dtype: str) -> Networks:
    """Returns the networks of a model's folder or name."""
    model = load_model(folder, dtype=dtype, float32_modules=TRAINABLE_MODULES)
    return Networks(jax.device_get(model.unet), jax.device_get(model.vae), model.schedule)


def random_networks(name: str, dtype: str, *, only_shapes: bool = False) -> Networks:
    """Returns networks of `NETWORKS` with random parameters, or with their shapes alone.

    Args:
        dtype: Of the computation, and of the parameters that are not trained.
    """

    def make(module_class: type, config: Any, float32_modules: tuple[str, ...]) -> Network:
        config = replace(config, dtype=dtype)
        if only_shapes:
            params: dict[str, Any] = parameter_shapes(module_class, config)
        else:
            params = init_network(module_class, config, jax.random.key(0)).params
        for parameter, value in params.items():
            kept = np.float32 if in_modules(parameter, float32_modules) else np.dtype(dtype)
            params[parameter] = (
                jax.ShapeDtypeStruct(value.shape, kept)
                if only_shapes
                else np.asarray(value.astype(kept))
            )
        return Network(module_class, config, params)

    configs = {part: CONFIGS[part] | NETWORKS[name].get(part, {}) for part in ("unet", "vae")}
    unet_config = published_config.read_unet_config(configs["unet"])
    return Networks(
        make(UNet3DConditionModel, unet_config, TRAINABLE_MODULES),
        make(AutoencoderKL, published_config.read_vae_config(configs["vae"]), ()),
        published_config.read_schedule(CONFIGS["scheduler"]),
    )


@dataclass(frozen=True)
class Program:
    """A jitted function with what it takes.

    Args:
        inputs: Makes its arguments, which a run may use up.
        settings: Its static arguments.
        carries: Whether a run's result is, or begins with, the first argument of the next.
        flops: Counts the method's work in one run, in whatever way that is computed.
    """

    function: Any
    inputs: Callable[[], tuple[Any, ...]]
    flops: Callable[[], int]
    settings: dict[str, Any]
    carries: bool = False

    def compile(self) -> jax.stages.Compiled:
        return self.function.lower(*self.inputs(), **self.settings).compile()


def make_programs(
    networks: Networks,
    *,
    frames: int,
    height: int,
    width: int,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Program]:
    """Returns the five programs in which a run spends its time, by name.

    Args:
        height, width: Pixels.
        mesh: Of devices that are not here, for which programs are to be compiled and not run. By
            default inputs are real, on the mesh in force.
    """
    unet, vae, schedule = networks.unet, networks.vae, networks.schedule
    grid = 1, frames, height // vae.config.downsampling, width // vae.config.downsampling
    labels = label_params(unet.params, TRAINABLE_MODULES)
    optimizer = make_optimizer(labels, LEARNING_RATE)

    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    latents, moments = of(*grid, unet.config.in_channels), of(*grid, 2 * unet.config.in_channels)
    context = of(1, TEXT_TOKENS, unet.config.cross_attention_dim)
    pixel_values, timesteps = of(1, frames, height, width, 3), jax.ShapeDtypeStruct((1,), jnp.int32)

    def place(tree: Any, lie: Any = storage) -> Any:
        def one(x: Any) -> Any:
            if isinstance(x, jax.ShapeDtypeStruct):
                return jax.random.normal(jax.random.key(0), x.shape, x.dtype)
            return jnp.array(x)  # a copy: a run may use it up

        if mesh is None:
            return laid(jax.tree.map(one, tree), lie)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            tree,
            lie(tree, mesh),
        )

    def begin(unet: Network[UNet3DConditionModel]) -> TrainState:
        return init_state(unet, optimizer, jax.random.key(0))

    def state() -> TrainState:
        return begin(place(unet)) if mesh is None else place(jax.eval_shape(begin, unet))

    # Kernels hide their products and recomputation repeats them: counted is the method's work.
    plain = unet.with_config(attention="einsum", gradient_checkpointing="none")

    def forward_flops(batch: int) -> int:
        inputs = (
            jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
            for x in (latents, timesteps, context)
        )
        return count_flops(lambda unet, *inputs: unet(*inputs), plain, *inputs)

    def tune_flops() -> int:
        def gradients(unet: Network, latents: Any, timesteps: Any, context: Any) -> Any:
            draw = NoisedBatch(latents, latents, timesteps)
            return loss_and_gradients(unet, labels, schedule, draw, context)

        return count_flops(gradients, plain, latents, timesteps, context)

    def loop_inputs(*texts: Any) -> tuple[Any, ...]:
        guidance = (GUIDANCE_SCALE,) if len(texts) > 1 else ()
        return place(latents, videos), 0, 1, place(unet), place(schedule), place(texts), *guidance

    return {
        "tune_step": Program(
            compile_train_step(vae.config.scaling_factor, optimizer=optimizer, labels=labels),
            lambda: (state(), place(moments, videos), place(context), place(schedule)),
            tune_flops,
            {},
            carries=True,
        ),
        "guided_step": Program(
            ddim_sample_loop,
            lambda: loop_inputs(context, context),
            lambda: forward_flops(2),
            {"num_steps": STEPS},
            carries=True,
        ),
        "inversion_step": Program(
            ddim_invert_loop,
            lambda: loop_inputs(context),
            lambda: forward_flops(1),
            {"num_steps": STEPS},
            carries=True,
        ),
        "encode": Program(
            encode_video,
            lambda: (place(vae), place(pixel_values, videos)),
            lambda: count_flops(lambda vae, x: vae.bind().encode(x), vae, pixel_values),
            {},
        ),
        "decode": Program(
            decode_video,
            lambda: (place(vae), place(latents, videos)),
            lambda: count_flops(lambda vae, x: vae.bind().decode(x), vae, latents),
            {},
        ),
    }


def chosen_attention(config: UNetConfig, frames: int, height: int, width: int) -> dict[str, str]:
    """Returns how attention between frames is computed at each level that has it, by its grid.

    Args:
        height, width: Of the latents.
    """
    chosen: dict[str, str] = {}
    levels = len(config.block_out_channels)
    for level, channels in enumerate(config.block_out_channels):
        last = level == levels - 1
        if not (config.down_attention[level] or config.up_attention[-1 - level] or last):
            continue
        # Strided convolutions round up.
        rows, columns = -(-height // 2**level), -(-width // 2**level)
        tokens, heads = rows * columns, config.num_attention_heads[level]
        lengths = {"sparse_causal": [tokens, tokens], "full": [frames * tokens]}
        chosen[f"{columns}x{rows}"] = (
            config.attention
            if config.attention != "auto"
            else choose_implementation(
                platform(),
                config.dtype,
                (1, frames, tokens, heads, channels // heads),
                lengths.get(config.attention_scope, [tokens]),
            )
        )
    return chosen
