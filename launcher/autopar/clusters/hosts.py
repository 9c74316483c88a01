"""The physical machine as numbers: hosts of one kind or of several, their devices, and the links between
them.

A cluster whose hosts are all alike is a `Cluster`, any other a `MixedCluster` of several such. Both number
their hosts from 0; whoever asks for a device or the links inside a host names the kind, by its hosts. What a
device and a link are is in `device`, what communication costs on a logical mesh in `mesh`; `cluster` reads
files. Left out: a submesh of hosts of several kinds.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

from launcher.autopar.clusters.device import GIB, GIGA, Device, Link
from launcher.autopar.text.strict_reader import Node
from launcher.autopar.text.wording import count, ranges
from launcher.errors import ConfigError, PlanError

MOST_HOSTS = 100_000
_NOMINAL = "; its figures are nominal, not measured"
_FEW_HOSTS = 16  # any number of which a stage may get


@dataclass(frozen=True, slots=True, kw_only=True)
class Submesh:
    """The shape of a rectangle of the cluster."""

    hosts: int
    devices: int

    @property
    def num_devices(self) -> int:
        return self.hosts * self.devices


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRef:
    """How a plan names a kind of hosts; `device` is the kind of theirs."""

    hosts: int
    devices_per_host: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRef:
    """How a plan names the cluster that it was made for.

    Attributes:
        devices_per_host: Of the largest hosts, where there are several kinds.
        groups: The kinds, if there are several, in the order of their hosts.
    """

    name: str
    hosts: int
    devices_per_host: int
    groups: tuple[GroupRef, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal hosts of equal devices.

    Attributes:
        intra_host: The links of one device to the others of its host.
        inter_host: The network link of one host, shared by its devices.
        nominal: The figures are round numbers or guesses, and no peak is known.
        sources: Figure -> where it comes from.
    """

    name: str
    num_hosts: int
    devices_per_host: int
    device: Device
    intra_host: Link
    inter_host: Link
    nominal: bool
    sources: Mapping[str, str]

    @property
    def kinds(self) -> "tuple[Cluster, ...]":
        """Return the kinds of hosts that there are, each as a cluster of its own."""
        return (self,)

    def kind_of(self, hosts: Iterable[int], place: str = "hosts") -> "Cluster":
        """Return the kind of some hosts."""
        del hosts, place
        return self

    def link_between(self, source: int, target: int) -> Link:
        """Return the link from a host to another one."""
        del source, target
        return self.inter_host

    @property
    def links(self) -> tuple[Link, ...]:
        """Return all kinds of links."""
        return self.intra_host, self.inter_host

    @property
    def stage_link(self) -> Link:
        """Return what lies between two stages as long as nobody knows their places."""
        return self.inter_host if self.num_hosts > 1 else self.intra_host

    @property
    def num_devices(self) -> int:
        return self.num_hosts * self.devices_per_host

    @property
    def memory_bytes(self) -> int:
        """Return the memory of all devices together."""
        return self.num_devices * self.device.memory_bytes

    @property
    def has_accelerators(self) -> bool:
        return self.device.accelerator

    @property
    def default_dtype(self) -> str:
        """Return what `model.dtype=auto` computes in."""
        if self.device.has_bf16:
            return "bf16"
        return "fp16" if self.device.accelerator else "fp32"

    @property
    def without_cudnn(self) -> str | None:
        """Return the kind of the devices if cuDNN's attention does not run on them."""
        return None if self.device.has_cudnn_attention else self.device.kind

    def peak_flops_per_s(self, dtype: str) -> float | None:
        """Return the peak that MFU refers to; None where it is not known: MFU is never a guess."""
        return None if self.nominal else self.device.peak_flops_per_s.get(dtype)

    def machine_of(self, host: int) -> int:
        """Return which machine a host is: itself, unless one machine emulates all of them."""
        return host if self.device.accelerator else 0

    def ref(self) -> ClusterRef:
        """Return the name and shape for a plan."""
        return ClusterRef(
            name=self.name, hosts=self.num_hosts, devices_per_host=self.devices_per_host
        )

    @property
    def shape_text(self) -> str:
        """Return how many hosts and devices there are, in words."""
        return f"{count(self.num_hosts, 'host')} x {count(self.devices_per_host, 'device')}"

    @property
    def hardware_text(self) -> str:
        """Return the same with the kind of the devices."""
        return f"{count(self.num_hosts, 'host')} x {self.devices_per_host} {self.device.kind}"

    def describe(self) -> str:
        """Return the cluster in one line."""
        each = f"({self.memory_text}{self.network_text})"
        return f"{self.name}: {self.hardware_text} {each}{_NOMINAL if self.nominal else ''}"

    @property
    def memory_text(self) -> str:
        """Return how much memory each device has, in words."""
        return f"{self.device.memory_bytes / GIB:.4g} GiB each"

    @property
    def network_text(self) -> str:
        """Return what is between the hosts, if there are several, after a comma."""
        return f", {_rate_text(self.inter_host)} between hosts" if self.num_hosts > 1 else ""

    def submeshes(self) -> tuple[Submesh, ...]:
        """Return the shapes that stages may get: parts of a host, or whole hosts.

        Parts are powers of two and divisors of a host's devices; of more than a few hosts those numbers are
        taken that are powers of two or divide them all.
        """
        few = self.num_hosts <= _FEW_HOSTS
        numbers = range(1, self.num_hosts + 1) if few else _round_numbers(self.num_hosts)
        slices = [n for n in _round_numbers(self.devices_per_host) if n < self.devices_per_host]
        return (
            *(Submesh(hosts=1, devices=width) for width in slices),
            *(Submesh(hosts=hosts, devices=self.devices_per_host) for hosts in numbers),
        )

    def replace(self, *, hosts: int) -> "Cluster":
        """Return the same kind of cluster with another number of hosts."""
        number = Node(value=hosts, place="cluster.hosts").integer(1, MOST_HOSTS)
        return replace(self, num_hosts=number)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedCluster:
    """Several kinds of hosts, numbered one kind after the other.

    What two kinds do is not what one does, so there is no `device` here: who asks for one names a kind.

    Attributes:
        kinds: Each kind as a cluster of its own.
        inter_host: The link of one host to hosts of another kind.
    """

    name: str
    kinds: tuple[Cluster, ...]
    inter_host: Link
    nominal: bool
    sources: Mapping[str, str]

    @property
    def num_hosts(self) -> int:
        return sum(kind.num_hosts for kind in self.kinds)

    @property
    def num_devices(self) -> int:
        return sum(kind.num_devices for kind in self.kinds)

    @property
    def memory_bytes(self) -> int:
        """Return the memory of all devices together."""
        return sum(kind.memory_bytes for kind in self.kinds)

    @property
    def has_accelerators(self) -> bool:
        return self.kinds[0].has_accelerators

    @property
    def default_dtype(self) -> str:
        """Return what `model.dtype=auto` computes in: what all kinds can."""
        if all(kind.device.has_bf16 for kind in self.kinds):
            return "bf16"
        return "fp16" if self.has_accelerators else "fp32"

    @property
    def without_cudnn(self) -> str | None:
        """Return a kind of devices on which cuDNN's attention does not run; None if there is none."""
        return next((kind.without_cudnn for kind in self.kinds if kind.without_cudnn), None)

    @property
    def links(self) -> tuple[Link, ...]:
        """Return all kinds of links."""
        return (*(link for kind in self.kinds for link in kind.links), self.inter_host)

    @property
    def stage_link(self) -> Link:
        """Return what lies between two stages as long as nobody knows their places."""
        return self.inter_host

    def kind_of(self, hosts: Iterable[int], place: str = "hosts") -> Cluster:
        """Return the kind of some hosts, or raise `PlanError` where they are not all of one.

        Args:
            place: Where the hosts are written.
        """
        missing = [host for host in hosts if not 0 <= host < self.num_hosts]
        if missing:
            raise PlanError(
                f"{place} has {ranges(missing)}, outside 0..{self.num_hosts - 1}, the hosts of "
                f"cluster={self.name} (cluster.groups): stay inside the cluster, or plan again for this one"
            )
        found = {self._number(host) for host in hosts}
        if len(found) != 1:
            raise PlanError(
                f"{place}={sorted(hosts)} are of {len(found)} kinds, and a stage lies on hosts of 1: "
                f"cluster={self.name} has {self._hosts_text()} (cluster.groups); give the stage hosts of "
                f"one of them"
            )
        return self.kinds[found.pop()]

    def _number(self, host: int) -> int:
        """Which kind a host is of."""
        last_hosts = itertools.accumulate(kind.num_hosts for kind in self.kinds)
        return next(number for number, end in enumerate(last_hosts) if host < end)

    def _hosts_text(self) -> str:
        """Which hosts are of which kind."""
        first, texts = 0, []
        for kind in self.kinds:
            numbers = ranges(range(first, first + kind.num_hosts))
            texts.append(f"{kind.device.kind} on {numbers}")
            first += kind.num_hosts
        return ", ".join(texts)

    def link_between(self, source: int, target: int) -> Link:
        """Return the link from a host to another one."""
        one, other = self._number(source), self._number(target)
        return self.kinds[one].inter_host if one == other else self.inter_host

    def machine_of(self, host: int) -> int:
        """Return which machine a host is: itself, unless one machine emulates all of them."""
        return host if self.has_accelerators else 0

    def ref(self) -> ClusterRef:
        """Return the name and shape for a plan."""
        groups = tuple(
            GroupRef(
                hosts=kind.num_hosts,
                devices_per_host=kind.devices_per_host,
                device=kind.device.kind,
            )
            for kind in self.kinds
        )
        most = max(group.devices_per_host for group in groups)
        return ClusterRef(
            name=self.name, hosts=self.num_hosts, devices_per_host=most, groups=groups
        )

    @property
    def shape_text(self) -> str:
        """Return how many hosts and devices there are, in words."""
        return " and ".join(kind.shape_text for kind in self.kinds)

    @property
    def hardware_text(self) -> str:
        """Return the same with the kinds of the devices."""
        return " and ".join(kind.hardware_text for kind in self.kinds)

    def describe(self) -> str:
        """Return the cluster in one line."""
        kinds = " and ".join(
            f"{kind.hardware_text} ({kind.memory_text}{kind.network_text})" for kind in self.kinds
        )
        return (
            f"{self.name}: {kinds}, {_rate_text(self.inter_host)} between them"
            f"{_NOMINAL if self.nominal else ''}"
        )

    def replace(self, *, hosts: int) -> NoReturn:
        """Refuse: one number does not say how many hosts of which kind."""
        raise ConfigError(
            f"cluster.hosts={hosts} does not say of which of the {len(self.kinds)} kinds of "
            f"cluster={self.name}: set the hosts of each in cluster.groups"
        )


AnyCluster = Cluster | MixedCluster


def _rate_text(link: Link) -> str:
    return f"{link.bytes_per_s * 8 / GIGA:g} Gb/s"


def _round_numbers(most: int) -> list[int]:
    """The powers of two up to a number, and its divisors."""
    return [n for n in range(1, most + 1) if most % n == 0 or n & (n - 1) == 0]
