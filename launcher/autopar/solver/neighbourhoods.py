"""Large-neighbourhood search: part of a choice is freed and solved anew by the ILP, the rest stays.

(Shaw, CP 1998.) A neighbourhood is one to four connected parts of the graph, each of its nodes with the
few strategies that look best: by the bound's `excess`, and by their cost beside the present picks. Its ILP
holds the memory that the others leave, so every answer fits. The size follows the time the ILPs take.

Two threads search at the same time; HiGHS runs without Python's lock. It stops at the time limit or when
the bound is reached; how good the result is, only the bound says.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from launcher.autopar.solver.eliminate import plan_order, solve_by_elimination
from launcher.autopar.solver.flat import FlatProblem
from launcher.autopar.solver.ilp import improve_by_ilp
from launcher.autopar.solver.problem import PROVEN_GAP_FRACTION, PairwiseProblem
from launcher.autopar.solver.reduce import reduce

_THREADS = 2
_SHORT_S, _LONG_S, _LIMIT_S = 0.7, 2.5, 5.0  # of one ILP: grow below, shrink above, stop
_FIRST_VARIABLES, _LEAST_VARIABLES, _MOST_VARIABLES = 30_000, 2_000, 100_000
_STRATEGIES = (6, 12, 30, 1000)  # how many a node may keep, drawn anew for each neighbourhood
_SHARES = (0.15, 0.2, 0.25, 0.4)  # of the draws
_MORE_EFFORT = 1.4
_STUCK_AFTER = 1.5  # times each node was freed, on average
_MOST_ENTRIES = 20_000_000  # of the tables of an elimination
_ALONE = 0.4  # the share of neighbourhoods that begin at one node
_MOST_PARTS = 4
_SAMPLE = 32  # nodes, of which the one that gains most begins another part
_BEST_IN_MERGE = 3  # strategies of each node
_MOST_NEIGHBOURS = 30  # followed from one node: hubs would fill the neighbourhood alone


@dataclass(frozen=True, slots=True)
class _Neighbourhood:
    """Free nodes, and which of their strategies they may take, the present one among them."""

    allowed: dict[int, np.ndarray]
    problem: PairwiseProblem
    start: tuple[int, ...]


class Search:
    """The best choice so far, and what improves it; the choice given first must fit.

    Args:
        priced: The costs of all strategies, memory priced in.
        excess: How much the bound would rise for each strategy.
        bound: No choice costs less.
    """

    def __init__(
        self,
        flat: FlatProblem,
        choice: np.ndarray,
        priced: np.ndarray,
        excess: np.ndarray,
        bound: float,
    ):
        self.choice = choice.copy()
        self.cost = flat.problem.cost(choice.tolist())
        self._flat = flat
        self._memory_costs = priced - flat.costs
        self._excess = excess
        self.bound = bound
        self.problem = flat.problem
        self._used = flat.used(choice)
        self._lock = threading.Lock()
        self._nodes_since_better = 0
        self._effort = 1.0
        self._variables = dict.fromkeys(_STRATEGIES, float(_FIRST_VARIABLES))

    @property
    def gap_fraction(self) -> float:
        """How far from optimal the choice may be, relative to its cost."""
        return (self.cost - self.bound) / abs(self.cost) if self.cost else 0.0

    @property
    def is_done(self) -> bool:
        """Whether the choice is as cheap as the bound."""
        return self.cost - self.bound <= PROVEN_GAP_FRACTION * abs(self.cost)

    def adopt(self, choice: Sequence[int]) -> None:
        """Take a choice over if it is cheaper; it must fit."""
        cost = self.problem.cost(choice)
        if cost < self.cost:
            self.choice, self.cost = np.array(choice, np.int64), cost
            self._used = self._flat.used(self.choice)

    @property
    def is_stuck(self) -> bool:
        """Whether every node has been freed several times since the choice last became better."""
        return self._nodes_since_better > _STUCK_AFTER * len(self.choice)

    def run(self, end_s: float, seed: int = 0) -> None:
        """Improve the choice until it is stuck, or a time of `time.monotonic`.

        Where it was stuck before, the neighbourhoods get larger.
        """
        if self.is_stuck:
            self._effort *= _MORE_EFFORT
            self._nodes_since_better = 0
        with ThreadPoolExecutor(_THREADS) as pool:
            for task in [pool.submit(self._improve, end_s, seed + n) for n in range(_THREADS)]:
                task.result()

    def _improve(self, end_s: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        variables = self._variables
        while (left_s := end_s - time.monotonic()) > 0.1 and not (self.is_done or self.is_stuck):
            most = int(rng.choice(_STRATEGIES, p=_SHARES))
            with self._lock:
                choice, used = self.choice.copy(), self._used
            part = self._part(rng, choice, used, most, variables[most])
            began = time.monotonic()
            answer = _best_answer(part, min(_LIMIT_S * self._effort, left_s))
            self._accept(
                {i: int(a[p]) for (i, a), p in zip(part.allowed.items(), answer, strict=True)}
            )
            took_s = (time.monotonic() - began) / self._effort
            if took_s > _LONG_S:
                variables[most] = max(_LEAST_VARIABLES, variables[most] * 0.8)
            elif took_s < _SHORT_S:
                variables[most] = min(_MOST_VARIABLES, variables[most] * 1.2)

    def _accept(self, picks: dict[int, int]) -> None:
        """Take new picks over if they still improve the choice, and still fit beside it."""
        with self._lock:
            change = self._flat.change_of_cost(self.choice, picks)
            self._nodes_since_better += len(picks)
            if change >= -1e-9 * abs(self.cost):
                return
            choice = self.choice.copy()
            choice[list(picks)] = list(picks.values())
            used = self._flat.used(choice)
            if self._flat.fits(used):
                self.choice, self._used, self.cost = choice, used, self.cost + change
                self._nodes_since_better = 0

    def restarted(self, choice: np.ndarray) -> "Search":
        """A search of the same problem from another choice, or from this one if that does not fit."""
        if not self._flat.fits(self._flat.used(choice)) or not np.isfinite(
            self.problem.cost(choice.tolist())
        ):
            choice = self.choice
        priced = self._memory_costs + self._flat.costs
        return Search(self._flat, choice, priced, self._excess, self.bound)

    def merge(self, choices: Sequence[np.ndarray], time_limit_s: float) -> None:
        """Solve for the best mixture of several choices, and of what the bound likes best."""
        allowed = {}
        for node in range(len(self.choice)):
            begin, end = self._flat.offsets[node], self._flat.offsets[node + 1]
            best = np.argsort(self._excess[begin:end], kind="stable")[:_BEST_IN_MERGE]
            picks = [choice[node] for choice in (self.choice, *choices)]
            allowed[node] = np.unique(np.concatenate((best, picks)))
        part = self._neighbourhood(allowed, self.choice, self._used)
        answer = _best_answer(part, time_limit_s)
        self._accept({i: int(a[p]) for (i, a), p in zip(part.allowed.items(), answer, strict=True)})

    def _part(self, rng, choice, used, most: int, variables: float) -> _Neighbourhood:
        """Connected parts of the graph whose ILP has about so many variables."""
        first = self._first_nodes(rng, choice, used)
        allowed = {node: self._best_strategies(node, choice, most) for node in first}
        queue, count = deque(first), sum(map(len, allowed.values()))
        while queue and count < variables:
            # Mostly breadth first; now and then a path, or all neighbourhoods would be balls.
            node = queue.popleft() if rng.random() < 0.7 else queue.pop()
            others = [j for j in self._flat.neighbours[node] if j not in allowed]
            if len(others) > _MOST_NEIGHBOURS:
                others = rng.choice(others, _MOST_NEIGHBOURS, replace=False).tolist()
            for other in others:
                kept = self._best_strategies(other, choice, most)
                linked = (allowed.get(j) for j in self._flat.neighbours[other])
                count += len(kept) * (1 + sum(len(a) for a in linked if a is not None))
                allowed[other] = kept
                queue.append(other)
                if count >= variables:
                    break
        return self._neighbourhood(allowed, choice, used)

    def _first_nodes(self, rng, choice: np.ndarray, used: np.ndarray) -> list[int]:
        """A node; often one that would gain alone but for the memory limit, and who could make room.

        Memory ties nodes together that no edge does: one gives up bytes so that the other can use them.
        """
        if not len(self._flat.room) or rng.random() < _ALONE:
            return [int(rng.integers(len(choice)))]
        sample = rng.integers(len(choice), size=_SAMPLE).tolist()
        wants = max(sample, key=lambda node: self._gain(node, choice))
        freeable = self._freeable(self._tightest_point(wants, choice, used), choice)
        holders = np.flatnonzero(freeable)
        if not len(holders):
            return [wants]
        count = min(len(holders), int(rng.integers(1, _MOST_PARTS)))
        weights = freeable[holders] / freeable[holders].sum()
        drawn = rng.choice(holders, count, replace=False, p=weights).tolist()
        return list(dict.fromkeys((*drawn, wants)))  # grown in this order

    def _tightest_point(self, node: int, choice: np.ndarray, used: np.ndarray) -> int:
        """Where the node's own best strategy lacks most bytes."""
        levels, free = self._flat.levels[node], self._flat.room - used
        if levels is None:
            return int(free.argmin())
        times = self._flat.memory.uses[node].times
        more = levels[:, self._flat.cost_at(node, choice).argmin()] - levels[:, choice[node]]
        least_free = np.minimum.reduceat(free[times[0] :], times - times[0])
        step = int((more - least_free).argmax())
        end = times[step + 1] if step + 1 < len(times) else len(free)
        return int(times[step] + free[times[step] : end].argmin())

    def _freeable(self, point: int, choice: np.ndarray) -> np.ndarray:
        """Bytes that each node could give up at a point."""
        found = np.zeros(len(choice))
        for node, use in enumerate(self._flat.memory.uses):
            if use is not None:
                step = int(use.times.searchsorted(point, side="right")) - 1
                if step >= 0:
                    levels = self._flat.levels[node][step]
                    found[node] = levels[choice[node]] - levels.min()
        return found

    def _gain(self, node: int, choice: np.ndarray) -> float:
        """What the node alone could save, neighbours and memory left aside."""
        costs = self._flat.cost_at(node, choice)
        return float(costs[choice[node]] - costs.min())

    def _best_strategies(self, node: int, choice: np.ndarray, most: int) -> np.ndarray:
        begin, end = self._flat.offsets[node], self._flat.offsets[node + 1]
        if end - begin <= most:
            return np.arange(end - begin)
        here = self._flat.cost_at(node, choice) + self._memory_costs[begin:end]
        by_bound = np.argpartition(self._excess[begin:end], most // 2)[: most // 2]
        by_cost = np.argpartition(here, most // 2)[: most // 2]
        return np.unique(np.concatenate((by_bound, by_cost, choice[node : node + 1])))

    def _neighbourhood(self, allowed, choice, used) -> _Neighbourhood:
        flat = self._flat
        number = {node: n for n, node in enumerate(allowed)}
        costs, edges = [], {}
        for node, kept in allowed.items():
            begin = flat.offsets[node]
            cost = flat.costs[begin : flat.offsets[node + 1]][kept].copy()
            for other, matrix in flat.neighbours[node].items():
                if other not in number:
                    cost += matrix[kept, choice[other]]
                elif number[node] < number[other]:
                    edges[number[node], number[other]] = matrix[np.ix_(kept, allowed[other])]
            costs.append(cost)
        start = tuple(int(np.searchsorted(kept, choice[node])) for node, kept in allowed.items())
        memory = None
        if flat.memory is not None:
            uses = flat.memory.uses
            kept_uses = tuple(
                None if uses[i] is None else uses[i].of(a) for i, a in allowed.items()
            )
            memory = replace(flat.memory, uses=kept_uses)
            memory = replace(memory, room=flat.room - used + memory.used(start)).tightened()
        return _Neighbourhood(allowed, PairwiseProblem(tuple(costs), edges, memory), start)


def _best_answer(part: _Neighbourhood, time_limit_s: float) -> tuple[int, ...]:
    """Solve a neighbourhood: by reductions, by elimination where memory is no matter, else by ILP."""
    reduced = reduce(part.problem)
    rest, nodes = reduced.rest()
    if not nodes:
        answer = ()
    elif not reduced.uses and (order := plan_order(rest, most_entries=_MOST_ENTRIES)) is not None:
        answer = solve_by_elimination(rest, order).choice
    else:
        start = _projected(
            rest, [reduced.kept[node] for node in nodes], [part.start[n] for n in nodes]
        )
        answer = improve_by_ilp(rest, start, time_limit_s=time_limit_s)
    return reduced.expand(answer, len(part.start))


def _projected(rest: PairwiseProblem, kept, start) -> tuple[int, ...]:
    """The start among the strategies left; for one that is gone, the cheapest of its node."""
    found = []
    for strategies, pick, costs in zip(kept, start, rest.node_costs, strict=True):
        at = int(np.searchsorted(strategies, pick))
        is_left = at < len(strategies) and strategies[at] == pick
        found.append(at if is_left else int(costs.argmin()))
    return tuple(found)
