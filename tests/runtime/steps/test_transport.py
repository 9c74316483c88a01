"""Values sent between submeshes of emulated devices: equal, counted, and without waiting."""

import itertools
import math
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launcher.autopar.sharding.crossing import Located, plan_crossing
from launcher.autopar.sharding.spec import REPLICATED, all_specs, to_partition_spec
from launcher.runtime.steps.transport import InProcess

MESHES = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1))
SHAPES = ((), (8,), (4, 6), (1, 3, 4))
NAMES = ("data", "tensor")
R = REPLICATED


def submesh(shape, first):
    devices = jax.devices()[first : first + math.prod(shape)]
    return Mesh(np.array(devices, dtype=object).reshape(shape), NAMES)


def located(spec, mesh, host):
    return Located(spec, mesh.devices.shape, tuple((host, d.id) for d in mesh.devices.flat))


def place(array, mesh, spec):
    return jax.device_put(array, NamedSharding(mesh, to_partition_spec(spec, array.ndim, NAMES)))


def numbered(shape, dtype=np.float32):
    return np.arange(1, 1 + math.prod(shape)).reshape(shape).astype(dtype)


def assert_arrived(array, expected, mesh, spec):
    """Every device has what the spec says, also replicas."""
    wanted = NamedSharding(mesh, to_partition_spec(spec, expected.ndim, NAMES))
    assert array.sharding.is_equivalent_to(wanted, expected.ndim)
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
    assert array.dtype == expected.dtype


class Spy:
    """Notes what goes through `jax.device_put`: how many bytes from which device to which."""

    def __init__(self, monkeypatch):
        self.original, self.calls, self.moved = jax.device_put, 0, Counter()
        monkeypatch.setattr(jax, "device_put", self)

    def __call__(self, arrays, destinations):
        self.calls += 1
        result = self.original(arrays, destinations)
        for sent, arrived in zip(arrays, result, strict=True):
            for a, b in zip(sent.addressable_shards, arrived.addressable_shards, strict=True):
                assert a.data.nbytes == b.data.nbytes
                self.moved[a.device.id, b.device.id] += a.data.nbytes
        return result


def planned_moves(crossings):
    """Bytes by (device, device), as the plan has them."""
    moves = Counter()
    for crossing in crossings:
        for tile in crossing.moving:
            pair = crossing.source.places[tile.source][1], crossing.target.places[tile.target][1]
            moves[pair] += crossing.tile_bytes
    return moves


def message(shape, source, target, hosts):
    """All pairs of specs of a value between two meshes, as one message."""
    pairs = itertools.product(all_specs(shape, MESHES[source]), all_specs(shape, MESHES[target]))
    from_mesh, to_mesh = submesh(MESHES[source], 0), submesh(MESHES[target], 4)
    crossings = {
        (a, b): plan_crossing(
            shape, np.dtype(np.float32), located(a, from_mesh, 0), located(b, to_mesh, hosts - 1)
        )
        for a, b in pairs
    }
    return from_mesh, to_mesh, crossings


@pytest.mark.parametrize(
    ("shape", "hosts"), [((8,), 1), ((8, 4), 1), *((shape, 2) for shape in SHAPES)]
)
@pytest.mark.parametrize("source", range(len(MESHES)))
def test_every_pair_of_specs_arrives_whole_and_counted(shape, source, hosts, monkeypatch):
    for target in range(len(MESHES)):
        from_mesh, to_mesh, crossings = message(shape, source, target, hosts)
        transport, full = InProcess(), numbered(shape)
        channel = transport.channel("activation", (0, 1), from_mesh, to_mesh, crossings)
        values = {pair: place(full, from_mesh, pair[0]) for pair in crossings}
        with monkeypatch.context() as patch:
            spy = Spy(patch)
            arrived = channel.hand_over(values)
        assert arrived.keys() == crossings.keys()
        for (_, spec), array in arrived.items():
            assert_arrived(array, full, to_mesh, spec)
        planned = sum(crossing.bytes_across for crossing in crossings.values())
        assert transport.bytes_sent() == {"activation": planned}
        assert (spy.calls, spy.moved) == (1, planned_moves(crossings.values()))


