"""The examples of docs/plan-file.md, schedules.md, clusters.md and auto-shard.md are what they say."""

import pathlib
import re

from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import adopt_plan
from launcher.autopar.plans.plan_file import from_json

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def examples(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def example(name: str, language: str) -> str:
    return examples(name, language)[0]


def test_the_smallest_plan_is_one(tiny_gpt, cpu8):
    given = from_json(example("plan-file.md", "json"))
    options = PlanOptions(mode="from_file", global_batch=given.global_batch)
    plan = adopt_plan(given, tiny_gpt(), cpu8, options).plan
    first, second = (stage.layers for stage in plan.stages)
    assert (first[0], first[1], second[1]) == (0, second[0], plan.num_layers)
    assert dict(plan.stages[0].mesh) == {"data": 2, "tensor": 2}
    assert plan.stages[0].params["blocks/0/mlp/up/kernel"] == (None, "tensor")
    assert plan.stages[1].strategies
    assert {path for stage in plan.stages for path in stage.params} == set(
        tiny_gpt().abstract_params
    )


def test_the_example_of_schedules_prints_the_grid_below_it(capsys):
    exec(example("schedules.md", "python"), {})
    printed = capsys.readouterr().out
    assert f"```\n{printed.strip()}" in (DOCS / "schedules.md").read_text()
    assert printed.count("\n") > 1


def test_the_cluster_of_ones_own_is_one(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(example("clusters.md", "yaml"))
    assert load_cluster(path).num_devices == 32


def test_the_cluster_of_several_kinds_is_one(tmp_path):
    path = tmp_path / "mixed.yaml"
    path.write_text(examples("clusters.md", "yaml")[1])
    cluster = load_cluster(path)
    assert [kind.num_devices for kind in cluster.kinds] == [8, 8]
    assert cluster.kinds[1].inter_host == load_cluster("dgx-a100").inter_host


def test_the_example_of_auto_shard_runs_as_it_says(capsys):
    names: dict = {}
    exec(example("auto-shard.md", "python"), names)
    assert names["sharded"].audit(names["compiled"]).agrees
    printed = capsys.readouterr().out
    assert "all-reduce" in printed
    assert "not the same" not in printed
