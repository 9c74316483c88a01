"""The relaxation of the tight form, whose optimum is whole for most stages' problems, and theirs then.

A plan is searched through problems of few shapes: the same nodes, strategies and edges at other costs, for
every number of microbatches and price on memory. Each begins at the last optimum of its shape, from which
the dual simplex method finds the next one in a tenth of its steps. Leaves out a limit on memory.
"""

from collections import OrderedDict
from collections.abc import Hashable

import highspy
import numpy as np

from launcher.autopar.solver.highs import highs_lp, silent_model
from launcher.autopar.solver.problem import PairwiseProblem, Solution
from launcher.autopar.solver.tight_form import TightForm, like, shape, tight_form

_GAP_FRACTION = 1e-6
_MOST_KEPT = 16  # models, of some 10 MB
_MOST_STEPS = 200_000  # of the simplex method: a problem that takes more is left to others


class Relaxations:
    """Solves problems by their relaxation, and remembers the last ones by their shapes."""

    def __init__(self):
        self._known: OrderedDict[Hashable, tuple[TightForm, highspy.Highs]] = OrderedDict()

    def solve(self, problem: PairwiseProblem) -> Solution | None:
        """The optimum, or None where the relaxation's is not whole."""
        assert problem.memory is None
        form, model = self._prepared(problem)
        model.run()
        if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        choice = form.choice(np.array(model.getSolution().col_value))
        cost = problem.cost(choice)
        bound = min(cost, model.getInfo().objective_function_value / form.scale)
        if not np.isfinite(cost) or cost - bound > _GAP_FRACTION * abs(cost):
            return None
        return Solution(choice, cost, bound, "relaxation")

    def _prepared(self, problem: PairwiseProblem) -> tuple[TightForm, highspy.Highs]:
        """A model with the problem's costs."""
        key = shape(problem)
        if key in self._known:
            known, model = self._known.pop(key)
            form = like(known, problem)
            columns = np.arange(len(form.costs), dtype=np.int32)
            model.changeColsCost(len(columns), columns, form.costs)
            lower = np.zeros(len(columns))
            model.changeColsBounds(len(columns), columns, lower, form.upper)
        else:
            form, model = tight_form(problem), silent_model()
            # HiGHS would look for reductions longer than it solves without them.
            model.setOptionValue("presolve", "off")
            model.setOptionValue("simplex_iteration_limit", _MOST_STEPS)
            lp = highs_lp(form, form.rows)
            lp.integrality_ = []
            model.passModel(lp)
        self._known[key] = form, model
        if len(self._known) > _MOST_KEPT:
            self._known.popitem(last=False)
        return form, model
