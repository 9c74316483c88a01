"""Inter-operator parallelism: cut the layers into stages and the cluster into submeshes.

The DP of Alpa (OSDI 2022, section 5.2). With B microbatches, t_i the seconds that stage i takes for
one microbatch (forward, backward, and receiving what crosses the cut before it) and u_i those
that it takes once per step, the plan found is the one of least

    T = sum_i t_i  +  (B - 1) * max_i t_i  +  max_i u_i

among those whose every stage fits into memory: fixed + (microbatches in flight) * stash. With both
maxima bounded what is left is a sum, which a DP over stages, from the last to the first, minimises:

    F(s, k, d) = min over j, submesh, option of  t(k..j, submesh, option) + F(s - 1, j, d - devices)

is the least sum for the layers from cut k on, in s stages on d devices; s tells how many
microbatches the first of these stages has in flight.

The paper tries the bounds on max t_i one by one, from below. Here pairs of bounds are searched by
branch and bound, which is as exact and takes tens of passes of the DP instead of thousands: the
plan found under the loosest bounds of a rectangle stays the best wherever the bounds allow it, and
in the rest of the rectangle no plan has a smaller sum.

Left out: T is the time of a pipeline whose slowest stage never waits once it has begun. What uneven
stages and transfers that overlap with computation do to that is for the simulator to say.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from launcher.errors import InfeasiblePlanError

# Where the search divides the range of max t_i at first, in multiples of the least there is: the
# best plan is mostly near it, and a good plan found early rules out most of the rest.
_FIRST_EDGES = (1.0, 1.02, 1.1, 1.3, 2.0, math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOption:
    """One way to run a range of layers on a submesh."""

    seconds: float  # forward and backward of one microbatch
    once_s: float  # per step: synchronisation and update
    fixed_bytes: float  # per device: parameters, optimizer state, accumulators, workspace
    stash_bytes: float  # per device and microbatch in flight
    tag: object  # the caller's


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoice:
    """Layers [first, last) on a submesh of shape `submeshes[submesh]`, run as `option` says."""

    first: int
    last: int
    submesh: int
    option: StageOption


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The best plan and what it took to find it."""

    stages: tuple[StageChoice, ...]
    total_s: float
    num_candidates: int  # options of all ranges that were asked for
    num_too_large: int  # those of them that fit into memory nowhere in the pipeline
    num_passes: int  # of the DP


