"""The two ends of a crossing: what a submesh cuts of a value that goes, and makes of what arrives.

On the source the i-th tiles of all devices are slot i: one array, split over all devices. On the target the
i-th tiles of all pieces are one array again. A value whose tiles are whole shards has one slot, itself; if
every tile is a whole piece, what arrives is the value as it lies then, but for the all-gathers. Each end
needs only the mesh of its own side. What lies between the two is the transport's.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launcher.autopar.sharding.crossing import Crossing, Tile
from launcher.autopar.sharding.spec import to_partition_spec


class Departure:
    """How a value leaves: as it lies, or cut into slots.

    Attributes:
        shipped: where the value lies.
        slots: the tiles of each array that is made of it.
    """

    def __init__(self, crossing: Crossing, mesh: Mesh):
        self.crossing, self.mesh = crossing, mesh
        spec = to_partition_spec(crossing.source.spec, len(crossing.shape), mesh.axis_names)
        self.shipped = NamedSharding(mesh, spec)
        self.is_cut = max(crossing.tiles_per_shard, default=1) > 1
        self.slots = _slots(crossing.tiles, self.is_cut)

    def check(self, name: object, value: jax.Array) -> None:
        """Raise ValueError for a value that lies otherwise: its shards would be taken for tiles."""
        if not value.sharding.is_equivalent_to(self.shipped, value.ndim):
            raise ValueError(
                f"{name} lies as {value.sharding}, this channel was opened for {self.shipped}"
            )

    def cut_local(self, shard: jax.Array) -> list[jax.Array]:
        """The tiles that this device sends."""
        names = self.mesh.axis_names
        starts = np.zeros((len(self.slots), self.mesh.size, shard.ndim), np.int32)
        for slot, tiles in enumerate(self.slots):
            for tile in tiles:
                starts[slot, tile.source] = np.remainder(tile.start, shard.shape)
        here = jnp.asarray(starts)[:, lax.axis_index(names)]
        return [
            lax.dynamic_slice(shard, list(here[slot]), self.crossing.tile_shape)
            for slot in range(len(self.slots))
        ]


class Arrival:
    """How a value arrives: as arrays of tiles, which are joined and gathered where that is needed.

    Attributes:
        wanted: where the value is to lie.
        arriving: shape and sharding of the arrays that arrive.
    """

    def __init__(self, crossing: Crossing, mesh: Mesh):
        self.crossing, self.mesh = crossing, mesh
        spec = to_partition_spec(crossing.target.spec, len(crossing.shape), mesh.axis_names)
        self.wanted = NamedSharding(mesh, spec)
        self.is_joined = bool(crossing.gathers) or max(crossing.tiles_per_piece, default=1) > 1
        self.arriving = self._arriving()

    def _arriving(self) -> list[tuple[tuple[int, ...], NamedSharding]]:
        crossing, names = self.crossing, self.mesh.axis_names
        count = len(crossing.tiles) // self.mesh.size
        if count > 1:
            shape, spec = in_a_row(crossing.tile_shape, self.mesh)
            return [(shape, NamedSharding(self.mesh, spec))] * count
        dims = [tuple(names[axis] for axis in axes) or None for axes in crossing.pieces]
        if not crossing.gathers:
            return [(crossing.shape, self.wanted)]
        return [(crossing.shape, NamedSharding(self.mesh, PartitionSpec(*dims)))]

    def tiles(self, number: int) -> Sequence[Tile]:
        """The tiles of an array that arrives, by target device."""
        return self.crossing.tiles[number :: len(self.arriving)]

    def join_local(self, tiles: Sequence[jax.Array]) -> jax.Array:
        """This device's shard, of the tiles that it was sent."""
        blocks = list(tiles)
        counts = self.crossing.tiles_per_piece
        for dim in reversed(range(len(counts))):
            n = counts[dim]
            blocks = [
                lax.concatenate(blocks[i : i + n], dim) if n > 1 else blocks[i]
                for i in range(0, len(blocks), n)
            ]
        [piece] = blocks
        for axis, dim in self.crossing.gathers:
            piece = lax.all_gather(piece, self.mesh.axis_names[axis], axis=dim, tiled=True)
        return piece


def _slots(tiles: Sequence[Tile], is_cut: bool) -> list[list[Tile]]:
    """The tiles of each slot: at most one block of every source device, for whomever it is sent to."""
    if not is_cut:
        return [list(tiles)]
    blocks: dict[int, dict[tuple[int, ...], int]] = {}
    slots: list[list[Tile]] = []
    for tile in tiles:
        own = blocks.setdefault(tile.source, {})
        slot = own.setdefault(tile.start, len(own))
        if slot == len(slots):
            slots.append([])
        slots[slot].append(tile)
    return slots


def in_a_row(tile_shape: tuple[int, ...], mesh: Mesh) -> tuple[tuple[int, ...], PartitionSpec]:
    """Shape and spec of an array that has one tile on every device, one after the other."""
    return (mesh.size * tile_shape[0], *tile_shape[1:]), PartitionSpec(mesh.axis_names)


def compiled_cut(ends: Sequence[Departure], mesh: Mesh) -> jax.stages.Compiled | None:
    """[value] -> [[slot]], for all values of a message at once; None if there are none."""
    if not ends:
        return None

    def cut(shards):
        return [end.cut_local(shard) for end, shard in zip(ends, shards, strict=True)]

    in_specs = ([end.shipped.spec for end in ends],)
    out_specs = [[PartitionSpec(mesh.axis_names)] * len(end.slots) for end in ends]
    arguments = [_abstract(e.crossing.shape, e.crossing.dtype, e.shipped) for e in ends]
    return _compiled(cut, mesh, in_specs, out_specs, arguments)


def compiled_join(ends: Sequence[Arrival], mesh: Mesh) -> jax.stages.Compiled | None:
    """[[what arrived]] -> [value], for all values of a message at once; None if there are none."""
    if not ends:
        return None

    def join(arrived):
        return [end.join_local(tiles) for end, tiles in zip(ends, arrived, strict=True)]

    in_specs = ([[sharding.spec for _, sharding in end.arriving] for end in ends],)
    arguments = [[_abstract(s, e.crossing.dtype, at) for s, at in e.arriving] for e in ends]
    return _compiled(join, mesh, in_specs, [end.wanted.spec for end in ends], arguments)


def _abstract(shape, dtype, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _compiled(function, mesh: Mesh, in_specs, out_specs, arguments) -> jax.stages.Compiled:
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped).lower(arguments).compile()
