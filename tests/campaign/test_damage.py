"""A small campaign of damaged files. See damage.py for a long one."""

import damage


def test_all_damage_is_noticed_and_none_loses_a_run(capsys):
    assert damage.main(["--seed", "7", "--flips", "10"]) == 0, capsys.readouterr().out