def plan_stages(
    *,
    num_layers: int,
    submeshes: Sequence[tuple[int, int]],
    num_devices: int,
    num_microbatches: int,
    memory_bytes: float,
    options: Callable[[int, int, int], Sequence[StageOption]],
    cuts: Sequence[int],
    in_flight: Callable[[int, int], int],
    num_stages: int | None = None,
    weight: int | None = None,
    use_all_devices: bool = True,
    transfer_s: Callable[[int], float] = lambda cut: 0.0,
    cures: str = "take less, or more devices",
) -> SearchResult:
    """Find the plan of least T, or raise `InfeasiblePlanError`.

    Args:
        submeshes: shapes that a stage may have, as (hosts, devices per host).
        memory_bytes: of one device.
        options: ways to run layers [first, last) on a submesh, or none; called as (first, last,
            submesh index), once for each stage beside which all layers and devices can be used up.
        cuts: layers before which a stage may begin, ascending, with 0 and `num_layers`.
        in_flight: how many microbatches a stage holds at once, called as (stages from it to the
            last, both counted; number of microbatches).
        num_stages: forces the number of stages.
        weight: of max t_i in the objective; B - 1 where it is not given.
        use_all_devices: whether submeshes must add up to `num_devices`, or may leave some idle.
        transfer_s: seconds per microbatch for what crosses a cut, paid by the stage behind it.
        cures: what to suggest where no plan fits into memory.
    """
    space = _space(num_layers, submeshes, num_devices, cuts, num_stages, use_all_devices)
    choices = [
        StageChoice(first=first, last=last, submesh=submesh, option=option)
        for first, last, submesh in space.ranges()
        for option in options(first, last, submesh)
    ]
    rows = _rows(space, choices, transfer_s)
    held = np.array([in_flight(s, num_microbatches) for s in range(1, space.max_stages + 1)], float)
    fixed_bytes = np.array([choice.option.fixed_bytes for choice in choices], float)
    stash_bytes = np.array([choice.option.stash_bytes for choice in choices], float)
    need_bytes = fixed_bytes[:, None] + held * stash_bytes[:, None]  # (choices, stages)
    fits = rows["fits"] & (need_bytes <= memory_bytes)
    is_used = fits.any(axis=1)
    fitting = rows[is_used]
    fitting["fits"] = fits[is_used]
    weight = num_microbatches - 1 if weight is None else weight
    best, num_passes = _search(space, fitting, weight)
    if best is None:
        least_bytes = _bottleneck(space, rows, need_bytes)
        raise _infeasible(space, least_bytes, memory_bytes, num_microbatches, cures)
    return SearchResult(
        stages=tuple(choices[number] for number in best["number"]),
        total_s=_total_s(best, weight),
        num_candidates=len(choices),
        num_too_large=int(np.count_nonzero(~is_used)),
        num_passes=num_passes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Space:
    """What a plan may look like. Neighbouring cuts enclose a piece; stages are made of pieces."""

    cuts: tuple[int, ...]
    sizes: tuple[int, ...]  # of the submeshes
    num_devices: int
    num_stages: int | None
    use_all_devices: bool

    @property
    def num_pieces(self) -> int:
        return len(self.cuts) - 1

    @property
    def max_stages(self) -> int:
        return self.num_stages or min(self.num_pieces, self.num_devices // min(self.sizes))

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """The (first, last, submesh) beside which pieces and devices can be used up."""
        reach = self._tilings()
        for start, end in itertools.combinations(range(self.num_pieces + 1), 2):
            behind = self.num_pieces - end
            fewest, most = (start > 0) + (behind > 0), start + behind  # other stages
            if self.num_stages is not None:
                fewest, most = max(fewest, self.num_stages - 1), min(most, self.num_stages - 1)
            for submesh, size in enumerate(self.sizes):
                rest = self.num_devices - size
                if rest >= 0 and reach[fewest : most + 1, rest].any():
                    yield self.cuts[start], self.cuts[end], submesh

    def _tilings(self) -> np.ndarray:
        """`result[n, d]`: whether n submeshes can take d devices, or leave some of them idle."""
        reach = np.zeros((self.num_pieces + 1, self.num_devices + 1), bool)
        reach[0, : 1 if self.use_all_devices else None] = True
        for n, size in itertools.product(range(self.num_pieces), self.sizes):
            reach[n + 1, size:] |= reach[n, : max(self.num_devices + 1 - size, 0)]
        return reach


def _space(num_layers, submeshes, num_devices, cuts, num_stages, use_all_devices) -> _Space:
    """Check that there are plans at all, whatever their stages cost."""
    if list(cuts) != sorted({0, *cuts, num_layers}):
        raise ValueError(f"cuts {tuple(cuts)} do not ascend from 0 to the {num_layers} layers")
    sizes = [math.prod(shape) for shape in submeshes]
    # Where all submeshes are whole hosts, the DP counts hosts.
    unit = math.gcd(*sizes, num_devices if use_all_devices else 0)
    space = _Space(
        cuts=tuple(cuts),
        sizes=tuple(size // unit for size in sizes),
        num_devices=num_devices // unit,
        num_stages=num_stages,
        use_all_devices=use_all_devices,
    )
    if next(space.ranges(), None) is None:
        raise InfeasiblePlanError(
            f"{num_devices} devices and {space.num_pieces} pieces of the model cannot be shared "
            f"out to {num_stages or 'any number of'} stages on submeshes of {shapes_text(submeshes)} "
            f"(parallel.pp={num_stages or 'null'}); set another parallel.pp or cluster.hosts"
        )
    return space


def _rows(space: _Space, choices: Sequence[StageChoice], transfer_s) -> np.ndarray:
    """A table of the choices, ordered by start, end and submesh; starts and ends count cuts."""
    piece = {cut: index for index, cut in enumerate(space.cuts)}
    received_s = {cut: transfer_s(cut) if cut else 0.0 for cut in space.cuts[:-1]}
    columns = {
        "start": [piece[choice.first] for choice in choices],
        "end": [piece[choice.last] for choice in choices],
        "submesh": [choice.submesh for choice in choices],
        "seconds": [choice.option.seconds + received_s[choice.first] for choice in choices],
        "once_s": [choice.option.once_s for choice in choices],
        "number": range(len(choices)),
    }
    kinds = [(name, float if name in ("seconds", "once_s") else int) for name in columns]
    # In "fits"[:, s - 1]: whether it can be the first of s stages.
    rows = np.zeros(len(choices), [*kinds, ("fits", bool, (space.max_stages,))])
    for name, values in columns.items():
        rows[name] = values
    stages, behind = np.arange(1, space.max_stages + 1), space.num_pieces - rows["end"][:, None]
    rows["fits"] = ((behind == 0) == (stages == 1)) & (stages - 1 <= behind)
    if space.num_stages is not None:
        rows["fits"] &= (rows["start"] == 0)[:, None] == (stages == space.num_stages)
    return rows


@dataclass(frozen=True, slots=True)
class _Box:
    """A rectangle of values for max t_i and max u_i, and a lower bound on sum t_i in it."""

    min_slowest_s: float
    max_slowest_s: float
    min_once_s: float
    max_once_s: float
    sum_s: float

    def least_s(self, weight: int) -> float:
        """No plan whose maxima are in here takes less."""
        if self.min_slowest_s > self.max_slowest_s or self.min_once_s > self.max_once_s:
            return math.inf
        return self.sum_s + weight * self.min_slowest_s + self.min_once_s

    def below(self, best_s: float, weight: int) -> "_Box":
        """Drop the maxima with which a plan takes at least `best_s`."""
        slack_s = best_s - self.least_s(weight)
        slowest_s = self.min_slowest_s + slack_s / weight if weight else math.inf
        return replace(
            self,
            max_slowest_s=min(self.max_slowest_s, slowest_s),
            max_once_s=min(self.max_once_s, self.min_once_s + slack_s),
        )

    def without(self, plan: np.ndarray, weight: int) -> tuple["_Box", "_Box"]:
        """The maxima of which one is less than those of the plan with the least sum.

        They form an L, which is cut in two so that in the second part little is left to gain.
        """
        slowest_s, once_s = float(plan["seconds"].max()), float(plan["once_s"].max())
        rest = replace(self, sum_s=float(plan["seconds"].sum()))
        less_slow = replace(rest, max_slowest_s=math.nextafter(slowest_s, -math.inf))
        less_once = replace(rest, max_once_s=math.nextafter(once_s, -math.inf))
        if once_s - self.min_once_s < weight * (slowest_s - self.min_slowest_s):
            return less_slow, replace(less_once, min_slowest_s=slowest_s)
        return less_once, replace(less_slow, min_once_s=once_s)


def _search(space: _Space, rows: np.ndarray, weight: int) -> tuple[np.ndarray | None, int]:
    """The rows of the best plan, if there is one, and the number of passes that it took."""
    floor_s = _bottleneck(space, rows, rows["seconds"])
    once_floor_s = _bottleneck(space, rows, rows["once_s"])
    best, best_s, num_passes = None, math.inf, 2
    tickets = itertools.count()  # so that boxes with equal bounds are not compared
    queue = []  # a heap, as its boxes ascend
    for low, high in itertools.pairwise(_FIRST_EDGES):
        highest_s = floor_s * high if floor_s else math.inf
        box = _Box(floor_s * low, highest_s, once_floor_s, math.inf, sum_s=floor_s)
        queue.append((box.least_s(weight), next(tickets), box))
    while queue and queue[0][0] < best_s:
        box = heapq.heappop(queue)[2].below(best_s, weight)
        plan = _least_sum(space, rows, box)
        num_passes += 1
        if plan is None:
            continue
        if _total_s(plan, weight) < best_s:
            best, best_s = plan, _total_s(plan, weight)
        for rest in box.without(plan, weight):
            if rest.least_s(weight) < best_s:
                heapq.heappush(queue, (rest.least_s(weight), next(tickets), rest))
    return best, num_passes


def _total_s(plan: np.ndarray, weight: int) -> float:
    """The objective T of the module's head."""
    seconds = plan["seconds"]
    return float(seconds.sum() + weight * seconds.max() + plan["once_s"].max())


def _bottleneck(space: _Space, rows: np.ndarray, values: np.ndarray) -> float:
    """The least value that the greatest of a plan's stages can have."""
    return float(_pass(space, rows, values, np.maximum)[:, 0, -1].min())


def _least_sum(space: _Space, rows: np.ndarray, box: _Box) -> np.ndarray | None:
    """The rows, first stage first, of the plan with the least sum under a box's loosest bounds."""
    rows = rows[(rows["seconds"] <= box.max_slowest_s) & (rows["once_s"] <= box.max_once_s)]
    sums = _pass(space, rows, rows["seconds"], np.add)
    stages, start, devices = int(sums[:, 0, -1].argmin()), 0, space.num_devices
    if np.isinf(sums[stages, 0, devices]):
        return None
    sizes, picked = np.array(space.sizes), []
    while stages:
        here = rows[slice(*np.searchsorted(rows["start"], (start, start + 1)))]
        here = here[here["fits"][:, stages - 1] & (sizes[here["submesh"]] <= devices)]
        behind = sums[stages - 1, here["end"], devices - sizes[here["submesh"]]]
        first = here[np.lexsort((here["once_s"], here["seconds"] + behind))[0]]
        picked.append(first)
        stages, start, devices = stages - 1, first["end"], devices - sizes[first["submesh"]]
    return np.array(picked, rows.dtype)


def _pass(space: _Space, rows: np.ndarray, values: np.ndarray, combine: np.ufunc) -> np.ndarray:
    """One pass of the DP: F(s, k, d) of the module's head.

    Args:
        values: what stages cost, one value per row, or one per row and number of stages.
        combine: `np.add` for their sum, `np.maximum` for the greatest of them.
    """
    width = space.num_devices + 1
    table = np.full((space.max_stages + 1, space.num_pieces + 1, width), np.inf)
    table[0, -1, : 1 if space.use_all_devices else None] = 0.0  # behind the last stage
    place = np.array([rows["start"], rows["end"], rows["submesh"]])
    heads = np.flatnonzero(np.diff(place, prepend=-1).any(axis=0))
    start, end, submesh = place[:, heads]
    values = np.where(rows["fits"], np.atleast_2d(values.T).T, np.inf)
    cheapest = np.minimum.reduceat(values, heads, axis=0)  # of the options of a place
    behind = np.full((len(space.sizes), space.num_pieces + 1, width), np.inf)
    for stages in range(1, space.max_stages + 1):
        live = np.flatnonzero(np.isfinite(cheapest[:, stages - 1]))
        for index, size in enumerate(space.sizes):
            behind[index, :, size:] = table[stages - 1, :, : max(width - size, 0)]
        ways = behind[submesh[live], end[live]]  # (places, devices)
        combine(ways, cheapest[live, stages - 1, None], out=ways)
        groups = np.flatnonzero(np.diff(start[live], prepend=-1))
        table[stages, start[live[groups]]] = np.minimum.reduceat(ways, groups, axis=0)
    return table


def _infeasible(space: _Space, least_bytes, memory_bytes, num_microbatches: int, cures: str):
    """The error for a search without a plan; `least_bytes` are those of the least demanding one."""
    if math.isinf(least_bytes):
        return InfeasiblePlanError(
            f"some of the {space.cuts[-1]} layers have no sharding on any submesh that leaves enough devices "
            f"to the others (parallel.num_microbatches={num_microbatches}); set another number"
        )
    return InfeasiblePlanError(
        f"the least demanding plan needs {least_bytes / 2**30:.2f} GiB on a device that has "
        f"{memory_bytes / 2**30:.2f} GiB, {math.ceil(least_bytes - memory_bytes):,} bytes too many "
        f"(parallel.num_microbatches={num_microbatches}); {cures}"
    )


def shapes_text(submeshes: Sequence[tuple[int, int]]) -> str:
    """Write shapes of submeshes as hosts x devices."""
    return ", ".join(f"{hosts}x{devices}" for hosts, devices in submeshes)
