"""The wiring of many ranges of layers as arrays, a row for each: costs are sums over their columns."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from launcher.autopar.intra_op.wiring import Place, StageWiring


@dataclass(frozen=True, slots=True, eq=False)
class WiringTable:
    """What each range has of everything that any of them has.

    Attributes:
        classes: Names; in `layers`: how many layers of each.
        places: Where parameters lie; in `owned` and `borrowed`: how many are there.
        read: Slots that read what another layer of the range makes; in `internal`: how many pairs of layers.
        imported: Slots computed by an earlier stage; in `imports`: whether it has one there.
        has_unread: Whether it has the parameters that no layer reads.
    """

    classes: tuple[str, ...]
    layers: np.ndarray
    places: tuple[Place, ...]
    owned: np.ndarray
    borrowed: np.ndarray
    read: tuple[Place, ...]
    internal: np.ndarray
    imported: tuple[Place, ...]
    imports: np.ndarray
    has_unread: np.ndarray

    @classmethod
    def of(cls, wirings: Sequence[StageWiring]) -> "WiringTable":
        """Return the table of some ranges."""
        classes, layers = counted([wiring.classes for wiring in wirings])
        places, owned = counted(
            [{p: held.owned for p, held in w.holdings.items()} for w in wirings]
        )
        _, borrowed = counted(
            [{p: held.borrowed for p, held in w.holdings.items()} for w in wirings]
        )
        read, internal = counted([_read(wiring) for wiring in wirings])
        imported, imports = counted([dict.fromkeys(wiring.imports, 1) for wiring in wirings])
        unread = np.array([bool(wiring.unread) for wiring in wirings])
        return cls(
            classes, layers, places, owned, borrowed, read, internal, imported, imports, unread
        )


def counted(rows: Iterable[Mapping[Hashable, int]]) -> tuple[tuple, np.ndarray]:
    """Everything that is counted in some row, and how often in each: (rows, things)."""
    rows = list(rows)
    columns = {
        thing: column for column, thing in enumerate(dict.fromkeys(t for r in rows for t in r))
    }
    table = np.zeros((len(rows), len(columns)))
    for row, counts in zip(table, rows, strict=True):
        for thing, count in counts.items():
            row[columns[thing]] = count
    return tuple(columns), table


def _read(wiring: StageWiring) -> dict[Place, int]:
    pairs: dict[Place, int] = {}
    for (_, _, *reader), number in wiring.internal.items():
        pairs[tuple(reader)] = pairs.get(tuple(reader), 0) + number
    return pairs
