"""Around the DP: the number of microbatches, the parallel mode, and the choice among the best candidates.

For each number of microbatches the model is traced at that microbatch size, its layers are priced on every
submesh (`stage_costs`) and cut into stages (`inter_op`). Microbatch sizes are tried from the smallest upwards
by factors of four, and then next to the best. A forced choice (parallel.tp=4) leaves a set of one; the
manual, data, ZeRO and single modes are searches in which everything but the strategies is forced (`space`).

Left out: schedules other than the one asked for, which the simulator judges in a later version.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from launcher.autopar.advice import (
    check_batch,
    check_degrees,
    check_experts,
    check_groups,
    memory_cures,
)
from launcher.autopar.arrangement import Arrangement, Arranger
from launcher.autopar.cluster import Cluster
from launcher.autopar.inter_op import SearchResult
from launcher.autopar.intra_op import IntraOpPlanner
from launcher.autopar.optimizer_state import OptimizerFootprint
from launcher.autopar.realize import layered_model
from launcher.autopar.schedules import schedule_by_name
from launcher.autopar.space import PlanOptions, Space, make_space, microbatch_counts
from launcher.autopar.stage_costs import StageCosts
from launcher.autopar.work import aval_bytes
from launcher.errors import InfeasiblePlanError
from launcher.models.model import Model

log = logging.getLogger(__name__)

_MOST_CUTS = 24
_STEP_FACTOR = 4


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One planned arrangement, before the simulator has judged it."""

    num_microbatches: int
    planner: IntraOpPlanner
    arrangement: Arrangement
    largest_gap_fraction: float

    @property
    def result(self) -> SearchResult:
        return self.arrangement.result


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """All candidates, best first, and what finding them took."""

    candidates: tuple[Candidate, ...]
    space: Space
    wall_s: float
    ilp_solved: int
    priced: int


def search(
    model: Model, cluster: Cluster, options: PlanOptions, progress: Callable[[str], None]
) -> Search:
    """Find the best arrangement for each number of microbatches worth trying."""
    start = time.perf_counter()
    check_degrees(options, cluster)
    check_groups(options)
    check_batch(options, cluster)
    space = make_space(options, cluster)
    attempts = _Attempts(model, cluster, options, space, progress)
    counts = microbatch_counts(options, cluster)
    forced = options.num_microbatches
    attempts.walk(_spread(counts, options.global_batch) if forced is None else (forced,))
    if attempts.found and forced is None:
        best = min(attempts.found.values(), key=lambda c: c.result.total_s).num_microbatches
        for neighbour in (best * 2, best // 2):
            if neighbour in counts:
                attempts.total_s(neighbour)
    if not attempts.found:
        raise attempts.failures[max(attempts.failures)]
    candidates = sorted(attempts.found.values(), key=lambda candidate: candidate.result.total_s)
    return Search(
        candidates=tuple(candidates),
        space=space,
        wall_s=time.perf_counter() - start,
        ilp_solved=sum(candidate.planner.num_solved for candidate in candidates),
        priced=sum(candidate.result.num_candidates for candidate in candidates),
    )


class _Attempts:
    """What has been tried: the best arrangement by number of microbatches, or why there is none."""

    def __init__(
        self, model: Model, cluster: Cluster, options: PlanOptions, space: Space, progress
    ):
        self._plan = partial(_candidate, model, cluster, options, space)
        self._progress = progress
        self.found: dict[int, Candidate] = {}
        self.failures: dict[int, InfeasiblePlanError] = {}

    def total_s(self, num_microbatches: int) -> float:
        """The step time of the best arrangement; infinite where none fits."""
        tried = (*self.found, *self.failures)
        if num_microbatches not in tried:
            self._progress(f"{num_microbatches} microbatches")
            try:
                self.found[num_microbatches] = self._plan(num_microbatches)
            except InfeasiblePlanError as error:
                self.failures[num_microbatches] = error
        known = self.found.get(num_microbatches)
        return known.result.total_s if known else math.inf

    def walk(self, counts: Iterable[int]) -> None:
        """Try falling counts until the best is behind.

        Larger microbatches need more memory: once one does not fit, none after it will.
        """
        best_s = math.inf
        for num_microbatches in counts:
            total_s = self.total_s(num_microbatches)
            if self.found and total_s > best_s:
                return
            best_s = min(best_s, total_s)


def _candidate(
    model: Model, cluster: Cluster, options: PlanOptions, space: Space, num_microbatches: int,
) -> Candidate:  # fmt: skip
    microbatch_size = options.global_batch // num_microbatches
    layered = layered_model(model, microbatch_size)
    check_experts(options, cluster, layered)
    if space.num_stages is not None and space.num_stages > len(layered.layers):
        many = (options.virtual_stages or 1) > 1
        key = "parallel.pp x parallel.virtual_stages" if many else "parallel.pp"
        layered = layered_model(model, microbatch_size, space.num_stages, key=key)
    planner = IntraOpPlanner(layered)
    cuts = _cuts(len(layered.layers), space.num_stages)
    costs = StageCosts(
        planner, cluster, space.submeshes, num_microbatches=num_microbatches,
        choices=space.choices, optimizer=OptimizerFootprint(options.optimizer),
        microbatch_size=microbatch_size,
    )  # fmt: skip
    bytes_at = _crossing_bytes(planner)
    link = cluster.inter_host if cluster.num_hosts > 1 else cluster.intra_host
    arranger = Arranger(
        cluster=cluster,
        space=space,
        schedule=schedule_by_name(space.schedule, space.virtual_stages),
        num_microbatches=num_microbatches,
        options=costs.options,
        cuts=cuts,
        transfer_s=lambda cut: bytes_at[cut] / link.bytes_per_s + 2 * link.latency_s,
        cures=memory_cures(options, cluster),
    )
    arrangement = arranger.best()
    return Candidate(num_microbatches, planner, arrangement, costs.largest_gap_fraction)


def _spread(counts: Sequence[int], global_batch: int) -> Iterator[int]:
    """Of falling counts, those whose microbatches grow from the smallest by a constant factor."""
    size = global_batch // counts[0]
    while size <= global_batch:
        if global_batch % size == 0 and global_batch // size in counts:
            yield global_batch // size
        size *= _STEP_FACTOR


def _cuts(num_layers: int, num_stages: int | None) -> tuple[int, ...]:
    """Where stages may begin; at most some two dozen places, evenly spread."""
    pieces = min(num_layers, max(_MOST_CUTS, num_stages or 0))
    return tuple(round(i * num_layers / pieces) for i in range(pieces + 1))


def _crossing_bytes(planner: IntraOpPlanner) -> dict[int, float]:
    """Bytes that cross each boundary per microbatch: values on, gradients back."""
    layers = planner.model.layers
    avals = planner.model.traced.graph.avals
    crossing: dict[int, float] = {0: 0.0, len(layers): 0.0}
    for cut in range(1, len(layers)):
        made = {value for layer in layers[:cut] for value in layer.outputs}
        read = {value for layer in layers[cut:] for value in layer.inputs}
        crossing[cut] = 2.0 * sum(aval_bytes(avals[value]) for value in made & read)
    return crossing