def test_bytes_are_counted_by_kind_and_message():
    source, target = submesh((2, 1), 0), submesh((2, 1), 4)
    crossing = plan_crossing(
        (4,), np.dtype(np.float32), located((0, R), source, 0), located((0, R), target, 1)
    )
    transport = InProcess()
    forth = transport.channel("activation", (0, 1), source, target, {"x": crossing})
    more = transport.channel("activation", (0, 1), source, target, {"x": crossing, "y": crossing})
    transport.channel("norm", (0, 1), source, target, {"x": crossing})
    x = place(numbered((4,)), source, (0, R))
    for _ in range(3):
        forth.hand_over({"x": x})
    more.hand_over({"x": x, "y": x, "an export for somebody else": x})
    assert transport.bytes_sent() == {"activation": 3 * 16 + 2 * 16, "norm": 0}


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "int8", "int32", "uint32", "bool"]
)
def test_every_dtype_is_cut_joined_and_gathered(dtype):
    source, target = submesh((2, 2), 0), submesh((2, 2), 4)
    full = numbered((8, 4)).astype(jnp.dtype(dtype))
    full[1::2] = 0
    crossings = {
        (a, b): plan_crossing((8, 4), full.dtype, located(a, source, 0), located(b, target, 1))
        for a, b in [((0, R), (R, R)), ((0, 1), (1, 0)), ((R, R), (0, R)), ((1, R), (0, R))]
    }
    channel = InProcess().channel("activation", (0, 1), source, target, crossings)
    values = {pair: place(full, source, pair[0]) for pair in crossings}
    for (_, spec), array in channel.hand_over(values).items():
        assert_arrived(array, full, target, spec)


def test_double_precision_crosses():
    with jax.enable_x64(True):
        source, target = submesh((1, 2), 0), submesh((1, 2), 4)
        full = numbered((4, 4), np.float64) / 3
        crossing = plan_crossing(
            (4, 4), full.dtype, located((R, 0), source, 0), located((R, R), target, 1)
        )
        channel = InProcess().channel("activation", (0, 1), source, target, {0: crossing})
        arrived = channel.hand_over({0: place(full, source, (R, 0))})[0]
        assert_arrived(arrived, full, target, (R, R))


def test_a_weakly_typed_scalar_crosses():
    source, target = submesh((2, 2), 0), submesh((1, 4), 4)
    crossing = plan_crossing(
        (), np.dtype(np.float32), located((R, R), source, 0), located((R, R), target, 1)
    )
    channel = InProcess().channel("norm", (0, 1), source, target, {"norm": crossing})
    weak = jax.device_put(jnp.asarray(2.0), NamedSharding(source, PartitionSpec()))
    assert weak.weak_type
    arrived = channel.hand_over({"norm": weak})["norm"]
    assert_arrived(arrived, np.float32(2.0) + np.zeros((), np.float32), target, (R, R))


@pytest.mark.parametrize(
    ("source", "target"), [((2, 2), (1, 4)), ((4, 1), (1, 4)), ((2, 2), (2, 2))]
)
def test_stages_on_the_same_devices_hand_over(source, target, monkeypatch):
    """What a device has already is not moved."""
    shape = (8, 4)
    full, from_mesh, to_mesh = numbered(shape), submesh(source, 0), submesh(target, 0)
    pairs = itertools.product(all_specs(shape, source), all_specs(shape, target))
    crossings = {
        (a, b): plan_crossing(shape, full.dtype, located(a, from_mesh, 0), located(b, to_mesh, 0))
        for a, b in pairs
    }
    transport = InProcess()
    channel = transport.channel("activation", (0, 1), from_mesh, to_mesh, crossings)
    values = {pair: place(full, from_mesh, pair[0]) for pair in crossings}
    with monkeypatch.context() as patch:
        spy = Spy(patch)
        arrived = channel.hand_over(values)
    for (_, spec), array in arrived.items():
        assert_arrived(array, full, to_mesh, spec)
    assert spy.moved == planned_moves(crossings.values())
    assert transport.bytes_sent() == {"activation": sum(spy.moved.values())}
    assert all(c.bytes_across == 0 for (a, b), c in crossings.items() if (a, b) == ((R, R), (R, R)))


