"""Sending values between submeshes, as `autopar.crossing` planned it.

A `Channel` carries one kind of message from one submesh to another. Everything is compiled when it is
opened; `send` and `receive` return at once, whether or not the values have been computed. `send` belongs to
the sender's instruction and `receive` to the receiver's, so that a submesh launches its programs in the
order of its own instructions: what is gathered on arrival waits in nobody's way.

`InProcess` reaches all devices. What it does not use is `jax.device_put` from one sharding to another: where
a piece of the target is no whole shard of the source, that waits for the value, takes it to the host, and
sends every replica its own copy.
"""

import abc
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launcher.autopar.crossing import Crossing, Tile
from launcher.autopar.spec import to_partition_spec

Arrays = Mapping[Hashable, jax.Array]


class Channel(abc.ABC):
    """The way of one kind of message from one submesh to another."""

    @abc.abstractmethod
    def send(self, values: Arrays) -> object:
        """Send the channel's values; the message is for `receive` on the other side."""

    @abc.abstractmethod
    def receive(self, message: object) -> dict[Hashable, jax.Array]:
        """The values of a message, as the target wants them."""


class Transport(abc.ABC):
    """Opens channels, and counts what goes through them."""

    @abc.abstractmethod
    def channel(
        self, kind: str, source: Mesh, target: Mesh, crossings: Mapping[Hashable, Crossing]
    ) -> Channel:
        """Prepare everything for messages of these values; `kind` names what they are counted as."""

    @abc.abstractmethod
    def bytes_sent(self) -> dict[str, int]:
        """Bytes that went between submeshes so far, by kind of message."""


