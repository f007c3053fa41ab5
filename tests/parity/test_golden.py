"""The reference cases again, by every way of computing attention and of keeping activations."""

from functools import partial
from pathlib import Path

import golden
import pytest
from jax.experimental import pallas as pl

from tav_jax.models.attention import chunked

# One prompt of the text case is too long on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:prompt of")

FOLDER = Path(__file__).parents[1] / "golden"


def failures(reference, names):
    cases = golden.cases(reference)
    return [row for name in names or cases for row in cases[name](reference) if not row.passed]


# Every implementation and every preset, and not each with each: a case takes minutes to compile.
# `tests/golden.py` by itself has "auto" and "none".
@pytest.mark.parametrize(
    ("attention", "preset"), [("einsum", "none"), ("by_head", "blocks"), ("chunked", "full")]
)
def test_every_case_passes_with_every_implementation_and_preset(monkeypatch, attention, preset):
    # So that grids of 64 tokens go in blocks of 16.
    monkeypatch.setattr(chunked, "BLOCK_SCORES", 16 * 16 * 16)
    reference = golden.GoldenSet(FOLDER, attention=attention, gradient_checkpointing=preset)
    assert failures(reference, None) == []


def test_single_calls_and_tuning_pass_with_the_kernel_for_tpus(monkeypatch):
    # In Pallas' interpreter, which is slow.
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr("tav_jax.models.attention.dispatch.platform", lambda: "tpu")
    reference = golden.GoldenSet(FOLDER, attention="fused")
    assert failures(reference, ["unet3d_tuned.3f_batch2", "tune"]) == []


def test_bfloat16_stays_within_a_stated_distance_of_every_case():
    reference = golden.GoldenSet(FOLDER, precision="bf16")
    rows = [row for case in golden.cases(reference).values() for row in reference.rows(case)]
    assert len(rows) >= 14
    assert [row for row in rows if not row.passed] == []
    # Were it float32 after all, it would be a thousand times nearer.
    assert all(row.measured > 1e-3 for row in rows if row.name.startswith(("unet", "vae")))
