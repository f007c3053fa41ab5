"""Reference cases as users compile them, and again by every way of computing attention.

The latter are some of the cases, since a program takes up to a minute to compile. All cases pass
under each implementation, preset and mesh: `python tests/golden.py --help` has the options.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import golden
import pytest
from jax.experimental import pallas as pl

from tav_jax.models.attention import chunked
from tav_jax.parallel import sharding
from tav_jax.parallel.sharding import make_mesh, on_mesh

pytestmark = [
    # One prompt of the text case is too long on purpose.
    pytest.mark.filterwarnings("ignore:prompt of"),
    pytest.mark.usefixtures("free_memory_at_once"),
]

FOLDER = Path(__file__).parents[1] / "golden"


def rows(reference, names):
    cases = golden.cases(reference)
    return [row for name in names for row in reference.rows(cases[name])]


def test_all_cases_pass_as_users_compile_them(users_environment):
    program = Path(golden.__file__)
    done = subprocess.run(
        [sys.executable, program, FOLDER],
        env=users_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tune.final" in done.stdout


# Every implementation and every preset, and not each with each. One of them on a mesh.
@pytest.mark.parametrize(
    ("attention", "preset", "mesh"),
    [
        ("einsum", "none", {"data": 1, "frames": 1, "fsdp": 1}),
        ("by_head", "blocks", {"data": 2, "frames": 2, "fsdp": 2}),
        ("chunked", "full", {"data": 1, "frames": 1, "fsdp": 1}),
    ],
)
def test_cases_pass_with_every_implementation_and_preset(monkeypatch, attention, preset, mesh):
    # So that grids of 64 tokens go in blocks of 16.
    monkeypatch.setattr(chunked, "BLOCK_SCORES", 16 * 16 * 16)
    # So that the small kernels of this network are stored in parts, where there is a mesh.
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 1)
    with on_mesh(make_mesh(mesh, frames=8)):
        reference = golden.GoldenSet(FOLDER, attention=attention, gradient_checkpointing=preset)
        # Tuning has the network's output in its losses, and all gradients.
        assert [row for row in rows(reference, ["tune"]) if not row.passed] == []


def test_a_case_passes_with_the_kernel_for_tpus(monkeypatch):
    # In Pallas' interpreter, which is slow. `unit/test_flash.py` has the kernel's gradients.
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr("tav_jax.models.backend.platform", lambda: "tpu")
    reference = golden.GoldenSet(FOLDER, attention="fused")
    assert [row for row in rows(reference, ["unet3d_tuned.3f_batch2"]) if not row.passed] == []


def test_cases_pass_with_the_arithmetic_of_gpus(monkeypatch):
    # Without cuDNN's kernels, which are for 16-bit types.
    monkeypatch.setattr("tav_jax.models.backend.platform", lambda: "gpu")
    reference = golden.GoldenSet(FOLDER)
    names = ("vae", "unet3d_tuned.4f_odd", "sample", "tune")
    assert [row for row in rows(reference, names) if not row.passed] == []


def test_bfloat16_stays_within_a_stated_distance():
    reference = golden.GoldenSet(FOLDER, precision="bf16")
    names = ("text", "vae", "unet3d_tuned.3f_batch2", "sample", "invert", "tune")
    stated = rows(reference, names)
    assert len(stated) == 11
    assert [row for row in stated if not row.passed] == []
    # Were it float32 after all, it would be a thousand times nearer.
    assert all(row.measured > 1e-3 for row in stated if row.name.startswith(("unet", "vae")))
