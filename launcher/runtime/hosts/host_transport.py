"""Sending values to stages of other processes: shard by shard, by the tiles of `autopar.sharding.crossing`.

What a sender's devices hold for the devices of one host goes as one message, and is pulled at once: so each
byte goes over the network once. Cutting before, joining and gathering after, are those of one process
(`crossing_ends`), on the devices that this process has of the submesh. Between stages that lie wholly in
this process values go as in one process.

All processes open the same channels in the sense that both ends number their messages alike: a message is
known by its kind, its stages, its number, and the two hosts.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from launcher.autopar.sharding.crossing import Crossing, Tile
from launcher.runtime.hosts.post_office import PostOffice
from launcher.runtime.steps.crossing_ends import Arrival, Departure, compiled_cut, compiled_join
from launcher.runtime.steps.mailbox import Mailbox
from launcher.runtime.steps.transport import (
    Arrays,
    Channel,
    Edge,
    Home,
    InProcess,
    Shared,
    Transport,
    shard_of,
)

KINDS = (
    "activation", "cotangent", "tied gradient", "tied parameter", "norm", "evaluation", "report",
    "evaluation loss", "clock",
)  # fmt: skip
# What the sender's next step donates, while a receiver may still read it.
_COPIED = "tied parameter"


class HostTransport(Transport):
    """The channels of one host's process.

    Args:
        stage_hosts: by stage, the hosts that it lies on.
        submesh_of: by stage.
        office: None if all stages lie on the same hosts.
        doing: says what is being dispatched.
    """

    def __init__(
        self, stage_hosts: Sequence[Sequence[int]], submesh_of: Sequence[int], host: int,
        num_hosts: int, office: PostOffice | None, doing: Callable[[], str],
    ):  # fmt: skip
        self._stage_hosts, self._submesh_of = stage_hosts, submesh_of
        self._host, self._num_hosts, self._office, self._doing = host, num_hosts, office, doing
        self._inside = InProcess()

    def channel(
        self, kind: str, edge: Edge, source: Mesh | None, target: Mesh | None,
        crossings: Mapping[Hashable, Crossing],
    ) -> Channel:  # fmt: skip
        if source is not None and target is not None:
            if _is_here(source) and _is_here(target):
                return self._inside.channel(kind, edge, source, target, crossings)
            if source.devices.flatten().tolist() == target.devices.flatten().tolist():
                ticket = kind, edge
                return _SameDevices(source, target, crossings, ticket, self._inside.mailbox)
        line = self._line(kind, edge)
        # Any order that all processes agree on.
        ordered = {name: crossings[name] for name in sorted(crossings, key=str)}
        return HostChannel(line, source, target, ordered, self._inside.mailbox)

    def _line(self, kind: str, edge: Edge) -> "_Line":
        submesh = self._submesh_of[edge[1]]
        return _Line(self._office, kind, edge, submesh, len(self._stage_hosts), self._doing)

    def shared(self, kind: str, homes: Mapping[str, Home]) -> "SharedNumbers":
        by_stage: dict[int, dict[str, Home]] = defaultdict(dict)
        for name, home in sorted(homes.items()):
            by_stage[home.stage][name] = home
        return SharedNumbers(
            [
                _SharedOfStage(self._line(kind, (stage, stage)), self._host, hosts, others, own)
                for stage, own in by_stage.items()
                if (hosts := self._stage_hosts[stage])
                and (others := [h for h in range(self._num_hosts) if h not in hosts])
            ]
        )

    def from_first_host(self, own: jax.Array, number: int) -> jax.Array:
        """A number of the first host, on this one."""
        line = self._line("clock", (0, 0))
        if self._host != 0:
            here = SingleDeviceSharding(jax.local_devices()[0])
            like = jax.ShapeDtypeStruct(own.shape, own.dtype, sharding=here)
            return line.pull(0, number, [like])[0]
        for other in range(1, self._num_hosts):
            line.post(other, number, [own])
        return own

    def bytes_sent(self) -> dict[str, int]:
        sent = self._inside.bytes_sent()
        for kind, num_bytes in (self._office.bytes_sent() if self._office else {}).items():
            sent[kind] = sent.get(kind, 0) + num_bytes
        return sent

    @property
    def num_unread(self) -> int:
        return self._inside.num_unread

    def give_up(self) -> None:
        self._inside.give_up()


@dataclass(frozen=True, slots=True)
class _Line:
    """A kind of message between two stages, as the post office knows it."""

    office: PostOffice
    kind: str
    edge: Edge
    submesh: int  # of the receiver
    num_stages: int
    doing: Callable[[], str]

    def post(self, to_host: int, number: int, arrays: Sequence[jax.Array]) -> None:
        self.office.post(self.kind, to_host, self._number(number), arrays)

    def pull(
        self, from_host: int, number: int, wanted: Sequence[jax.ShapeDtypeStruct]
    ) -> list[jax.Array]:
        pulled = self.office.pull(from_host, self._number(number), wanted)
        text = f"{self.doing()}: the {self.kind} of stage {self.edge[0]} from host {from_host}"
        self.office.arrivals.expected(self.submesh, text, pulled)
        return pulled

    def _number(self, number: int) -> int:
        kind = KINDS.index(self.kind)
        number = number * len(KINDS) + kind
        for stage in self.edge:
            number = number * self.num_stages + stage
        return number


def _is_here(mesh: Mesh) -> bool:
    here = set(jax.local_devices())
    return all(device in here for device in mesh.devices.flat)


class _SameDevices(Channel):
    """Between stages of one submesh that several processes share: XLA reshards."""

    def __init__(
        self, source: Mesh, target: Mesh, crossings: Mapping[Hashable, Crossing], name: Hashable,
        mailbox: Mailbox,
    ):  # fmt: skip
        self._name, self._mailbox = name, mailbox
        given, wanted = {}, {}
        for key, crossing in crossings.items():
            where = Departure(crossing, source).shipped
            given[key] = jax.ShapeDtypeStruct(crossing.shape, crossing.dtype, sharding=where)
            wanted[key] = Arrival(crossing, target).wanted
        # A list: names may be of kinds that cannot be sorted.
        self._names = list(given)
        whole = jax.jit(lambda values: list(values), out_shardings=list(wanted.values()))
        self._reshard = whole.lower(list(given.values())).compile()

    def send(self, values: Arrays, number: int) -> object:
        moved = self.hand_over(values)
        self._mailbox.post((self._name, number), moved)
        return moved

    def receive(self, number: int) -> dict[Hashable, jax.Array]:
        return self._mailbox.take((self._name, number))

    def hand_over(self, values: Arrays) -> dict[Hashable, jax.Array]:
        made = self._reshard([values[name] for name in self._names])
        return dict(zip(self._names, made, strict=True))


Row = tuple[Hashable, Tile]
"""One tile of one value."""


class HostChannel(Channel):
    """Cut, post by receiving host; pull by sending host, join and gather.

    A mesh that lies wholly elsewhere is None. Both ends list the tiles that go from one host to another in
    the same order.
    """

    def __init__(
        self, line: _Line, source: Mesh | None, target: Mesh | None,
        crossings: Mapping[Hashable, Crossing], mailbox: Mailbox,
    ):  # fmt: skip
        self._line, self._mailbox, self._host = line, mailbox, line.office.host
        self._ticket = line.kind, line.edge
        self._rows: dict[tuple[int, int], list[Row]] = defaultdict(list)
        for name, crossing in crossings.items():
            for tile in crossing.tiles:
                pair = (
                    crossing.source.places[tile.source][0],
                    crossing.target.places[tile.target][0],
                )
                self._rows[pair].append((name, tile))
        self._sends = source and _Sending(crossings, source, self._leaving())
        self._receives = target and _Receiving(crossings, target, self._coming())

    def _leaving(self) -> dict[int, list[Row]]:
        return {to: rows for (here, to), rows in self._rows.items() if here == self._host}

    def _coming(self) -> dict[int, list[Row]]:
        return {come: rows for (come, here), rows in self._rows.items() if here == self._host}

    def send(self, values: Arrays, number: int) -> object:
        if self._line.kind == _COPIED:
            values = {name: jnp.copy(values[name]) for name in self._sends.names}
        tiles = self._sends.tiles(values)
        for host, arrays in tiles.items():
            if host == self._host:
                self._mailbox.post((self._ticket, number), arrays)
            else:
                self._line.post(host, number, arrays)
        return list(tiles.values())

    def receive(self, number: int) -> dict[Hashable, jax.Array]:
        arrived = {}
        for host, wanted in self._receives.wanted.items():
            if host == self._host:
                tiles = self._mailbox.take((self._ticket, number))
                devices = [like.sharding for like in wanted]
                arrived[host] = jax.device_put(tiles, devices)
            else:
                arrived[host] = self._line.pull(host, number, wanted)
        return self._receives.values(arrived)

    def hand_over(self, values: Arrays) -> dict[Hashable, jax.Array]:
        raise NotImplementedError("stages of one submesh share its processes")


class _Sending:
    """The source's side: values -> tiles by receiving host."""

    def __init__(
        self, crossings: Mapping[Hashable, Crossing], mesh: Mesh, leaving: Mapping[int, list[Row]]
    ):
        self._ends = {name: Departure(c, mesh) for name, c in crossings.items()}
        self.names = list(self._ends)
        self._cut_names = [name for name, end in self._ends.items() if end.is_cut]
        self._cut = compiled_cut([self._ends[name] for name in self._cut_names], mesh)
        slots = {
            (name, tile): slot
            for name, end in self._ends.items()
            for slot, tiles in enumerate(end.slots)
            for tile in tiles
        }
        places = _local_numbers(mesh)
        self._picks = {
            host: [(name, slots[name, tile], places[tile.source]) for name, tile in rows]
            for host, rows in leaving.items()
        }
        self._checked = False

    def tiles(self, values: Arrays) -> dict[int, list[jax.Array]]:
        if not self._checked:
            for name, end in self._ends.items():
                end.check(name, values[name])
            self._checked = True
        made = {name: (values[name],) for name in self._ends}
        if self._cut is not None:
            cut = self._cut([values[name] for name in self._cut_names])
            made.update(zip(self._cut_names, cut, strict=True))
        return {
            host: [shard_of(made[name][slot], number) for name, slot, number in picks]
            for host, picks in self._picks.items()
        }


