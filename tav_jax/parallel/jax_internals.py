"""What this package takes from the private part of JAX. All of it is here."""

from typing import Any

from jax._src.clusters import GceTpuCluster, GkeTpuCluster
from jax._src.distributed import global_state


def distributed_state() -> Any:
    """Return JAX's record of the job: `process_id`, `num_processes` and `client`.

    The client is None in a job of one process. Orbax takes it from the same place, because JAX has
    no public barrier with a limit of time.
    """
    return global_state


def find_tpu_cluster() -> tuple[str, int, int] | None:
    """Return the name, the number of processes and this process's number in a job on TPU hosts.

    None if there is one process only. JAX offers this as a part of `jax.distributed.initialize`
    alone, which would connect at once.
    """
    for cluster in (GkeTpuCluster, GceTpuCluster):
        if cluster.is_env_present() and (count := cluster.get_process_count()) > 1:
            return cluster.name, count, cluster.get_process_id()
    return None
