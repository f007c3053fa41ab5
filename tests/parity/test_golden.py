"""The reference cases again, by every way of computing attention and of keeping activations."""

from functools import partial
from pathlib import Path

import golden
import pytest
from jax.experimental import pallas as pl

from tav_jax.models import chunked

# One prompt of the text case is too long on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:prompt of")

FOLDER = Path(__file__).parents[1] / "golden"


def failures(reference, names):
    cases = golden.cases(reference)
    return [row for name in names or cases for row in cases[name](reference) if not row.passed]


@pytest.mark.parametrize("attention", ["einsum", "by_head", "chunked"])
def test_every_case_passes_with_every_implementation_of_attention(monkeypatch, attention):
    # So that grids of 64 tokens go in blocks of 16.
    monkeypatch.setattr(chunked, "BLOCK_SCORES", 16 * 16 * 16)
    assert failures(golden.GoldenSet(FOLDER, attention=attention), None) == []


def test_single_calls_and_tuning_pass_with_the_kernel_for_tpus(monkeypatch):
    # In Pallas' interpreter, which is slow.
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr("tav_jax.models.attention.platform", lambda: "tpu")
    reference = golden.GoldenSet(FOLDER, attention="fused")
    assert failures(reference, ["unet3d_tuned.3f_batch2", "tune"]) == []


@pytest.mark.parametrize("preset", ["blocks", "full"])
def test_tuning_passes_with_every_preset_of_gradient_checkpointing(preset):
    reference = golden.GoldenSet(FOLDER, gradient_checkpointing=preset)
    assert failures(reference, ["tune"]) == []