def test_a_value_that_is_where_it_is_wanted_is_handed_on_as_it_is():
    mesh, spec = submesh((2, 2), 0), (0, R)
    same = located(spec, mesh, 0)
    crossing = plan_crossing((4,), np.dtype(np.float32), same, same)
    channel = InProcess().channel("activation", (0, 1), mesh, mesh, {"x": crossing})
    value = place(numbered((4,)), mesh, spec)
    assert channel.hand_over({"x": value})["x"] is value


def test_shards_over_devices_in_another_order():
    """Tensor-major to data-major: devices send to others than those of their own number."""
    source, target = submesh((2, 2), 0), submesh((2, 2), 4)
    full = numbered((8, 4))
    crossing = plan_crossing(
        (8, 4), full.dtype, located((1, 0), source, 0), located((0, 1), target, 1)
    )
    assert [(t.source, t.target) for t in crossing.tiles] == [(0, 0), (2, 1), (1, 2), (3, 3)]
    channel = InProcess().channel("activation", (0, 1), source, target, {0: crossing})
    arrived = channel.hand_over({0: place(full, source, (1, 0))})[0]
    assert_arrived(arrived, full, target, (0, 1))


def test_two_shards_to_three_devices():
    source, target = submesh((2, 1), 0), submesh((3, 1), 4)
    full = numbered((12, 2))
    crossing = plan_crossing(
        (12, 2), full.dtype, located((0, R), source, 0), located((0, R), target, 1)
    )
    channel = InProcess().channel("activation", (0, 1), source, target, {0: crossing})
    arrived = channel.hand_over({0: place(full, source, (0, R))})[0]
    assert_arrived(arrived, full, target, (0, R))


def test_an_empty_message_arrives_empty():
    channel = InProcess().channel("tied", (0, 1), submesh((1, 1), 0), submesh((1, 1), 4), {})
    assert channel.hand_over({}) == {}


def test_a_value_that_lies_otherwise_than_planned_is_refused():
    source, target = submesh((2, 1), 0), submesh((2, 1), 4)
    crossing = plan_crossing(
        (4,), np.dtype(np.float32), located((0, R), source, 0), located((0, R), target, 1)
    )
    channel = InProcess().channel("activation", (0, 1), source, target, {"x": crossing})
    with pytest.raises(ValueError, match="x lies as .* this channel was opened for"):
        channel.send({"x": place(numbered((4,)), source, (R, R))}, 0)


SLOW_S = 0.5


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((0, R), (0, R)),  # cut and gathered
        ((0, 1), (1, 0)),  # moved to other devices
        ((1, R), (0, R)),  # cut and joined
        ((R, R), (0, 1)),
        ((0, 1), (R, R)),
    ],
)
def test_nothing_waits_for_what_is_still_being_computed(source, target):
    from_mesh, to_mesh = submesh((2, 2), 0), submesh((2, 2), 4)
    full = numbered((8, 4))

    def slow(shard):
        def wait(held):
            time.sleep(SLOW_S)
            return np.asarray(held)

        return jax.pure_callback(wait, jax.ShapeDtypeStruct(shard.shape, shard.dtype), shard)

    spec = to_partition_spec(source, 2, NAMES)
    compute = jax.jit(
        jax.shard_map(slow, mesh=from_mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    value = place(full, from_mesh, source)
    jax.block_until_ready(compute(value))  # compiled
    crossing = plan_crossing(
        (8, 4), full.dtype, located(source, from_mesh, 0), located(target, to_mesh, 1)
    )
    channel = InProcess().channel("activation", (0, 1), from_mesh, to_mesh, {"x": crossing})
    computing = compute(value)
    start = time.perf_counter()
    arrived = channel.hand_over({"x": computing})["x"]
    assert not computing.is_ready()
    assert not arrived.is_ready()
    assert time.perf_counter() - start < SLOW_S / 2
    assert_arrived(arrived, full, to_mesh, target)
