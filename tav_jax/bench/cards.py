"""GPUs for which programs can be compiled without having one."""

from collections.abc import Sequence
from dataclasses import dataclass

from tav_jax.bench.gpu_hlo import KINDS, Kernel, KernelKind, total_bytes


@dataclass(frozen=True)
class GpuWork:
    """What the kernels of a program do in one run, on one GPU.

    Args:
        kernels: How many are started.
        moved_bytes: Bytes that they read and write, by kind of kernel.
        floor_seconds: The least time that they can take, see `Card.floor_seconds`.
    """

    kernels: int
    moved_bytes: dict[KernelKind, int]
    floor_seconds: float


@dataclass(frozen=True)
class Card:
    """A GPU of NVIDIA's Hopper generation (SXM), by the published numbers.

    Args:
        name: What the driver calls it.
        memory_bytes: Size of its memory.
        memory_bandwidth: Published bytes per second, by which the compiler decides.
        reached_bandwidth: Bytes per second that large copies reach, for `floor_seconds`.
    """

    name: str
    memory_bytes: int
    memory_bandwidth: float
    reached_bandwidth: float

    # Operations per second that products of large matrices reach in bfloat16: 80 % of the 989
    # TFLOP/s published. The published rate of float32 products, in TF32, is half of that.
    bfloat16_rate = 790e12
    float32_rate = 395e12

    def target_config(self) -> str:
        """Return what XLA must know to compile for this card, as a textproto."""
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: 9 }}
              core_count: 132
              fpus_per_core: 128
              clock_rate_ghz: 1.98
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              registers_per_block_limit: 65536
              registers_per_core_limit: 65536
              shared_memory_per_block: {48 * 1024}
              shared_memory_per_block_optin: {227 * 1024}
              shared_memory_per_core: {228 * 1024}
              l2_cache_size: {50 * 1024**2}
              memory_bandwidth: {self.memory_bandwidth:.0f}
              device_memory_size: {self.memory_bytes}
            }}
            platform_name: "CUDA"
            runtime_version {{ major: 12 minor: 8 }}
            dnn_version_info {{ major: 9 minor: 12 }}
            device_description_str: "{self.name}"
        """

    def matrix_rate(self, bits: int) -> float:
        """Return operations per second of large products of numbers of this width."""
        return self.bfloat16_rate if bits <= 16 else self.float32_rate

    def floor_seconds(self, kernels: Sequence[Kernel]) -> float:
        """Return the least time that kernels can take one after another.

        Each takes at least the time of its products at the matrix rate, and at least the time to
        move its bytes at the bandwidth that large copies reach.
        """
        return sum(
            kernel.runs
            * max(
                kernel.flops / self.matrix_rate(kernel.bits), kernel.bytes / self.reached_bandwidth
            )
            for kernel in kernels
        )

    def work(self, kernels: Sequence[Kernel]) -> GpuWork:
        """Return the work of a program's kernels."""
        return GpuWork(
            sum(kernel.runs for kernel in kernels),
            {kind: total_bytes(kernels, kind) for kind in KINDS},
            self.floor_seconds(kernels),
        )

    def rates(self) -> str:
        """Return the rates that `floor_seconds` assumes, for people."""
        return (
            f"{self.bfloat16_rate / 1e12:.0f} TFLOP/s in bfloat16, "
            f"{self.float32_rate / 1e12:.0f} in float32 (TF32), "
            f"{self.reached_bandwidth / 1e12:.1f} TB/s"
        )


CARDS = {
    "h100": Card("NVIDIA H100 80GB HBM3", 80 * 10**9, 3.35e12, 3.0e12),
    "h200": Card("NVIDIA H200", 141 * 10**9, 4.8e12, 4.3e12),
}
