"""Forced choices: each alternative is what a search with that choice forced finds."""

from dataclasses import replace

import pytest

from launcher.autopar.answers.compare import THIS_PLAN, priced
from launcher.autopar.answers.why_not import choice_text, forced_options, why_not, why_not_text
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan

OPTIONS = PlanOptions(mode="auto", global_batch=32, num_microbatches=4)


@pytest.fixture(scope="module")
def answer(tiny_gpt, cpu8):
    model = tiny_gpt(layers=4)
    chosen = find_plan(model, cpu8, OPTIONS, lambda text: None)
    stages = len(chosen.plan.stages)
    choices = [{"pp": 8 if stages == 1 else 1}, {"tp": 3}, {"pp": stages}, {"num_microbatches": 5}]
    said = []
    found = why_not(priced(THIS_PLAN, chosen), choices, model, cpu8, OPTIONS, said.append)
    return found, choices, said, (model, cpu8)


def test_an_alternative_is_the_best_plan_under_the_choice(answer):
    found, choices, said, (model, cluster) = answer
    first = found.alternatives[0]
    again = find_plan(model, cluster, replace(OPTIONS, **choices[0]), lambda text: None)
    assert first.best.step_s == again.plan.predicted.step_s
    assert first.best.step_s >= found.chosen.step_s
    assert " more " in first.reason
    assert any(text.startswith(choice_text(choices[0])) for text in said)


def test_what_cannot_be_has_its_reason(answer):
    found, *_ = answer
    assert found.alternatives[1].best is None
    assert "parallel.tp=3 cannot share out" in found.alternatives[1].reason
    assert "parallel.num_microbatches=5" in found.alternatives[3].reason


def test_what_is_chosen_anyway_is_said_so(answer):
    found, *_ = answer
    assert found.alternatives[2].reason == "the chosen plan"


def test_the_table_has_a_row_for_each(answer):
    found, choices, *_ = answer
    text = why_not_text(found)
    lines = text.splitlines()
    assert lines[1].startswith("chosen")
    assert [line.split("  ")[0] for line in lines[2:6]] == [choice_text(c) for c in choices]
    assert "none fits" in lines[3]
    assert max(map(len, lines)) <= 100


def test_choices_add_to_what_the_run_forces():
    run = replace(OPTIONS, tp=2)
    assert forced_options(run, {"pp": 1}) == replace(run, pp=1)
    assert forced_options(run, {"tp": 4, "zero": 2}) == replace(run, tp=4, zero=2)


def test_beside_a_plan_that_was_not_searched_all_else_is_free():
    run = PlanOptions(mode="manual", global_batch=32, tp=2, pp=2)
    assert forced_options(run, {"pp": 1}) == PlanOptions(
        mode="auto", global_batch=32, pp=1, optimizer=run.optimizer
    )
