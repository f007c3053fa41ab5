"""The kind of device that the program being traced is for."""

import jax


def platform() -> str:
    """Return "cpu", "gpu" or "tpu": that of the current mesh, or else JAX's default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
