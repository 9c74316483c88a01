"""Stages for a schedule: the DP of `inter_op`, given what schedules differ in; see also `pace`.

Microbatches in flight. The DP goes from the last stage to the first and knows how many stages follow, which
decides what a stage holds under GPipe and 1F1B. Under ZB-H1 it depends on the number of all stages. So the
DP is given at first the least that it can be; if its plan fits, there is no better one. If not, every number
of stages is tried by itself, with what it really takes.

Virtual stages. Of p equal submeshes each gets v stages in turn. To the DP they are p v stages on devices of
their own, with the objective of the interleaved schedule

    T = sum_i t_i  +  (v (m - p) + p - 1) * max_i t_i  +  max_i u_i

which for equal stages is the time it takes, but for u. What they cannot know of one another is their memory:
the v stages of a submesh share it. The DP runs with all of the memory for each stage, then with prices on
memory (`shared_memory`), which rise where it is short until the stages of every submesh fit together.

Whatever the DP finds is judged by the simulator and compared with what else may be faster (`refine`); beside
it stands what no other arrangement can beat.

Left out: submeshes of different shapes under virtual stages.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.inter_op.arranged import Arranged, Arrangement
from launcher.autopar.inter_op.by_period import Bound, by_period_s
from launcher.autopar.inter_op.inter_op import SearchResult, cheapest, plan_stages
from launcher.autopar.inter_op.judge import judged_s, num_passes
from launcher.autopar.inter_op.loop_plans import plans_by_period
from launcher.autopar.inter_op.neighbours import Neighbours
from launcher.autopar.inter_op.pace import pace_of
from launcher.autopar.inter_op.paired_stages import paired_stages_s
from launcher.autopar.inter_op.placement import Placement, place_on
from launcher.autopar.inter_op.plan_bounds import lines_of
from launcher.autopar.inter_op.refine import refine
from launcher.autopar.inter_op.shared_memory import on_submeshes_bytes
from launcher.autopar.inter_op.space import Space
from launcher.autopar.inter_op.stage_table import StageChoice, StageOption, StageTable
from launcher.autopar.inter_op.submesh_bound import (
    busiest_submesh_s,
    fastest_options_s,
    repacked,
)
from launcher.autopar.programs.schedules import AbstractSchedule
from launcher.autopar.text.wording import size
from launcher.errors import InfeasiblePlanError, without_frames

# Of microbatches through stages, that the simulator may play while it looks for one better arrangement.
_MOST_PASSES, _MOST_PASSES_BEFORE = 600_000, 100_000  # before: by periods
_SLOWER_IN_CROWDS = 100  # times, to play
_MOST_RISES = 16  # of the prices on memory that stages share


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arranger:
    """Finds the stages of a model for a schedule and a number of microbatches.

    Attributes:
        options: ways to run layers [first, last) on a submesh, called as (first, last, submesh index).
        cuts: layers before which a stage may begin, ascending, with 0 and the number of layers.
        transfer_s: seconds per microbatch for what crosses a cut, both ways.
        cures: what to suggest where nothing fits, by how many times as much memory is needed.
        worth_s: arrangements that cannot take less are not worth finding.
        most_judged: how many arrangements the simulator may be asked about by `refine`.
    """

    cluster: AnyCluster
    space: Space
    schedule: AbstractSchedule
    num_microbatches: int
    options: Callable[[int, int, int], Sequence[StageOption]]
    cuts: Sequence[int]
    transfer_s: Callable[[int], float]
    cures: Callable[[float | None], str]
    worth_s: float = math.inf
    most_judged: int = 40

    def find(self) -> Arranged:
        """Return the arrangement of least T, or raise `InfeasiblePlanError`."""
        if self.schedule.virtual_stages > 1:
            return self._virtual()
        first = result = self._plan(self.space.num_submeshes)
        bounds = (self._bound(first),)
        if result.stages is not None and (self._start_in_turn or not self._fits(result.stages)):
            result, bounds = self._by_number(first)
        if first.stages is None:
            return Arranged(None, bounds, first.num_candidates)
        return self._refined(result, first, bounds)

    def _bound(self, result: SearchResult) -> Bound:
        """What no plan of a search can beat; what is not the least of all need not be sharper."""
        if result.bound_s >= self.worth_s or self._neighbours.slow_down:
            return Bound(result.bound_s)
        of_space = result.table.pieces, result.table.rows, *self._program
        room_bytes = self._room_bytes(result.table)
        return Bound(result.bound_s, partial(by_period_s, *of_space, room_bytes))

    def _room_bytes(self, table: StageTable) -> np.ndarray:
        """What there is on a device, by row."""
        memory_bytes = np.array([kind.device.usable_bytes for kind in self.cluster.kinds])
        return memory_bytes[np.array(self.space.kinds)[table.rows["submesh"]]]

    def _by_number(self, first: SearchResult) -> tuple[SearchResult, tuple[Bound, ...]]:
        """Try every number of stages by itself, as long as it may still be the best."""
        least_s = np.max([line.by_stages() for line in first.lines], axis=0)
        best, known_s, bounds = replace(first, stages=None), self.worth_s, []
        failures: list[InfeasiblePlanError] = []
        numbers = [
            n for n in np.argsort(least_s, kind="stable").tolist() if math.isfinite(least_s[n])
        ]
        for at, number in enumerate(numbers):
            if least_s[number] >= known_s:
                bounds += [Bound(float(least_s[n])) for n in numbers[at:]]
                break
            try:
                result = replace(self, worth_s=known_s)._plan(number)
            except InfeasiblePlanError as error:
                failures.append(without_frames(error))
                continue
            bounds.append(self._bound(result))
            step_s = self._judge(result.stages)
            if step_s < known_s:
                best, known_s = result, step_s
        if best.stages is None and math.isinf(self.worth_s):
            raise failures[0] if failures else self._no_fit()
        return best, tuple(bounds)

    def _refined(
        self, result: SearchResult, first: SearchResult, bounds: tuple[Bound, ...]
    ) -> Arranged:
        """Look, with the simulator, whether others of `first` are faster than the formula's stages."""
        num_candidates = first.num_candidates
        stages, step_s = self._or_short_period(result.stages, first.table)
        if stages is None:
            return Arranged(None, bounds, num_candidates)
        passes = self._passes(stages)
        better = refine(
            first.table, first.lines, min(step_s, self.worth_s), self._judge,
            min(self.most_judged, 1 + _MOST_PASSES // passes),
        )  # fmt: skip
        if better.stages is not None:
            stages, step_s = better.stages, better.step_s
        if better.is_proven:
            bounds = (Bound(max(better.step_s, min(bounds).least_s)),)
        placement = self._place(stages)
        stages = self._neighbours.among_all(stages, placement[: len(stages) // self._v])
        best = Arrangement(stages, placement, step_s) if math.isfinite(step_s) else None
        return Arranged(best, bounds, num_candidates)

    def _or_short_period(
        self, stages: tuple[StageChoice, ...] | None, table: StageTable
    ) -> tuple[tuple[StageChoice, ...] | None, float]:
        """The faster of the formula's stages and those of a short period, and how long a step takes."""
        step_s, passes = self._judge(stages), 0
        of_table = table, *self._program, self._room_bytes(table)
        for others in plans_by_period(*of_table, min(step_s, self.worth_s)):
            passes += self._passes(others)
            if passes > _MOST_PASSES_BEFORE:
                break
            its_s = self._judge(others)
            if its_s < step_s:
                stages, step_s = others, its_s
        return stages, step_s

    def _passes(self, stages: Sequence[StageChoice]) -> int:
        """What judging some stages takes."""
        slower = _SLOWER_IN_CROWDS if self._neighbours.slow_down else 1
        return slower * num_passes(self.schedule, len(stages), self.num_microbatches)

    @property
    def _program(self) -> tuple[AbstractSchedule, int]:
        return self.schedule, self.num_microbatches

    @property
    def _v(self) -> int:
        return self.schedule.virtual_stages

    def _judge(self, stages: Sequence[StageChoice] | None) -> float:
        """The simulated step time; infinite for none, and what does not fit, in memory or on the cluster."""
        if stages is None or not self._fits(stages):
            return math.inf
        try:
            placed = self._place(stages)[: len(stages) // self._v]
        except InfeasiblePlanError:
            return math.inf
        kinds = [self.space.kinds[choice.submesh] for choice in stages[: len(placed)]]
        return judged_s(
            self._neighbours.among_all(stages, placed), *self._program, self.transfer_s,
            crowd=self._neighbours.crowd(kinds, placed),
        )  # fmt: skip

    @property
    def _neighbours(self) -> Neighbours:
        return Neighbours(self.cluster, self.space)

    @property
    def _start_in_turn(self) -> bool:
        """Whether what stages take depends on how many there are, and that is open."""
        return self._neighbours.starts_take_time and self.space.num_submeshes is None

    def _options_among(self, submeshes: int, *of: int) -> Sequence[StageOption]:
        return self._neighbours.options_among(submeshes, self.options(*of))

    def _plan(self, num_stages: int | None) -> SearchResult:
        def counted(peak: Callable[[int, int, int], int]) -> Callable[[int, int], int]:
            def count(stages_to_end: int, num_microbatches: int) -> int:
                total = num_stages or stages_to_end  # where it is open, the least that it can be
                return peak(total - stages_to_end, total, num_microbatches)

            return count

        return plan_stages(
            submeshes=self.space.submeshes,
            num_devices=self.space.devices,
            memory_bytes=[kind.device.usable_bytes for kind in self.cluster.kinds],
            kinds=self.space.kinds,
            options=partial(self._options_among, num_stages or 1),
            in_flight=counted(self.schedule.stash_peak),
            split=counted(self.schedule.split_peak),
            num_stages=num_stages,
            **self._common(),
        )

    def _common(self) -> dict:
        """What the DP is told for any schedule."""
        return {
            "num_layers": self.cuts[-1],
            "num_microbatches": self.num_microbatches,
            "cuts": self.cuts,
            "transfer_s": self.transfer_s,
            "pace": pace_of(self.schedule),
            "lines": partial(
                lines_of,
                schedule=self.schedule,
                num_microbatches=self.num_microbatches,
                memory_bytes=self._memory_bytes,
                crowded=self._neighbours.crowded(),
            ),
            "worth_s": self.worth_s,
            "cures": self.cures,
        }

    # Virtual stages

    def _virtual(self) -> Arranged:
        found, failures = [], []
        for submesh, num_submeshes in self._equal_submeshes():
            known_s = [arranged.best.step_s for arranged in found if arranged.best is not None]
            alone = replace(
                self,
                worth_s=min([self.worth_s, *known_s]),
                space=self.space.only([submesh]),
                options=partial(self._options_on, submesh, num_submeshes),
            )
            try:
                result = alone._plan_equal(num_submeshes)
                if result.stages is None:
                    arranged = Arranged(None, (Bound(result.bound_s),), result.num_candidates)
                else:
                    arranged = alone._refined(result, result, (Bound(result.bound_s),))
            except InfeasiblePlanError as error:
                failures.append(without_frames(error))
                continue
            best = arranged.best and arranged.best.renumbered([submesh])
            found.append(replace(arranged, best=best))
        plans = [arranged.best for arranged in found if arranged.best is not None]
        if not found or (not plans and math.isinf(self.worth_s)):
            raise self._no_fit() if found else failures[-1] if failures else self._no_groups()
        return Arranged(
            min(plans, key=lambda arrangement: arrangement.step_s, default=None),
            tuple(bound for arranged in found for bound in arranged.bounds),
            sum(arranged.num_candidates for arranged in found),
        )

    @property
    def _memory_bytes(self) -> float:
        """Of a device, as far as virtual stages are concerned, which lie on hosts of one kind."""
        return self.cluster.kinds[0].device.usable_bytes

    def _no_groups(self) -> InfeasiblePlanError:
        v = self.schedule.virtual_stages
        return InfeasiblePlanError(
            f"{self.space.num_devices} devices cannot be shared out to p equal submeshes where p divides "
            f"parallel.num_microbatches={self.num_microbatches} and p x {v} stages "
            f"(parallel.virtual_stages={v}) find as many of the {len(self.cuts) - 1} pieces of the model; "
            f"set another parallel.pp or parallel.num_microbatches, or take parallel.schedule=1f1b"
        )

    def _equal_submeshes(self) -> Iterator[tuple[int, int]]:
        """Yield (index of a shape, how many of them use up the devices), where the schedule can use that."""
        v = self.schedule.virtual_stages
        for index, (hosts, devices) in enumerate(self.space.submeshes):
            number, rest = divmod(self.space.devices[self.space.kinds[index]], hosts * devices)
            if rest or number * hosts * devices < self.space.num_devices:
                continue  # devices would be left, also if only those of another kind
            if self.num_microbatches % number or number * v >= len(self.cuts):
                continue
            if self.space.num_submeshes in (None, number):
                yield index, number

    def _options_on(
        self, submesh: int, submeshes: int, first: int, last: int, _: int
    ) -> Sequence[StageOption]:
        return self._options_among(submeshes, first, last, submesh)

    def _plan_equal(self, p: int) -> SearchResult:
        """Cut the layers for so many submeshes of the one shape there is.

        The stages of a submesh should fit together: prices on memory rise until they do. If they do at
        none, the plan whose stages fit one by one stands.
        """
        memory_bytes, weight = self._memory_bytes, self._weight(p)
        whole = self._cut_equal(p, memory_bytes)
        if whole.stages is None:
            return whole
        bound_s, fits = self._bound_of_equal_s(whole), self._fits(whole.stages)
        whole = replace(whole, bound_s=bound_s)
        if bound_s >= self.worth_s:
            return replace(whole, stages=None)
        if fits:
            return whole
        prices = whole.lines[0].prices
        for _ in range(_MOST_RISES):
            # The prices are those of the sum over p submeshes.
            stages = cheapest(whole.table, weight, prices.rows_s / p)
            is_short = on_submeshes_bytes(stages, *self._program) > memory_bytes
            if not is_short.any():
                packed = repacked(stages, self.options, *self._program, memory_bytes)
                return replace(whole, stages=packed)
            prices = prices.raised(is_short)
        return whole

    def _bound_of_equal_s(self, whole: SearchResult) -> float:
        """What no plan of equal submeshes can beat, as far as it must be known."""
        bound_s, memory_bytes = whole.bound_s, self._memory_bytes
        if self._neighbours.slow_down:
            return bound_s
        of_space = whole.table.pieces, whole.table.rows, *self._program
        bound_s = max(bound_s, paired_stages_s(*of_space, memory_bytes))
        if bound_s < self.worth_s:
            bound_s = max(bound_s, busiest_submesh_s(*of_space, memory_bytes, self.worth_s))
        if bound_s < self.worth_s:
            of_cut_s = fastest_options_s(whole.table, *self._program, self.transfer_s)
            bound_s = max(bound_s, of_cut_s)
        return bound_s

    def _weight(self, p: int) -> int:
        """Of max t_i in the objective."""
        return self._v * (self.num_microbatches - p) + p - 1

    def _no_fit(self) -> InfeasiblePlanError:
        v, memory_bytes = self._v, self._memory_bytes
        return InfeasiblePlanError(
            f"no plan was found of which {v} stages (parallel.virtual_stages={v}) fit together on a "
            f"device that has {size(memory_bytes)} "
            f"(parallel.num_microbatches={self.num_microbatches}); {self.cures(None)}"
        )

    def _cut_equal(self, p: int, memory_bytes: float) -> SearchResult:
        """Run the DP for stages each of which may take so much."""
        v = self._v
        ((hosts, devices),) = self.space.submeshes
        return plan_stages(
            submeshes=self.space.submeshes,
            num_devices=hosts * devices * p * v,
            weight=self._weight(p),
            memory_bytes=memory_bytes,
            options=self.options,
            in_flight=lambda to_end, m: self.schedule.stash_peak(p * v - to_end, p * v, m),
            num_stages=p * v,
            **self._common(),
        )

    # Both

    def _fits(self, stages: Sequence[StageChoice]) -> bool:
        """Whether what the stages of each submesh hold at most fits together."""
        homes = [self.space.kinds[choice.submesh] for choice in stages[: len(stages) // self._v]]
        room_bytes = [self.cluster.kinds[kind].device.usable_bytes for kind in homes]
        return bool((on_submeshes_bytes(stages, *self._program) <= room_bytes).all())

    def _place(self, stages: Sequence[StageChoice]) -> tuple[Placement, ...]:
        """Where the stages lie; those of a submesh take turns."""
        homes = [choice.submesh for choice in stages[: len(stages) // self._v]]
        shapes = [self.space.submeshes[submesh] for submesh in homes]
        kinds = [self.space.kinds[submesh] for submesh in homes]
        return place_on(self.cluster, shapes, kinds) * self._v
