"""Sending values between submeshes, as `crossing.py` planned it: the interface, and one process's way.

A `Channel` carries one kind of message from one submesh to another. Everything is compiled when it is
opened; `send` and `receive` return at once, whether or not the values have been computed. `send` belongs to
the sender's instruction and `receive` to the receiver's, so that a submesh launches its programs in the
order of its own instructions: what is gathered on arrival waits in nobody's way.

`InProcess` reaches all devices (`host_transport` those of other processes). What it does not use is
`jax.device_put` from one sharding to another: where a piece of the target is no whole shard of the source,
that waits for the value, takes it to the host, and sends every replica its own copy.
"""

import abc
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding

from launcher.autopar.sharding.crossing import Crossing, Tile
from launcher.runtime.steps.crossing_ends import (
    Arrival,
    Departure,
    compiled_cut,
    compiled_join,
    in_a_row,
)
from launcher.runtime.steps.mailbox import Mailbox

Arrays = Mapping[Hashable, jax.Array]
Edge = tuple[int, int]
"""(from stage, to stage)"""


class Channel(abc.ABC):
    """The way of one kind of message from one submesh to another."""

    @abc.abstractmethod
    def send(self, values: Arrays, number: int) -> object:
        """Send the channel's values under a number that no other message of it has; gives arrays that
        are there when it has gone."""

    @abc.abstractmethod
    def receive(self, number: int) -> dict[Hashable, jax.Array]:
        """The values of a message, as the target wants them."""

    @abc.abstractmethod
    def hand_over(self, values: Arrays) -> dict[Hashable, jax.Array]:
        """Both at once, between stages of one submesh: from one sharding to another, or as they are."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where a number is made: on a stage, all of whose devices have it."""

    stage: int
    aval: jax.ShapeDtypeStruct


class Shared(abc.ABC):
    """Numbers of which each is made on one stage, and which all processes need."""

    @abc.abstractmethod
    def all_of(self, own: Mapping[str, jax.Array], number: int) -> dict[str, jax.Array]:
        """All of them, from those that are made here; `number` as in `Channel.send`."""


class Transport(abc.ABC):
    """Opens channels, and counts what goes through them."""

    @abc.abstractmethod
    def channel(
        self, kind: str, edge: Edge, source: Mesh | None, target: Mesh | None,
        crossings: Mapping[Hashable, Crossing],
    ) -> Channel:  # fmt: skip
        """Prepare everything for messages of these values between two stages.

        `kind` names what they are counted as. The mesh of a side that lies elsewhere is None.
        """

    @abc.abstractmethod
    def shared(self, kind: str, homes: Mapping[str, Home]) -> Shared:
        """Prepare everything to share these numbers."""

    @abc.abstractmethod
    def bytes_sent(self) -> dict[str, int]:
        """Bytes that went between submeshes so far, by kind of message; from here."""

    @property
    @abc.abstractmethod
    def num_unread(self) -> int:
        """How many messages have been sent inside this process and not been received."""

    @abc.abstractmethod
    def give_up(self) -> None:
        """Wake the threads that wait for a message of one that has failed."""


