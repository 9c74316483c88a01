"""The contest's file format, the command line, and the problems themselves where they are at hand."""

import gzip
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from launcher.autopar.solve import main
from launcher.autopar.solver import contest, solve
from launcher.autopar.solver.contest import read_problem
from launcher.autopar.solver.problem import brute_force
from launcher.errors import ConfigError

EXAMPLE = {
    "name": "example",
    "nodes": {
        "intervals": [[30, 70], [40, 70], [50, 120], [110, 140], [110, 150]],
        "costs": [[15], [55, 65], [25, 45, 35], [85, 75], [95]],
        "usages": [[10], [25, 25], [15, 20, 15], [10, 10], [15]],
    },
    "edges": {
        "nodes": [[0, 1], [0, 2], [1, 3], [2, 4], [3, 4]],
        "costs": [[30, 40], [50, 10, 40], [90, 10, 20, 80], [60, 20, 30], [70, 60]],
    },
    "usage_limit": 50,
}
FOLDER = os.environ.get("LAUNCHER_IOPDDL_DIR")


@pytest.fixture
def write(tmp_path):
    def written(changes: dict | None = None, name: str = "problem.json") -> pathlib.Path:
        problem = json.loads(json.dumps(EXAMPLE))
        for place, value in (changes or {}).items():
            *parents, last = place.split(".")
            owner = problem
            for parent in parents:
                owner = owner[parent]
            owner[last] = value
        path = tmp_path / name
        data = json.dumps({"problem": problem}).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return written


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments], started_s=time.monotonic())


def total_cost(problem: dict, choice: list[int]) -> int:
    """The contest's objective, written out over the lists of the file."""
    nodes, edges = problem["nodes"], problem["edges"]
    cost = sum(costs[pick] for costs, pick in zip(nodes["costs"], choice, strict=True))
    for (tail, head), costs in zip(edges["nodes"], edges["costs"], strict=True):
        cost += costs[choice[tail] * len(nodes["costs"][head]) + choice[head]]
    return cost


@pytest.mark.parametrize("name", ["problem.json", "problem.json.gz"])
def test_the_contest_s_example_costs_445(write, tmp_path, capsys, name):
    out = tmp_path / "solution.json"
    assert run(write(name=name), "--time-limit", 20, "--out", out) == 0
    assert total_cost(EXAMPLE, json.loads(out.read_text())) == 445
    assert "cost 445\n" in (said := capsys.readouterr().out)
    assert "proven optimal" in said


def test_edges_given_twice_backwards_or_to_oneself_add_up(write):
    nodes = [[1, 0], [0, 1], [1, 1], [3, 4], [2, 4], [1, 3]]
    costs = [[30, 40], [5, 6], [7, 9, 9, 8], [70, 60], [60, 20, 30], [90, 10, 20, 80]]
    changes = {"edges.nodes": nodes, "edges.costs": costs}
    path = write(changes)
    raw = json.loads(path.read_text())["problem"]
    problem = read_problem(path)
    for choice in ((0, 0, 0, 0, 0), (0, 1, 2, 1, 0), (0, 1, 1, 0, 0)):
        assert problem.cost(choice) == total_cost(raw, list(choice))
    assert solve(problem).cost == brute_force(problem).cost


