"""What a caller of `auto_shard` may ask for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.autopar.clusters.collective_costs import CollectiveCosts
from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.solver.solve import METHODS
from launcher.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class IntraOpOptions:
    """Choices to force, costs to use, limits to keep.

    Attributes:
        batch_axis: hold this mesh axis (by number) to the batch dim: whatever has one is split there by
            it, whatever has none is whole or an unreduced sum along it.
        batch_argnums: the arguments that are batches, dim 0 first. None: those whose arrays all have the
            leading dim of the last argument's.
        allow_all_gather, allow_all_to_all: whether values may be gathered, or exchanged.
        allow_dim_over_axes: whether one dim may be split over several axes.
        zero: 1 or 2 splits the optimizer state as far as it goes, so that gradients are reduce-scattered
            and updated parameters gathered; 3 splits the parameters too. In one program without
            accumulation, 1 and 2 are the same.
        carry: result -> argument, by position, where a result is an argument's next value and must be left
            where the argument lies. None finds them: see `step_roles`.
        memory_limit_bytes: what a device may hold at any time: inputs, results and everything between.
        costs: how collectives are priced (`RingCosts`, `AlpaCosts`); None: as the mesh says.
        compute: prices computation, in the unit of the mesh's costs (seconds); None: matrix products and
            convolutions are divided as far as they go, and nothing else counts.
        solver: "auto" (exact elimination where it is cheap, then what `solver` lists), "ilp_highs" or
            "ilp_cbc" (the ILP, whatever its size), "search" (a bound and a search).
        time_limit_s: for the solver.
        fold: plan repeated blocks once.
    """

    batch_axis: int | None = None
    batch_argnums: Sequence[int] | None = None
    allow_all_gather: bool = True
    allow_all_to_all: bool = True
    allow_dim_over_axes: bool = True
    zero: int = 0
    carry: Mapping[int, int] | None = None
    memory_limit_bytes: float | None = None
    costs: CollectiveCosts | None = None
    compute: ComputeModel | None = None
    solver: str = "auto"
    time_limit_s: float = 60.0
    fold: bool = True

    def __post_init__(self):
        if self.zero not in (0, 1, 2, 3):
            raise ConfigError(f"zero={self.zero}: choose 0, 1, 2 or 3")
        if self.solver not in METHODS:
            raise ConfigError(f"solver={self.solver!r}: choose one of {', '.join(METHODS)}")
        if self.time_limit_s <= 0:
            raise ConfigError(f"time_limit_s={self.time_limit_s}: must be above 0")
        if self.memory_limit_bytes is not None and self.memory_limit_bytes <= 0:
            raise ConfigError(f"memory_limit_bytes={self.memory_limit_bytes}: must be above 0")
