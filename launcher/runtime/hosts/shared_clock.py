"""One clock for all hosts: that of the first, as far as the steps carry it.

With every step the first host sends how late it is, in the same order as everything else, so all hosts read
the same number at the same place of the training loop, and find a checkpoint due at the same step. It is a
step or two behind.
"""

import time
from collections import deque
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Share = Callable[[jax.Array, int], jax.Array]
"""(this host's number, its number among messages) -> the first host's."""


class SharedClock:
    """Tick once per step; reading gives seconds since the start, as of the step before the last."""

    def __init__(self, share: Share):
        self._share, self._began_s = share, time.monotonic()
        self._ticks: deque[jax.Array] = deque(maxlen=2)

    def tick(self, number: int) -> None:
        """Dispatch what tells all hosts how late it is; waits for nothing."""
        here = jax.local_devices()[0]
        own = jax.device_put(np.float32(time.monotonic() - self._began_s), here)
        self._ticks.append(self._share(own, number))

    def __call__(self) -> float:
        """What is there already where the numbers of the step before the last have been read."""
        return float(self._ticks[0]) if len(self._ticks) == 2 else 0.0


def over_devices(devices: np.ndarray) -> Share:
    """Share among processes that have these devices together, by a program over all of them."""
    mesh = Mesh([device for device in devices.flat if device], ("all",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("all",), ()))
    like = jax.ShapeDtypeStruct((mesh.size,), np.float32, sharding=split)
    first = jax.jit(lambda values: values[0], out_shardings=whole).lower(like).compile()

    def share(own: jax.Array, number: int) -> jax.Array:
        del number
        shards = [jax.device_put(own[None], device) for device in mesh.local_devices]
        values = jax.make_array_from_single_device_arrays((mesh.size,), split, shards)
        return first(values)

    return share
