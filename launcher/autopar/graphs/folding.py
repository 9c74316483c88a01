"""Which ops of a graph stand for each other: repeated blocks are planned once.

Ops at the same place of two repetitions of a block are one class; the sharding problem has one node per
class, counted as often as the class has members. This is exact for the price of every plan that shards
equal blocks equally, and leaves out the plans that do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.autopar.graphs.graph import Op
from launcher.autopar.graphs.structure import find_repeats, op_signature


@dataclass(frozen=True, slots=True)
class Folding:
    """`representative[i]` is the position of the op that stands for op `i`."""

    representative: tuple[int, ...]

    @property
    def num_classes(self) -> int:
        return len(set(self.representative))


def fold(ops: Sequence[Op]) -> Folding:
    """Find the repeated blocks of a list of ops."""
    signatures = [op_signature(op) for op in ops]
    representative = list(range(len(ops)))
    for run in find_repeats(signatures):
        for position in range(run.start, run.end):
            representative[position] = run.start + (position - run.start) % run.period
    return Folding(tuple(representative))


def unfolded(ops: Sequence[Op]) -> Folding:
    """Every op stands for itself."""
    return Folding(tuple(range(len(ops))))
