"""What was priced, beside what was compiled: the collectives of a plan and those of its HLO.

Two lists are equal when every collective of one has its own in the other, of the same kind, bytes and
axis. Two things that XLA does are undone, and counted: the CPU backend computes reductions of 16-bit
floats in f32, and a recomputed value may be merged with the original, its collectives with it. (Combined
collectives are taken apart by `hlo`.)
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.sharding.collectives import Collective
from launcher.autopar.sharding.hlo import HloCollective, axis_groups

Signature = tuple[str, str, int, str]  # kind, axis, bytes, dtype

_HALF = {"bf16", "f16"}
_REDUCTIONS = {"all-reduce", "reduce-scatter"}


@dataclass(frozen=True, slots=True)
class Audit:
    """The comparison; `rows` are (signature, priced, compiled) of every kind of collective.

    `num_widened` reductions and `num_merged` recomputed collectives are counted as compiled in `rows`.
    """

    rows: tuple[tuple[Signature, int, int], ...]
    num_widened: int
    num_merged: int

    @property
    def agrees(self) -> bool:
        return all(priced == compiled for _, priced, compiled in self.rows)

    def __str__(self) -> str:
        head = (
            f"{'collective':<16}{'axis':<10}{'bytes':>14} {'dtype':<6}{'priced':>8}{'compiled':>10}"
        )
        lines = [head]
        for (kind, axis, num_bytes, dtype), priced, compiled in self.rows:
            mark = "" if priced == compiled else "  <-- differs"
            lines.append(
                f"{kind:<16}{axis:<10}{num_bytes:>14,} {dtype:<6}{priced:>8}{compiled:>10}{mark}"
            )
        if self.num_widened:
            lines.append(f"{self.num_widened} reductions of 16-bit floats are compiled in f32")
        if self.num_merged:
            lines.append(f"{self.num_merged} recomputed collectives are merged with the original")
        total = sum(priced for _, priced, _ in self.rows)
        lines.append(
            f"{total} collectives priced; compiled: {'the same' if self.agrees else 'not the same'}"
        )
        return "\n".join(lines)


def audit(
    priced: Iterable[Collective], compiled: Sequence[HloCollective], mesh: LogicalMesh
) -> Audit:
    """Compare two lists of collectives on one mesh."""
    priced = list(priced)
    wanted = Counter(map(_signature, priced))
    names = {
        axis_groups(mesh.shape, axis): name
        for axis, name in enumerate(mesh.axis_names)
        if mesh.shape[axis] > 1
    }
    found = Counter(
        (c.kind, names.get(c.groups, "several"), c.num_bytes, c.dtype) for c in compiled
    )
    widened = _undo_widening(wanted, found)
    merged = _undo_merging(wanted, found, Counter(_signature(c) for c in priced if c.repeats))
    signatures = sorted({*wanted, *found})
    rows = tuple((s, wanted[s], found[s]) for s in signatures if wanted[s] or found[s])
    return Audit(rows, widened, merged)


def _signature(collective: Collective) -> Signature:
    return collective.kind, collective.axis, collective.num_bytes, collective.dtype


def _undo_merging(wanted: Counter, found: Counter, repeats: Counter) -> int:
    """Count the recomputed collectives that XLA merged as compiled."""
    total = 0
    for signature, count in repeats.items():
        merged = max(0, min(count, wanted[signature] - found[signature]))
        found[signature] += merged
        total += merged
    return total


def _undo_widening(wanted: Counter, found: Counter) -> int:
    """Move reductions that were compiled in f32 back to the type they were asked for in."""
    total = 0
    for signature in list(wanted):
        kind, axis, num_bytes, dtype = signature
        wide = (kind, axis, 2 * num_bytes, "f32")
        if kind in _REDUCTIONS and dtype in _HALF:
            missing = wanted[signature] - found[signature]
            spare = found[wide] - wanted[wide]
            moved = max(0, min(missing, spare))
            found[signature] += moved
            found[wide] -= moved
            total += moved
    return total
