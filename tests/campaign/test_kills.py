"""Some of the campaign of kills; `python tests/campaign/kills.py` runs all of it."""

import pytest
from kills import run_campaign


@pytest.mark.full
def test_commands_that_are_killed_end_as_those_that_are_not(tmp_path):
    count, faults = run_campaign(tmp_path, kills=2, terms=2, minutes=30, seed=7)
    assert not faults
    assert sum(times for what, times in count.items() if what.startswith("SIG")) >= 4
