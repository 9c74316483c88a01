"""The recipes of this repository, and those that a team keeps elsewhere."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from launcher import main
from launcher.cli import compose
from launcher.cli.compose import load
from launcher.config import conf_dir
from launcher.inputs import find_cluster

RECIPES = sorted(path.stem for path in (conf_dir() / "recipe").glob("*.yaml"))
ROOT = pathlib.Path(__file__).parents[1]
# Degrees that fit, so that planning takes seconds: what is searched, is searched in the slow test.
FORCED = {
    "alpa_gpt_39b": ("pp=16", "tp=4", "num_microbatches=1024", "recompute=layer"),
    "alpa_moe_70b": ("pp=16", "tp=4", "num_microbatches=256", "recompute=full"),
    "alpa_wrn_13b": ("pp=16", "tp=4", "num_microbatches=96", "recompute=full"),
    "gpt_1_3b_h100": ("zero=2", "num_microbatches=8"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes(recipe):
    compose.check(compose.parse([f"+recipe={recipe}"]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_says_how_it_is_called(recipe):
    text = (conf_dir() / "recipe" / f"{recipe}.yaml").read_text()
    assert text.startswith("# @package _global_\n# ")
    assert f"+recipe={recipe}" in text


@pytest.mark.parametrize(
    ("recipe", "size", "batch", "devices"),
    [
        ("alpa_gpt_39b", "39b", 1024, 64),
        ("alpa_moe_70b", "70b", 1024, 64),
        ("alpa_wrn_13b", "13b", 1536, 64),
        ("gpt_1_3b_h100", "1.3b", 512, 8),
    ],
)
def test_what_the_flagships_are(recipe, size, batch, devices):
    config = load([f"+recipe={recipe}"])
    assert (config.model.size, config.train.global_batch) == (size, batch)
    assert find_cluster(config).num_devices == devices


def planned(tmp_path, recipe, *overrides):
    assert main.run(load([f"+recipe={recipe}", "mode=plan", *overrides]), tmp_path) == 0
    return json.loads((tmp_path / "plan.json").read_text())


@pytest.mark.parametrize("recipe", FORCED)
def test_a_flagship_plans_by_hand(tmp_path, recipe):
    degrees = [f"parallel.{degree}" for degree in FORCED[recipe]]
    plan = planned(tmp_path, recipe, "parallel=manual", *degrees)
    cluster = plan["cluster"]
    assert cluster["hosts"] * cluster["devices_per_host"] == (8 if "h100" in recipe else 64)
    assert plan["predicted"]["step_s"] > 0


@pytest.mark.slow  # 15 s to 2 min each
@pytest.mark.parametrize("recipe", FORCED)
def test_a_flagship_plans_by_itself_and_no_worse(tmp_path, recipe):
    (tmp_path / "hand").mkdir()
    degrees = [f"parallel.{degree}" for degree in FORCED[recipe]]
    hand = planned(tmp_path / "hand", recipe, "parallel=manual", *degrees)
    searched = planned(tmp_path, recipe)
    assert searched["predicted"]["step_s"] <= hand["predicted"]["step_s"]


def command(folder: pathlib.Path, *arguments: str, **environment: str):
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_it_has_all_modes(tmp_path):
    line = compose.parse(["+recipe=parallel_modes"])
    modes = load(["+recipe=parallel_modes"])
    assert (modes.mode, compose.check(line)) == ("plan", None)  # no folder: a sweep
    options = {path.stem for path in (conf_dir() / "parallel").glob("*.yaml")}
    text = (conf_dir() / "recipe" / "parallel_modes.yaml").read_text()
    swept = text.split("      parallel: ")[1].strip().split(",")
    assert set(swept) == options - {"from_file"}  # which needs a file


MODELS = """
import jax
import jax.numpy as jnp
from flax import nnx

class Net(nnx.Module):
    def __init__(self, rngs, hidden):
        self.head = nnx.Linear(8, hidden, rngs=rngs)

    def loss(self, batch):
        return jnp.mean(self.head(batch["x"]) ** 2), {}

    def example_batch(self, batch_size):
        return {"x": jax.ShapeDtypeStruct((batch_size, 8), jnp.float32)}

def build(rngs, hidden):
    return Net(rngs, hidden)
"""
TEAM = {
    "team_models.py": MODELS,
    "conf/model/net.yaml": "defaults: [custom, _self_]\ntarget: team_models:build\nargs: {hidden: 16}\n",
    "conf/cluster/lab.yaml": "defaults: [cpu8, _self_]\nname: lab\nhosts: 1\n",
    "conf/recipe/daily.yaml": "# @package _global_\ndefaults: [override /model: net, override /cluster: lab]"
    "\ntrain: {steps: 2, eval_batches: 0}\nlogger: {project: team}\n",
}


@pytest.fixture
def team(tmp_path):
    """A repository of a team's own."""
    for name, text in TEAM.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_team_names_its_folder_in_the_environment_and_trains(team):
    done = command(
        team, "+recipe=daily", "hydra.run.dir=out", "logger=jsonl", LAUNCHER_CONF=f"{team}/conf"
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads((team / "out" / "plan.json").read_text())
    assert (plan["cluster"]["name"], plan["model"]["name"]) == ("lab", "custom")
    assert "target: team_models:build" in (team / "out" / "config.yaml").read_text()
    assert json.loads((team / "out" / "summary.json").read_text())["steps"] == 2


def test_the_comparison_of_parallel_modes_is_a_sweep_without_a_flag_also_of_its_model(team):
    done = command(
        team, "+recipe=parallel_modes", "model=net", "cluster=lab", "train.global_batch=8",
        "parallel=single,data", "hydra.sweep.dir=out", LAUNCHER_CONF="conf:",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "2 runs, sorted by predicted speed" in said
    assert said[-1] == "written: out/comparison.csv, out/comparison.svg"
    assert sorted(line.split()[1:3] for line in said[-3:-1]) == [
        ["data", "planned"], ["single", "planned"],
    ]  # fmt: skip
    assert {
        json.loads(path.read_text())["model"]["name"] for path in team.glob("out/*/plan.json")
    } == {"custom"}


WAYS = {
    "variable": ((), {"LAUNCHER_CONF": "{team}/nothing:{team}/conf"}),
    "searchpath": (("hydra.searchpath=[file://{team}/conf]",), {}),
    "config-dir": (("--config-dir={team}/conf",), {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_finds_recipe_model_and_cluster(team, way, monkeypatch, capfd):
    flags, environment = WAYS[way]
    (team / "nothing").mkdir()
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(team=team))
    line = compose.parse([*(flag.format(team=team) for flag in flags), "+recipe=daily"])
    with compose._loader(line) as loader:
        config = compose._compose_point(loader, line, line.overrides).config
    assert (config.cluster.name, config.cluster.hosts) == ("lab", 1)
    assert (config.model.target, config.model.args) == ("team_models:build", {"hidden": 16})
    assert (config.logger.project, config.data.name) == ("team", "synthetic")


def test_a_name_of_ours_keeps_its_meaning(team, monkeypatch):
    (team / "conf/cluster/cpu8.yaml").write_text("name: other\n")
    monkeypatch.setenv("LAUNCHER_CONF", f"{team}/conf")
    assert load(["cluster=cpu8"]).cluster.name == "cpu8"


def test_help_lists_the_options_of_the_team(team):
    done = command(team, "--help", LAUNCHER_CONF=f"{team}/conf")
    assert "daily" in done.stdout
    assert "lab" in done.stdout
