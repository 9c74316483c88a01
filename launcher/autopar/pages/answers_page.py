"""The parts of plan.html that answer questions: the budget, the other plan, the forced choices."""

from collections.abc import Iterator
from html import escape

from launcher.autopar.answers.answers import Answers
from launcher.autopar.answers.compare import Comparison, PricedPlan, figure_rows, part_rows, verdict
from launcher.autopar.answers.why_not import HEADS, WhyNot, table_rows
from launcher.autopar.pages.html_page import cell, number, section, table
from launcher.autopar.pages.stage_bars import bar_legend, time_bar
from launcher.autopar.plans.budget import Budget, budget_text

_MOST_TENSORS = 40


def sections(answers: Answers) -> Iterator[str]:
    """Yield a section for each question but the budget."""
    if answers.comparison is not None:
        yield _comparison(answers.comparison)
    if answers.why_not is not None:
        yield _why_not(answers.why_not)


def budget_note(budget: Budget | None) -> str:
    """Say what a budget would take, under the figures of the head."""
    return "" if budget is None else f'<div class="note">{escape(budget_text(budget))}.</div>'


def _comparison(comparison: Comparison) -> str:
    pair = (comparison.one, comparison.other)
    names = [plan.name for plan in pair]
    times = ("".join((cell(name), *map(number, values))) for name, *values in part_rows(comparison))
    figures = (
        "".join((cell(name), *map(number, values), number("")))
        for name, *values in figure_rows(comparison)
    )
    decided = [*comparison.differences, *comparison.tensors[:_MOST_TENSORS]]
    more = len(comparison.tensors) - _MOST_TENSORS
    rows = ["".join(map(cell, (d.what, d.one, d.other))) for d in decided]
    if more > 0:
        rows.append(cell(f"and {more} more groups of tensors"))
    body = (
        _bars(pair)
        + table(("part of a step", *names, "difference"), (*times, *figures))
        + (table(("what differs", *names), rows) if rows else "<p>They decide the same.</p>")
    )
    lead = (
        f"{escape(verdict(comparison))}. Times are of the average device, and add up to the step."
    )
    return section("Beside another plan", lead, body)


def _bars(plans: tuple[PricedPlan, ...]) -> str:
    longest_s = max(plan.parts.step_s for plan in plans)
    rows = (f"{cell(plan.name)}<td>{time_bar(plan.parts, longest_s)}</td>" for plan in plans)
    return bar_legend([plan.parts for plan in plans]) + table(("plan", "a step"), rows)


def _why_not(answer: WhyNot) -> str:
    reasons = ("", *(each.reason for each in answer.alternatives))
    rows = (
        "".join((cell(name), *map(number, figures), cell(plan), cell(reason)))
        for (name, *figures, plan), reason in zip(table_rows(answer), reasons, strict=True)
    )
    lead = "The best plan under each forced choice, beside the chosen one."
    return section("Why not", lead, table((*HEADS, "what makes the difference"), rows))
