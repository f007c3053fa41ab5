"""The reference cases once, compiled with few optimisations.

`launch/test.sh --all` compiles them as users do instead, with `tests/golden.py`.
"""

from pathlib import Path

import golden
import pytest

# One prompt of the text case is too long on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:prompt of")

CASES = (
    *("text", "vae", "unet2d", "schedule", "sample", "invert", "tune"),
    *("unet3d_inflated.8f", "unet3d_tuned.1f", "unet3d_tuned.3f_batch2"),
    *("unet3d_tuned.4f_odd", "unet3d_tuned.8f"),
)


@pytest.fixture(scope="module")
def reference() -> golden.GoldenSet:
    return golden.GoldenSet(Path(__file__).parents[1] / "golden")


def test_all_cases_of_the_set_are_here(reference):
    assert set(golden.cases(reference)) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_case_equals_the_published_code(name, reference):
    rows = list(golden.cases(reference)[name](reference))
    assert rows
    assert [row for row in rows if not row.passed] == []
