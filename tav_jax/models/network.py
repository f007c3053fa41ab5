"""A network as a value: a static definition and a flat dictionary of arrays."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict

from tav_jax.models.compute import ComputeOptions
from tav_jax.models.layers import NoRngs
from tav_jax.types import Params, PRNGKey

Module = TypeVar("Module", bound=nnx.Module)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Network(Generic[Module]):
    """A module class with its config, its `ComputeOptions` and its parameters.

    It is a pytree whose leaves are the parameters, so `jit`, `grad` and `vmap` accept it. Calling
    it runs the module. Other methods are called through `bind`, as in
    `vae.bind().decode(latents)`.

    Args:
        module_class: A class whose constructor takes config, compute options and `rngs`.
        config: What the network is.
        params: Parameters by name. The leaves are arrays, or what a JAX transformation puts there.
        compute: How it computes.

    Example:
        noise_pred = jax.jit(lambda unet, *inputs: unet(*inputs))(unet, latents, timesteps, context)
    """

    module_class: type[Module] = field(metadata={"static": True})
    config: Any = field(metadata={"static": True})
    params: dict[str, Any]
    compute: ComputeOptions = field(default_factory=ComputeOptions, metadata={"static": True})

    def bind(self) -> Module:
        """Return a module with these parameters. Use it within the same trace only."""
        state = nnx.from_flat_state(
            [(_path(name), value) for name, value in self.params.items()], cls=nnx.State
        )
        return nnx.merge(_definition(self.module_class, self.config, self.compute)[0], state)

    def __call__(self, *inputs: Any) -> Any:
        """Return the module's output."""
        return self.bind()(*inputs)

    def with_params(self, params: Params) -> "Network[Module]":
        """Return the same network with other parameters."""
        return replace(self, params=params)

    def with_kernels_cast(self) -> "Network[Module]":
        """Return the same network with its kernels in the type of the computation.

        Layers cast kernels when they use them. Before a loop this does it once for all steps.
        """
        dtype = self.compute.dtype
        cast = {name: x.astype(dtype) for name, x in self.params.items() if name.endswith("kernel")}
        return self.with_params(self.params | cast)

    def with_config(self, **changes: Any) -> "Network[Module]":
        """Return the same network with some fields of its config changed."""
        return replace(self, config=replace(self.config, **changes))

    def with_compute(self, **changes: Any) -> "Network[Module]":
        """Return the same network with some of its `ComputeOptions` changed."""
        return replace(self, compute=replace(self.compute, **changes))


def init_network(module_class: type[Module], config: Any, key: PRNGKey) -> Network[Module]:
    """Return a network with new random parameters in float32."""
    # Not jitted: compiling one program of hundreds of draws takes longer than the draws.
    module: nnx.Module = module_class(config, ComputeOptions(), rngs=nnx.Rngs(key))  # type: ignore[call-arg]
    params = {name: jnp.asarray(value) for name, value in _flat(nnx.state(module)).items()}
    return Network(module_class, config, params)


def parameter_shapes(module_class: type[Module], config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape and type of every parameter by name, without creating any."""
    return _definition(module_class, config, ComputeOptions())[1]


@lru_cache(maxsize=32)
def _definition(
    module_class: type, config: Any, compute: ComputeOptions
) -> tuple[nnx.GraphDef, dict]:
    # Not `nnx.eval_shape`: to trace the initialisation of v1-4's U-Net takes eight seconds. No
    # operation of JAX runs here, because the current mesh may have devices that are not here.
    graphdef, state = nnx.split(module_class(config, compute, rngs=NoRngs()))
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _flat(state).items()
    }
    return graphdef, shapes


def _flat(state: Any) -> dict[str, Any]:
    leaves = flatten_dict(nnx.to_pure_dict(state))
    return {".".join(map(str, path)): leaf for path, leaf in leaves.items()}


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def in_modules(name: str, modules: Iterable[str]) -> bool:
    """Tell whether a parameter belongs to a module whose path ends in one of `modules`."""
    return any(f".{module}." in f".{name}" for module in modules)
