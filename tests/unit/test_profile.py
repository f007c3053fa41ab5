"""Traces of programs: what the reader of traces makes of a GPU's, and of a real one of a CPU."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from tav_jax.bench.profile import Operation, Profile, kind_of, newest_trace, read_trace
from tav_jax.errors import UserError


def thread(name, pid, tid):
    return {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}


def event(name, ts, dur, pid=1, tid=1, **args):
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}


@pytest.fixture
def write_trace(tmp_path):
    def write(*events):
        path = tmp_path / "host.trace.json.gz"
        with gzip.open(path, "wt") as file:
            json.dump({"traceEvents": [*events, {}]}, file)  # JAX ends the list so
        return path

    return write


def test_of_a_gpu_the_kernels_on_its_streams_count_and_nothing_of_the_host(write_trace):
    path = write_trace(
        thread("Stream #13(Compute,MemcpyD2D)", 1, 13),
        thread("XLA Ops", 1, 14),
        thread("python", 2, 1),
        # Rounded, it seems to end after the next one has begun.
        event("nvjet_tst_128x256", 0.0, 600.001, tid=13, hlo_op="gemm.1"),
        event("loop_add_fusion_7", 600, 100, tid=13, hlo_op="loop_add_fusion.7"),
        event("loop_add_fusion_12", 700, 200, tid=13, hlo_op="loop_add_fusion.12"),
        event("nvjet_tst_128x256", 1000, 400, tid=13),
        event("gemm.1", 0, 600, tid=14, hlo_op="gemm.1"),
        event("Thunk", 0, 5000, pid=2, hlo_op="gemm.1"),
    )
    assert list(read_trace(path, runs=2)) == [
        Operation("nvjet_tst_128x256", "matrix_product", 1, pytest.approx(500e-6)),
        Operation("loop_add_fusion", "other", 1, pytest.approx(150e-6)),
    ]


def test_time_of_operations_inside_a_loop_is_theirs_and_not_the_loops(write_trace):
    path = write_trace(
        event("while.3", 0, 1000, hlo_op="while.3"),
        event("dot.1", 100, 300, hlo_op="dot.1"),
        event("call.2", 500, 400, hlo_op="call.2"),
        event("dot.4", 500, 350, hlo_op="dot.4"),
        event("dot.5", 100, 50, tid=2, hlo_op="dot.5"),
        event("no operation of XLA's", 0, 9000),
    )
    seconds = {operation.name: operation.seconds for operation in read_trace(path, runs=1)}
    assert seconds == pytest.approx({"dot": 700e-6, "while": 300e-6, "call": 50e-6})


def test_a_real_trace_of_a_cpu_has_the_products_of_the_program(tmp_path):
    @jax.jit
    def program(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ x), x)

    x = jax.block_until_ready(program(jnp.ones((256, 256))))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(tmp_path, profiler_options=options):
        for _ in range(2):
            jax.block_until_ready(program(x))
    operations = list(read_trace(newest_trace(tmp_path), runs=2))
    products = sum(x.runs for x in operations if x.kind == "matrix_product")
    assert products == 3
    profile = Profile(1.0, operations)
    assert 0 < profile.busy_seconds < 1
    assert sum(profile.seconds_by_kind().values()) == pytest.approx(profile.busy_seconds)
    seconds = [operation.seconds for operation in operations]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix_product"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNT", "matrix_product"),
        ("gemm_fusion_dot_general", "matrix_product"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "matrix_product"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("cudnn::cnn::conv2d_grouped_direct_kernel", "convolution"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("loop_convert_fusion", "other"),
        ("input_reduce_fusion", "other"),
        ("convolution", "convolution"),
        ("dot", "matrix_product"),
        ("MemcpyD2D", "other"),
    ],
)
def test_the_kind_of_a_kernel_is_told_by_its_name(name, kind):
    assert kind_of(name) == kind


def test_a_folder_without_a_trace_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no \*\.trace\.json\.gz"):
        newest_trace(tmp_path)
