"""The collectives of a compiled program, read off its HLO text.

XLA writes one instruction for several collectives that it combined (a tuple), and one all-to-all as a
tuple of the pieces for each peer: both are undone here, so that an entry is one collective of one value.
Bytes are counted as `reshard.Step` does: what an all-gather ends with, what the others begin with. Loop
bodies are read once, however often they run.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Groups = frozenset[tuple[int, ...]]

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_INSTRUCTION = re.compile(
    r"= (?P<shape>.+?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<dims>[\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{(?P<groups>(?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(
    r"replica_groups=\[(?P<shape>[\d,]+)\]<=\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?"
)
_MESH = re.compile(r"replica_groups=mesh\[(?P<shape>[^\]]*)\] ?\{(?P<axes>[^}]*)\}")


@dataclass(frozen=True, slots=True)
class HloCollective:
    """One collective of one value.

    Attributes:
        kind: as `reshard.Kind` names it.
        groups: the positions of the devices that take part together.
    """

    kind: str
    dtype: str
    num_bytes: int
    groups: Groups


def read_collectives(text: str) -> tuple[HloCollective, ...]:
    """Every collective in an HLO module."""
    return tuple(
        collective
        for line in text.splitlines()
        if (match := _INSTRUCTION.search(line))
        for collective in _parts(match, _groups(line))
    )


def _parts(match: re.Match, groups: Groups) -> list[HloCollective]:
    kind, arrays = match["kind"], _ARRAY.findall(match["shape"])
    sizes = [(dtype, _num_bytes(dtype, dims)) for dtype, dims in arrays]
    length = len(next(iter(groups))) if groups else 1
    if kind == "all-gather" and match["start"]:
        sizes = sizes[len(sizes) // 2 :]  # operands, then results
    if kind == "reduce-scatter":
        sizes = [(dtype, size * length) for dtype, size in sizes]
    if kind == "all-to-all" and len(sizes) > 1:
        pieces = [sizes[k : k + length] for k in range(0, len(sizes), length)]
        sizes = [(piece[0][0], sum(size for _, size in piece)) for piece in pieces]
    return [HloCollective(kind, dtype, size, groups) for dtype, size in sizes]


def _num_bytes(dtype: str, dims: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype) or int(digits[0] if digits else 8)
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def _groups(line: str) -> Groups:
    if match := _IOTA.search(line):
        shape, dims = _numbers(match["shape"]), _numbers(match["dims"])
        order = _numbers(match["order"]) if match["order"] else range(len(dims))
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
        return frozenset(tuple(sorted(map(int, group))) for group in ids)
    if match := _MESH.search(line):
        return _mesh_groups(match["shape"], match["axes"])
    if match := _LISTED.search(line):
        found = re.findall(r"\{([\d,]*)\}", match["groups"])
        return frozenset(tuple(sorted(_numbers(group))) for group in found)
    return frozenset()


def _mesh_groups(shape: str, axes: str) -> Groups:
    """`mesh['a'=4,'b'=2] {'a'}`: the devices that differ along the named axes only."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", shape)}
    named = re.findall(r"'([^']+)'", axes)
    order = [name for name in sizes if name not in named] + named
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    rows = ids.transpose([list(sizes).index(name) for name in order])
    rows = rows.reshape(-1, math.prod(sizes[name] for name in named))
    return frozenset(tuple(sorted(map(int, row))) for row in rows)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def axis_groups(mesh_shape: Sequence[int], axis: int) -> Groups:
    """The devices that differ along one axis of a mesh only."""
    ids = np.arange(math.prod(mesh_shape)).reshape(mesh_shape)
    rows = np.moveaxis(ids, axis, -1).reshape(-1, mesh_shape[axis])
    return frozenset(tuple(sorted(map(int, row))) for row in rows)
