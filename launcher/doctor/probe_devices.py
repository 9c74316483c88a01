"""Ask JAX for its devices and let each compute: `python -m launcher.doctor.probe_devices [NUM]`.

With NUM, that many devices are emulated on the CPU. The doctor runs this in a process of its own, since
a driver may hang or end it, and reads the last line of its output: one JSON object.
"""

import json
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launcher.runtime.devices import emulate

_SIDE = 64


def main(arguments: Sequence[str]) -> int:
    """Print what was found; whatever goes wrong ends in a traceback, which the doctor reads."""
    if arguments:
        emulate(int(arguments[0]))
    devices = jax.local_devices()
    start = time.perf_counter()
    found = {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "memory_bytes": (devices[0].memory_stats() or {}).get("bytes_limit"),
        "wrong": [str(device) for device in devices if not _computes(device)],
        "sum": _sum_over(devices),
        "compute_s": time.perf_counter() - start,
    }
    sys.stdout.write(f"{json.dumps(found)}\n")
    return 0


def _computes(device: jax.Device) -> bool:
    """Multiply two small matrices of ones on one device."""
    ones = jax.device_put(np.ones((_SIDE, _SIDE), np.float32), device)
    return bool(np.all(np.asarray(jnp.dot(ones, ones)) == _SIDE))


def _sum_over(devices: Sequence[jax.Device]) -> int:
    """Add 1, 2, 3, ... of one device each, by an all-reduce."""
    mesh = Mesh(np.asarray(devices), ("device",))
    numbers = np.arange(1, len(devices) + 1, dtype=np.int32)
    spread = jax.device_put(numbers, NamedSharding(mesh, PartitionSpec("device")))
    return int(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(spread))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
