"""The five programs in which a run spends its time, with inputs to compile and to run them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tav_jax.bench.flops import count_flops
from tav_jax.diffusion.schedule import NoiseSchedule
from tav_jax.models.compute import ComputeOptions
from tav_jax.models.network import Network, in_modules, init_network, parameter_shapes
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.models.vae import AutoencoderKL
from tav_jax.parallel.sharding import param_sharding, shard, video_sharding
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
from tav_jax.training.memory import Size
from tav_jax.training.optimizer import TRAINABLE_MODULES, label_params, make_optimizer
from tav_jax.training.train_step import NoisedBatch, TrainState, init_state, loss_and_gradients

GUIDANCE_SCALE, LEARNING_RATE = 12.5, 3e-5  # as in the paper
STEPS, TEXT_TOKENS = 50, 77

# The layout of v1-4, narrow enough for two CPU cores to run in seconds.
SMALL: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [64, 128, 160, 160], "cross_attention_dim": 256},
    "vae": {"block_out_channels": [32, 64, 128, 128]},
}
NETWORKS: dict[str, dict[str, dict[str, Any]]] = {"v1-4": {}, "small": SMALL}


@dataclass(frozen=True)
class Networks:
    """The U-Net, the autoencoder and the noise schedule.

    Parameters are arrays on the host, or shapes from which programs can only be compiled.
    """

    unet: Network[UNet3DConditionModel]
    vae: Network[AutoencoderKL]
    schedule: NoiseSchedule

    def with_unet_config(self, **changes: Any) -> "Networks":
        """Return the same parameters, with some fields of the U-Net's config changed."""
        return replace(self, unet=self.unet.with_config(**changes))

    def with_unet_compute(self, **changes: Any) -> "Networks":
        """Return the same networks, with some of the U-Net's `ComputeOptions` changed."""
        return replace(self, unet=self.unet.with_compute(**changes))


def load_networks(folder: str, dtype: str) -> Networks:
    """Return the networks of a model, given its folder, id or name."""
    model = load_model(folder, dtype=dtype, float32_modules=TRAINABLE_MODULES)
    return Networks(jax.device_get(model.unet), jax.device_get(model.vae), model.schedule)


def random_networks(name: str, dtype: str, *, only_shapes: bool = False) -> Networks:
    """Return networks with random parameters.

    Args:
        name: A key of `NETWORKS`.
        dtype: Type of the computation, and of the parameters that are not trained.
        only_shapes: Make shapes in place of parameters.
    """

    def make(module_class: type, config: Any, float32_modules: tuple[str, ...]) -> Network:
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
        return Network(module_class, config, params, ComputeOptions(dtype=dtype))

    configs = {part: CONFIGS[part] | NETWORKS[name].get(part, {}) for part in ("unet", "vae")}
    unet_config = published_config.read_unet_config(configs["unet"])
    return Networks(
        make(UNet3DConditionModel, unet_config, TRAINABLE_MODULES),
        make(AutoencoderKL, published_config.read_vae_config(configs["vae"]), ()),
        published_config.read_schedule(CONFIGS["scheduler"]),
    )


class ClipShapes(NamedTuple):
    """Shapes of what the programs take for one clip and one prompt."""

    pixel_values: jax.ShapeDtypeStruct
    moments: jax.ShapeDtypeStruct
    latents: jax.ShapeDtypeStruct
    context: jax.ShapeDtypeStruct
    timesteps: jax.ShapeDtypeStruct


def clip_shapes(networks: Networks, size: Size) -> ClipShapes:
    """Return the shapes of a clip of this size, its latents and its prompt's text states."""
    unet, factor = networks.unet.config, networks.vae.config.downsampling
    grid = 1, size.frames, size.height // factor, size.width // factor

    def float32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return ClipShapes(
        pixel_values=float32(1, size.frames, size.height, size.width, 3),
        moments=float32(*grid, 2 * unet.in_channels),
        latents=float32(*grid, unet.in_channels),
        context=float32(1, TEXT_TOKENS, unet.cross_attention_dim),
        timesteps=jax.ShapeDtypeStruct((1,), jnp.int32),
    )


# Makes one argument of a program: from a tree of host arrays or shapes, a sharding rule, and
# optionally a function from the tree to the argument.
MakeInput = Callable[..., Any]


def abstract_input(tree: Any, rule: Any = param_sharding, init: Callable | None = None) -> Any:
    """Return the shapes of an argument, sharded over the current mesh if there is one.

    Args:
        tree: Arrays or shapes.
        rule: Returns the sharding of every leaf of a tree on a mesh.
        init: Makes the argument from the tree.
    """
    shapes = jax.eval_shape(init or (lambda tree: tree), tree)
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return shapes
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        rule(shapes, mesh),
    )


def real_input(tree: Any, rule: Any = param_sharding, init: Callable | None = None) -> Any:
    """Return an argument as `abstract_input` describes it: shapes become normal random numbers.

    Arrays are copied, since a program may donate them.
    """

    def materialise_leaf(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype)
        return jnp.array(leaf)

    arrays = shard(jax.tree.map(materialise_leaf, tree), rule)
    return arrays if init is None else shard(init(arrays), rule)


