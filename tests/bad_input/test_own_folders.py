"""What is wrong with a team's own folder of configs, in one line."""

import pytest
from bad_inputs import bad

RECIPE = "# @package _global_\n"
PATH = "hydra.searchpath=[file://${oc.env:PWD}/c]"
CASES = [
    bad("--config-dir=c", "+recipe=x", files={"c/recipe/x.yaml": f"{RECIPE}train: {{stepz: 1}}\n"},
        says="train.stepz ... did you mean train.steps?"),
    bad("--config-dir=c", "+recipe=y", files={"c/recipe/x.yaml": RECIPE},
        says="recipe=y is unknown ... x"),
    bad("--config-dir=c", "model=x", files={"c/model/x.yaml": "defaults: [custom, _self_]\n"},
        says="model.target"),
    bad("--config-dir=c", "cluster=x", files={"c/cluster/x.yaml": "name: [\n"}, says="x.yaml is no YAML"),
    bad("hydra.searchpath=[file:///nowhere/conf]", says="/nowhere/conf is no folder (hydra.searchpath) ... "
        "name one that has recipe/, model/ or cluster/"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_folder_of_configs_is_refused(case, refuse):
    refuse(case)


def test_a_folder_of_the_environment_that_is_not_there(refuse, monkeypatch, tmp_path):
    monkeypatch.setenv("LAUNCHER_CONF", f"{tmp_path}/gone")
    refuse(bad(says=f"{tmp_path}/gone is no folder (LAUNCHER_CONF): name one ... or leave it out"))


def test_a_file_of_the_environments_folder_is_looked_at_before_hydra_reads_it(
    refuse, monkeypatch, tmp_path
):
    folder = tmp_path / "own"
    (folder / "cluster").mkdir(parents=True)
    (folder / "cluster" / "x.yaml").write_text("a: &a [*a]\n")
    monkeypatch.setenv("LAUNCHER_CONF", str(folder))
    refuse(bad("cluster=x", says="write it out"))
