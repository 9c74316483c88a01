"""`plan.why_not`: what its entries may be, and that a mistake is named with its place."""

import re

import pytest

from launcher.cli.compose import load
from launcher.errors import ConfigError

MISTAKES = [
    (
        ["plan.why_not={pp: 1}"],
        "plan.why_not={pp: 1} is a mapping, and plan.why_not takes a list: put it in brackets",
    ),
    (["plan.why_not=5"], "plan.why_not=5 is of the wrong type: give a list of forced choices"),
    (["plan.why_not=[3]"], "plan.why_not[0]=3 forces nothing: give a mapping, such as {pp: 1}"),
    (["plan.why_not=[{pp: 1}, {}]"], "plan.why_not[1]={} forces nothing"),
    (
        ["plan.why_not=[{pp: 1}, {foo: 2}]"],
        "plan.why_not[1].foo=2: there is no such choice: take one of dp, tp, pp, ep, zero",
    ),
    (["plan.why_not=[{pp: two}]"], "plan.why_not[0].pp=two is of the wrong type: give a whole"),
    (["plan.why_not=[{pp: true}]"], "plan.why_not[0].pp=True is of the wrong type"),
    (["plan.why_not=[{tp: null}]"], "plan.why_not[0].tp=None is of the wrong type"),
    (
        ["plan.why_not=[{recompute: 1}]"],
        "plan.why_not[0].recompute=1 is of the wrong type: give a na",
    ),
    (["plan.why_not=[{tp: 0}]"], "plan.why_not[0]: parallel.tp=0 is less than 1"),
    (["plan.why_not=[{recompute: all}]"], "plan.why_not[0]: parallel.recompute=all is unknown"),
    (
        ["plan.why_not=[{virtual_stages: 2}]"],
        "plan.why_not[0]: parallel.virtual_stages=2 contradicts parallel.schedule=null",
    ),
    (
        ["parallel.pp=4", "plan.why_not=[{schedule: interleaved, num_microbatches: 6}]"],
        "plan.why_not[0]: parallel.num_microbatches=6 is no multiple of parallel.pp=4",
    ),
]


@pytest.mark.parametrize(("overrides", "text"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_named_in_one_line(overrides, text):
    with pytest.raises(ConfigError, match=re.escape(text)) as caught:
        load(overrides)
    assert "\n" not in str(caught.value)


def test_choices_to_force_are_plain_python():
    config = load(["plan.why_not=[{pp: 1}, {schedule: 1f1b, num_microbatches: 8}]"])
    assert config.plan.why_not == [{"pp": 1}, {"schedule": "1f1b", "num_microbatches": 8}]
    free = load(["parallel=manual", "parallel.pp=2", "plan.why_not=[{schedule: interleaved}]"])
    assert free.plan.why_not == [{"schedule": "interleaved"}]
