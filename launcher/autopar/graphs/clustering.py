"""Ops -> layers: cut the forward pass where few bytes cross, into layers of balanced work.

The operator clustering of Alpa (section 5.2): among all ways to cut K ops into L consecutive layers, each
with at most (1 + slack) times its fair share of the FLOPs, take those whose costliest cut crosses the
fewest bytes, and of those the most even one (least sum of squared FLOPs). Alpa breaks ties by op counts.

What repeats in the model repeats in the layers. Where most of the work is in repeated blocks and no number
of layers is asked for, every repetition is a layer, and the DP cuts what stands before, between and behind
the blocks into layers of about their size: so all blocks are one layer, planned once, and no other layer
has a copy of a block in it. Where a number is asked for, ops are first gathered into atoms, of which every
repetition is one.

Ops that depend on nothing but literals and the random key belong to no layer; each layer that needs one has
its own copy.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jax.extend.core import Literal
from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import Graph, Op, Value
from launcher.autopar.graphs.structure import Run, find_repeats, op_signature
from launcher.autopar.graphs.trace import Role, TracedModel
from launcher.autopar.graphs.work import aval_bytes, op_flops
from launcher.errors import ConfigError

# Alpa takes 0.5; where no cut keeps that (a head as heavy as half a block), the next one is tried.
SLACKS = (0.5, 1.0, 2.0, np.inf)
_DEFAULT_LAYERS = 16
_EXPENSIVE = frozenset({"random_bits", "rng_bit_generator", "threefry2x32"})


@dataclass(frozen=True, slots=True)
class Clustering:
    """`layers[i]` are the ops of layer i; `free` are the ops that every layer may copy."""

    layers: tuple[tuple[Op, ...], ...]
    free: tuple[Op, ...]


def cluster(
    traced: TracedModel, num_layers: int | None = None, *, key: str = "num_layers"
) -> Clustering:
    """Cut a traced model into `num_layers` layers, or into as many as it has repeated blocks.

    Args:
        key: what the user set `num_layers` by, for the error if there are fewer places to cut.
    """
    free = free_ops(traced)
    free_results = {result for op in free for result in op.results}
    ops = [op for op in traced.graph.ops if free_results.isdisjoint(op.results)]
    crossing = crossing_bytes(traced.graph, ops, free_results)
    runs = [_in_phase(run, crossing) for run in find_repeats([op_signature(op) for op in ops])]
    flops = np.array([op_flops(op) for op in ops], np.float64)
    block_flops = _block_flops(runs, flops)
    if num_layers is None and block_flops is not None:
        firsts = _around_blocks(ops, runs, flops, crossing, block_flops)
        return Clustering(_between(ops, firsts), tuple(free))
    natural = _natural_number_of_layers(flops, block_flops)
    wanted = num_layers or natural
    whole = _atoms(runs if wanted <= natural else (), len(ops))
    # Blocks stay whole unless that leaves too few places to cut.
    for atoms in (whole, _atoms((), len(ops))):
        starts = np.array([start for start, _ in atoms])
        work, crossed = np.add.reduceat(flops, starts), crossing[starts]
        most = len(places_to_cut(work, crossed))
        if most >= wanted:
            break
    if num_layers is not None and num_layers > most:
        raise ConfigError(
            f"{key}={num_layers} is more layers than the {most} that the model's ops can be cut into: "
            f"give {key}={most} or less"
        )
    cuts = best_cuts(work, crossed, min(wanted, most))
    return Clustering(_between(ops, [atoms[cut][0] for cut in cuts]), tuple(free))


def _between(ops: Sequence[Op], firsts: Sequence[int]) -> tuple[tuple[Op, ...], ...]:
    """The layers that begin at these ops."""
    return tuple(tuple(ops[a:b]) for a, b in itertools.pairwise((*firsts, len(ops))))


def _around_blocks(
    ops: Sequence[Op], runs: Sequence[Run], flops: np.ndarray, crossing: np.ndarray,
    block_flops: float,
) -> list[int]:  # fmt: skip
    """The first op of every layer: each repetition of a block, and even pieces of what is around them.

    Of what the model recomputes piece by piece (`jax.checkpoint`) each piece begins a layer too, but for
    the first: layers are what is certain to be recomputed one after the other.
    """
    firsts: list[int] = []

    def cut(start: int, end: int) -> None:
        _, *later = [i for i in range(start, end) if ops[i].primitive is prim.remat_p] or [start]
        for a, b in itertools.pairwise((start, *later, end)):
            cut_piece(a, b)

    def cut_piece(start: int, end: int) -> None:
        if start < end:
            work, crossed = flops[start:end], crossing[start:end]
            wanted = max(1, round(float(work.sum()) / block_flops))
            cuts = best_cuts(work, crossed, min(wanted, len(places_to_cut(work, crossed))))
            firsts.extend(start + place for place in cuts)

    position = 0
    for run in runs:
        cut(position, run.start)
        position = run.start + run.count * run.period
        firsts.extend(range(run.start, position, run.period))
    cut(position, len(flops))
    return firsts


def free_ops(traced: TracedModel) -> list[Op]:
    """Cheap ops whose only inputs are literals, constants and the random key."""
    known: set[Value] = {
        value
        for value, source in traced.inputs.items()
        if source.role in (Role.RANDOM, Role.CONSTANT)
    }
    free = []
    for op in traced.graph.ops:
        if str(op.primitive) not in _EXPENSIVE and known.issuperset(op.values):
            known.update(op.results)
            free.append(op)
    return free


def crossing_bytes(graph: Graph, ops: Sequence[Op], free_results: set[Value]) -> np.ndarray:
    """`result[i]`: the bytes of all values that are computed before op i and read at i or later."""
    produced = {value: i for i, op in enumerate(ops) for value in op.results}
    last_read: dict[Value, int] = {}
    for i, op in enumerate(ops):
        for value in op.values:
            last_read[value] = i
    for output in graph.outputs:
        if not isinstance(output, Literal):
            last_read.setdefault(output, -1)
    change = np.zeros(len(ops) + 2)
    for value, start in produced.items():
        end = last_read.get(value, -1)
        if end > start and value not in free_results:
            size = aval_bytes(graph.avals[value])
            change[start + 1] += size
            change[end + 1] -= size
    return np.cumsum(change)[: len(ops) + 1]


def _atoms(runs: Sequence[Run], num_ops: int) -> list[tuple[int, int]]:
    """Half-open ranges of ops that stay together: each repetition of a run, and single other ops."""
    atoms: list[tuple[int, int]] = []
    position = 0
    for run in runs:
        atoms += [(i, i + 1) for i in range(position, run.start)]
        position = run.start + run.count * run.period
        atoms += [(i, i + run.period) for i in range(run.start, position, run.period)]
    return atoms + [(i, i + 1) for i in range(position, num_ops)]


def _in_phase(run: Run, crossing: np.ndarray) -> Run:
    """Begin a run where, inside its first period, the fewest bytes cross.

    The ops before a block often look like the end of one, so that the run begins too early.
    """
    offset = int(np.argmin(crossing[run.start : run.start + run.period]))
    return Run(run.start + offset, run.period, run.end)


def _block_flops(runs: Sequence[Run], flops: np.ndarray) -> float | None:
    """The mean work of a repetition; None where less than half of all work repeats."""
    total = flops.sum()
    repeated = sum(flops[run.start : run.start + run.count * run.period].sum() for run in runs)
    if total == 0 or repeated < total / 2:
        return None
    return float(repeated) / sum(run.count for run in runs)


def _natural_number_of_layers(flops: np.ndarray, block_flops: float | None) -> int:
    """As many layers as fit in if each is as heavy as a repetition of what repeats.

    Where little repeats, 16, as Alpa takes for its Wide-ResNets.
    """
    if block_flops is None:
        return int(min(_DEFAULT_LAYERS, max(1, np.count_nonzero(flops))))
    return max(2, int(flops.sum() / block_flops))


def best_cuts(flops: np.ndarray, crossing: np.ndarray, num_layers: int) -> tuple[int, ...]:
    """The first atom of every layer, by the two-level objective of the module's head.

    Args:
        flops: work of each atom.
        crossing: bytes that cross the boundary before each atom.
        num_layers: at most as many as there are places to cut.
    """
    starts = places_to_cut(flops, crossing)
    for slack in SLACKS:
        bound = max((1 + slack) * flops.sum() / num_layers, flops.max())
        cuts = _least_crossing(flops, crossing, starts, num_layers, bound)
        if cuts is not None:
            return cuts
    raise AssertionError(f"{num_layers} layers of {len(starts)} places to cut")


def _least_crossing(flops, crossing, starts, num_layers: int, bound: float):
    """The most even cuts among those whose costliest crosses the fewest bytes."""
    limits = np.unique(crossing[starts])
    best = _most_even(flops, starts, num_layers, bound)
    low, high = 0, len(limits) - 1 if best is not None else 0
    while low < high:
        middle = (low + high) // 2
        cuts = _most_even(flops, starts[crossing[starts] <= limits[middle]], num_layers, bound)
        if cuts is None:
            low = middle + 1
        else:
            best, high = cuts, middle
    return best


def places_to_cut(flops: np.ndarray, crossing: np.ndarray) -> np.ndarray:
    """Where a layer may start: between two heavy atoms, only where the fewest bytes cross."""
    crossing = np.array([0.0, *crossing[1:]])
    heavy = np.flatnonzero(flops > 0)
    between = [0, *(int(i) + 1 for i in heavy)]
    segments = zip(between, [*(int(i) for i in heavy), len(flops) - 1], strict=True)
    lightest = {a + int(np.argmin(crossing[a : b + 1])) for a, b in segments if a <= b}
    return np.array(sorted({0} | lightest))


def _most_even(
    flops: np.ndarray, starts: np.ndarray, num_layers: int, bound: float
) -> tuple[int, ...] | None:
    """Least sum of squared FLOPs over layers that start at `starts`; None if there is no way."""
    starts = np.union1d([0], starts)
    if len(starts) < num_layers:
        return None
    before = np.concatenate(([0.0], np.cumsum(flops)))
    position = before[[*starts, len(flops)]] / max(flops.sum(), 1.0)  # scaled: squares stay near 1
    limit = bound / max(flops.sum(), 1.0) * (1 + 1e-9)
    size = position[None, :] - position[:, None]  # (from, to)
    square = np.where((size >= 0) & (size <= limit), size**2, np.inf)
    square[np.tril_indices(len(position))] = np.inf
    cost = np.full(len(position), np.inf)
    cost[0] = 0.0
    choice = np.zeros((num_layers, len(position)), np.int64)
    for layer in range(num_layers):
        total = cost[:, None] + square
        choice[layer] = np.argmin(total, axis=0)
        cost = np.min(total, axis=0)
    if not np.isfinite(cost[-1]):
        return None
    cuts, end = [], len(position) - 1
    for layer in reversed(range(num_layers)):
        end = int(choice[layer, end])
        cuts.append(int(starts[end]))
    return tuple(reversed(cuts))
