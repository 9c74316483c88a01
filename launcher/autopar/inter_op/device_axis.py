"""The devices that are left to other stages, as one number: what the DP over stages counts down.

With one kind of hosts it is the number of these devices. With several kinds it has a digit for each, how
many devices of the kind are left, written with as many values as there can be (mixed radix). A submesh takes
its devices from the digit of its kind; where fewer are left it has no room, so nothing is borrowed from
another digit, and taking is a shift along one axis.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Index = slice | np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class DeviceAxis:
    """What submeshes take from the devices that are left.

    Attributes:
        width: How many numbers there are; the last one means that all devices are left, 0 that none are.
        takes: By submesh, what having its devices taken lowers the number by.
        has_room: (submeshes, numbers): whether so many devices hold the submesh.
        most_submeshes: That can lie side by side.
    """

    width: int
    takes: np.ndarray
    has_room: np.ndarray
    most_submeshes: int
    _moves: tuple[tuple[Index, Index], ...]

    @property
    def all_devices(self) -> int:
        """Return the number that means all of them."""
        return self.width - 1

    def moves(self, submesh: int) -> tuple[Index, Index]:
        """Return the numbers that have room for the submesh, and what each becomes."""
        return self._moves[submesh]


def device_axis(
    sizes: Sequence[int], kinds: Sequence[int], num_devices: Sequence[int], *, use_all: bool
) -> DeviceAxis:
    """Return the axis for submeshes of so many devices.

    A kind counts in the largest unit in which all its submeshes are whole: in hosts, for instance.

    Args:
        kinds: Of hosts, by submesh.
        num_devices: By kind.
        use_all: Whether submeshes must add up to them.
    """
    own = [
        [s for s, k in zip(sizes, kinds, strict=True) if k == n] for n in range(len(num_devices))
    ]
    totals = [number if use_all else 0 for number in num_devices]
    # 1 for a kind of which nothing is used.
    units = [math.gcd(*mine, total) or 1 for mine, total in zip(own, totals, strict=True)]
    radix = [number // unit + 1 for number, unit in zip(num_devices, units, strict=True)]
    place = [math.prod(radix[:kind]) for kind in range(len(radix))]
    counts = [size // units[kind] for size, kind in zip(sizes, kinds, strict=True)]
    takes = np.array([n * place[kind] for n, kind in zip(counts, kinds, strict=True)])
    width = math.prod(radix)
    left = [np.arange(width) // place[kind] % radix[kind] for kind in range(len(radix))]
    has_room = np.array([left[kind] >= n for n, kind in zip(counts, kinds, strict=True)])
    return DeviceAxis(
        width=width,
        takes=takes,
        has_room=has_room,
        most_submeshes=sum(
            number // min(mine) for number, mine in zip(num_devices, own, strict=True) if mine
        ),
        _moves=tuple(
            _move(room, int(took), alone=len(radix) == 1)
            for room, took in zip(has_room, takes, strict=True)
        ),
    )


def _move(room: np.ndarray, took: int, *, alone: bool) -> tuple[Index, Index]:
    """The numbers with room, and what they become; slices, which are faster, where there is one digit."""
    if alone:
        return slice(took, None), slice(max(len(room) - took, 0))
    numbers = np.flatnonzero(room)
    return numbers, numbers - took
