"""The transfer benchmark: a row per pair of shardings, and settings that are refused."""

import pytest

from launcher.bench import transfers
from launcher.bench.__main__ import main


def test_the_table_says_what_is_sent_and_that_nothing_waits(capsys, monkeypatch):
    monkeypatch.setattr(transfers, "discover", lambda count: None)  # the devices are there already
    assert main(["transfers", "size_mib=1"]) == 0
    title, heads, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("4 + 4 devices (cpu), 1 MiB")
    assert heads.split()[-2:] == ["copies", "waits"]
    figures = {row[:34].strip(): row[34:].split() for row in rows}
    assert {title: (row[4], row[6]) for title, row in figures.items()} == {
        "same split": ("1", "no"),
        "whole along one axis, same host": ("2", "no"),
        "whole along one axis": ("1", "no"),
        "whole": ("1", "no"),
        "whole to split": ("1", "no"),
        "split to whole": ("1", "no"),
        "rows to columns": ("1", "no"),
    }


@pytest.mark.parametrize(
    ("setting", "says"),
    [("color=red", "transfers has no key 'color'"), ("size_mib=0", "size_mib='0'"),
     ("size_mib=big", "size_mib='big'")],
)  # fmt: skip
def test_a_setting_that_is_none_is_refused(setting, says, capsys):
    assert main(["transfers", setting]) == 2
    assert says in capsys.readouterr().err
