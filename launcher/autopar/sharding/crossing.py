"""How a value crosses from one submesh to another: which device sends which tile to which, and what is
gathered after it has arrived.

Cross-mesh resharding of Alpa (OSDI 2022, section 6). The shards of the source and the pieces that the
target receives are intersected to tiles. Where the target holds the value several times, its replicas
receive different pieces, further split along the axes that replicate, and an all-gather inside the target
completes them, so that a byte crosses the slow link once. Replicas of the source share the sending.

Objective, in this order: bytes between hosts; the bytes at the busiest device, sent, received and gathered;
few tiles. So inside one host, where every device has a link of its own, pieces are split only if the target
has more devices than the source.

All tiles of a crossing have one shape, so that one program can cut them on all devices. They are the
intersections wherever, along each dim, one side's number of shards divides the other's; elsewhere (2 shards
to 3) the intersections are cut further. Left out: the order in which tiles share a link (Alpa's paper
leaves it to greedy load balance as well), relaying between replicas that cannot be split evenly (each of
them is sent its own copy), and splitting for a hand-over between stages on the same devices.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from launcher.autopar.clusters.device import Link
from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.sharding.spec import (
    PARTIAL,
    REPLICATED,
    Shape,
    Spec,
    fits,
    local_shape,
    to_text,
)

Place = tuple[int, int]
"""A device: its host, and its number there."""

Dims = tuple[tuple[int, ...], ...]
"""For each dim the mesh axes that split it, the major one first."""


@dataclass(frozen=True, slots=True)
class Located:
    """How a submesh holds a value; `places` are its devices in row-major order of the mesh."""

    spec: Spec
    mesh_shape: Shape
    places: tuple[Place, ...]

    @property
    def hosts(self) -> frozenset[int]:
        return frozenset(host for host, _ in self.places)

    def dims(self, rank: int) -> Dims:
        return tuple(
            tuple(axis for axis, entry in enumerate(self.spec) if entry == dim)
            for dim in range(rank)
        )


@dataclass(frozen=True, slots=True)
class Tile:
    """A block of the value that one device sends to another.

    `source` and `target` number devices in their meshes; `start` is the block's first index in every dim.
    """

    source: int
    target: int
    start: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Crossing:
    """A value on its way between two submeshes.

    Attributes:
        tiles: by target device, and for each of them in row-major order of its piece.
        pieces: the target's axes that split each dim on arrival.
        gathers: (axis, dim) of the all-gathers that follow in the target, in order.
    """

    shape: Shape
    dtype: np.dtype
    source: Located
    target: Located
    tile_shape: Shape
    tiles: tuple[Tile, ...]
    pieces: Dims
    gathers: tuple[tuple[int, int], ...]

    @property
    def tile_bytes(self) -> int:
        return math.prod(self.tile_shape) * self.dtype.itemsize

    @property
    def tiles_per_shard(self) -> Shape:
        """Into how many tiles each dim of a source shard is cut."""
        shard = local_shape(self.source.spec, self.shape, self.source.mesh_shape)
        return _ratio(shard, self.tile_shape)

    @property
    def tiles_per_piece(self) -> Shape:
        """How many tiles make up each dim of a target device's piece."""
        return _ratio(_cut(self.shape, self.pieces, self.target.mesh_shape), self.tile_shape)

    @property
    def moving(self) -> tuple[Tile, ...]:
        """The tiles that do leave their device: two submeshes may have devices in common."""
        return tuple(tile for tile in self.tiles if not self.stays(tile))

    def stays(self, tile: Tile) -> bool:
        return self.source.places[tile.source] == self.target.places[tile.target]

    @property
    def bytes_across(self) -> int:
        """Bytes sent from device to device between the submeshes."""
        return self.tile_bytes * len(self.moving)

    @property
    def bytes_between_hosts(self) -> int:
        source, target = self.source.places, self.target.places
        return self.tile_bytes * sum(source[t.source][0] != target[t.target][0] for t in self.tiles)

    @property
    def gathered_bytes(self) -> int:
        """Bytes that the target's devices receive from one another in the all-gathers."""
        piece = math.prod(_cut(self.shape, self.pieces, self.target.mesh_shape))
        whole = math.prod(local_shape(self.target.spec, self.shape, self.target.mesh_shape))
        return (whole - piece) * self.dtype.itemsize * len(self.target.places)


