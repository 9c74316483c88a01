"""Around the DP: the number of microbatches, the parallel mode, and the choice among the best candidates.

For each number of microbatches the model is traced at that microbatch size, its layers are priced on every
submesh (`stage_costs`) and cut into stages (`inter_op`). Microbatch sizes are tried from one sample upwards
by factors of four, and then next to the best. A forced choice (parallel.tp=4) leaves a set of one; the
manual, data, ZeRO and single modes are searches in which everything but the strategies is forced.

Left out: schedules other than the one asked for, which the simulator judges in a later version.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import jax
import optax

from launcher.autopar.cluster import Cluster
from launcher.autopar.inter_op import SearchResult, place, plan_stages
from launcher.autopar.intra_op import IntraOpPlanner
from launcher.autopar.realize import layered_model
from launcher.autopar.restrictions import Experts
from launcher.autopar.stage_costs import Choices, StageCosts
from launcher.autopar.work import aval_bytes
from launcher.errors import ConfigError, InfeasiblePlanError
from launcher.models.model import Model

log = logging.getLogger(__name__)

_MOST_CUTS = 24
_STEP_FACTOR = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What is asked of the planner; None leaves a choice to it.

    Attributes:
        mode: "single", "data", "zero", "manual" or "auto".
        optimizer: decides how many bytes of state a parameter has.
    """

    mode: str
    global_batch: int
    num_microbatches: int | None = None
    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    zero: int | None = None
    recompute: str | None = None
    schedule: str | None = None
    optimizer: optax.GradientTransformation = field(default_factory=lambda: optax.adamw(1e-3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What the search may combine, worked out from the options and the cluster."""

    submeshes: tuple[tuple[int, int], ...]
    num_devices: int
    num_stages: int | None
    choices: Choices
    schedule: str


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One planned arrangement, before the simulator has judged it."""

    num_microbatches: int
    planner: IntraOpPlanner
    result: SearchResult
    placement: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    largest_gap_fraction: float


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
    space = make_space(options, cluster)
    attempts = _Attempts(model, cluster, options, space, progress)
    attempts.walk(_microbatch_counts(options, space))
    if attempts.found and options.num_microbatches is None:
        best = min(attempts.found.values(), key=lambda c: c.result.total_s).num_microbatches
        for neighbour in (best * 2, best // 2):
            if neighbour and options.global_batch % neighbour == 0:
                attempts.total_s(neighbour)
    if not attempts.found and not attempts.failures:
        raise ConfigError(
            f"a global batch of {options.global_batch} samples leaves no microbatch that "
            f"{space.choices.data} devices of the data axis can share (train.global_batch="
            f"{options.global_batch}); choose a multiple of {space.choices.data}, or a smaller parallel.dp"
        )
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
    if space.num_stages is not None and space.num_stages > len(layered.layers):
        layered = layered_model(model, microbatch_size, space.num_stages)
    planner = IntraOpPlanner(layered)
    cuts = _cuts(len(layered.layers), space.num_stages)
    costs = StageCosts(
        planner, cluster, space.submeshes, num_microbatches=num_microbatches,
        choices=space.choices, optimizer_ratio=optimizer_ratio(model, options.optimizer),
        microbatch_size=microbatch_size,
    )  # fmt: skip
    bytes_at = _crossing_bytes(planner)
    link = cluster.inter_host if cluster.num_hosts > 1 else cluster.intra_host
    result = plan_stages(
        num_layers=len(layered.layers),
        submeshes=space.submeshes,
        num_devices=space.num_devices,
        num_microbatches=num_microbatches,
        memory_bytes=cluster.device.memory_bytes,
        options=costs.options,
        cuts=cuts,
        in_flight=_in_flight(space.schedule),
        num_stages=space.num_stages,
        transfer_s=lambda cut: bytes_at[cut] / link.bytes_per_s + 2 * link.latency_s,
    )
    shapes = [space.submeshes[choice.submesh] for choice in result.stages]
    placement = place(shapes, cluster.num_hosts, cluster.devices_per_host)
    return Candidate(num_microbatches, planner, result, placement, costs.largest_gap_fraction)


def _in_flight(schedule: str) -> Callable[[int, int], int]:
    """Microbatches that a stage holds, by how many stages follow (itself included)."""
    if schedule == "gpipe":
        return lambda stages_to_end, num_microbatches: num_microbatches
    return lambda stages_to_end, num_microbatches: min(stages_to_end, num_microbatches)


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


def optimizer_ratio(model: Model, optimizer: optax.GradientTransformation) -> float:
    """Bytes of optimizer state per byte of parameters."""
    state = jax.eval_shape(optimizer.init, dict(model.abstract_params))
    held = sum(aval_bytes(leaf) for leaf in jax.tree.leaves(state))
    return held / sum(aval_bytes(leaf) for leaf in model.abstract_params.values())


def _microbatch_counts(options: PlanOptions, space: Space) -> Iterator[int]:
    """From the smallest microbatch upwards: the counts in falling order."""
    batch = options.global_batch
    if options.num_microbatches is not None:
        if batch % options.num_microbatches:
            raise ConfigError(
                f"a global batch of {batch} samples cannot be cut into {options.num_microbatches} equal "
                f"microbatches (parallel.num_microbatches={options.num_microbatches}); choose a divisor "
                f"of train.global_batch={batch}"
            )
        yield options.num_microbatches
        return
    size = _smallest_microbatch(space)
    while size <= batch:
        if batch % size == 0:
            yield batch // size
        size *= _STEP_FACTOR


def _smallest_microbatch(space: Space) -> int:
    """A forced data axis needs a sample for each of its devices."""
    return space.choices.data or 1


def make_space(options: PlanOptions, cluster: Cluster) -> Space:
    """Turn options into sets of choices, checking forced degrees against the cluster."""
    num_devices = 1 if options.mode == "single" else cluster.num_devices
    zero = {"auto": (0, 2)}.get(options.mode, (0,)) if options.zero is None else (options.zero,)
    if options.mode == "zero" and options.zero is None:
        zero = (2,)
    recompute = ("none", "layer") if options.mode == "auto" else ("none",)
    if options.recompute is not None:
        recompute = (options.recompute,)
    schedule = options.schedule or "1f1b"
    if options.mode == "auto":
        choices = Choices(
            zero=zero,
            recompute=recompute,
            tensor=options.tp,
            data=options.dp,
            experts=_experts(options),
        )
        submeshes = tuple((s.hosts, s.devices) for s in cluster.submeshes())
        return Space(
            submeshes=submeshes, num_devices=num_devices, num_stages=options.pp, choices=choices,
            schedule=schedule,
        )  # fmt: skip
    data, tensor, stages = _degrees(options, num_devices)
    submesh = _submesh(data * tensor, cluster)
    if tensor > submesh[1]:
        raise ConfigError(
            f"a tensor axis of {tensor} does not fit a host's {cluster.devices_per_host} devices "
            f"(parallel.tp={tensor}); tensor parallelism stays inside a host: lower parallel.tp"
        )
    choices = Choices(
        zero=zero, recompute=recompute, tensor=tensor, data=data, experts=_experts(options)
    )
    return Space(
        submeshes=(submesh,), num_devices=num_devices, num_stages=stages, choices=choices,
        schedule=schedule,
    )  # fmt: skip


def _experts(options: PlanOptions) -> Experts:
    if options.ep is None:
        return Experts.FREE
    return Experts.NEVER if options.ep == 1 else Experts.FORCED


def _degrees(options: PlanOptions, num_devices: int) -> tuple[int, int, int]:
    """(data, tensor, pipeline) of a mode without search; data takes the devices that remain."""
    tensor, stages = options.tp or 1, options.pp or 1
    data = options.dp or max(1, num_devices // (tensor * stages))
    if data * tensor * stages != num_devices:
        raise ConfigError(
            f"dp {data} x tp {tensor} x pp {stages} is {data * tensor * stages} devices, the cluster has "
            f"{num_devices} (parallel.dp, parallel.tp={tensor}, parallel.pp={stages}); choose degrees "
            f"whose product is {num_devices}, or another cluster.hosts"
        )
    if options.ep not in (None, 1, data):
        raise ConfigError(
            f"experts can be split over the {data} devices of the data axis or not at all "
            f"(parallel.ep={options.ep}); set parallel.ep=1 or parallel.ep={data}"
        )
    return data, tensor, stages


def _submesh(num_devices: int, cluster: Cluster) -> tuple[int, int]:
    """The rectangle that a stage of so many devices gets."""
    per_host = cluster.devices_per_host
    if num_devices <= per_host and per_host % num_devices == 0:
        return 1, num_devices
    if num_devices % per_host == 0:
        return num_devices // per_host, per_host
    raise ConfigError(
        f"a stage of {num_devices} devices is no rectangle of hosts with {per_host} devices "
        f"(parallel.dp x parallel.tp = {num_devices}); choose a divisor or a multiple of {per_host}"
    )
