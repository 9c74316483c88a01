"""What a token budget takes: steps, time and device-hours."""

from dataclasses import dataclass, replace

import pytest

from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.plans.budget import (
    budget_text,
    check_tokens,
    hours_text,
    long_time,
    token_budget,
)
from launcher.errors import ConfigError


@dataclass(frozen=True)
class Tokens:
    """What a budget reads of a model."""

    name: str = "gpt"
    sample_unit: str = "tokens"
    units_per_sample: int = 128


@pytest.fixture
def hourly(plan):
    """A plan of 8 devices and 32 samples whose step takes a second."""
    return replace(plan, predicted=replace(plan.predicted, step_s=1.0))


def test_a_budget_is_steps_times_the_predicted_step(hourly, cpu8):
    budget = token_budget(3600 * 32 * 128, Tokens(), hourly, cpu8)
    assert (budget.steps, budget.tokens_per_step, budget.wall_s) == (3600, 32 * 128, 3600.0)
    assert budget.device_hours == pytest.approx(8.0)
    assert budget_text(budget) == (
        "14.7 million tokens are 3,600 steps of 4,096 tokens: 1 hours, 8 device-hours"
    )
    assert budget.as_row() == {
        "budget_tokens": 3600 * 32 * 128,
        "budget_steps": 3600,
        "budget_s": 3600.0,
        "budget_device_hours": pytest.approx(8.0),
    }


def test_the_last_step_sees_what_is_left(hourly, cpu8):
    assert token_budget(1, Tokens(), hourly, cpu8).steps == 1
    assert token_budget(32 * 128 + 1, Tokens(), hourly, cpu8).steps == 2


def test_accelerators_are_gpus(hourly):
    budget = token_budget(1e12, Tokens(), hourly, load_cluster("1xp3"))
    assert hours_text(budget) == "542,535 GPU-hours"


def test_times_are_in_days_or_hours():
    assert long_time(86400 * 62.4) == "62.4 days"
    assert long_time(86400 * 12000) == "12,000 days"
    assert long_time(5400) == "1.5 hours"
    assert long_time(36) == "0.01 hours"


def test_a_model_without_tokens_is_refused():
    check_tokens(None, Tokens(name="wrn", sample_unit="samples"))
    check_tokens(1e9, Tokens())
    with pytest.raises(
        ConfigError,
        match=r"train\.tokens=1e\+09 counts tokens, and a step of model=wrn counts samples: leave "
        r"it out, and set train\.steps",
    ):
        check_tokens(1e9, Tokens(name="wrn", sample_unit="samples"))
