"""What a run was asked about its plan: another plan beside it, forced choices, a budget of tokens."""

from dataclasses import dataclass

from launcher.autopar.answers.compare import Comparison
from launcher.autopar.answers.why_not import WhyNot
from launcher.autopar.plans.budget import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """None: not asked."""

    budget: Budget | None = None
    comparison: Comparison | None = None
    why_not: WhyNot | None = None