def plan_crossing(shape: Shape, dtype: np.dtype, source: Located, target: Located) -> Crossing:
    """Decide how a value that lies as `source` says comes to lie as `target` says."""
    for located in (source, target):
        _check(shape, located)
    pieces, gathers = _pieces(shape, source, target)
    counts = [
        math.lcm(sent, received)
        for sent, received in zip(
            _counts(source.dims(len(shape)), source.mesh_shape),
            _counts(pieces, target.mesh_shape),
            strict=True,
        )
    ]
    tile_shape = tuple(size // count for size, count in zip(shape, counts, strict=True))
    tiles = _assign(shape, tile_shape, source, target, pieces)
    return Crossing(
        shape=tuple(shape),
        dtype=np.dtype(dtype),
        source=source,
        target=target,
        tile_shape=tile_shape,
        tiles=tuple(tiles),
        pieces=pieces,
        gathers=gathers,
    )


def _check(shape: Shape, located: Located) -> None:
    names = tuple(f"axis{axis}" for axis in range(len(located.mesh_shape)))
    if PARTIAL in located.spec:
        raise ValueError(f"{to_text(located.spec, names)}: an unreduced sum does not cross meshes")
    if not fits(located.spec, shape, located.mesh_shape):
        raise ValueError(
            f"{to_text(located.spec, names)} on a mesh of {located.mesh_shape} does not divide {shape}"
        )


# What the target's devices receive


def _pieces(shape: Shape, source: Located, target: Located) -> tuple[Dims, tuple]:
    """The pieces of the target's devices, and the all-gathers that make shards of them."""
    whole = target.dims(len(shape))
    if not _pays(source, target):
        return whole, ()
    shard = local_shape(target.spec, shape, target.mesh_shape)
    axes = [
        axis
        for axis, (entry, size) in enumerate(zip(target.spec, target.mesh_shape, strict=True))
        if entry == REPLICATED and size > 1
    ]
    sent = _counts(source.dims(len(shape)), source.mesh_shape)

    def cost(added: tuple[int | None, ...]):
        received = _counts(_added(whole, axes, added), target.mesh_shape)
        tiles = math.prod(map(math.lcm, sent, received))
        return -math.prod(received), tiles, [len(shape) if dim is None else dim for dim in added]

    choices = itertools.product((None, *range(len(shape))), repeat=len(axes))
    added = min((c for c in choices if _divides(shard, axes, c, target.mesh_shape)), key=cost)
    gathers = [(axis, dim) for axis, dim in zip(axes, added, strict=True) if dim is not None]
    return _added(whole, axes, added), tuple(reversed(gathers))


def _pays(source: Located, target: Located) -> bool:
    """Whether splitting what the target's replicas receive sends less over the busiest link.

    Inside a host, s devices send to t: (t / s) of a piece leave each, or one piece arrives, and what was
    not sent is gathered. That is least for whole shards unless t > s.
    """
    if source.places == target.places:
        return False
    if len(source.hosts | target.hosts) > 1:
        return True
    return len(target.places) > len(source.places)


def _added(dims: Dims, axes: Sequence[int], added: Sequence[int | None]) -> Dims:
    """Split dims further, as minor axes: each device's piece is a part of its own shard."""
    extra = list(zip(axes, added, strict=True))
    return tuple((*held, *(axis for axis, to in extra if to == d)) for d, held in enumerate(dims))


def _divides(shard: Shape, axes: Sequence[int], added, mesh_shape: Shape) -> bool:
    counts = _counts(_added(((),) * len(shard), axes, added), mesh_shape)
    return all(size % count == 0 for size, count in zip(shard, counts, strict=True))


# Who sends it


def _assign(
    shape: Shape, tile_shape: Shape, source: Located, target: Located, pieces: Dims
) -> Iterator[Tile]:
    """Give every tile of every target device a source device: one that is the same device, or on the
    same host, or has sent least so far, in this order. Of equals, the one in the target's position."""
    rank = len(shape)
    shard = local_shape(source.spec, shape, source.mesh_shape)
    holders: dict[tuple[int, ...], list[int]] = {}
    for position, start in enumerate(_starts(shape, source.dims(rank), source.mesh_shape)):
        holders.setdefault(start, []).append(position)
    piece = _cut(shape, pieces, target.mesh_shape)
    sent: Counter[int] = Counter()
    for receiver, start in enumerate(_starts(shape, pieces, target.mesh_shape)):
        place = target.places[receiver]
        for corner in _corners(start, piece, tile_shape):
            home = tuple(c - c % size if size else 0 for c, size in zip(corner, shard, strict=True))
            sender = min(
                holders[home],
                key=lambda s: (
                    source.places[s] != place, source.places[s][0] != place[0], sent[s],
                    s != receiver, s,
                ),
            )  # fmt: skip
            sent[sender] += source.places[sender] != place
            yield Tile(sender, receiver, corner)


def _starts(shape: Shape, dims: Dims, mesh_shape: Shape) -> Iterator[tuple[int, ...]]:
    """The first index of every device's block."""
    block = _cut(shape, dims, mesh_shape)
    for coordinates in itertools.product(*map(range, mesh_shape)):
        numbers = (_number([coordinates[a] for a in axes], [mesh_shape[a] for a in axes])
                   for axes in dims)  # fmt: skip
        yield tuple(number * size for number, size in zip(numbers, block, strict=True))


def _number(digits: Sequence[int], bases: Sequence[int]) -> int:
    """The number that mixed-radix digits write, the first being the major one."""
    number = 0
    for digit, base in zip(digits, bases, strict=True):
        number = number * base + digit
    return number


def _corners(start: Sequence[int], block: Shape, tile: Shape) -> Iterator[tuple[int, ...]]:
    counts = _ratio(block, tile)
    for index in itertools.product(*map(range, counts)):
        yield tuple(s + i * size for s, i, size in zip(start, index, tile, strict=True))


def _counts(dims: Dims, mesh_shape: Shape) -> list[int]:
    return [math.prod(mesh_shape[axis] for axis in axes) for axes in dims]


def _cut(shape: Shape, dims: Dims, mesh_shape: Shape) -> Shape:
    return tuple(
        size // count for size, count in zip(shape, _counts(dims, mesh_shape), strict=True)
    )


def _ratio(block: Shape, tile: Shape) -> Shape:
    return tuple(b // t if t else 1 for b, t in zip(block, tile, strict=True))


# What it takes


def message_s(crossings: Iterable[Crossing], cluster: AnyCluster, mesh: LogicalMesh) -> float:
    """Seconds from the sending of a message until its values lie where the target wants them.

    Tiles travel together: the busiest host's network link, or the busiest device's link inside a host,
    takes the longest. Then come the all-gathers, one after the other.

    Args:
        crossings: all between the same two submeshes, each on hosts of one kind.
        mesh: the target's.
    """
    crossings = tuple(crossings)
    if not crossings:
        return 0.0
    ends = crossings[0].source.places[0][0], crossings[0].target.places[0][0]
    near, far = cluster.kind_of(ends[1:]).intra_host, cluster.link_between(*ends)
    inside, between = Counter(), Counter()
    gather_s = 0.0
    for crossing in crossings:
        for tile in crossing.moving:
            sender = crossing.source.places[tile.source]
            receiver = crossing.target.places[tile.target]
            if sender[0] == receiver[0]:
                inside.update({("out", sender): crossing.tile_bytes})
                inside.update({("in", receiver): crossing.tile_bytes})
            else:
                between.update({("out", sender[0]): crossing.tile_bytes})
                between.update({("in", receiver[0]): crossing.tile_bytes})
        gather_s += crossing_gather_s(crossing, mesh)
    return max(_busiest_s(inside, near), _busiest_s(between, far)) + gather_s


def crossing_gather_s(crossing: Crossing, mesh: LogicalMesh) -> float:
    """Seconds of the all-gathers that follow in the target."""
    held = math.prod(_cut(crossing.shape, crossing.pieces, crossing.target.mesh_shape))
    seconds = 0.0
    for axis, _ in crossing.gathers:
        held *= mesh.shape[axis]
        seconds += mesh.all_gather(axis, held * crossing.dtype.itemsize)
    return seconds


def _busiest_s(num_bytes: Counter, link: Link) -> float:
    if not num_bytes:
        return 0.0
    return link.send_s(max(num_bytes.values()))


def total_bytes(crossings: Iterable[Crossing]) -> int:
    """Bytes that a message takes from device to device, between the submeshes and in the gathers."""
    return sum(crossing.bytes_across + crossing.gathered_bytes for crossing in crossings)
