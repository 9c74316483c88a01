"""Numbers of devices that are left: taking is a shift, and nothing is taken that is not there."""

import itertools
import random

import numpy as np
import pytest

from launcher.autopar.inter_op.device_axis import device_axis


def test_one_kind_counts_its_devices_in_the_largest_unit():
    axis = device_axis([8, 16], [0, 0], [64], use_all=True)
    assert (axis.width, axis.all_devices, axis.most_submeshes) == (9, 8, 8)
    assert axis.takes.tolist() == [1, 2]
    values = np.arange(9)
    room, rest = axis.moves(1)
    assert values[room].tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert values[rest].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert device_axis([3], [0], [8], use_all=False).width == 3  # 2 of them, and 2 devices idle


@pytest.mark.parametrize("seed", range(20))
def test_digits_are_the_devices_of_each_kind(seed):
    rng = random.Random(seed)
    totals = [rng.randint(1, 6) for _ in range(rng.randint(2, 3))]
    kinds = [rng.randrange(len(totals)) for _ in range(5)]
    sizes = [rng.randint(1, 4) for _ in kinds]
    axis = device_axis(sizes, kinds, totals, use_all=True)
    # By the devices that are left of each kind, in its own unit, the first kind varying fastest.
    units = [
        np.gcd.reduce([total, *(s for s, k in zip(sizes, kinds, strict=True) if k == kind)])
        for kind, total in enumerate(totals)
    ]
    digits = [range(total // unit + 1) for total, unit in zip(totals, units, strict=True)]
    left = [tuple(reversed(digit)) for digit in itertools.product(*reversed(digits))]
    assert left[axis.all_devices] == tuple(digit[-1] for digit in digits)
    for submesh, (size, kind) in enumerate(zip(sizes, kinds, strict=True)):
        room, rest = axis.moves(submesh)
        moves = dict(zip(room.tolist(), rest.tolist(), strict=True))
        for number, before in enumerate(left):
            after = tuple(n - size // units[k] if k == kind else n for k, n in enumerate(before))
            assert axis.has_room[submesh, number] == (min(after) >= 0) == (number in moves)
            if number in moves:
                assert left[moves[number]] == after
                assert number - axis.takes[submesh] == moves[number]
