"""Fixtures for all tests: keys, and small networks in which nothing is zero by accident."""

import atexit
import contextlib
import ctypes
import gc
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_configs

from tav_jax.models.clip import CLIPTextModel
from tav_jax.models.network import Network, parameter_shapes
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.models.vae import AutoencoderKL

# Which tests run when. An entry is a file, or one test of it. docs/testing.md has the reasons and
# the times. What is in neither table runs by default.
QUICK = {
    "unit/test_checkpointing.py",
    "unit/test_clip_metrics.py",
    "unit/test_config.py",
    "unit/test_console.py",
    "unit/test_cuda_lowering.py",
    "unit/test_digests.py",
    "unit/test_documents.py",
    "unit/test_figures_to_markdown.py",
    "unit/test_files.py",
    "unit/test_flow_metrics.py",
    "unit/test_frame_metrics.py",
    "unit/test_gpu_hlo.py",
    "unit/test_imports.py",
    "unit/test_lock.py",
    "unit/test_measure.py",
    "unit/test_memory.py",
    "unit/test_package.py",
    "unit/test_partition.py",
    "unit/test_processes.py",
    "unit/test_published_config.py",
    "unit/test_run_record.py",
    "unit/test_sampling_settings.py",
    "unit/test_schedule.py",
    "unit/test_shipped_files.py",
}
FULL = {
    "campaign/test_damage.py",
    "campaign/test_faults.py",
    "campaign/test_fuzz.py",
    "campaign/test_kills.py",
    "e2e/test_adapter.py::test_another_process_samples_from_it_as_from_the_run",
    "e2e/test_aot_cuda.py",
    "e2e/test_base_model.py",
    "e2e/test_batch.py::test_a_fleet_makes_each_video_once_though_a_worker_is_killed",
    "e2e/test_batch.py::test_a_worker_that_dies_is_named_and_its_videos_are_made_by_the_others",
    "e2e/test_batch.py::test_an_interrupt_ends_all_workers_and_the_same_command_makes_the_rest",
    "e2e/test_bench.py",
    "e2e/test_browser.py",
    "e2e/test_compile_cache.py::test_a_second_start_compiles_nothing",
    "e2e/test_damage_and_faults.py",
    "e2e/test_demo.py",
    "e2e/test_demo_jobs.py::test_a_cancelled_tuning_goes_on_and_equals_one_that_was_not",
    "e2e/test_demo_jobs.py::test_previews_come_at_thirds_but_not_one_soon_after_another",
    "e2e/test_distributed.py",
    "e2e/test_dry_run.py::test_clips_are_described_one_after_another_and_share_a_program_if_they_can",
    "e2e/test_edit.py",
    "e2e/test_experiments.py",
    "e2e/test_gpu_figures.py",
    "e2e/test_hub_upload.py::test_it_is_uploaded",
    "e2e/test_log.py",
    "e2e/test_lora.py",
    "e2e/test_mesh.py",
    "e2e/test_notebook.py::test_it_runs_from_top_to_bottom",
    "e2e/test_pretrain.py",
    "e2e/test_readme.py",
    "e2e/test_same_run.py::test_a_killed_run_does_not_go_on_on_a_clip_that_was_put_in_the_place_of_its_own",
    "e2e/test_same_run.py::test_of_two_commands_at_once_one_is_refused_in_a_line",
    "e2e/test_single_file.py",
    "e2e/test_stopped.py",
    "e2e/test_suite.py::test_several_processes_share_a_suite_and_a_killed_one_is_made_good",
    "e2e/test_tune.py::test_a_run_killed_twice_ends_as_one_that_was_not",
    "parity/test_golden.py",
    "unit/test_flash.py::test_a_tpu_v5e_has_room_for_the_kernels_and_never_holds_the_scores",
    "unit/test_gpu_arithmetic.py::test_the_network_on_a_gpu",
    "unit/test_large_clips.py::test_large_frames_are_read_in_less_than_a_gigabyte",
    "unit/test_sharding.py",
}


def pytest_ignore_collect(collection_path, config):
    """Leaves out files that `-m quick` would deselect. Some import PyTorch, which takes long."""
    file = collection_path.relative_to(Path(__file__).parent).as_posix()
    if config.option.markexpr == "quick" and file.endswith(".py") and file not in QUICK:
        return True
    return None


def pytest_collection_modifyitems(items):
    """Marks tests by the tables above, for `-m quick` and `-m "not full"`."""
    tests = Path(__file__).parent
    for item in items:
        file = item.path.relative_to(tests).as_posix()
        for tier, entries in (("quick", QUICK), ("full", FULL)):
            if entries & {file, f"{file}::{item.originalname}"}:
                item.add_marker(tier)


