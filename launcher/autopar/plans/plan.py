"""The plan: everything that planning decides, and what the runtime is told. The narrow waist.

Whoever makes a plan (the planner, a person with an editor), the runtime executes it and cannot tell
them apart. Its file form is in `plan_file`, and what must hold of it in `plan_checks`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from launcher.autopar.clusters.hosts import ClusterRef
from launcher.autopar.clusters.mesh import DATA, TENSOR
from launcher.autopar.programs.program import round_robin

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
        scatter: Gradients are scattered along the data axis behind every microbatch, and summed in shards.
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
    scatter: bool = False
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


def axes_of(spec: SpecList) -> Iterable[str]:
    """Yield the mesh axes that a spec names, dim by dim."""
    for dim in spec:
        if dim is not None:
            yield from (dim,) if isinstance(dim, str) else dim
