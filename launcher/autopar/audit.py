"""What was priced, beside what was compiled: the collectives of a plan and those of its HLO.

Two lists are equal when every collective of one has its own in the other, of the same kind, bytes and
axis. XLA's CPU backend computes reductions of 16-bit floats in f32: such a pair counts as equal, and is
counted apart. (Combined collectives are taken apart by `hlo`.)
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.autopar.hlo import HloCollective, axis_groups
from launcher.autopar.mesh import LogicalMesh
from launcher.autopar.sharded_graph import Collective

Signature = tuple[str, str, int, str]  # kind, axis, bytes, dtype

_HALF = {"bf16", "f16"}
_REDUCTIONS = {"all-reduce", "reduce-scatter"}


@dataclass(frozen=True, slots=True)
class Audit:
    """The comparison; `rows` are (signature, priced, compiled) of every kind of collective."""

    rows: tuple[tuple[Signature, int, int], ...]
    num_widened: int

    @property
    def agrees(self) -> bool:
        return all(priced == compiled for _, priced, compiled in self.rows)

    def __str__(self) -> str:
        head = f"{'collective':<16}{'axis':<10}{'bytes':>14} {'dtype':<6}{'priced':>8}{'compiled':>10}"
        lines = [head]
        for (kind, axis, num_bytes, dtype), priced, compiled in self.rows:
            mark = "" if priced == compiled else "  <-- differs"
            lines.append(
                f"{kind:<16}{axis:<10}{num_bytes:>14,} {dtype:<6}{priced:>8}{compiled:>10}{mark}"
            )
        if self.num_widened:
            lines.append(f"{self.num_widened} reductions of 16-bit floats are compiled in f32")
        total = sum(priced for _, priced, _ in self.rows)
        lines.append(f"{total} collectives priced; compiled: {'the same' if self.agrees else 'not the same'}")
        return "\n".join(lines)


def audit(
    priced: Iterable[Collective], compiled: Sequence[HloCollective], mesh: LogicalMesh
) -> Audit:
    """Compare two lists of collectives on one mesh."""
    wanted = Counter((c.kind, c.axis, c.num_bytes, c.dtype) for c in priced)
    names = {
        axis_groups(mesh.shape, axis): name
        for axis, name in enumerate(mesh.axis_names)
        if mesh.shape[axis] > 1
    }
    found = Counter(
        (c.kind, names.get(c.groups, "several"), c.num_bytes, c.dtype) for c in compiled
    )
    widened = _undo_widening(wanted, found)
    signatures = sorted({*wanted, *found})
    rows = tuple((s, wanted[s], found[s]) for s in signatures if wanted[s] or found[s])
    return Audit(rows, widened)


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
