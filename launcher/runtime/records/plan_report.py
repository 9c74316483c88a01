"""What a run says of its plan: on the terminal, in plan.json and in plan.html.

The plan is written before the forced choices are searched, which takes as long as planning each time.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from launcher.autopar.answers.answers import Answers
from launcher.autopar.answers.compare import (
    THIS_PLAN,
    PricedPlan,
    adopt_other,
    compare,
    comparison_text,
    priced,
)
from launcher.autopar.answers.why_not import Choice, WhyNot, why_not, why_not_text
from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import Planned
from launcher.autopar.pages.plan_page import PageExtras, write_page
from launcher.autopar.plans.budget import Budget, token_budget
from launcher.autopar.plans.plan_file import write_plan
from launcher.autopar.plans.summary import summarize
from launcher.autopar.predictions.step_parts import submesh_parts
from launcher.models.model import Model
from launcher.runtime.compiled.compile_all import Compilation
from launcher.runtime.records.metrics import PlanMetrics
from launcher.runtime.records.progress import phase
from launcher.runtime.records.summary_file import write_summary

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReporter:
    """What is asked about a plan, and where the answers go.

    Attributes:
        options: What the planner was asked for, and is asked again with a choice forced.
        tokens: `train.tokens`.
        compare: `plan.compare`.
        choices: `plan.why_not`.
    """

    model: Model
    cluster: AnyCluster
    options: PlanOptions
    run_dir: Path
    console: Console
    tokens: float | None
    compare: str | None
    choices: Sequence[Choice]

    def price_other(self) -> PricedPlan | None:
        """Price the plan to compare with, on this cluster; None if there is none."""
        if self.compare is None:
            return None
        with phase(self.console, "pricing the other plan"):
            planned = adopt_other(Path(self.compare), self.model, self.cluster, self.options)
        return priced(self.compare, planned)

    def budget(self, planned: Planned) -> Budget | None:
        """Work out what the tokens would take, if there are any."""
        if self.tokens is None:
            return None
        return token_budget(self.tokens, self.model, planned.plan, self.cluster)

    def metrics(self, planned: Planned, compiled: Compilation | None = None) -> PlanMetrics:
        """Give the plan's numbers as they stand beside the measured ones."""
        plan, predicted = planned.plan, planned.plan.predicted
        return PlanMetrics(
            step_s=predicted.step_s,
            bubble_fraction=predicted.bubble_fraction,
            peak_bytes_per_device=tuple(predicted.peak_bytes_per_device),
            communicated_bytes=predicted.communicated_bytes,
            tflops_per_device=predicted.tflops_per_device,
            solver_s=plan.search.wall_s if plan.search else 0.0,
            num_programs=compiled.num_programs if compiled else None,
            compile_s=compiled.wall_s if compiled else None,
            budget=self.budget(planned),
        )

    def write_summary(self, planned: Planned) -> None:
        """Write summary.json of a run that only plans."""
        write_summary(self.run_dir, {"status": "planned", **self.metrics(planned).as_row()})

    def report(self, planned: Planned, other: PricedPlan | None) -> None:
        """Print the plan and all answers; write plan.html for people, plan.json for machines."""
        params, answers = self.model.abstract_params, Answers(budget=self.budget(planned))
        log.info("plan:\n%s", summarize(planned.plan, self.cluster, params, answers.budget))
        write_plan(planned.plan, self.run_dir / "plan.json")
        chosen = priced(THIS_PLAN, planned)
        if other is not None:
            answers = replace(answers, comparison=compare(chosen, other, params))
            log.info("compared:\n%s", comparison_text(answers.comparison))
        page = self._write_page(planned, answers)
        if self.choices:
            answers = replace(answers, why_not=self._force(chosen))
            log.info("why not:\n%s", why_not_text(answers.why_not))
            self._write_page(planned, answers)
        log.info("written: %s, %s", self.run_dir / "plan.json", page)

    def _force(self, chosen: PricedPlan) -> WhyNot:
        with phase(self.console, "forcing choices") as progress:
            return why_not(chosen, self.choices, self.model, self.cluster, self.options, progress)

    def _write_page(self, planned: Planned, answers: Answers) -> Path:
        path, timeline = self.run_dir / "plan.html", planned.outlook.timeline
        extras = PageExtras(
            params=self.model.abstract_params,
            parts=submesh_parts(planned.realized, timeline),
            answers=answers,
        )
        write_page(planned.plan, timeline, self.cluster, path, extras)
        return path
