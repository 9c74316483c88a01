"""`python -m launcher.bench transfers`: sending a value to another submesh, beside plain `jax.device_put`.

Two submeshes of 2 x 2 devices: the accelerators of this machine if it has enough, emulated CPU devices
elsewhere. For each pair of shardings, of the transport (`runtime/steps/transport.py`) and of `device_put`:
what the dispatching thread spends per message on a value of 8 KiB, the rate at which a large value arrives,
bytes from submesh to submesh per byte of the value, and whether the call waits for a value that is still
being computed.

    size_mib   of the large value; default: 16
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from launcher.autopar.sharding.crossing import Crossing, Located, plan_crossing
from launcher.autopar.sharding.spec import REPLICATED, Spec, num_shards, to_partition_spec
from launcher.bench.settings import check_keys, whole_number
from launcher.runtime.devices import discover
from launcher.runtime.steps.transport import InProcess

_R = REPLICATED
_NAMES, _MESH = ("data", "tensor"), (2, 2)
_ROWS, _SMALL_COLUMNS = 64, 32
_BURST, _REPEATS, _LARGE_REPEATS, _SLOW_S = 8, 31, 9, 0.05


@dataclass(frozen=True, slots=True)
class Case:
    """A pair of shardings; `hosts` says whether the submeshes share one."""

    title: str
    source: Spec
    target: Spec
    hosts: int = 2


_CASES = (
    Case("same split", (0, 1), (0, 1)),
    Case("whole along one axis, same host", (0, _R), (0, _R), hosts=1),
    Case("whole along one axis", (0, _R), (0, _R)),
    Case("whole", (_R, _R), (_R, _R)),
    Case("whole to split", (_R, _R), (0, 1)),
    Case("split to whole", (0, 1), (_R, _R)),
    Case("rows to columns", (0, _R), (1, _R)),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one way to send: `copies` are bytes sent per byte of the value."""

    host_us: float
    gb_per_s: float
    copies: float
    waits: bool


def run(settings: Mapping[str, str]) -> int:
    """Print a row per case; status 0."""
    check_keys("transfers", settings, ["size_mib"])
    size_mib = whole_number(settings, "size_mib", 16)
    source, target = _submeshes()
    kind = source.devices.flat[0].device_kind
    sys.stdout.write(
        f"{source.size} + {target.size} devices ({kind}), {size_mib} MiB; device_put in brackets\n"
        f"{'':<34}{'host us/send':>16}{'GB/s':>16}{'copies':>14}{'waits':>12}\n"
    )
    for case in _CASES:
        ours, plain = _measure(case, source, target, size_mib * 2**20)
        sys.stdout.write(
            f"{case.title:<34}"
            f"{f'{ours.host_us:.0f} ({plain.host_us:.0f})':>16}"
            f"{f'{ours.gb_per_s:.2f} ({plain.gb_per_s:.2f})':>16}"
            f"{f'{ours.copies:g} ({plain.copies:g})':>14}"
            f"{f'{_yes(ours.waits)} ({_yes(plain.waits)})':>12}\n"
        )
        sys.stdout.flush()
    return 0


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def _submeshes() -> tuple[Mesh, Mesh]:
    discover(8)
    found = jax.devices() if len(jax.devices()) >= 8 else jax.devices("cpu")
    halves = np.array(found[:8], dtype=object).reshape(2, *_MESH)
    return Mesh(halves[0], _NAMES), Mesh(halves[1], _NAMES)


def _measure(case: Case, source: Mesh, target: Mesh, num_bytes: int) -> tuple[Figures, Figures]:
    columns = num_bytes // 4 // _ROWS
    small, large = (_crossing(case, (_ROWS, c)) for c in (_SMALL_COLUMNS, columns))
    wanted = NamedSharding(target, to_partition_spec(case.target, 2, _NAMES))

    def channel_of(crossing: Crossing) -> Callable[[jax.Array], jax.Array]:
        channel = InProcess().channel("activation", (0, 1), source, target, {0: crossing})
        return lambda value: channel.hand_over({0: value})[0]

    def plain(value: jax.Array) -> jax.Array:
        return jax.device_put(value, wanted)

    values = [_value(case, source, c.shape) for c in (small, large)]
    copied = target.size / num_shards(case.target, _MESH)
    ways = (
        (channel_of(small), channel_of(large), large.bytes_across / values[1].nbytes),
        (plain, plain, copied),
    )
    figures = [
        Figures(
            host_us=_host_us(send_small, values[0]),
            gb_per_s=_gb_per_s(send_large, values[1]),
            copies=copies,
            waits=_waits(send_small, values[0]),
        )
        for send_small, send_large, copies in ways
    ]
    return figures[0], figures[1]


def _crossing(case: Case, shape: tuple[int, int]) -> Crossing:
    ends = [
        Located(spec, _MESH, tuple((host, 4 * number + i) for i in range(4)))
        for number, (spec, host) in enumerate([(case.source, 0), (case.target, case.hosts - 1)])
    ]
    return plan_crossing(shape, np.dtype(np.float32), *ends)


def _value(case: Case, mesh: Mesh, shape: tuple[int, int]) -> jax.Array:
    spec = to_partition_spec(case.source, 2, _NAMES)
    return jax.device_put(np.ones(shape, np.float32), NamedSharding(mesh, spec))


def _host_us(send: Callable, value: jax.Array) -> float:
    """What the caller spends per message, in bursts, so that nothing is waited for in between."""
    spent = []
    for _ in range(_REPEATS):
        values = _fresh(value, _BURST)
        began_s = time.perf_counter()
        arrived = [send(fresh) for fresh in values]
        spent.append((time.perf_counter() - began_s) / _BURST)
        jax.block_until_ready(arrived)
    return 1e6 * statistics.median(spent)


def _gb_per_s(send: Callable, value: jax.Array) -> float:
    took = []
    for _ in range(_LARGE_REPEATS):
        [fresh] = _fresh(value, 1)
        began_s = time.perf_counter()
        jax.block_until_ready(send(fresh))
        took.append(time.perf_counter() - began_s)
    return value.nbytes / statistics.median(took) / 1e9


def _fresh(value: jax.Array, number: int) -> list[jax.Array]:
    """Copies: an array remembers what it once was on the host, which a step's values never were."""
    return jax.block_until_ready([jnp.copy(value) for _ in range(number)])


def _waits(send: Callable, value: jax.Array) -> bool:
    """Whether the call takes as long as what computes the value."""

    def slow(shard):
        def sleep(held):
            time.sleep(_SLOW_S)
            return np.asarray(held)

        return jax.pure_callback(sleep, jax.ShapeDtypeStruct(shard.shape, shard.dtype), shard)

    mesh, spec = value.sharding.mesh, value.sharding.spec
    compute = jax.jit(
        jax.shard_map(slow, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    jax.block_until_ready(compute(value))
    computing = compute(value)
    began_s = time.perf_counter()
    arrived = send(computing)
    took_s = time.perf_counter() - began_s
    jax.block_until_ready(arrived)
    return took_s > _SLOW_S / 2
