"""Choosing one strategy per node of a graph with pairwise costs: exact reductions, then an ILP."""

from launcher.autopar.solver.live_memory import LiveUse, Memory
from launcher.autopar.solver.problem import PairwiseProblem, ProblemSize, Solution, Stage
from launcher.autopar.solver.relaxation import Relaxations
from launcher.autopar.solver.solve import METHODS, simplify, solve

__all__ = [
    "METHODS",
    "LiveUse",
    "Memory",
    "PairwiseProblem",
    "ProblemSize",
    "Relaxations",
    "Solution",
    "Stage",
    "simplify",
    "solve",
]
