"""Around the DP: the number of microbatches, the schedule, and the choice among the best candidates.

For each number of microbatches the model is traced at that microbatch size, its layers are priced on every
submesh (`stage_costs`) and, for each schedule, cut into stages (`arrangement`), which the simulator judges.
Microbatch sizes are tried from the smallest upwards by factors of four, and then next to the best, as long
as that promises enough (`climb`), with the strategies that were found before and submeshes like those of the
best. The strategies of the best plans of the two best numbers, and of one at which the walk would end, are
solved for their own; there the layers are cut into more pieces, too. A forced choice
(parallel.tp=4) leaves a set of one; the manual, data, ZeRO and single modes are searches in which everything
but the strategies is forced (`space`).

A schedule whose bound says that it cannot beat what was found is not searched. The least of all bounds is
what the optimality gap is stated against: of the numbers of microbatches that were tried.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.graphs.layers import LayeredModel
from launcher.autopar.graphs.optimizer_state import OptimizerFootprint
from launcher.autopar.inter_op.advice import (
    check_batch,
    check_degrees,
    check_experts,
    check_groups,
    check_kinds,
    check_stages,
    memory_cures,
)
from launcher.autopar.inter_op.arranged import Arranged
from launcher.autopar.inter_op.arrangement import Arranger
from launcher.autopar.inter_op.by_period import least_bound_s
from launcher.autopar.inter_op.candidate import Candidate, Tried, fastest
from launcher.autopar.inter_op.climb import climb
from launcher.autopar.inter_op.cuts import crossing_bytes, ways_to_cut
from launcher.autopar.inter_op.neighbours import Neighbours
from launcher.autopar.inter_op.space import PlanOptions, Space, make_space, microbatch_counts
from launcher.autopar.inter_op.stage_costs import Choices, StageCosts, worthwhile
from launcher.autopar.inter_op.stage_table import StageOption
from launcher.autopar.inter_op.strategies import Key, Known
from launcher.autopar.intra_op.intra_op import IntraOpPlanner
from launcher.autopar.programs.schedules import schedule_by_name
from launcher.autopar.realized.realize import layered_model
from launcher.autopar.solver import Relaxations
from launcher.autopar.text.wording import count
from launcher.errors import InfeasiblePlanError, without_frames
from launcher.models.model import Model

_STEP_FACTOR = 4
_NEAR = 1.1  # times the best: what is slower is not looked at again
_LIKE, _LIKE_EQUAL = 2, 4  # times as many devices, or as few
_MOST_SETTLED = 2  # numbers of microbatches
# Of a step, per device and at most: a try at the next number takes longer for more devices.
_WORTH_CLIMBING, _MOST_WORTH_CLIMBING = 1e-4, 0.005
_CLOSE = 1.05  # times the best: worth solving for its own number of microbatches
_FINE_PIECES = 48  # that layers are cut into where the best is known, but for these cuts


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """All candidates, best first, and what finding them took.

    Attributes:
        bound_s: No plan of the space takes less, at the numbers of microbatches that were tried.
        tried: These numbers, and the part of the space that was tried at each.
        cuts: Of how many pieces stages are made, and how many layers there are.
        finer: Of how many pieces next to the best.
    """

    candidates: tuple[Candidate, ...]
    space: Space
    wall_s: float
    ilp_solved: int
    priced: int
    bound_s: float
    tried: Mapping[int, Space]
    cuts: tuple[int, int]
    finer: int

    def describe_space(self) -> str:
        """What was searched, in words."""
        (pieces, layers), texts = self.cuts, [self.space.describe()]
        if pieces < layers and self.space.has_pipelines:
            finer = f", {self.finer} next to the best" if self.finer > pieces else ""
            texts.append(
                f"stages of {pieces} pieces of {layers} layers{finer}, or of equally many layers"
            )
        for part in dict.fromkeys(self.tried.values()):
            counts = [str(m) for m in sorted(self.tried) if self.tried[m] == part]
            texts.append(f"{', '.join(counts)} microbatches{part.describe_limits(self.space)}")
        return "; ".join(texts)


def search(
    model: Model, cluster: AnyCluster, options: PlanOptions, progress: Callable[[str], None]
) -> Search:
    """Find the best arrangement for each schedule and each number of microbatches worth trying."""
    start = time.perf_counter()
    check_kinds(options, cluster)
    check_degrees(options, cluster)
    check_groups(options)
    check_batch(options, cluster)
    space = make_space(options, cluster)
    attempts = _Attempts(model, cluster, options, space, progress)
    counts = microbatch_counts(options, cluster)
    forced = options.num_microbatches
    attempts.walk(_spread(counts, options.global_batch) if forced is None else (forced,))
    if not attempts.found:
        raise attempts.failures[max(attempts.failures)]
    if forced is None:
        attempts.climb(counts)
    attempts.settle()
    tried = attempts.found.values()
    candidates = sorted((c for t in tried for c in t.candidates), key=lambda c: c.step_s)
    return Search(
        candidates=tuple(candidates),
        space=space,
        wall_s=time.perf_counter() - start,
        ilp_solved=sum(attempt.num_solved for attempt in tried),
        priced=sum(attempt.num_candidates for attempt in tried),
        bound_s=least_bound_s((b for t in tried for b in t.bounds), attempts.best()[0]),
        tried=attempts.parts,
        cuts=next(iter(tried)).cuts,
        finer=attempts.finer,
    )


class _Attempts:
    """What has been tried, by number of microbatches, and why nothing fits at some of them."""

    def __init__(
        self, model: Model, cluster: AnyCluster, options: PlanOptions, space: Space, progress
    ):
        self._search = partial(_try, cluster, options)
        self._layers = partial(_layers, model, cluster, options, space)
        self._planners: dict[int, IntraOpPlanner] = {}
        self._relaxations = Relaxations()
        self._space = space
        self._progress = progress
        self.found: dict[int, Tried] = {}
        self.failures: dict[int, InfeasiblePlanError] = {}
        self.parts: dict[int, Space] = {}  # of the space, by what was tried
        self.finer = 0  # pieces, next to the best
        self._known: tuple[Known, ...] = tuple({} for _ in cluster.kinds)

    def _try(self, num_microbatches: int, worth_s: float, known, space: Space) -> Tried:
        """Search at a number of microbatches, whose planner remembers what it has done before."""
        if num_microbatches not in self._planners:
            self._planners[num_microbatches] = IntraOpPlanner(
                self._layers(num_microbatches), relaxations=self._relaxations
            )
        planner = self._planners[num_microbatches]
        tried = self._search(planner, num_microbatches, worth_s, known, space)
        numbers = space.numbers_in(self._space)
        return replace(tried, candidates=tuple(c.renumbered(numbers) for c in tried.candidates))

    def best(self) -> tuple[float, int]:
        """The least step time, and the number of microbatches that has it."""
        return min(((tried.step_s, m) for m, tried in self.found.items()), default=(math.inf, 0))

    def step_s(self, num_microbatches: int, space: Space | None = None) -> float:
        """The step time of the best arrangement, in a part of the space if one is given; infinite where none
        fits."""
        if num_microbatches not in (*self.found, *self.failures):
            self._progress(count(num_microbatches, "microbatch"))
            space = space or self._space
            self.parts[num_microbatches] = space
            try:
                self.found[num_microbatches] = self._try(
                    num_microbatches, self.best()[0], self._known, space
                )
            except InfeasiblePlanError as error:
                self.failures[num_microbatches] = without_frames(error)
        known = self.found.get(num_microbatches)
        return known.step_s if known else math.inf

    def walk(self, counts: Iterable[int]) -> None:
        """Try falling counts until the best is behind.

        Where none has fitted yet, larger microbatches may: they leave the data axis more devices. Before the
        walk ends for a count that is a little slower, its strategies are solved for itself: those of
        smaller microbatches may be the reason.
        """
        for num_microbatches in counts:
            best_s = self.best()[0]
            if best_s < self.step_s(num_microbatches) < _NEAR * best_s:
                self._solve_anew(num_microbatches)
            if self.step_s(num_microbatches) > best_s:
                return

    def _solve_anew(self, num_microbatches: int) -> None:
        """Try a count that had a plan with the strategies of others with its own."""
        if not any(self._taken_over(num_microbatches)):
            return
        before = self.found[num_microbatches]
        self._progress(count(num_microbatches, "microbatch"))
        known: tuple[Known, ...] = tuple({} for _ in self._known)
        try:
            again = self._try(num_microbatches, self.best()[0], known, self._space)
        except InfeasiblePlanError:
            return
        for old, new in zip(self._known, known, strict=True):
            old.update(new)
        self.found[num_microbatches] = before.with_more(again)

    def _taken_over(self, num_microbatches: int) -> list[set[Key]]:
        """The strategies that were last solved for others, by kind of hosts."""
        return [
            {
                key
                for key, solution in known.items()
                if solution.num_microbatches != num_microbatches
            }
            for known in self._known
        ]

    def climb(self, counts: Sequence[int]) -> None:
        """Go on from the best, as long as that is worth it, with what is like what comes near it."""
        worth = min(_MOST_WORTH_CLIMBING, _WORTH_CLIMBING * self._space.num_devices)
        candidates = [c for tried in self.found.values() for c in tried.candidates]
        near = [c for c in candidates if c.step_s <= _NEAR * self.best()[0]]
        # Equal submeshes share out the microbatches evenly: another number of them needs others.
        times = _LIKE_EQUAL if any(c.virtual_stages > 1 for c in near) else _LIKE
        like = self._space.like({c.submesh for it in near for c in it.arrangement.stages}, times)
        part = self._with_zero_of(near, like)
        climb(partial(self.step_s, space=part), self._tried_s, counts, worth)

    def _with_zero_of(self, candidates: Sequence[Candidate], space: Space) -> Space:
        """Leave out ZeRO-3, which has strategies of its own, unless one of the candidates has it."""
        stages = (choice for c in candidates for choice in c.arrangement.stages)
        most = max((choice.option.tag.zero for choice in stages), default=0)
        zero = tuple(stage for stage in space.choices.zero if stage <= max(2, most))
        return replace(space, choices=replace(space.choices, zero=zero))

    def _tried_s(self) -> dict[int, float]:
        """Step times by count; infinite where nothing fits."""
        fit = {count: tried.step_s for count, tried in self.found.items()}
        return dict.fromkeys(self.failures, math.inf) | fit

    def settle(self) -> None:
        """Solve anew what the best took over, and what comes close, and cut both finer: either may be why it
        is behind."""
        settled: set[int] = set()
        while len(settled) < _MOST_SETTLED:
            near_s = _CLOSE * self.best()[0]
            near = sorted((tried.step_s, m) for m, tried in self.found.items() if m not in settled)
            if not near or near[0][0] > near_s:
                return
            settled.add(near[0][1])
            self._settle(near[0][1])

    def _settle(self, num_microbatches: int) -> None:
        """Solve what the best candidates of a number took over from others, and cut into more pieces."""
        before = self.found[num_microbatches]
        near = [c for c in before.candidates if c.step_s <= _CLOSE * before.step_s]
        chosen = [choice for candidate in near for choice in candidate.arrangement.stages]
        kinds = self._space.kinds
        used = {(kinds[c.submesh], c.option.tag.mesh, c.option.tag.weight) for c in chosen}
        stale = [
            {key for key in keys if (kind, *key[:2]) in used}
            for kind, keys in enumerate(self._taken_over(num_microbatches))
        ]
        pieces, layers = before.cuts
        is_pipeline = any(len(c.arrangement.stages) > 1 for c in near)
        if not any(stale) and not (is_pipeline and pieces < min(layers, _FINE_PIECES)):
            return
        self._progress(count(num_microbatches, "microbatch"))
        others = tuple(
            {key: solution for key, solution in known.items() if key not in keys}
            for known, keys in zip(self._known, stale, strict=True)
        )
        part = replace(
            self._with_zero_of(near, self._space.only({choice.submesh for choice in chosen})),
            schedules=tuple(dict.fromkeys((c.schedule, c.virtual_stages) for c in near)),
            most_pieces=_FINE_PIECES,
        )
        try:
            again = self._try(num_microbatches, math.inf, others, part)
        except InfeasiblePlanError:
            return  # the new strategies need more memory, and the ones that were taken over fit
        self.finer = max(self.finer, again.cuts[0] if is_pipeline else 0)
        self.found[num_microbatches] = before.with_more(again)


def _try(
    cluster: AnyCluster, options: PlanOptions, planner: IntraOpPlanner, num_microbatches: int,
    worth_s: float, known: Sequence[Known], space: Space,
) -> Tried:  # fmt: skip
    """Search all schedules for what takes less than `worth_s`; where memory is scarce, with all choices."""
    layered, optimizer = planner.model, OptimizerFootprint(options.optimizer)
    search_with = partial(
        _try_choices, planner, cluster, options, num_microbatches, worth_s, known, space
    )
    everything = (space.choices,) * len(cluster.kinds)
    some = tuple(
        worthwhile(space.choices, layered, optimizer, kind.device) for kind in cluster.kinds
    )
    try:
        tried = search_with(some)
    except InfeasiblePlanError:
        if some == everything:
            raise
        return search_with(everything)
    if some == everything or tried.candidates or not tried.has_failures:
        return tried
    return search_with(everything)


def _try_choices(
    planner: IntraOpPlanner, cluster: AnyCluster, options: PlanOptions, num_microbatches: int,
    worth_s: float, known: Sequence[Known], space: Space, choices: Sequence[Choices],
) -> Tried:  # fmt: skip
    """Search with the choices on each kind of hosts, and with the strategies that are known for it."""
    solved_before, layered = planner.num_solved, planner.model
    ways = tuple(ways_to_cut(options, space, layered))
    ranges = dict.fromkeys(ends for way in ways for ends in way.ranges())
    costs = tuple(
        StageCosts(
            planner, cluster, space.submeshes, num_microbatches=num_microbatches,
            choices=choices[kind], optimizer=OptimizerFootprint(options.optimizer),
            known=known[kind], kind=kind, ranges=ranges,
            microbatch_size=options.global_batch // num_microbatches,
            **Neighbours(cluster, space).priced_for(kind, worth_s),
        )
        for kind in range(len(cluster.kinds))
    )  # fmt: skip
    bytes_at, link = crossing_bytes(layered), cluster.stage_link
    found: list[Arranged] = []
    candidates: list[Candidate] = []
    failures: list[InfeasiblePlanError] = []
    for way in ways:
        name, v = way.schedule, way.virtual_stages
        arranger = Arranger(
            cluster=cluster,
            space=replace(space, num_submeshes=way.num_submeshes),
            schedule=schedule_by_name(name, v),
            num_microbatches=num_microbatches,
            options=partial(_options, costs, space, name),
            cuts=way.cuts,
            transfer_s=lambda cut: bytes_at[cut] / link.bytes_per_s + 2 * link.latency_s,
            cures=memory_cures(options, cluster, layered.traced.num_parameters),
            worth_s=min([worth_s, *(candidate.step_s for candidate in candidates)]),
        )
        try:
            found.append(arranger.find())
        except InfeasiblePlanError as error:
            failures.append(without_frames(error))
            continue
        best = found[-1].best
        if best is not None:
            gap = max(its.largest_gap_fraction for its in costs)
            candidates.append(Candidate(num_microbatches, name, v, planner, best, gap))
    if not found and not any(its.has_left_out for its in costs):
        raise failures[0]
    pieces = layered.layers if options.equal_layers else ways[0].cuts[1:]
    return Tried(
        num_solved=planner.num_solved - solved_before,
        candidates=fastest(candidates),
        cuts=(len(pieces), len(layered.layers)),
        bounds=tuple(bound for arranged in found for bound in arranged.bounds),
        num_candidates=sum(arranged.num_candidates for arranged in found),
        has_failures=bool(failures),
    )


def _options(
    costs: Sequence[StageCosts], space: Space, schedule: str, *of: int
) -> Sequence[StageOption]:
    """The ways to run layers [first, last) on a submesh, called as (first, last, submesh)."""
    return costs[space.kinds[of[-1]]].options_under(schedule, *of)


def _layers(
    model: Model, cluster: AnyCluster, options: PlanOptions, space: Space, num_microbatches: int
) -> LayeredModel:
    """The model in its natural layers, or in more where so many stages are asked for."""
    microbatch_size = options.global_batch // num_microbatches
    layered = layered_model(model, microbatch_size)
    check_experts(options, cluster, layered)
    least = (space.num_submeshes or 0) * min(v for _, v in space.schedules)
    if least <= len(layered.layers):
        check_stages(options, cluster, len(layered.layers), microbatch_size)
        return layered
    many = (options.virtual_stages or 1) > 1
    key = "parallel.pp x parallel.virtual_stages" if many else "parallel.pp"
    return layered_model(model, microbatch_size, least, key=key)


def _spread(counts: Sequence[int], global_batch: int) -> Iterator[int]:
    """Of falling counts, those whose microbatches grow from the smallest by a constant factor."""
    size = global_batch // counts[0]
    while size <= global_batch:
        if global_batch % size == 0 and global_batch // size in counts:
            yield global_batch // size
        size *= _STEP_FACTOR
