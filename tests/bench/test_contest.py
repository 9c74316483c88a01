"""The contest benchmark: its table from real runs of the solver on a tiny problem."""

import json

import pytest

from launcher.bench.__main__ import main

PROBLEM = {
    "name": "tiny",
    "nodes": {"intervals": [[0, 2], [1, 3]], "costs": [[4, 1], [3, 1]], "usages": [[1, 3], [1, 3]]},
    "edges": {"nodes": [[0, 1]], "costs": [[0, 0, 0, 0]]},
    "usage_limit": 4,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny-T.json").write_text(json.dumps({"problem": PROBLEM}))
    (tmp_path / "reference.csv").write_text("id,timeout_s,best_known,xla\nT,60,4,8\n")
    return tmp_path


def test_the_table_has_cost_best_known_and_time(folder, capsys):
    assert main(["contest", f"data={folder}"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["instance", "cost"]
    # Both cheap strategies together take 6 of 4: the best is 4 = 1 + 3.
    assert row.split()[:5] == ["T", "4", "4", "0.000", "%"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "contest"),
        (["nothing"], "nothing"),
        (["contest", "data"], "key=value"),
        (["contest", "data=nowhere"], "reference.csv"),
        (["contest", "color=red"], "color"),
        (["contest", "data={folder}", "instances=Q"], "instances=Q"),
        (["contest", "data={folder}", "fraction=2"], "fraction=2"),
    ],
)
def test_a_wrong_command_line_is_status_2_in_one_line(folder, capsys, arguments, says):
    assert main([argument.format(folder=folder) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