def test_costs_of_1e18_forbid(write):
    problem = read_problem(write({"nodes.costs": [[15], [55, 1e18], [25, 45, 35], [85, 75], [95]]}))
    assert problem.node_costs[1][1] == np.inf
    assert solve(problem).choice[1] == 0


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"nodes": []}, "nodes is not there or not an object"),
        ({"nodes.costs": "many"}, "nodes.costs is not there or not a list"),
        ({"nodes.costs": [[15], [55, "x"], [25, 45, 35], [85, 75], [95]]}, "nodes.costs[1]"),
        ({"nodes.costs": [[15], [], [25, 45, 35], [85, 75], [95]]}, "nodes.costs[1]"),
        ({"nodes.usages": [[1], [2, 3], [1, 1, 1], [1, 2]]}, "4 entries for 5 nodes"),
        ({"nodes.usages": [[1], [2], [1, 1, 1], [1, 2], [3]]}, "1 numbers instead of 2"),
        ({"nodes.intervals": [[0, 1]] * 4 + [[0.5, 1]]}, "nodes.intervals"),
        ({"nodes.intervals": [[0, 1]] * 3}, "3 entries for 5 nodes"),
        ({"edges.nodes": [[0, 1], [0, 9], [1, 3], [2, 4], [3, 4]]}, "names node [0, 9] of 5"),
        ({"edges.nodes": [[0, 1]]}, "5 entries for 1 edges"),
        ({"edges.costs": [[30], [50, 10, 40], [1] * 4, [1] * 3, [1] * 2]}, "edges.costs[0]"),
        ({"usage_limit": "much"}, "usage_limit"),
    ],
)
def test_what_is_no_problem_is_status_2_in_one_line(write, capsys, changes, names):
    path = write(changes)
    assert run(path, "--out", path.with_name("out.json")) == 2
    said = capsys.readouterr().err
    assert names in said
    assert str(path) in said
    assert said.count("\n") == 1
    assert not path.with_name("out.json").exists()


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"{", "a.json"), (b"{}", "a.json.gz"), (b"\xff\xfe", "a.json"), (b"[" * 99_999, "a.json")],
)
def test_what_is_no_json_is_status_2_in_one_line(tmp_path, capsys, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    assert run(path, "--out", tmp_path / "out.json") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bad_arguments_are_status_2_in_one_line(write, tmp_path, capsys):
    path = write()
    for arguments in (
        (),
        (tmp_path / "nothing.json",),
        (path, "--time-limit", "soon"),
        (path, "--time-limit", "0"),
        (path, "--method", "magic"),
    ):
        assert run(*arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_that_is_not_there_is_status_6(write, tmp_path, capsys):
    assert run(write(), "--out", tmp_path / "no" / "out.json") == 6
    assert capsys.readouterr().err.count("\n") == 1


def test_a_limit_that_cannot_be_met_names_the_smallest_that_can(write, tmp_path, capsys):
    limit = {"usage_limit": 49}  # nodes 0, 1 and 2 live together and take 10 + 25 + 15
    assert run(write(limit), "--time-limit", 20, "--out", tmp_path / "out.json") == 4
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "smallest limit that can be met is 50" in said
    assert run(write({"usage_limit": 50}), "--out", tmp_path / "out.json") == 0


def test_where_pairs_are_forbidden_the_smallest_limit_counts_them(write, tmp_path, capsys):
    changes = {
        "nodes.usages": [[10], [5, 25], [15, 20, 15], [10, 10], [15]],
        "edges.costs": [[1e18, 40], [50, 10, 40], [90, 10, 20, 80], [60, 20, 30], [70, 60]],
        "usage_limit": 45,  # node 1 may only take 25
    }
    assert run(write(changes), "--time-limit", 20, "--out", tmp_path / "out.json") == 4
    assert "smallest limit that can be met is 50" in capsys.readouterr().err


def test_forbidden_costs_alone_are_named(write, tmp_path, capsys):
    changes = {"nodes.costs": [[1e18], [55, 65], [25, 45, 35], [85, 75], [95]]}
    assert run(write(changes), "--time-limit", 20, "--out", tmp_path / "out.json") == 4
    assert "no limit can be met" in capsys.readouterr().err


def test_as_a_process(write, tmp_path):
    out = tmp_path / "solution.json"
    command = [sys.executable, "-m", "launcher.autopar.solve", str(write()), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert total_cost(EXAMPLE, json.loads(out.read_text())) == 445


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="LAUNCHER_IOPDDL_DIR names no folder of contest problems")
@pytest.mark.parametrize(("name", "optimum"), [("B", 532_843), ("G", 217_039)])
def test_contest_problems_are_solved_to_the_known_optimum(name, optimum):
    (path,) = pathlib.Path(FOLDER).glob(f"*-{name}.json.gz")
    problem = read_problem(path)
    solution = solve(problem, time_limit_s=60)
    assert (solution.cost, solution.is_proven) == (optimum, True)
    assert problem.fits(solution.choice)


def test_a_small_file_that_unpacks_to_very_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(contest, "LARGEST_BYTES", 1000)
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(ConfigError, match=r"x\.json\.gz holds more than 1000 bytes of JSON: give"):
        read_problem(tmp_path / "x.json.gz")
