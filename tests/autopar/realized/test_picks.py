"""Picks as a plan file writes them: what is read back is what was picked."""

import re
from dataclasses import replace

import pytest

from launcher import models
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.autopar.plans.plan_file import from_json, to_json
from launcher.autopar.realized.picks import choice_text, pins_of_stage, specs_as_dims, strategies_of
from launcher.autopar.realized.realize import realize
from launcher.autopar.sharding.rules import AxisStrategy, Strategy
from launcher.config import MoeConfig
from launcher.errors import PlanError

GPT_PLANS = {
    "data": {"mode": "data"},
    "all three": {"mode": "manual", "dp": 2, "tp": 2, "pp": 2},
    "zero-3": {"mode": "manual", "dp": 4, "tp": 2, "zero": 3},
    "auto": {"mode": "auto"},
}


def planned(model, cluster, **fields):
    options = PlanOptions(**{"global_batch": 32, "num_microbatches": 4, **fields})
    return find_plan(model, cluster, options, lambda text: None)


def assert_replays(found, model, cluster):
    plan = found.plan
    again = from_json(to_json(plan))
    assert again == plan
    realized = realize(again, model, cluster)
    for before, after in zip(found.realized.stages, realized.stages, strict=True):
        assert after.sharding.picks == before.sharding.picks
        assert after.sharding.seconds == before.sharding.seconds
        assert after.layout.kept == before.layout.kept
    assert realized.program == found.realized.program
    assert realized.planner.num_solved == 0, "everything is pinned: there is nothing to solve"


@pytest.fixture(scope="module")
def gpt(tiny_gpt):
    return tiny_gpt(layers=3, dropout=0.1)


@pytest.mark.parametrize("name", GPT_PLANS)
def test_a_plan_from_a_file_makes_the_same_picks(name, gpt, cpu8):
    assert_replays(planned(gpt, cpu8, **GPT_PLANS[name]), gpt, cpu8)


@pytest.mark.parametrize("ep", [None, 4])
def test_a_plan_of_a_mixture_of_experts_does_too(cpu8, ep):
    model = models.build(MoeConfig(size="tiny", dtype="fp32", layers=2, hidden=32))
    assert_replays(planned(model, cpu8, mode="manual", dp=4, tp=2, ep=ep), model, cpu8)


def test_texts_name_entries_along_each_axis():
    assert choice_text((-1, 0)) == "R,0"
    assert choice_text((-2, -1)) == "P,R"
    split = AxisStrategy(operands=(1, 0), results=(-2,))
    whole = AxisStrategy(operands=(-1, -1), results=(-1,))
    assert choice_text(Strategy((split, whole))) == "1,0>P|R,R>R"


def test_texts_of_a_node_tell_its_choices_apart(gpt, cpu8):
    realized = planned(gpt, cpu8, **GPT_PLANS["all three"]).realized
    for stage in realized.stages:
        problem = realized.planner.problem(*stage.stage.layers, stage.settings)
        for key, choices in problem.choices.items():
            assert len({choice_text(choice) for choice in choices}) == len(choices), key


def test_every_node_is_written_once_in_order(gpt, cpu8):
    (stage,) = planned(gpt, cpu8, **GPT_PLANS["data"]).realized.stages
    groups = strategies_of(stage.sharding)
    assert sum(len(texts) for texts in groups.values()) == len(stage.sharding.picks)
    for texts in groups.values():
        numbers = [int(text.split(":")[0]) for text in texts]
        assert numbers == sorted(set(numbers))


def test_specs_are_written_by_tensor_dim():
    specs = {"a": (0, 1), "b": (0, 0), "c": (-1, -1), "d": (-1, 1)}
    ranks = {"a": 2, "b": 1, "c": 2, "d": 3}
    assert specs_as_dims(specs, ranks, ("data", "tensor")) == {
        "a": ("data", "tensor"),
        "b": (("data", "tensor"),),
        "c": (None, None),
        "d": (None, "tensor", None),
    }


def changed(stage, group, index, text):
    texts = list(stage.strategies[group])
    texts[index] = text
    return replace(stage, strategies={**stage.strategies, group: tuple(texts)})


def test_a_strategy_that_no_rule_allows_is_an_error_that_names_it(gpt, cpu8):
    found = planned(gpt, cpu8, **GPT_PLANS["data"])
    (stage,) = found.plan.stages
    group = "layer0/op"
    number = stage.strategies[group][3].partition(":")[0]
    words = rf"no strategy '7>7\|R>R' for entry {number} of layer0/op"
    plan = replace(found.plan, stages=(changed(stage, group, 3, f"{number}:7>7|R>R"),))
    with pytest.raises(PlanError, match=words):
        realize(plan, gpt, cpu8)


@pytest.mark.parametrize("text", ["", "R>R", "x:R>R", "-1:R>R", "1.5:R>R", "²:R>R"])
def test_a_strategy_without_a_number_is_an_error(gpt, cpu8, text):
    found = planned(gpt, cpu8, **GPT_PLANS["data"])
    (stage,) = found.plan.stages
    plan = replace(found.plan, stages=(changed(stage, "layer0/op", 0, text),))
    with pytest.raises(
        PlanError, match=rf"strategy '{re.escape(text)}' .*names no node .*number:choice"
    ):
        realize(plan, gpt, cpu8)


def test_strategies_that_are_left_out_are_found_anew(gpt, cpu8):
    """Some groups only: the others are solved under them, as well as before."""
    found = planned(gpt, cpu8, **GPT_PLANS["all three"])
    stages = tuple(
        replace(
            stage,
            strategies={g: t for g, t in stage.strategies.items() if g.endswith("/slot")},
        )
        for stage in found.plan.stages
    )
    again = realize(replace(found.plan, stages=stages), gpt, cpu8)
    for before, after in zip(found.realized.stages, again.stages, strict=True):
        slots = {k: v for k, v in before.sharding.picks.items() if k[0] == "slot"}
        assert slots.items() <= after.sharding.picks.items()
        assert after.sharding.microbatch_s <= before.sharding.microbatch_s * (1 + 1e-9)


def test_parameters_alone_pin_their_slots(gpt, cpu8):
    found = planned(gpt, cpu8, **GPT_PLANS["all three"])
    realized = found.realized
    stage = replace(found.plan.stages[0], strategies={})
    pins = pins_of_stage(realized.planner, stage, realized.stages[0].settings)
    picks = realized.stages[0].sharding.picks
    assert pins
    assert all(key[0] == "slot" and allowed == [picks[key]] for key, allowed in pins.items())


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (
            {"blocks/0/mlp/up/kernl": (None, None)},
            r"params\['blocks/0/mlp/up/kernl'\] of the stage of layers \[0, \d+\] is none of the \d+ "
            r"parameters .*did you mean 'blocks/0/mlp/up/kernel'",
        ),
        ({"of/another/model": (None,)}, r"is none of the \d+ parameters .*: drop it"),
        ({"blocks/0/mlp/up/kernel": (None,)}, r"has 1 entry, and the tensor has 2 dims"),
        (
            {"blocks/0/mlp/up/kernel": ("data", None)},
            r"=\['data', None\] is not possible on the mesh",
        ),
    ],
)
def test_what_a_plan_says_of_parameters_is_checked(gpt, cpu8, params, words):
    found = planned(gpt, cpu8, **GPT_PLANS["data"])
    (stage,) = found.plan.stages
    stage = replace(stage, strategies={}, params=params)
    with pytest.raises(PlanError, match=words):
        realize(replace(found.plan, stages=(stage,)), gpt, cpu8)