class _Receiving:
    """The target's side: tiles by sending host -> values.

    Attributes:
        wanted: by sending host, the tiles that this process gets from there.
    """

    def __init__(
        self, crossings: Mapping[Hashable, Crossing], mesh: Mesh, coming: Mapping[int, list[Row]]
    ):
        self._ends = {name: Arrival(c, mesh) for name, c in crossings.items()}
        self._joined_names = [name for name, end in self._ends.items() if end.is_joined]
        self._join = compiled_join([self._ends[name] for name in self._joined_names], mesh)
        devices = mesh.devices.flatten()
        self.wanted = {
            host: [
                jax.ShapeDtypeStruct(
                    crossings[name].tile_shape, crossings[name].dtype,
                    sharding=SingleDeviceSharding(devices[tile.target]),
                )
                for name, tile in rows
            ]
            for host, rows in coming.items()
        }  # fmt: skip
        where = {row: (host, i) for host, rows in coming.items() for i, row in enumerate(rows)}
        local = list(_local_numbers(mesh))
        self._landings = {
            name: [
                [where[name, end.tiles(number)[position]] for position in local]
                for number in range(len(end.arriving))
            ]
            for name, end in self._ends.items()
        }

    def values(self, arrived: Mapping[int, Sequence[jax.Array]]) -> dict[Hashable, jax.Array]:
        landed = {
            name: [
                jax.make_array_from_single_device_arrays(
                    shape, sharding, [arrived[host][i] for host, i in landing]
                )
                for (shape, sharding), landing in zip(
                    end.arriving, self._landings[name], strict=True
                )
            ]
            for name, end in self._ends.items()
        }
        found = {name: arrays[0] for name, arrays in landed.items()}
        if self._join is not None:
            joined = self._join([landed[name] for name in self._joined_names])
            found.update(zip(self._joined_names, joined, strict=True))
        return found


