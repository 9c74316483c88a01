"""Choosing one strategy per node of a graph with pairwise costs: exact reductions, then an ILP."""

from launcher.autopar.solver.problem import PairwiseProblem, Solution
from launcher.autopar.solver.solve import solve

__all__ = ["PairwiseProblem", "Solution", "solve"]
