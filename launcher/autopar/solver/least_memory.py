"""The smallest memory limit that some allowed choice meets: what to say where a limit cannot be met.

The same ILP as that of the problem, with another objective: the least z such that no point takes more than
its room and z. Graphs too large for it get the bound that holds if every node took its least.
"""

import time
from dataclasses import replace

import numpy as np

from launcher.autopar.solver.followers import Merged, merge_followers
from launcher.autopar.solver.ilp import least_excess
from launcher.autopar.solver.live_memory import Memory, joined
from launcher.autopar.solver.problem import PairwiseProblem
from launcher.errors import InfeasiblePlanError

_MOST_ENTRIES = 60_000


def least_limit(problem: PairwiseProblem, end_s: float) -> str:
    """A sentence about the smallest memory limit, found until a time of `time.monotonic`."""
    least = problem.memory.limit + problem.memory.shortage
    try:
        merged = merge_followers(replace(problem, memory=None))
        memory = _of_merged(problem.memory, merged)
        least = max(least, memory.limit + memory.shortage)
        if merged.problem.size().edge_entries > _MOST_ENTRIES:
            return (
                f"a limit below {least:.15g} cannot be met; the graph is too large to say which can"
            )
        costs = tuple(np.zeros(len(costs)) for costs in merged.problem.node_costs)
        rest = replace(merged.problem, node_costs=costs, memory=memory)
        found = least_excess(rest, time_limit_s=max(1.0, end_s - time.monotonic()))
    except InfeasiblePlanError:
        return "forbidden costs alone leave no choice, so no limit can be met"
    if found is None:
        return (
            f"a limit below {least:.15g} cannot be met; time ran out before one that can was found"
        )
    if found.is_least:
        return f"the smallest limit that can be met is {memory.limit + found.excess:.15g}"
    return f"a limit of {memory.limit + found.excess:.15g} can be met, none below {least:.15g}"


def _of_merged(memory: Memory, merged: Merged) -> Memory:
    """The memory of a merged problem, what settled nodes hold taken off the room."""
    taken = np.zeros(len(memory.room))
    for node, pick in merged.settled:
        if (use := memory.uses[node]) is not None:
            np.add.at(taken, use.times, use.change[:, pick])
    uses = tuple(
        joined([use.of(a) for node, a in members if (use := memory.uses[node]) is not None])
        for members in merged.members
    )
    return replace(memory, room=memory.room - taken.cumsum(), uses=uses)
