"""Which sample is number i of a run: a seeded shuffle for every epoch that keeps no state.

A run reads samples number 0, 1, 2, ...; batch `step` of size b is numbers step*b to (step+1)*b - 1.
Sample number i of a set of n is entry i mod n of the permutation of epoch i div n, so every epoch
reads every sample exactly once, a batch may lie across two epochs, and any step of any run can be
addressed at once: after a restart nothing has to be replayed, and a billion samples need no table.

The permutation is a Feistel network on a rows x columns grid just large enough for n cells: each
round moves a cell along one coordinate by a hash of the other, which is invertible for any grid.
The few cells beyond n are walked on until they land inside ("cycle walking": Black and Rogaway,
Ciphers with Arbitrary Finite Domains, 2002). It shuffles well; it is no cipher.
"""

import math
from collections.abc import Iterable

import numpy as np

SPLITS = ("train", "valid")

# Each split has its own stream of hashes, so that equal seeds do not give equal orders.
_STREAMS = {"train": 0x7261696E, "valid": 0x76616C69}

# Four moves of each coordinate: fewer leave a visible bias in the first entries.
_NUM_ROUNDS = 8

# splitmix64 (Steele, Lea and Flood 2014): the odd constant of its counter, and its two multipliers.
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_MASK = 2**64 - 1


def batch_number(step: int, left_out: Iterable[int]) -> int:
    """Give the batch that a step reads, counted from 0, where some batches are left out for good.

    The others keep their order: none is read twice, and none but those is missed.
    """
    number = step
    for other in sorted(set(left_out)):
        if other > number:
            break
        number += 1
    return number


def sample_indices(
    seed: int, split: str, step: int, batch_size: int, num_samples: int
) -> np.ndarray:
    """Give the `batch_size` entries, below `num_samples`, that batch `step` reads.

    Held-out samples come in one order for every seed, so that two runs' losses compare.
    """
    if split == "valid":
        seed = 0
    first = step * batch_size
    # Numbers are Python integers up to here, so that no step can overflow.
    epoch, offset = divmod(first, num_samples)
    flat = np.arange(offset, offset + batch_size, dtype=np.uint64)
    epochs, positions = np.divmod(flat, np.uint64(num_samples))
    stream = np.asarray([(seed * _GOLDEN + _STREAMS[split]) & _MASK], dtype=np.uint64)
    keys = _mix(_mix(stream) + np.uint64(epoch) + epochs)
    return _permute(positions, num_samples, keys).astype(np.int64)


def _permute(positions: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Map each position to its place in the permutation of range(size) that its key names."""
    rows = max(1, math.isqrt(size - 1) + 1)
    columns = -(-size // rows)
    result = _feistel(positions, rows, columns, keys)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = _feistel(result[outside], rows, columns, keys[outside])
        outside = outside[result[outside] >= size]
    return result


def _feistel(cells: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    num_rows, num_columns = np.uint64(rows), np.uint64(columns)
    row, column = np.divmod(cells, num_columns)
    for index in range(0, _NUM_ROUNDS, 2):
        row = (row + _mix(keys + column + _counter(index)) % num_rows) % num_rows
        column = (column + _mix(keys + row + _counter(index + 1)) % num_columns) % num_columns
    return row * num_columns + column


def _counter(index: int) -> np.uint64:
    return np.uint64((index + 1) * _GOLDEN & _MASK)


def _mix(values: np.ndarray) -> np.ndarray:
    """Hash every 64-bit value of an array (array arithmetic wraps without a warning)."""
    values = (values ^ (values >> _SHIFTS[0])) * _MULTIPLIERS[0]
    values = (values ^ (values >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return values ^ (values >> _SHIFTS[2])
