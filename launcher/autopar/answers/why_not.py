"""What the best plan would cost under choices that were not made: one search for each forced choice.

A choice is a mapping of `parallel.*` keys, such as {"pp": 1}. It is added to what the run forces itself;
all else stays free. Where the run does not search (`parallel=manual`, a plan file), everything else is free.
Why a forced plan is slower is said by the parts of its step (`compare`); where nothing fits, by the search's
error.

Left out: what the searches have in common but the traced model, which is remembered.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.autopar.answers.compare import PricedPlan, compare, priced, reasons
from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.autopar.plans.plan import Plan
from launcher.autopar.plans.summary import WIDTH
from launcher.autopar.text.wording import aligned, count, digits, percent, seconds, size
from launcher.errors import ConfigError, InfeasiblePlanError
from launcher.models.model import Model

Choice = Mapping[str, int | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A forced choice: the best plan under it, or why there is none.

    Attributes:
        reason: Where the difference to the chosen plan lies, or why no plan was found.
    """

    name: str
    best: PricedPlan | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WhyNot:
    """The chosen plan, and its alternatives in the order in which they were asked for."""

    chosen: PricedPlan
    alternatives: tuple[Alternative, ...]


def choice_text(choice: Choice) -> str:
    """Write a forced choice: `pp=1 zero=2`."""
    return " ".join(f"{key}={value}" for key, value in choice.items())


def forced_options(options: PlanOptions, choice: Choice) -> PlanOptions:
    """What is asked of the planner if a choice is forced, and all else is as free as in the run."""
    free = options
    if options.mode != "auto":
        free = PlanOptions(
            mode="auto", global_batch=options.global_batch, optimizer=options.optimizer
        )
    return replace(free, **choice)


def why_not(
    chosen: PricedPlan,
    choices: Sequence[Choice],
    model: Model,
    cluster: AnyCluster,
    options: PlanOptions,
    progress: Callable[[str], None],
) -> WhyNot:
    """Search under each forced choice, and say what is different."""
    found = []
    for choice in choices:
        name = choice_text(choice)

        def report(text: str, name: str = name) -> None:
            progress(f"{name}: {text}")

        try:
            planned = find_plan(model, cluster, forced_options(options, choice), report)
        except (InfeasiblePlanError, ConfigError) as error:  # the latter: a degree that cannot be
            found.append(Alternative(name=name, best=None, reason=str(error)))
            continue
        best = priced(name, planned)
        found.append(Alternative(name=name, best=best, reason=_reason(chosen, best)))
    return WhyNot(chosen=chosen, alternatives=tuple(found))


def _reason(chosen: PricedPlan, best: PricedPlan) -> str:
    comparison = compare(chosen, best, {})
    if not comparison.differences:
        return "the chosen plan"
    return reasons(comparison) or "another plan that takes the same time"


HEADS = ("", "step", "ratio", "bubble", "memory", "plan")


def table_rows(answer: WhyNot) -> list[tuple[str, ...]]:
    """Return a row for the chosen plan and one for every alternative, under `HEADS`."""
    rows = [("chosen", *_cells(answer.chosen, answer.chosen))]
    for each in answer.alternatives:
        cells = _cells(each.best, answer.chosen) if each.best else ("-",) * 4 + ("none fits",)
        rows.append((each.name, *cells))
    return rows


def _cells(plan: PricedPlan, chosen: PricedPlan) -> tuple[str, ...]:
    predicted = plan.plan.predicted
    return (
        seconds(plan.step_s),
        digits(plan.step_s / chosen.step_s),
        percent(predicted.bubble_fraction),
        size(plan.peak_bytes),
        _short(plan.plan),
    )


def _short(plan: Plan) -> str:
    """A plan in a few words: `3 stages of 1x2, 2x2; 512 microbatches, 1f1b`."""
    meshes = dict.fromkeys("x".join(str(n) for _, n in stage.mesh) for stage in plan.stages)
    shown = list(meshes)[:3]
    more = "" if len(meshes) == len(shown) else ", ..."
    return (
        f"{count(len(plan.stages), 'stage')} of {', '.join(shown)}{more}; "
        f"{count(plan.num_microbatches, 'microbatch')}, {plan.schedule}"
    )


def why_not_text(answer: WhyNot) -> str:
    """Write the alternatives for a terminal: a table, and why each is not the plan."""
    lines = aligned([HEADS, *table_rows(answer)], right=(1, 2, 3, 4))
    lines.append("")
    for each in answer.alternatives:
        lines += textwrap.wrap(
            f"{each.name}: {each.reason}", WIDTH, subsequent_indent="  ", break_on_hyphens=False
        )
    return "\n".join(lines)
