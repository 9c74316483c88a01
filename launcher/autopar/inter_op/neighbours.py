"""What stages cost one another that share a machine.

Their programs are started in turn by one thread (`program_starts`), and their devices may slow one another
down: emulated devices share a CPU's cores, accelerators power and memory channels. Options are priced for a
machine all of whose devices compute; where some wait, the others are faster (`programs.crowded`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from launcher.autopar.clusters.device import Device
from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.inter_op.placement import Placement
from launcher.autopar.inter_op.plan_bounds import Crowded
from launcher.autopar.inter_op.space import Space
from launcher.autopar.inter_op.stage_table import StageChoice, StageOption
from launcher.autopar.programs.crowded import Crowd


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """The machines of a cluster, and the submeshes of a space on them."""

    cluster: AnyCluster
    space: Space

    @property
    def start_in_turn(self) -> bool:
        """Whether starting programs takes time, and all submeshes share a machine."""
        kinds = self.cluster.kinds
        takes_time = any(k.device.program_launch_s or k.device.array_launch_s for k in kinds)
        return takes_time and len(self._devices()) == 1

    @property
    def slow_down(self) -> bool:
        """Whether devices that compute at once slow one another down."""
        factors = (factor for k in self.cluster.kinds for _, factor in k.device.concurrency)
        return max(factors) != 1.0

    def options_among(
        self, submeshes: int, options: Sequence[StageOption]
    ) -> Sequence[StageOption]:
        """The options where there are so many submeshes."""
        return [o.among(submeshes) for o in options] if self.start_in_turn else options

    def among_all(
        self, stages: Sequence[StageChoice], virtual_stages: int
    ) -> Sequence[StageChoice]:
        """The stages where each has all others as neighbours, if so it is."""
        if not self.start_in_turn:
            return stages
        submeshes = len(stages) // virtual_stages
        return [replace(it, option=it.option.among(submeshes)) for it in stages]

    def crowd(self, kinds: Sequence[int], placement: Sequence[Placement]) -> Crowd | None:
        """Who shares a machine with whom, by the kind of each submesh and where it lies; None where that
        costs nothing."""
        if not self.slow_down:
            return None
        devices = [self.cluster.kinds[kind].device for kind in kinds]
        return Crowd(
            devices=tuple(
                Counter(self.cluster.machine_of(host) for host in hosts for _ in own)
                for hosts, own in placement
            ),
            slowdown=tuple(device.slowdown for device in devices),
            priced=tuple(device.slowdown(None) for device in devices),
        )

    def crowded(self) -> Crowded | None:
        """What bounds can be had where devices slow one another down; None where they do not."""
        if not self.slow_down:
            return None
        sizes = np.array([hosts * devices for hosts, devices in self.space.submeshes])
        speed_up = max(
            _speed_up(kind.device, most)
            for kind in self.cluster.kinds
            for most in self._devices().values()
        )
        return Crowded(sizes / self.space.num_devices, speed_up)

    def _devices(self) -> Counter[int]:
        """How many devices each machine has."""
        found: Counter[int] = Counter()
        first = 0
        for kind in self.cluster.kinds:
            for host in range(first, first + kind.num_hosts):
                found[self.cluster.machine_of(host)] += kind.devices_per_host
            first += kind.num_hosts
        return found


def _speed_up(device: Device, most: int) -> float:
    """How many times as much as all that compute at once some of so many devices can do together."""
    numbers = np.arange(1, most + 1)
    rates = numbers / [device.slowdown(number) for number in numbers.tolist()]
    return float(rates.max() * device.slowdown(None) / most)
