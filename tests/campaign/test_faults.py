"""Each fault of the disk once. See faults.py for a long campaign."""

import faults


def test_a_run_survives_the_faults_of_its_disk(capsys):
    assert faults.main(["--seed", "5"]) == 0, capsys.readouterr().out
