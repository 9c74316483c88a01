"""How much memory devices have used, by their own count."""

from collections.abc import Iterable, Mapping
from typing import Protocol


class Counts(Protocol):
    """A device of jax."""

    def memory_stats(self) -> Mapping[str, int] | None:
        """Its allocator's figures; None where the backend keeps none, as on CPU."""


def peak_bytes(devices: Iterable[Counts]) -> int | None:
    """The most that any of them has held at a time since the process began, if all of them count."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    return None if None in peaks else max(peaks)
