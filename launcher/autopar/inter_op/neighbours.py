"""What stages cost one another that share a machine.

Their programs are started in turn by one thread (`program_starts`), and their devices may slow one another
down: emulated devices share a CPU's cores, accelerators power and memory channels. Options are priced for a
machine all of whose devices compute; where some wait, the others are faster (`programs.crowded`).

Left out: in the DP and in bounds, that several submeshes may share one of several machines; the judge knows.
"""

import math
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
from launcher.autopar.plans.stage_hosts import submeshes_at_hand
from launcher.autopar.programs.crowded import Crowd


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """The machines of a cluster, and the submeshes of a space on them."""

    cluster: AnyCluster
    space: Space

    @property
    def starts_take_time(self) -> bool:
        """Whether starting programs does."""
        return not all(kind.device.starts_programs_for_free for kind in self.cluster.kinds)

    @property
    def are_on_one_machine(self) -> bool:
        """Whether all submeshes are."""
        return self.cluster.machine_of(self.cluster.num_hosts - 1) == 0

    @property
    def slow_down(self) -> bool:
        """Whether devices that compute at once slow one another down."""
        return any(kind.device.slows_others for kind in self.cluster.kinds)

    def options_among(
        self, submeshes: int, options: Sequence[StageOption]
    ) -> Sequence[StageOption]:
        """The options where so many submeshes share one machine, if they do."""
        if not (self.starts_take_time and self.are_on_one_machine):
            return options
        return [option.among(submeshes) for option in options]

    def among_all(
        self, stages: Sequence[StageChoice], placement: Sequence[Placement]
    ) -> tuple[StageChoice, ...]:
        """The stages among those that share a machine with them, by where the submeshes lie."""
        if not self.starts_take_time:
            return tuple(stages)
        machines = [{self.cluster.machine_of(host) for host in hosts} for hosts, _ in placement]
        counts = submeshes_at_hand(machines)
        return tuple(
            replace(stage, option=stage.option.among(counts[at % len(counts)]))
            for at, stage in enumerate(stages)
        )

    def priced_for(self, kind: int, worth_s: float) -> dict:
        """What `StageCosts` of a kind goes by, for a step that should take less than `worth_s`.

        Where others may wait, a stage can be done sooner than its options say.
        """
        return {
            "at_once": self.at_once(kind),
            "worth_s": math.inf if self.slow_down else worth_s,
        }

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
            priced=tuple(
                device.slowdown(self.at_once(kind))
                for device, kind in zip(devices, kinds, strict=True)
            ),
        )

    def at_once(self, kind: int) -> int:
        """How many devices of a machine with hosts of a kind compute at once, at most."""
        kinds = self.cluster.kinds
        emulated = not self.cluster.has_accelerators
        there = sum(k.num_devices for k in kinds) if emulated else kinds[kind].devices_per_host
        return min(there, self.space.num_devices)

    def crowded(self) -> Crowded | None:
        """What bounds can be had where devices slow one another down; None where they do not."""
        if not self.slow_down:
            return None
        sizes = np.array([hosts * devices for hosts, devices in self.space.submeshes])
        kinds = range(len(self.cluster.kinds))
        speed_up = max(_speed_up(self.cluster.kinds[k].device, self.at_once(k)) for k in kinds)
        return Crowded(sizes / self.space.num_devices, speed_up)


def _speed_up(device: Device, most: int) -> float:
    """How many times as much as all of so many devices at once some of them can do together."""
    numbers = np.arange(1, most + 1)
    rates = numbers / [device.slowdown(number) for number in numbers.tolist()]
    return float(rates.max() / rates[-1])
