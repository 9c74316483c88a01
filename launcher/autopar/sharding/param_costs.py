"""What a parameter costs once per step and in memory, for every spec it may lie in.

With ZeRO the optimizer's state of a parameter lies in shards along the data axis: gradients are brought
there and the updated parameter is brought home.
"""

from dataclasses import dataclass

import numpy as np

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.optimizer_state import OptimizerFootprint
from launcher.autopar.graphs.work import aval_bytes
from launcher.autopar.sharding.reshard import reshard_cost, reshard_costs
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED, Spec, fits, num_shards

Specs = tuple[Spec, ...]


@dataclass(frozen=True, slots=True)
class ParamCosts:
    """A parameter's costs, by where it lies; matrices have a row for each spec of the accumulator.

    Attributes:
        update_s: to update it.
        reduce_s: to bring the sum of its gradients to its state.
        synchronize_s: that, and to bring the new value home.
        hand_on_s: to bring the sum home, in a stage that then sends it to the one that updates it.
        weight_bytes: per device, as are the others.
        accumulator_bytes: by the specs of the accumulator.
    """

    update_s: np.ndarray
    reduce_s: np.ndarray
    synchronize_s: np.ndarray
    hand_on_s: np.ndarray
    weight_bytes: np.ndarray
    state_bytes: np.ndarray
    accumulator_bytes: np.ndarray


def param_costs(
    aval, homes: Specs, accumulators: Specs, optimizer: OptimizerFootprint, mesh: LogicalMesh, *,
    zero: int, memory_bytes_per_s: float,
) -> ParamCosts:  # fmt: skip
    """Price a parameter; without a gradient `accumulators` are none, and it is updated all the same."""

    def shards(specs: Specs) -> np.ndarray:
        return np.array([num_shards(spec, mesh.shape) for spec in specs])

    states = tuple(optimizer_spec(home, aval.shape, mesh, zero) for home in homes)
    kept = optimizer.kept(aval)
    split_bytes, whole_bytes = optimizer.update_bytes(aval)
    update_s = (split_bytes / shards(states) + whole_bytes) / memory_bytes_per_s
    gather_s = np.array(
        [
            reshard_cost(aval.shape, aval.dtype.itemsize, state, home, mesh)
            for state, home in zip(states, homes, strict=True)
        ]
    )
    hand_on_s = reshard_matrix(aval, accumulators, homes, mesh)
    # ZeRO-1 reduces the whole gradient everywhere; 2 and 3 scatter the sum to where the state lies.
    reduce_s = hand_on_s if zero == 1 else reshard_matrix(aval, accumulators, states, mesh)
    return ParamCosts(
        update_s=update_s if accumulators else update_s + gather_s,
        reduce_s=reduce_s,
        synchronize_s=reduce_s + gather_s,
        hand_on_s=hand_on_s,
        weight_bytes=aval_bytes(aval) / shards(homes),
        state_bytes=kept.alike_bytes / shards(states) + kept.whole_bytes,
        accumulator_bytes=aval_bytes(aval) / shards(accumulators),
    )


def state_spec(home: Spec, shape: tuple[int, ...], mesh_shape: tuple[int, ...]) -> Spec:
    """Where ZeRO puts the optimizer state: the home spec, further split along the data axis.

    The first dim that the data axis divides is taken; a tensor without one stays as it is.
    """
    if home[0] != REPLICATED or mesh_shape[0] == 1:
        return home
    for dim in range(len(shape)):
        split = (dim, *home[1:])
        if fits(split, shape, mesh_shape):
            return split
    return home


def scattered_spec(summed: Spec, shape: tuple[int, ...], mesh_shape: tuple[int, ...]) -> Spec:
    """Where gradients are summed that are scattered along the data axis behind every microbatch.

    As optimizer state is split, what is whole or partial along that axis; what nothing divides stays.
    """
    if summed[0] not in (REPLICATED, PARTIAL):
        return summed
    whole = (REPLICATED, *summed[1:])
    split = state_spec(whole, shape, mesh_shape)
    return summed if split == whole else split


def optimizer_spec(home: Spec, shape, mesh: LogicalMesh, zero: int) -> Spec:
    """Where a parameter's optimizer state lies."""
    return state_spec(home, shape, mesh.shape) if zero else home


def gradient_spec(home: Spec, shape, mesh: LogicalMesh, zero: int) -> Spec:
    """Where the summed gradient lies: with ZeRO-2 and 3, where the optimizer state does."""
    return optimizer_spec(home, shape, mesh, zero) if zero >= 2 else home


def reshard_matrix(aval, sources, targets, mesh: LogicalMesh) -> np.ndarray:
    """Resharding cost from each source spec (rows) to each target spec (columns)."""
    costs = reshard_costs(aval.shape, aval.dtype.itemsize, mesh)
    rows = [costs.number[spec] for spec in sources]
    columns = [costs.number[spec] for spec in targets]
    return costs.between.take(rows, axis=0).take(columns, axis=1)