def _local_numbers(mesh: Mesh) -> dict[int, int]:
    """Position in the mesh -> number among this process's devices of it."""
    here = set(jax.local_devices())
    positions = [i for i, device in enumerate(mesh.devices.flat) if device in here]
    return {position: number for number, position in enumerate(positions)}


@dataclass(frozen=True, slots=True)
class _SharedOfStage:
    """The numbers of one stage: its first host sends them to all hosts that are not of the stage."""

    line: _Line
    host: int
    hosts: Sequence[int]
    others: Sequence[int]
    homes: Mapping[str, Home]

    def share(self, own: Mapping[str, jax.Array], number: int) -> dict[str, jax.Array]:
        if self.host in self.others:
            here = SingleDeviceSharding(jax.local_devices()[0])
            wanted = [
                jax.ShapeDtypeStruct(home.aval.shape, home.aval.dtype, sharding=here)
                for home in self.homes.values()
            ]
            pulled = self.line.pull(self.hosts[0], number, wanted)
            return dict(zip(self.homes, pulled, strict=True))
        if self.host == self.hosts[0]:
            arrays = [own[name].addressable_data(0) for name in self.homes]
            for other in self.others:
                self.line.post(other, number, arrays)
        return {}


class SharedNumbers(Shared):
    """The numbers of all stages that some host has no part in."""

    def __init__(self, stages: Sequence[_SharedOfStage]):
        self._stages = stages

    def all_of(self, own: Mapping[str, jax.Array], number: int) -> dict[str, jax.Array]:
        found = dict(own)
        for stage in self._stages:
            found |= stage.share(own, number)
        return found