class InProcess(Transport):
    """All devices belong to this process."""

    def __init__(self):
        self._channels: list[tuple[str, InProcessChannel]] = []
        self.mailbox = Mailbox()

    def channel(
        self, kind: str, edge: Edge, source: Mesh | None, target: Mesh | None,
        crossings: Mapping[Hashable, Crossing],
    ) -> "InProcessChannel":  # fmt: skip
        opened = InProcessChannel(source, target, crossings, (kind, edge), self.mailbox)
        self._channels.append((kind, opened))
        return opened

    def shared(self, kind: str, homes: Mapping[str, Home]) -> "_AllHere":
        del kind, homes
        return _AllHere()

    def bytes_sent(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for kind, channel in self._channels:
            total[kind] += channel.num_sent * channel.message_bytes
        return dict(total)

    @property
    def num_unread(self) -> int:
        return len(self.mailbox)

    def give_up(self) -> None:
        self.mailbox.give_up()


class _AllHere(Shared):
    def all_of(self, own: Mapping[str, jax.Array], number: int) -> dict[str, jax.Array]:
        del number
        return dict(own)


class InProcessChannel(Channel):
    """Cut on the source, move by one `jax.device_put`, join and gather on the target.

    Cutting is left out for values whose tiles are whole shards, the last step for those that arrive as they
    are wanted.

    Attributes:
        message_bytes: what one message takes from device to device, added up from what is moved.
        num_sent: messages so far.
    """

    def __init__(
        self, source: Mesh, target: Mesh, crossings: Mapping[Hashable, Crossing],
        name: Hashable, mailbox: Mailbox,
    ):  # fmt: skip
        self._name, self._mailbox = name, mailbox
        self._ways = {name: _Way(c, source, target) for name, c in crossings.items()}
        self._cut_names = [name for name, way in self._ways.items() if way.departure.is_cut]
        self._joined_names = [name for name, way in self._ways.items() if way.arrival.is_joined]
        self._cut = compiled_cut([self._ways[n].departure for n in self._cut_names], source)
        self._join = compiled_join([self._ways[n].arrival for n in self._joined_names], target)
        self._parcels = [(n, parcel) for n, way in self._ways.items() for parcel in way.parcels]
        self._destinations = [parcel.destination for _, parcel in self._parcels]
        self._is_direct = all(way.is_direct for way in self._ways.values())
        self.message_bytes = sum(parcel.num_bytes for _, parcel in self._parcels)
        self.num_sent = 0

    def send(self, values: Arrays, number: int) -> object:
        message = self._move(values)
        self._mailbox.post((self._name, number), message)
        return message

    def receive(self, number: int) -> dict[Hashable, jax.Array]:
        return self._land(self._mailbox.take((self._name, number)))

    def hand_over(self, values: Arrays) -> dict[Hashable, jax.Array]:
        return self._land(self._move(values))

    def _move(self, values: Arrays) -> object:
        if self.num_sent == 0:  # the first message is looked at
            for name, way in self._ways.items():
                way.departure.check(name, values[name])
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

    def _land(self, message: object) -> dict[Hashable, jax.Array]:
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
        return array if self.shard is None else shard_of(array, self.shard)


class _Way:
    """How one value crosses inside this process: its two ends, the parcels, what becomes of them."""

    def __init__(self, crossing: Crossing, source: Mesh, target: Mesh):
        self.crossing, self.source_mesh, self.target_mesh = crossing, source, target
        self.departure, self.arrival = Departure(crossing, source), Arrival(crossing, target)
        self.parcels = self._parcels()
        self._is_home = not self.parcels and self.departure.shipped == self.arrival.wanted
        arriving = [sharding for _, sharding in self.arrival.arriving]
        self._has_landed = [p.destination for p in self.parcels] == arriving
        is_whole = not (self.departure.is_cut or self.arrival.is_joined)
        self.is_direct = self._has_landed and is_whole
        self._landings = self._landed_from()

    def _parcels(self) -> list[_Parcel]:
        """A slot goes as one array if every device sends to another one, else tile by tile."""
        tile_bytes = self.crossing.tile_bytes
        devices = list(self.target_mesh.devices.flat)
        disjoint = not set(devices) & set(self.source_mesh.devices.flat)
        parcels = []
        for slot, tiles in enumerate(self.departure.slots):
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
        shape, spec = self.crossing.shape, self.departure.shipped.spec
        if self.departure.is_cut:
            shape, spec = in_a_row(self.crossing.tile_shape, self.source_mesh)
        chosen = self.target_mesh.devices.flatten()[order].reshape(self.source_mesh.devices.shape)
        mirrored = NamedSharding(Mesh(chosen, self.source_mesh.axis_names), spec)
        same_shape, there = self.arrival.arriving[0]
        alike = (
            len(self.departure.slots) == len(self.arrival.arriving) == 1
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
            for tile in self.departure.slots[parcel.slot]:
                if self.crossing.stays(tile):
                    continue
                if parcel.shard is None:
                    taken[tile] = number, 0, tile.source
                elif (tile.source, parcel.destination) == (parcel.shard, self._device(tile)):
                    taken[tile] = number, 0, 0
        for slot, tiles in enumerate(self.departure.slots):
            taken |= {t: (None, slot, t.source) for t in tiles if self.crossing.stays(t)}
        return [
            [taken[tile] for tile in self.arrival.tiles(number)]
            for number in range(len(self.arrival.arriving))
        ]

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
                    shard_of(made[slot] if parcel is None else moved[parcel], shard)
                    for parcel, slot, shard in landing
                ],
            )
            for (shape, sharding), landing in zip(
                self.arrival.arriving, self._landings, strict=True
            )
        ]


def shard_of(array: jax.Array, number: int) -> jax.Array:
    """What one device of this process holds, the devices in the order of the array's mesh.

    Of a replicated array `addressable_data` is always the first one's.
    """
    if number and array.is_fully_replicated:
        return array.addressable_shards[number].data
    return array.addressable_data(number)