def pytest_collection_finish():
    """Keeps the garbage collector from searching all modules again and again while JAX traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_terminal_summary(terminalreporter, config):
    """With `--durations`, also says what the tests of each file took, the longest first."""
    if not config.option.durations:
        return
    seconds, gigabytes = Counter(), Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                file = report.nodeid.split("::")[0].removeprefix("tests/")
                seconds[file] += report.duration
                peak = dict(report.user_properties).get("gigabytes", 0.0)
                gigabytes[file] = max(gigabytes[file], peak)
    terminalreporter.section("seconds, and the worker's gigabytes, by file")
    slowest, largest = seconds.most_common(config.option.durations), gigabytes.most_common(5)
    for file in dict([*slowest, *largest]):
        terminalreporter.write_line(f"{seconds[file]:6.0f}  {gigabytes[file]:4.1f}  {file}")


def pytest_runtest_teardown(item):
    """Notes the most memory that the worker held since the test before."""
    status = Path("/proc/self/status")
    if status.is_file():
        [peak] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        item.user_properties.append(("gigabytes", int(peak.split()[1]) * 1024 / 1e9))
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


# No test asks the Hub, and a machine without a network would wait for it. Read at import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Of which only tests of meshes use more than the first.
jax.config.update("jax_num_cpu_devices", 8)


def quick_compilation_flags() -> str:
    """Returns the XLA flags that halve the time to compile, as far as this jaxlib knows them.

    jaxlib aborts the process at a flag that it does not know: 0.12 has no fusion emitters to turn
    off. So each flag is tried in a process of its own, before this one starts JAX's backend.
    """
    flags = [
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        # Not for speed: in jaxlib 0.10.2 these fusions give wrong numbers for attention that is
        # computed element by element. Only GPUs compute it so, and tests of their arithmetic.
        "--xla_cpu_experimental_ynn_fusion_type=",
    ]
    tries = [
        subprocess.Popen(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env=os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for flag in flags
    ]
    statuses = [known.wait(timeout=600) for known in tries]
    return " ".join(flag for flag, status in zip(flags, statuses, strict=True) if status == 0)


# Compiling is most of the tests' time. LLVM's costly passes are left out, and fusions are written
# in the older way, which takes half as long. Programs that tests run with `users_environment` have
# it all as users have it.
# What one test compiles the others load, those of pytest-xdist's other workers and the processes
# that tests start among them: all inherit this folder, which is the session's and never the user's.
if "PYTEST_XDIST_WORKER" not in os.environ:
    folder = tempfile.mkdtemp(prefix="tav_jax-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ |= {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {quick_compilation_flags()}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def drop_programs() -> None:
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module", autouse=True)
def free_memory():
    """Drops compiled programs after each file. Otherwise a worker would keep gigabytes of them."""
    yield
    drop_programs()


@pytest.fixture
def free_memory_at_once():
    """Does the same after a test that compiles a gigabyte."""
    yield
    drop_programs()


@pytest.fixture
def optimized():
    """Compiles as much better as users do: for what is large, or measured."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def users_environment() -> dict[str, str]:
    """Of processes that compile everything themselves, and as they do for users."""
    ours = {"XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"JAX_COMPILATION_CACHE_DIR": ""}


@pytest.fixture(scope="session")
def golden() -> Path:
    """The set of reference numbers that is shipped with the tests."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def key(request):
    """A key of the test's own, the same at every run."""
    return jax.random.key(zlib.crc32(request.node.name.encode()) >> 1)


@pytest.fixture(scope="session")
def random_network():
    """Makes a network in which every parameter matters.

    Fresh networks have biases of zero and scales of one, under which an omitted bias or a wrong
    scale would go unseen. Kernels keep the variance of what they are given.
    """

    def make(module_class, config, seed=0):
        draw = np.random.default_rng(seed).standard_normal

        def value(name, shape):
            noise = draw(shape)
            match name.rsplit(".", 1)[-1]:
                case "kernel":
                    noise = noise / math.sqrt(math.prod(shape[:-1]))
                case "scale":
                    noise = 1 + 0.2 * noise
                case "bias":
                    noise = 0.2 * noise
            return jnp.asarray(noise, jnp.float32)

        shapes = parameter_shapes(module_class, config)
        params = {name: value(name, leaf.shape) for name, leaf in shapes.items()}
        return Network(module_class, config, params)

    return make


@pytest.fixture(scope="session")
def jit():
    """Compiles in half the time, to programs that are slower, which tiny networks never notice."""
    return partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="session")
def call(jit):
    """Runs a network, compiled once for each config and shape, whichever test comes first."""
    return jit(lambda network, *inputs: network(*inputs))


@pytest.fixture(scope="session")
def unet_config():
    return small_configs.UNET


@pytest.fixture(scope="session")
def tiny_unet(random_network, unet_config):
    return random_network(UNet3DConditionModel, unet_config)


@pytest.fixture(scope="session")
def vae_config():
    return small_configs.VAE


@pytest.fixture(scope="session")
def tiny_vae(random_network, vae_config):
    return random_network(AutoencoderKL, vae_config)


@pytest.fixture(scope="session")
def text_config():
    return small_configs.TEXT


@pytest.fixture(scope="session")
def tiny_text_encoder(random_network, text_config):
    return random_network(CLIPTextModel, text_config)
