"""What a token budget would take at the predicted step time: steps, hours, device-hours (`train.tokens`).

Left out: what a run spends besides its steps: compiling, evaluations, restarts.
"""

import math
from dataclasses import dataclass

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.plans.plan import Plan
from launcher.autopar.text.wording import digits, large
from launcher.errors import ConfigError
from launcher.models.model import Model

_HOUR_S, _DAY_S = 3600.0, 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A number of tokens, in steps and time.

    Attributes:
        steps: So many that all tokens are seen; the last step may see more.
        device_hours: Of all devices of the plan together.
        device_word: "GPU" or "device".
    """

    tokens: int
    tokens_per_step: int
    steps: int
    wall_s: float
    device_hours: float
    device_word: str

    def as_row(self) -> dict[str, float]:
        """Give the budget by the names it is logged under."""
        return {
            "budget_tokens": self.tokens,
            "budget_steps": self.steps,
            "budget_s": self.wall_s,
            "budget_device_hours": self.device_hours,
        }


def check_tokens(tokens: float | None, model: Model) -> None:
    """Raise `ConfigError` if tokens are asked for of a model that has none."""
    if tokens is not None and model.sample_unit != "tokens":
        raise ConfigError(
            f"train.tokens={tokens:g} counts tokens, and a step of model={model.name} counts "
            f"{model.sample_unit}: leave it out, and set train.steps"
        )


def token_budget(tokens: float, model: Model, plan: Plan, cluster: AnyCluster) -> Budget:
    """Work out what a priced plan takes for so many tokens."""
    tokens_per_step = plan.global_batch * model.units_per_sample
    steps = math.ceil(tokens / tokens_per_step)
    wall_s = steps * plan.predicted.step_s
    return Budget(
        tokens=round(tokens),
        tokens_per_step=tokens_per_step,
        steps=steps,
        wall_s=wall_s,
        device_hours=wall_s * plan.num_devices / _HOUR_S,
        device_word="GPU" if cluster.has_accelerators else "device",
    )


def budget_text(budget: Budget) -> str:
    """Say it in one sentence."""
    return (
        f"{large(budget.tokens)} tokens are {budget.steps:,} steps of "
        f"{budget.tokens_per_step:,} tokens: {long_time(budget.wall_s)}, "
        f"{hours_text(budget)}"
    )


def hours_text(budget: Budget) -> str:
    """Write what the devices spend: `11,980 GPU-hours`."""
    hours = budget.device_hours
    number = f"{hours:,.0f}" if hours >= 999.5 else digits(hours)
    return f"{number} {budget.device_word}-hours"


def long_time(value_s: float) -> str:
    """Write a time in days or hours: `62.4 days`, `1.5 hours`."""
    days, hours = value_s / _DAY_S, value_s / _HOUR_S
    if days >= 1.995:
        return f"{days:,.0f} days" if days >= 999.5 else f"{digits(days)} days"
    return f"{digits(hours)} hours"
