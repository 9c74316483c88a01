"""The examples of docs/plan-file.md, schedules.md, clusters.md and auto-shard.md are what they say."""

import pathlib
import re

from launcher.autopar.cluster import load_cluster
from launcher.autopar.plan_file import from_json

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def example(name: str, language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)[1]


def test_the_smallest_plan_is_one():
    plan = from_json(example("plan-file.md", "json"))
    plan.check(5, load_cluster("cpu8"))
    assert [stage.num_devices for stage in plan.stages] == [4, 4]


def test_the_example_of_schedules_prints_the_grid_below_it(capsys):
    exec(example("schedules.md", "python"), {})
    printed = capsys.readouterr().out
    assert f"```\n{printed.strip()}" in (DOCS / "schedules.md").read_text()
    assert printed.count("\n") > 1


def test_the_cluster_of_ones_own_is_one(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(example("clusters.md", "yaml"))
    assert load_cluster(path).num_devices == 32


def test_the_example_of_auto_shard_runs_as_it_says(capsys):
    names: dict = {}
    exec(example("auto-shard.md", "python"), names)
    assert names["sharded"].audit(names["compiled"]).agrees
    printed = capsys.readouterr().out
    assert "all-reduce" in printed
    assert "not the same" not in printed
