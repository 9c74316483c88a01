"""Stages for a schedule: the DP of `inter_op`, given what schedules differ in.

Microbatches in flight. The DP goes from the last stage to the first and knows how many stages follow, which
decides what a stage holds under GPipe and 1F1B. Under ZB-H1 it depends on the number of all stages. So the
DP is given at first the least that it can be; if its plan fits, there is no better one. If not, every number
of stages is tried by itself, with what it really takes.

Virtual stages. Of p equal submeshes each gets v stages in turn. To the DP they are p v stages on devices of
their own, with the objective of the interleaved schedule

    T = sum_i t_i  +  (v (m - p) + p - 1) * max_i t_i  +  v * max_i u_i

which for equal stages is the time it takes. What they cannot know of one another is their memory: the v
stages of a submesh share it. The DP runs with all of the memory for each stage, then with less and less down
to a v-th, until the stages of every submesh fit together. With a v-th they always do. So a plan that is found
fits; if it was found at the first try, it is the best one, and if later, there may be better ones.

Left out: submeshes of different shapes under virtual stages; the overlap that makes ZB-H1's bubble shorter
than T says.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from launcher.autopar.cluster import Cluster
from launcher.autopar.inter_op import SearchResult, StageOption, plan_stages
from launcher.autopar.placement import Placement, place
from launcher.autopar.program import round_robin
from launcher.autopar.schedules import AbstractSchedule
from launcher.autopar.space import Space
from launcher.errors import InfeasiblePlanError

_MEMORY_STEPS = 4  # between all of a device's memory and a v-th of it


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """Stages, and where each lies."""

    result: SearchResult
    placement: tuple[Placement, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arranger:
    """Finds the stages of a model for a number of microbatches.

    Attributes:
        options: ways to run layers [first, last) on a submesh, called as (first, last, submesh index).
        cuts: layers before which a stage may begin, ascending, with 0 and the number of layers.
        transfer_s: seconds per microbatch for what crosses a cut.
        cures: what to suggest where nothing fits into memory.
    """

    cluster: Cluster
    space: Space
    schedule: AbstractSchedule
    num_microbatches: int
    options: Callable[[int, int, int], Sequence[StageOption]]
    cuts: Sequence[int]
    transfer_s: Callable[[int], float]
    cures: str

    def best(self) -> Arrangement:
        """Return the arrangement of least T, or raise `InfeasiblePlanError`."""
        if self.schedule.virtual_stages > 1:
            return self._virtual()
        result = self._plan(self.space.num_stages)
        if not self._fits(result):
            most = min(len(self.cuts) - 1, self.space.num_devices)
            result = self._best_of(lambda n=n: self._plan(n) for n in range(1, most + 1))
        shapes = [self.space.submeshes[choice.submesh] for choice in result.stages]
        return Arrangement(result, self._place(shapes))

    def _plan(self, num_stages: int | None) -> SearchResult:
        def in_flight(stages_to_end: int, num_microbatches: int) -> int:
            total = num_stages or stages_to_end  # where it is open, the least that it can be
            return self.schedule.stash_peak(total - stages_to_end, total, num_microbatches)

        return plan_stages(
            num_layers=self.cuts[-1],
            submeshes=self.space.submeshes,
            num_devices=self.space.num_devices,
            num_microbatches=self.num_microbatches,
            memory_bytes=self.cluster.device.usable_bytes,
            options=self.options,
            cuts=self.cuts,
            in_flight=in_flight,
            num_stages=num_stages,
            transfer_s=self.transfer_s,
            cures=self.cures,
        )

    # Virtual stages

    def _virtual(self) -> Arrangement:
        v, found, failures = self.schedule.virtual_stages, [], []
        for submesh, num_submeshes in self._equal_submeshes():
            try:
                placement = self._place([self.space.submeshes[submesh]] * num_submeshes)
                found.append(Arrangement(self._plan_equal(submesh, num_submeshes), placement * v))
            except InfeasiblePlanError as error:
                failures.append(error)
        if found:
            return min(found, key=lambda arrangement: arrangement.result.total_s)
        if failures:
            raise failures[-1]
        raise InfeasiblePlanError(
            f"{self.space.num_devices} devices cannot be shared out to p equal submeshes where p divides "
            f"parallel.num_microbatches={self.num_microbatches} and p x {v} stages "
            f"(parallel.virtual_stages={v}) find as many of the {len(self.cuts) - 1} pieces of the model; "
            f"set another parallel.pp or parallel.num_microbatches, or take parallel.schedule=1f1b"
        )

    def _equal_submeshes(self) -> Iterator[tuple[int, int]]:
        """Yield (index of a shape, how many of them use up the devices), where the schedule can use that."""
        v = self.schedule.virtual_stages
        for index, (hosts, devices) in enumerate(self.space.submeshes):
            number, rest = divmod(self.space.num_devices, hosts * devices)
            if rest or self.num_microbatches % number or number * v >= len(self.cuts):
                continue
            if self.space.num_stages in (None, number * v):
                yield index, number

    def _plan_equal(self, submesh: int, num_submeshes: int) -> SearchResult:
        """Cut the layers for so many submeshes of a shape, with as much memory per stage as goes."""
        v, memory_bytes = self.schedule.virtual_stages, self.cluster.device.usable_bytes
        for step in range(_MEMORY_STEPS + 1):
            share = 1 - step / _MEMORY_STEPS * (1 - 1 / v)
            result = self._cut_equal(submesh, num_submeshes, share * memory_bytes)
            if result is not None and self._fits(result):
                return result
        raise InfeasiblePlanError(
            f"no plan was found of which {v} stages (parallel.virtual_stages={v}) fit together on a "
            f"device that has {memory_bytes / 2**30:.2f} GiB "
            f"(parallel.num_microbatches={self.num_microbatches}); {self.cures}"
        )

    def _cut_equal(self, submesh: int, p: int, memory_bytes: float) -> SearchResult | None:
        """Run the DP for stages that may take so much; None where none do, unless it is all there is."""
        v, m = self.schedule.virtual_stages, self.num_microbatches
        hosts, devices = self.space.submeshes[submesh]

        def options(first: int, last: int, _: int) -> list[StageOption]:
            priced = self.options(first, last, submesh)
            return [replace(option, once_s=v * option.once_s) for option in priced]

        try:
            result = plan_stages(
                num_layers=self.cuts[-1],
                submeshes=[(hosts, devices)],
                num_devices=hosts * devices * p * v,
                num_microbatches=m,
                weight=v * (m - p) + p - 1,
                memory_bytes=memory_bytes,
                options=options,
                cuts=self.cuts,
                in_flight=lambda to_end, m: self.schedule.stash_peak(p * v - to_end, p * v, m),
                num_stages=p * v,
                transfer_s=self.transfer_s,
                cures=self.cures,
            )
        except InfeasiblePlanError:
            if memory_bytes == self.cluster.device.usable_bytes:
                raise
            return None
        stages = (
            replace(choice, submesh=submesh, option=replace(option, once_s=option.once_s / v))
            for choice in result.stages
            for option in [choice.option]
        )
        return replace(result, stages=tuple(stages))

    # Both

    def _best_of(self, tries) -> SearchResult:
        found, failures = [], []
        for attempt in tries:
            try:
                found.append(attempt())
            except InfeasiblePlanError as error:
                failures.append(error)
        if not found:
            raise failures[-1]
        return min(found, key=lambda result: result.total_s)

    def _fits(self, result: SearchResult) -> bool:
        """Whether what the stages of each submesh hold at most fits together."""
        number, m = len(result.stages), self.num_microbatches
        homes = round_robin(number, self.schedule.virtual_stages)
        needed_bytes = dict.fromkeys(homes, 0.0)
        for stage, choice in enumerate(result.stages):
            held = self.schedule.stash_peak(stage, number, m)
            option = choice.option
            needed_bytes[homes[stage]] += option.fixed_bytes + held * option.stash_bytes
        return max(needed_bytes.values()) <= self.cluster.device.usable_bytes

    def _place(self, shapes: Sequence[tuple[int, int]]) -> tuple[Placement, ...]:
        return place(shapes, self.cluster.num_hosts, self.cluster.devices_per_host)