@dataclass(frozen=True)
class Program:
    """A jitted function and what it takes.

    Args:
        function: The jitted function.
        make_inputs: Makes its arguments, each by the function that it is given.
        flops: Counts the operations of one run as the method defines it, however it is computed.
        settings: Static arguments.
        feeds_back: Whether the result of a run is, or begins with, the next run's first argument.
    """

    function: Any
    make_inputs: Callable[[MakeInput], tuple[Any, ...]]
    flops: Callable[[], int]
    settings: dict[str, Any] = field(default_factory=dict)
    feeds_back: bool = False

    def abstract_inputs(self) -> tuple[Any, ...]:
        """Return the arguments' shapes and shardings on the current mesh."""
        return self.make_inputs(abstract_input)

    def materialise(self) -> tuple[Any, ...]:
        """Return real arguments on the current mesh, which a run may use up."""
        return self.make_inputs(real_input)

    def compile(self, compiler_options: dict[str, Any] | None = None) -> jax.stages.Compiled:
        """Compile for the current mesh; its devices need not be here."""
        lowered = self.function.lower(*self.abstract_inputs(), **self.settings)
        return lowered.compile(compiler_options or None)

    def runs(self, compiled: jax.stages.Compiled) -> Iterator[None]:
        """Run the compiled program once for each `next`, and wait for the result."""
        inputs = self.materialise()
        while True:
            result = jax.block_until_ready(compiled(*inputs))
            if self.feeds_back:
                first = result[0] if isinstance(result, tuple) and len(result) == 2 else result
                inputs = first, *inputs[1:]
            yield


def tune_step_program(networks: Networks, size: Size) -> Program:
    """Return a training step on one clip."""
    unet, schedule, clip = networks.unet, networks.schedule, clip_shapes(networks, size)
    labels = label_params(unet.params, TRAINABLE_MODULES)
    optimizer = make_optimizer(labels, LEARNING_RATE)

    def init(unet: Network[UNet3DConditionModel]) -> TrainState:
        return init_state(unet, optimizer, jax.random.key(0))

    def gradients(unet: Network, latents: Any, timesteps: Any, context: Any) -> Any:
        batch = NoisedBatch(latents, latents, timesteps)
        return loss_and_gradients(unet, labels, schedule, batch, context)

    return Program(
        compile_train_step(networks.vae.config.scaling_factor, optimizer=optimizer, labels=labels),
        lambda make: (
            make(unet, init=init),
            make(clip.moments, video_sharding),
            make(clip.context),
            make(schedule),
        ),
        lambda: count_flops(
            gradients, with_visible_products(unet), clip.latents, clip.timesteps, clip.context
        ),
        feeds_back=True,
    )


def guided_step_program(networks: Networks, size: Size) -> Program:
    """Return a DDIM step with classifier-free guidance."""
    context = clip_shapes(networks, size).context
    return sampling_program(
        ddim_sample_loop, networks, size, [context, context], guidance=(GUIDANCE_SCALE,)
    )


def inversion_step_program(networks: Networks, size: Size) -> Program:
    """Return a step of DDIM inversion."""
    context = clip_shapes(networks, size).context
    return sampling_program(ddim_invert_loop, networks, size, [context])


def sampling_program(
    loop: Any,
    networks: Networks,
    size: Size,
    contexts: Sequence[jax.ShapeDtypeStruct],
    guidance: tuple[float, ...] = (),
) -> Program:
    """Return the first step of a sampling loop, which predicts noise once for each context."""
    unet, clip = networks.unet, clip_shapes(networks, size)

    def flops() -> int:
        inputs = (
            jax.ShapeDtypeStruct((len(contexts), *shape.shape[1:]), shape.dtype)
            for shape in (clip.latents, clip.timesteps, clip.context)
        )
        network = with_visible_products(unet)
        return count_flops(lambda unet, *inputs: unet(*inputs), network, *inputs)

    def make_inputs(make: MakeInput) -> tuple[Any, ...]:
        latents, schedule = make(clip.latents, video_sharding), make(networks.schedule)
        return latents, 0, 1, make(unet), schedule, make(tuple(contexts)), *guidance

    return Program(loop, make_inputs, flops, {"num_steps": STEPS}, feeds_back=True)


def encode_program(networks: Networks, size: Size) -> Program:
    """Return the autoencoder's encoding of a clip."""
    vae, pixel_values = networks.vae, clip_shapes(networks, size).pixel_values
    return Program(
        encode_video,
        lambda make: (make(vae), make(pixel_values, video_sharding)),
        lambda: count_flops(lambda vae, x: vae.bind().encode(x), vae, pixel_values),
    )


def decode_program(networks: Networks, size: Size) -> Program:
    """Return the autoencoder's decoding of a clip."""
    vae, latents = networks.vae, clip_shapes(networks, size).latents
    return Program(
        decode_video,
        lambda make: (make(vae), make(latents, video_sharding)),
        lambda: count_flops(lambda vae, x: vae.bind().decode(x), vae, latents),
    )


PROGRAMS: dict[str, Callable[[Networks, Size], Program]] = {
    "tune_step": tune_step_program,
    "guided_step": guided_step_program,
    "inversion_step": inversion_step_program,
    "encode": encode_program,
    "decode": decode_program,
}


def make_programs(
    networks: Networks, *, frames: int, height: int, width: int
) -> dict[str, Program]:
    """Return all programs by name, for clips of a size in pixels."""
    size = Size(frames, height, width)
    return {name: make(networks, size) for name, make in PROGRAMS.items()}


def with_visible_products(unet: Network) -> Network:
    """Return the network as the method defines it, for `count_flops`.

    Kernels hide their products, and recomputation would count them twice.
    """
    return unet.with_compute(attention_implementation="einsum", gradient_checkpointing="none")
