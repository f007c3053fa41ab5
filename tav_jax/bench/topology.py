"""Devices of a TPU slice that is not here, for its compiler."""

import os

import jax

from tav_jax.errors import UserError


def topology_devices(topology: str, chips: int) -> list[jax.Device]:
    """Return the first chips of a TPU slice that is not here, to compile for.

    Args:
        topology: Kind of TPU and shape of the slice, as in "v5e:2x2".
        chips: How many, from 1.

    Raises:
        UserError: libtpu, which has the compiler, is not installed or knows no such slice; or the
            slice has fewer chips.
    """
    # Look for no real TPU, and let other processes compile at the same time.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # libtpu raises many kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--aot {topology}: {reason}; it needs pip install '.[tpu]', and a name like v5e:2x2"
        ) from None
    devices = slice_.devices
    if not 1 <= chips <= len(devices):
        raise UserError(f"--chips {chips}: {topology} has {len(devices)}")
    return devices[:chips]
