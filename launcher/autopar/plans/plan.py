"""The plan: everything that planning decides, and what the runtime is told. The narrow waist.

Whoever makes a plan (the planner, a person with an editor), the runtime executes it and cannot tell
them apart. `Plan.check` proves what can be proven without the model; what else must hold, such as
that a tensor's dim divides, is found when the plan is realized. The file form is in `plan_file`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from launcher.autopar.clusters.hosts import AnyCluster, ClusterRef
from launcher.autopar.clusters.mesh import DATA, TENSOR
from launcher.autopar.programs.program import round_robin
from launcher.autopar.programs.schedules import SCHEDULE_NAMES
from launcher.autopar.text.wording import count, ranges
from launcher.errors import PlanError

PLAN_VERSION = 1
AXIS_NAMES = (DATA, TENSOR)
RECOMPUTE_NAMES = ("none", "layer", "full")
LARGEST_ZERO = 3

DimSpec = None | str | tuple[str, ...]
SpecList = tuple[DimSpec, ...]
"""Per tensor dim: None, the mesh axis that splits it, or several axes, the first outermost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Which model a plan is for.

    Attributes:
        fingerprint: Of its name and sizes; None in a plan written by hand.
        dtype, attention, loss_chunks: How it computes; None leaves it to the config.
    """

    name: str
    size: str
    fingerprint: str | None = None
    dtype: str | None = None
    attention: str | None = None
    loss_chunks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Consecutive layers on a submesh. What is left empty, the solver completes.

    Attributes:
        layers: First layer, and the one after the last; () leaves them to the solver.
        hosts: Of the cluster; the submesh is their product with `devices`, indices in each host.
        mesh: Axis name and length, the last axis varying fastest over the devices; () leaves it to
            the solver.
        recompute: What the backward pass computes again: "none", "layer" or "full".
        zero: What the data axis shards: 0 nothing, 1 optimizer state, 2 gradients too, 3 all.
        overlap: Gradients are brought together during the last backward pass, in its program.
        params: Parameter path -> how it lies on the mesh.
        optimizer_state: The same for what the optimizer keeps of it.
        strategies: Group of ops -> one text per op, as `picks` writes and reads it.
    """

    layers: tuple[int, int] | tuple[()] = ()
    hosts: tuple[int, ...]
    devices: tuple[int, ...]
    mesh: tuple[tuple[str, int], ...] = ()
    recompute: str = "none"
    zero: int = 0
    overlap: bool = False
    params: Mapping[str, SpecList] = field(default_factory=dict)
    optimizer_state: Mapping[str, SpecList] = field(default_factory=dict)
    strategies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def num_devices(self) -> int:
        return len(self.hosts) * len(self.devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a plan promises; tuples have one entry per stage.

    Attributes:
        tflops_convention: Which operations `tflops_per_device` counts.
        communicated_bytes: That all devices send in a step.
        stage_forward_s: Of one microbatch; so is `stage_backward_s`. The other two are of a step.
    """

    step_s: float
    bubble_fraction: float
    peak_bytes_per_device: tuple[float, ...]
    tflops_per_device: float
    tflops_convention: str
    communicated_bytes: float
    stage_forward_s: tuple[float, ...]
    stage_backward_s: tuple[float, ...]
    stage_sync_s: tuple[float, ...]
    stage_update_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchStats:
    """What finding a plan took.

    Attributes:
        optimality_gap: No plan of the space takes a step that is shorter by more than this fraction;
            None where that is not known.
        space: What a plan could be, in words.
    """

    wall_s: float
    ilp_solved: int
    candidates: int
    optimality_gap: float | None = None
    space: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """A plan that was not chosen, and why."""

    description: str
    step_s: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model trains on a cluster.

    Attributes:
        virtual_stages: How many stages a submesh holds. Of p submeshes number i % p holds stage i, so
            stages i and i + p name the same hosts and devices.
        stages: All of them, in the order of their layers.
        num_layers: Into how many layers the model's ops are clustered: where the last stage ends,
            which is also what None means.
        predicted: None until the plan has been priced.
        search: None for a plan that was not searched for.
    """

    version: int = PLAN_VERSION
    model: ModelRef
    cluster: ClusterRef
    global_batch: int
    num_microbatches: int
    schedule: str
    virtual_stages: int = 1
    num_layers: int | None = None
    stages: tuple[Stage, ...]
    predicted: Prediction | None = None
    search: SearchStats | None = None
    runners_up: tuple[RunnerUp, ...] = ()

    @property
    def microbatch_size(self) -> int:
        """Return the samples of one microbatch."""
        return self.global_batch // self.num_microbatches

    @property
    def num_submeshes(self) -> int:
        return len(self.stages) // self.virtual_stages

    @property
    def submesh_of(self) -> tuple[int, ...]:
        """Return each stage's submesh."""
        return round_robin(len(self.stages), self.virtual_stages)

    @property
    def submeshes(self) -> tuple[Stage, ...]:
        """Return the first stage of each submesh."""
        return self.stages[: self.num_submeshes]

    @property
    def num_devices(self) -> int:
        return sum(stage.num_devices for stage in self.submeshes)

    def check(
        self, num_layers: int | None, cluster: AnyCluster, fingerprint: str | None = None
    ) -> None:
        """Raise `PlanError` for the first thing that cannot be.

        Args:
            num_layers: Of the model; None leaves that to the plan.
            cluster: That the plan shall run on, which need not be the one it was made for.
            fingerprint: Of the model that shall be trained.
        """
        _check_head(self, fingerprint)
        _check_layers(self, num_layers)
        _check_submeshes(self)
        _check_devices(self, cluster)
        for index, stage in enumerate(self.stages):
            _check_stage(f"stages[{index}]", stage)
        if self.predicted is not None:
            _check_prediction(self.predicted, len(self.stages))


def _check_head(plan: Plan, fingerprint: str | None) -> None:
    if plan.version != PLAN_VERSION:
        raise PlanError(
            f"version={plan.version} is not {PLAN_VERSION}, the one that this launcher reads: "
            "plan again, or take the launcher that wrote the plan"
        )
    given = plan.model.fingerprint
    if fingerprint is not None and given is not None and given != fingerprint:
        raise PlanError(
            f"model.fingerprint={given} is not {fingerprint}, that of the model to train: "
            f"train model={plan.model.name} model.size={plan.model.size} as it was when it was "
            "planned, or plan again"
        )
    _check_known("schedule", plan.schedule, SCHEDULE_NAMES)
    _check_virtual_stages(plan)
    if plan.num_microbatches < 1 or plan.global_batch % plan.num_microbatches:
        raise PlanError(
            f"num_microbatches={plan.num_microbatches} does not divide "
            f"global_batch={plan.global_batch}: choose a divisor"
        )


def _check_virtual_stages(plan: Plan) -> None:
    given = f"virtual_stages={plan.virtual_stages}"
    if plan.schedule == "interleaved" and plan.virtual_stages < 2:
        raise PlanError(
            f"{given} is less than 2, the least that schedule=interleaved takes: write 2 or more, or "
            "schedule=1f1b"
        )
    if plan.schedule != "interleaved" and plan.virtual_stages != 1:
        raise PlanError(
            f"{given} is not 1, all that schedule={plan.schedule} takes: write 1, or "
            "schedule=interleaved"
        )


def _check_submeshes(plan: Plan) -> None:
    """Virtual stages share out, and the microbatches group by the submeshes."""
    v, number = plan.virtual_stages, len(plan.stages)
    if number % v:
        raise PlanError(
            f"stages has {number} entries, no multiple of virtual_stages={v}, the stages of a submesh: "
            f"give {number - number % v} or {number - number % v + v}"
        )
    if v > 1 and plan.num_microbatches % plan.num_submeshes:
        raise PlanError(
            f"num_microbatches={plan.num_microbatches} is no multiple of {plan.num_submeshes}, the "
            f"submeshes of {number} stages with virtual_stages={v}, by which schedule=interleaved "
            f"groups them: write a multiple of {plan.num_submeshes}, or schedule=1f1b"
        )


def _check_layers(plan: Plan, num_layers: int | None) -> None:
    if not plan.stages:
        raise PlanError("stages=[] has 0 stages, at least 1 is needed: add one")
    open_stages = [index for index, stage in enumerate(plan.stages) if not stage.layers]
    if len(open_stages) == len(plan.stages):
        return
    if open_stages:
        raise PlanError(
            f"stages[{open_stages[0]}].layers is left out, and {len(plan.stages) - len(open_stages)} of "
            f"{len(plan.stages)} stages have theirs: give them all, or none"
        )
    end = 0
    for index, stage in enumerate(plan.stages):
        first, last = stage.layers
        place = f"stages[{index}].layers=[{first}, {last}]"
        if first != end:
            where = f"stage {index - 1} ends" if index else "the model begins"
            raise PlanError(
                f"{place} begins at {first}, and {where} at {end}: write [{end}, {last}]"
            )
        if last <= first:
            raise PlanError(f"{place} ends at {last}, not after {first}: give it a layer")
        end = last
    for name, wanted in (("num_layers", plan.num_layers), ("the model's layers", num_layers)):
        if wanted is not None and wanted != end:
            raise PlanError(
                f"stages[{len(plan.stages) - 1}].layers ends at {end}, not at {name}={wanted}: "
                f"let the stages cover [0, {wanted}]"
            )


def _check_devices(plan: Plan, cluster: AnyCluster) -> None:
    """All submeshes lie inside the cluster, and none on top of another."""
    user: dict[tuple[int, int], int] = {}
    hosts = _Extent(cluster.num_hosts, max((h for s in plan.stages for h in s.hosts), default=0))
    last_device = max((d for s in plan.stages for d in s.devices), default=0)
    for index, stage in enumerate(plan.stages):
        first = index % plan.num_submeshes
        if index != first:
            _check_same_place(plan, first, index)
            continue
        place = f"stages[{index}]"
        kind = cluster.kind_of(stage.hosts, f"{place}.hosts")
        devices = _Extent(kind.devices_per_host, last_device)
        _check_indices(f"{place}.hosts", stage.hosts, hosts, "cluster.hosts")
        _check_indices(f"{place}.devices", stage.devices, devices, "cluster.devices_per_host")
        for where in ((host, device) for host in stage.hosts for device in stage.devices):
            if where in user:
                raise PlanError(
                    f"{place}.devices: device {where[1]} of host {where[0]} is used twice, by "
                    f"stage {user[where]} too: give each stage its own devices"
                )
            user[where] = index


def _check_same_place(plan: Plan, first: int, index: int) -> None:
    one, other = plan.stages[first], plan.stages[index]
    if (one.hosts, one.devices) != (other.hosts, other.devices):
        raise PlanError(
            f"stages[{index}] has hosts={list(other.hosts)} and devices={list(other.devices)}, and "
            f"stages[{first}] on the same submesh (virtual_stages={plan.virtual_stages}) has "
            f"{list(one.hosts)} and {list(one.devices)}: write the same"
        )


@dataclass(frozen=True, slots=True)
class _Extent:
    """How many hosts, or devices of a host, there are, and the last that a plan names."""

    number: int
    last: int


def _check_indices(place: str, indices: tuple[int, ...], extent: _Extent, key: str) -> None:
    if not indices:
        raise PlanError(f"{place}=[] has 0 entries, at least 1 is needed: add one")
    limit, missing = extent.number, [i for i in indices if not 0 <= i < extent.number]
    if missing:
        raise PlanError(
            f"{place} has {ranges(missing)}, outside 0..{limit - 1} ({key}={limit}): "
            f"stay inside the cluster, take one that has all ({key}={max(limit, extent.last + 1)}), or "
            f"plan again for this one"
        )
    if len(set(indices)) < len(indices):
        raise PlanError(f"{place}={list(indices)} names an index twice: drop one")


def _check_stage(place: str, stage: Stage) -> None:
    _check_known(f"{place}.recompute", stage.recompute, RECOMPUTE_NAMES)
    if not 0 <= stage.zero <= LARGEST_ZERO:
        raise PlanError(
            f"{place}.zero={stage.zero} is not in 0..{LARGEST_ZERO}: choose one of them"
        )
    if stage.mesh:
        _check_mesh(place, stage)
    for table, specs in (("params", stage.params), ("optimizer_state", stage.optimizer_state)):
        for path, spec in specs.items():
            _check_spec(f"{place}.{table}['{path}']", spec, AXIS_NAMES)


def _check_mesh(place: str, stage: Stage) -> None:
    names = tuple(name for name, _ in stage.mesh)
    if names != AXIS_NAMES:
        raise PlanError(
            f"{place}.mesh has the axes {', '.join(names) or 'of nothing'}, not "
            f"{' and '.join(AXIS_NAMES)}: write both, in this order"
        )
    lengths = tuple(length for _, length in stage.mesh)
    shape = " x ".join(f"{name}={length}" for name, length in stage.mesh)
    if min(lengths) < 1 or math.prod(lengths) != stage.num_devices:
        raise PlanError(
            f"{place}.mesh {shape} is {math.prod(lengths)} devices, and "
            f"{count(len(stage.hosts), 'host')} x {count(len(stage.devices), 'device')} are "
            f"{stage.num_devices}: change the mesh or the devices"
        )


def _check_spec(place: str, spec: SpecList, names: tuple[str, ...]) -> None:
    used = list(axes_of(spec))
    for name in used:
        _check_known(place, name, names)
    if len(set(used)) < len(used):
        raise PlanError(
            f"{place}={[*spec]} splits by an axis twice, which has its devices once: drop one"
        )


def _check_known(place: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise PlanError(f"{place}={name} is unknown: take {' or '.join(known)}")


def _check_prediction(predicted: Prediction, num_stages: int) -> None:
    for name, values in (
        ("peak_bytes_per_device", predicted.peak_bytes_per_device),
        ("stage_forward_s", predicted.stage_forward_s),
        ("stage_backward_s", predicted.stage_backward_s),
        ("stage_sync_s", predicted.stage_sync_s),
        ("stage_update_s", predicted.stage_update_s),
    ):
        if len(values) != num_stages:
            raise PlanError(
                f"predicted.{name} has {len(values)} entries for {num_stages} stages: "
                "drop `predicted`, the launcher prices the plan anew"
            )


def axes_of(spec: SpecList) -> Iterable[str]:
    """Yield the mesh axes that a spec names, dim by dim."""
    for dim in spec:
        if dim is not None:
            yield from (dim,) if isinstance(dim, str) else dim
