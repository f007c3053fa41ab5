"""Devices that are not here, and what their compilers need to know."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from tav_jax.bench.cards import CARDS, Card
from tav_jax.errors import UserError

GPUS_OF_A_HOST = 8


@dataclass(frozen=True)
class Target:
    """Devices that are not here, to compile for.

    Args:
        devices: As many as were asked for.
        card: Their kind, if they are GPUs.
    """

    devices: list[jax.Device]
    card: Card | None = None

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Return the options of XLA for this target.

        Without a GPU nothing can be autotuned, and Triton's matrix products need that. cuBLAS's do
        not.
        """
        if self.card is None:
            return {}
        return {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}

    @property
    def memory_limit(self) -> float:
        """Return the bytes that a program may need on each device.

        JAX takes 75 % of a GPU's memory. A TPU's compiler refuses by itself what does not fit.
        """
        return math.inf if self.card is None else 0.75 * self.card.memory_bytes


def find_target(name: str, chips: int) -> Target:
    """Return devices that are not here, to compile for.

    Args:
        name: A card of `CARDS`, or the kind and the shape of a TPU slice, as in "v5e:2x2".
        chips: How many, from 1; at most 8 GPUs, or as many as the slice has.

    Raises:
        UserError: the compiler is not installed or knows no such target, or there are fewer chips.
    """
    jax.config.update("jax_platforms", "cpu")
    card = CARDS.get(name)
    devices = _tpu_devices(name) if card is None else _gpu_devices(name, card)
    if not 1 <= chips <= len(devices):
        raise UserError(f"--chips {chips}: {name} has 1 to {len(devices)}")
    return Target(devices[:chips], card)


def _tpu_devices(name: str) -> list[jax.Device]:
    # Look for no real TPU, and let other processes compile at the same time.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # libtpu raises many kinds
        raise UserError(
            f"--aot {name}: {_first_line(error)}; expected {' or '.join(CARDS)}, or a TPU slice "
            "like v5e:2x2, which needs pip install '.[tpu]'"
        ) from None


def _gpu_devices(name: str, card: Card) -> list[jax.Device]:
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=card.target_config(),
            topology=f"1x1x{GPUS_OF_A_HOST}",  # slices, hosts, GPUs of a host
        )
    except Exception as error:  # without the plugin other kinds than with it
        raise UserError(
            f"--aot {name}: {_first_line(error)}; XLA's compiler for GPUs needs "
            "pip install '.[aot-cuda]'"
        ) from None
    return list(topology.devices)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


@contextmanager
def assume_cudnn() -> Iterator[None]:
    """Within this context, let JAX trace cuDNN's attention for a Hopper GPU without having one.

    While it traces, JAX asks for the version of cuDNN and for the kind of the GPU. This answers
    with cuDNN 9.12 and compute capability 9.0. It replaces private functions of JAX, and no other
    place does.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    answers: dict[str, Callable] = {
        "check_cudnn_version": lambda: 91200,
        "check_compute_capability": lambda capability: float(capability) <= 9.0,
        "is_cuda_compute_capability_equal": lambda capability: float(capability) == 9.0,
    }
    originals = {name: getattr(fused_attention_stablehlo, name) for name in answers}
    vars(fused_attention_stablehlo).update(answers)
    try:
        yield
    finally:
        vars(fused_attention_stablehlo).update(originals)
