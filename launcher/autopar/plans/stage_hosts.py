"""What the devices that a plan's stages lie on can do: their memory, and their peak.

Where hosts are of several kinds, each stage has the devices of its own kind.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.autopar.clusters.device import Device
from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.plans.plan import Plan, Prediction


@dataclass(frozen=True, slots=True)
class TightStage:
    """The stage whose devices are the fullest, by its number, and what its submesh needs of each."""

    stage: int
    needed_bytes: float
    device: Device

    @property
    def over_bytes(self) -> float:
        """Return how much of that there is not; below zero: how much is left."""
        return self.needed_bytes - self.device.usable_bytes

    @property
    def fits(self) -> bool:
        """Return whether it is there; then what every other stage needs is there too."""
        return self.over_bytes <= 0


def devices_of(plan: Plan, cluster: AnyCluster) -> tuple[Device, ...]:
    """Return the device of each stage."""
    return tuple(cluster.kind_of(stage.hosts).device for stage in plan.stages)


def submeshes_at_hand(machines: Sequence[set[int]]) -> tuple[int, ...]:
    """Return, for each submesh, how many have a part of its busiest machine, its own included.

    Args:
        machines: on which each submesh lies.
    """
    present = Counter(machine for own in machines for machine in own)
    return tuple(max(present[machine] for machine in own) for own in machines)


def tightest(predicted: Prediction, devices: Sequence[Device]) -> TightStage:
    """Return the stage that fills its devices most; the plan fits if it does."""
    needs = enumerate(zip(predicted.peak_bytes_per_device, devices, strict=True))
    return max(
        (TightStage(stage, needed_bytes, device) for stage, (needed_bytes, device) in needs),
        key=lambda stage: stage.over_bytes,
    )


def peaks_by_kind(
    plan: Plan, predicted: Prediction, cluster: AnyCluster
) -> Iterator[tuple[str, Device, float]]:
    """Yield what devices are called, the device, and the most memory that a plan fills of one; by kind."""
    several = len(cluster.kinds) > 1
    peaks: dict[str, tuple[Device, float]] = {}
    for device, num_bytes in zip(
        devices_of(plan, cluster), predicted.peak_bytes_per_device, strict=True
    ):
        word = device.kind if several else "device"
        peaks[word] = device, max(num_bytes, peaks.get(word, (device, 0.0))[1])
    yield from ((word, device, peak_bytes) for word, (device, peak_bytes) in peaks.items())


def peak_flops_per_s(plan: Plan, cluster: AnyCluster, dtype: str) -> float | None:
    """Return the peak that MFU refers to, of the mean device that the plan uses.

    None where one of them has none that is known.
    """
    number = Counter[float | None]()
    for stage in plan.submeshes:
        number[cluster.kind_of(stage.hosts).peak_flops_per_s(dtype)] += stage.num_devices
    if None in number or len(number) == 1:
        return next((peak for peak in number if peak is None), next(iter(number)))
    return sum(peak * devices for peak, devices in number.items()) / sum(number.values())
