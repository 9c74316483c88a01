"""Solving a step's problem, under a memory limit where there is one.

Without a limit the solver's answer stands. With one, bytes get a price (a Lagrange multiplier) at the
instructions where too much is held, and the price rises until the plan fits; then it is lowered again as
far as the limit allows. Every plan is measured as it would run, instruction by instruction. The gap is
stated against the optimum without the limit, which no plan can beat.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.work import aval_bytes
from launcher.autopar.sharding.spec import num_shards
from launcher.autopar.solver import solve
from launcher.autopar.whole_graph.graph_problem import Key
from launcher.autopar.whole_graph.intra_op_options import IntraOpOptions
from launcher.autopar.whole_graph.live_bytes import live_bytes, live_ranges, peak_bytes
from launcher.autopar.whole_graph.sharded_graph import ShardedGraph, write_out
from launcher.autopar.whole_graph.step_problem import StepProblem
from launcher.errors import InfeasiblePlanError

_RAISES, _REFINEMENTS = 10, 5
_FIRST_PRICE, _RAISE = 1e-4, 8.0  # of what a byte costs to send, and by how much it rises
_ROUNDING = 1e-9  # a gap this small is the solver's arithmetic


@dataclass(frozen=True, slots=True, eq=False)
class SolvedStep:
    """A choice for every node, the instructions it comes to, and how far from optimal it may be."""

    picks: Mapping[Key, object]
    sharded: ShardedGraph
    cost: float
    gap_fraction: float


def solve_step(
    step: StepProblem, options: IntraOpOptions, pins: Mapping[Key, object] | None = None
) -> SolvedStep:
    """Solve, holding some nodes to one of their choices.

    Raises:
        InfeasiblePlanError: no choice is allowed, or none fits the memory limit.
    """
    free = _solve(step, options, pins, {})
    limit = options.memory_limit_bytes
    if limit is None or peak_bytes(free.sharded) <= limit:
        return free
    return _within_memory(step, options, pins, free)


def _solve(step: StepProblem, options: IntraOpOptions, pins, prices) -> SolvedStep:
    pairwise, keys = step.problem.pairwise(pins)
    costs = [
        costs + prices.get(key, 0.0) for key, costs in zip(keys, pairwise.node_costs, strict=True)
    ]
    priced = replace(pairwise, node_costs=tuple(costs))
    try:
        solution = solve(priced, time_limit_s=options.time_limit_s, method=options.solver)
    except InfeasiblePlanError as error:
        if not step.mesh.forbidden:  # then no option is to blame
            raise
        raise InfeasiblePlanError(_without_forbidden(step.mesh, options)) from error
    cost = pairwise.cost(solution.choice)
    choices = step.problem.choices
    picks = {key: choices[key][p] for key, p in zip(keys, solution.choice, strict=True)}
    sharded = write_step(step, picks)
    gap = solution.gap_fraction if solution.gap_fraction > _ROUNDING else 0.0
    return SolvedStep(picks, sharded, cost, gap)


def _without_forbidden(mesh: LogicalMesh, options: IntraOpOptions) -> str:
    """What is forbidden, by which option, and what would help."""
    switches = {
        "allow_all_gather": options.allow_all_gather,
        "allow_all_to_all": options.allow_all_to_all,
    }
    off = [f"{name}=False" for name, allowed in switches.items() if not allowed]
    forced = {"batch_axis": options.batch_axis, "zero": options.zero or None}
    cures = [f"drop {name}={value}" for name, value in forced.items() if value is not None]
    return (
        f"no sharding was found that does without {' and '.join(sorted(mesh.forbidden))} "
        f"({', '.join(off) or 'mesh.forbidden'}): "
        f"{' or '.join(['allow ' + ('them' if len(mesh.forbidden) > 1 else 'it'), *cures])}"
    )


def write_step(step: StepProblem, picks: Mapping[Key, object]) -> ShardedGraph:
    """The instructions that picks come to."""
    graph = step.region.graph
    inputs = {
        value: picks[port.key] for value, port in zip(graph.inputs, step.inputs, strict=False)
    }
    whole = (-1,) * step.mesh.num_axes
    outputs = tuple(whole if port is None else picks[port.key] for port in step.outputs)
    return write_out(step.region, step.problem, picks, inputs, outputs)


def _within_memory(
    step: StepProblem, options: IntraOpOptions, pins, free: SolvedStep
) -> SolvedStep:
    """Raise the price of bytes until the plan fits, then lower it while it still does."""
    limit = options.memory_limit_bytes
    price = _FIRST_PRICE * max(step.mesh.beta)
    crowded = _Crowded(step)
    crowded.add_peak(free.sharded)
    smallest, low = peak_bytes(free.sharded), 0.0
    best: SolvedStep | None = None
    for _ in range(_RAISES):
        solved = _solve(step, options, pins, crowded.prices(price))
        peak = peak_bytes(solved.sharded)
        smallest = min(smallest, peak)
        if peak <= limit:
            best = solved
            break
        crowded.add_peak(solved.sharded)
        low, price = price, price * _RAISE
    if best is None:
        raise InfeasiblePlanError(
            f"memory_limit_bytes={limit:.0f} cannot be met: the least that was found for a device is "
            f"{smallest} bytes; raise the limit, use more devices or a smaller batch"
        )
    for _ in range(_REFINEMENTS):
        middle = (low + price) / 2
        solved = _solve(step, options, pins, crowded.prices(middle))
        fits = peak_bytes(solved.sharded) <= limit
        low, price = (low, middle) if fits else (middle, price)
        if fits and solved.cost < best.cost:
            best = solved
    gap = 0.0 if best.cost <= 0 else max(0.0, 1 - free.cost * (1 - free.gap_fraction) / best.cost)
    return replace(best, gap_fraction=gap)


class _Crowded:
    """The values that were held when too much was, as bytes by node and choice."""

    def __init__(self, step: StepProblem):
        self.step = step
        self.held: dict[Key, np.ndarray] = {}

    def add_peak(self, sharded: ShardedGraph) -> None:
        timeline = live_bytes(sharded)
        peak = int(np.argmax(timeline))
        for value, (first, last) in live_ranges(sharded).items():
            if first <= peak <= last:
                self._add(value)

    def _add(self, value) -> None:
        num_bytes = aval_bytes(self.step.region.graph.avals[value])
        for port in self.step.problem.holders(value):
            shards = [num_shards(spec, self.step.mesh.shape) for spec in port.specs]
            self.held[port.key] = self.held.get(port.key, 0.0) + num_bytes / np.array(shards)

    def prices(self, price: float) -> dict[Key, np.ndarray]:
        return {key: price * held for key, held in self.held.items()}