class InProcess(Transport):
    """All devices belong to this process."""

    def __init__(self):
        self._channels: list[tuple[str, InProcessChannel]] = []

    def channel(
        self, kind: str, source: Mesh, target: Mesh, crossings: Mapping[Hashable, Crossing]
    ) -> "InProcessChannel":
        opened = InProcessChannel(source, target, crossings)
        self._channels.append((kind, opened))
        return opened

    def bytes_sent(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for kind, channel in self._channels:
            total[kind] += channel.num_sent * channel.message_bytes
        return dict(total)


class InProcessChannel(Channel):
    """Cut on the source, move by one `jax.device_put`, join and gather on the target.

    Cutting is left out for values whose tiles are whole shards, the last step for those that arrive as they
    are wanted.

    Attributes:
        message_bytes: what one message takes from device to device, added up from what is moved.
        num_sent: messages so far.
    """

    def __init__(self, source: Mesh, target: Mesh, crossings: Mapping[Hashable, Crossing]):
        self._ways = {name: _Way(c, source, target) for name, c in crossings.items()}
        self._cut_names = [name for name, way in self._ways.items() if way.is_cut]
        self._joined_names = [name for name, way in self._ways.items() if way.is_joined]
        self._cut = _compiled_cut([self._ways[n] for n in self._cut_names], source)
        self._join = _compiled_join([self._ways[n] for n in self._joined_names], target)
        self._parcels = [(n, parcel) for n, way in self._ways.items() for parcel in way.parcels]
        self._destinations = [parcel.destination for _, parcel in self._parcels]
        self._is_direct = all(way.is_direct for way in self._ways.values())
        self.message_bytes = sum(parcel.num_bytes for _, parcel in self._parcels)
        self.num_sent = 0

    def send(self, values: Arrays) -> object:
        if self.num_sent == 0:
            self._check(values)
        self.num_sent += 1
        if self._is_direct:
            return jax.device_put([values[name] for name in self._ways], self._destinations)
        made = {name: (values[name],) for name in self._ways}
        if self._cut is not None:
            cut = self._cut([values[name] for name in self._cut_names])
            made.update(zip(self._cut_names, cut, strict=True))
        posted = [parcel.taken_from(made[name]) for name, parcel in self._parcels]
        moved = iter(jax.device_put(posted, self._destinations) if posted else ())
        return {
            name: way.landed(made[name], [next(moved) for _ in way.parcels])
            for name, way in self._ways.items()
        }

    def _check(self, values: Arrays) -> None:
        """The first message is looked at: shards of another sharding would be taken for tiles."""
        for name, way in self._ways.items():
            lies = values[name].sharding
            if not lies.is_equivalent_to(way.shipped, values[name].ndim):
                raise ValueError(
                    f"{name} lies as {lies}, this channel was opened for {way.shipped}"
                )

    def receive(self, message: object) -> dict[Hashable, jax.Array]:
        if self._is_direct:
            return dict(zip(self._ways, message, strict=True))
        joined = {}
        if self._join is not None:
            joined = zip(
                self._joined_names,
                self._join([message[name] for name in self._joined_names]),
                strict=True,
            )
        arrived = {name: arrays[0] for name, arrays in message.items()}
        return arrived | dict(joined)


@dataclass(frozen=True, slots=True)
class _Parcel:
    """One array to be moved: all shards of what the source made, each to a device of its own, or one.

    `slot` says which of the arrays that the source made, `shard` which shard of it; None for all.
    """

    slot: int
    shard: int | None
    destination: NamedSharding | jax.Device
    num_bytes: int

    def taken_from(self, made: Sequence[jax.Array]) -> jax.Array:
        array = made[self.slot]
        return array if self.shard is None else _shard(array, self.shard)


class _Way:
    """How one value crosses: the arrays made of it on the source, the parcels, what becomes of them.

    On the source the i-th tiles of all devices are slot i: one array, split over all devices. On the target
    the i-th tiles of all pieces are one array again. A value whose tiles are whole shards has one slot,
    itself; if every tile is a whole piece, they are the value as it lies on arrival.
    """

    def __init__(self, crossing: Crossing, source: Mesh, target: Mesh):
        self.crossing, self.source_mesh, self.target_mesh = crossing, source, target
        rank = len(crossing.shape)
        self.shipped = NamedSharding(
            source, to_partition_spec(crossing.source.spec, rank, source.axis_names)
        )
        self.wanted = NamedSharding(
            target, to_partition_spec(crossing.target.spec, rank, target.axis_names)
        )
        self.is_cut = max(crossing.tiles_per_shard, default=1) > 1
        self.is_joined = bool(crossing.gathers) or max(crossing.tiles_per_piece, default=1) > 1
        self.slots = _slots(crossing.tiles, self.is_cut)
        self.arriving = self._arriving()
        self.parcels = self._parcels()
        self._is_home = not self.parcels and self.shipped == self.wanted
        self._has_landed = [p.destination for p in self.parcels] == [s for _, s in self.arriving]
        self.is_direct = self._has_landed and not (self.is_cut or self.is_joined)
        self._landings = self._landed_from()

    def _arriving(self) -> list[tuple[tuple[int, ...], NamedSharding]]:
        """Shape and sharding of the arrays that arrive on the target."""
        crossing, names = self.crossing, self.target_mesh.axis_names
        count = len(crossing.tiles) // self.target_mesh.size
        if count > 1:
            shape, spec = _in_a_row(crossing.tile_shape, self.target_mesh)
            return [(shape, NamedSharding(self.target_mesh, spec))] * count
        dims = [tuple(names[axis] for axis in axes) or None for axes in crossing.pieces]
        if not crossing.gathers:
            return [(crossing.shape, self.wanted)]
        return [(crossing.shape, NamedSharding(self.target_mesh, PartitionSpec(*dims)))]

    def _parcels(self) -> list[_Parcel]:
        """A slot goes as one array if every device sends to another one, else tile by tile."""
        tile_bytes = self.crossing.tile_bytes
        devices = list(self.target_mesh.devices.flat)
        disjoint = not set(devices) & set(self.source_mesh.devices.flat)
        parcels = []
        for slot, tiles in enumerate(self.slots):
            moving = [tile for tile in tiles if not self.crossing.stays(tile)]
            receivers = {tile.source: tile.target for tile in moving}
            everybody = len(receivers) == len(set(receivers.values())) == self.source_mesh.size
            if disjoint and everybody and len(moving) == len(receivers):
                order = [receivers[sender] for sender in range(self.source_mesh.size)]
                num_bytes = tile_bytes * len(moving)
                parcels.append(_Parcel(slot, None, self._mirrored(order), num_bytes))
            else:
                parcels += [_Parcel(slot, t.source, devices[t.target], tile_bytes) for t in moving]
        return parcels

    def _mirrored(self, order: list[int]) -> NamedSharding:
        """The sharding of a slot on the devices that receive it: shard by shard as on the source.

        Where it is a sharding of the target already, it is that one.
        """
        shape, spec = self.crossing.shape, self.shipped.spec
        if self.is_cut:
            shape, spec = _in_a_row(self.crossing.tile_shape, self.source_mesh)
        chosen = self.target_mesh.devices.flatten()[order].reshape(self.source_mesh.devices.shape)
        mirrored = NamedSharding(Mesh(chosen, self.source_mesh.axis_names), spec)
        same_shape, there = self.arriving[0]
        alike = (
            len(self.slots) == len(self.arriving) == 1
            and order == list(range(self.target_mesh.size))
            and same_shape == shape
            and there.is_equivalent_to(mirrored, len(shape))
        )
        return there if alike else mirrored

    def _landed_from(self) -> list[list[tuple[int | None, int, int]]]:
        """For every array that arrives, and each of its shards in turn, where it comes from:
        (parcel, shard of it), or (None, slot, shard of it) for a tile that stays where it is."""
        taken = {}
        for number, parcel in enumerate(self.parcels):
            for tile in self.slots[parcel.slot]:
                if self.crossing.stays(tile):
                    continue
                if parcel.shard is None:
                    taken[tile] = number, 0, tile.source
                elif (tile.source, parcel.destination) == (parcel.shard, self._device(tile)):
                    taken[tile] = number, 0, 0
        for slot, tiles in enumerate(self.slots):
            taken |= {t: (None, slot, t.source) for t in tiles if self.crossing.stays(t)}
        count = len(self.arriving)
        return [[taken[tile] for tile in self.crossing.tiles[i::count]] for i in range(count)]

    def _device(self, tile: Tile) -> jax.Device:
        return self.target_mesh.devices.flat[tile.target]

    def landed(self, made: Sequence[jax.Array], moved: Sequence[jax.Array]) -> list[jax.Array]:
        """Put what was moved together: arrays on the target mesh, shard by shard."""
        if self._has_landed or self._is_home:
            return list(moved) or list(made)
        return [
            jax.make_array_from_single_device_arrays(
                shape,
                sharding,
                [
                    _shard(made[slot] if parcel is None else moved[parcel], shard)
                    for parcel, slot, shard in landing
                ],
            )
            for (shape, sharding), landing in zip(self.arriving, self._landings, strict=True)
        ]

    # What the compiled programs do with this value, on one device

    def cut_local(self, shard: jax.Array) -> list[jax.Array]:
        """The tiles that this device sends."""
        names = self.source_mesh.axis_names
        starts = np.zeros((len(self.slots), self.source_mesh.size, shard.ndim), np.int32)
        for slot, tiles in enumerate(self.slots):
            for tile in tiles:
                starts[slot, tile.source] = np.remainder(tile.start, shard.shape)
        here = jnp.asarray(starts)[:, lax.axis_index(names)]
        return [
            lax.dynamic_slice(shard, list(here[slot]), self.crossing.tile_shape)
            for slot in range(len(self.slots))
        ]

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
            piece = lax.all_gather(piece, self.target_mesh.axis_names[axis], axis=dim, tiled=True)
        return piece


def _shard(array: jax.Array, number: int) -> jax.Array:
    """What one device holds. Of a replicated array `addressable_data` is always the first one's."""
    if number and array.is_fully_replicated:
        return array.addressable_shards[number].data
    return array.addressable_data(number)


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


def _in_a_row(tile_shape: tuple[int, ...], mesh: Mesh) -> tuple[tuple[int, ...], PartitionSpec]:
    """Shape and spec of an array that has one tile on every device, one after the other."""
    return (mesh.size * tile_shape[0], *tile_shape[1:]), PartitionSpec(mesh.axis_names)


def _compiled_cut(ways: Sequence[_Way], mesh: Mesh) -> jax.stages.Compiled | None:
    """[value] -> [[slot]], for all values of a message at once."""
    if not ways:
        return None

    def cut(shards):
        return [way.cut_local(shard) for way, shard in zip(ways, shards, strict=True)]

    in_specs = ([way.shipped.spec for way in ways],)
    out_specs = [[PartitionSpec(mesh.axis_names)] * len(way.slots) for way in ways]
    arguments = [_abstract(w.crossing.shape, w.crossing.dtype, w.shipped) for w in ways]
    return _compiled(cut, mesh, in_specs, out_specs, arguments)


def _compiled_join(ways: Sequence[_Way], mesh: Mesh) -> jax.stages.Compiled | None:
    """[[what arrived]] -> [value]."""
    if not ways:
        return None

    def join(arrived):
        return [way.join_local(tiles) for way, tiles in zip(ways, arrived, strict=True)]

    in_specs = ([[sharding.spec for _, sharding in way.arriving] for way in ways],)
    arguments = [[_abstract(s, w.crossing.dtype, at) for s, at in w.arriving] for w in ways]
    return _compiled(join, mesh, in_specs, [way.wanted.spec for way in ways], arguments)


def _abstract(shape, dtype, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _compiled(function, mesh: Mesh, in_specs, out_specs, arguments) -> jax.stages.Compiled:
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped).lower(arguments).compile()
