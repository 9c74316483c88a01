"""Values sent between submeshes through the post offices of two hosts, both of them in this process."""

import itertools
import math
import re
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from launcher.autopar.sharding.crossing import Located, plan_crossing
from launcher.autopar.sharding.spec import REPLICATED, all_specs, to_partition_spec
from launcher.errors import TrainingError
from launcher.runtime.hosts.arrivals import Arrivals
from launcher.runtime.hosts.host_transport import KINDS, HostTransport
from launcher.runtime.hosts.post_office import PostOffice, free_port
from launcher.runtime.steps.transport import Home

NAMES = ("data", "tensor")
MESHES = ((1, 1), (2, 1), (2, 2), (1, 4))
R = REPLICATED
LIMIT_S = 0.2


@pytest.fixture(scope="module")
def offices():
    """Those of hosts 0 and 1; what comes later than the limit is an error."""
    addresses = [f"127.0.0.1:{free_port('127.0.0.1')}" for _ in range(2)]
    return [PostOffice(host, addresses, Arrivals(LIMIT_S)) for host in range(2)]


@pytest.fixture
def transports(offices):
    """Stage 0 lies on host 0, stage 1 on host 1."""
    return [
        HostTransport([(0,), (1,)], [0, 1], host, 2, office, lambda: "1RECV_F0<0")
        for host, office in enumerate(offices)
    ]


def submesh(shape, first):
    devices = jax.devices()[first : first + math.prod(shape)]
    return Mesh(np.array(devices, dtype=object).reshape(shape), NAMES)


def located(spec, mesh, host):
    return Located(spec, mesh.devices.shape, tuple((host, d.id) for d in mesh.devices.flat))


def crossing_of(full, ends, meshes):
    source, target = (located(ends[host], meshes[host], host) for host in range(2))
    return plan_crossing(full.shape, full.dtype, source, target)


def place(array, mesh, spec):
    return jax.device_put(array, NamedSharding(mesh, to_partition_spec(spec, array.ndim, NAMES)))


numbers = itertools.count()


@pytest.mark.parametrize("shape", [(), (8, 4)])
@pytest.mark.parametrize(("source", "target"), [(0, 3), (3, 0), (1, 2), (2, 2), (2, 3)])
def test_every_pair_of_specs_arrives_whole_and_counted(transports, offices, shape, source, target):
    meshes = submesh(MESHES[source], 0), submesh(MESHES[target], 4)
    full = np.arange(1.0, 1 + math.prod(shape), dtype=np.float32).reshape(shape)
    pairs = itertools.product(all_specs(shape, MESHES[source]), all_specs(shape, MESHES[target]))
    crossings = {ends: crossing_of(full, ends, meshes) for ends in pairs}
    sender = transports[0].channel("activation", (0, 1), meshes[0], None, crossings)
    receiver = transports[1].channel("activation", (0, 1), None, meshes[1], crossings)
    before, number = offices[0].bytes_sent().get("activation", 0), next(numbers)
    sender.send({ends: place(full, meshes[0], ends[0]) for ends in crossings}, number)
    arrived = receiver.receive(number)
    assert arrived.keys() == crossings.keys()
    for (_, spec), array in arrived.items():
        wanted = NamedSharding(meshes[1], to_partition_spec(spec, full.ndim, NAMES))
        assert array.sharding.is_equivalent_to(wanted, full.ndim)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), full[shard.index])
    planned = sum(crossing.bytes_across for crossing in crossings.values())
    assert transports[0].bytes_sent()["activation"] - before == planned


def test_a_receive_may_come_first_and_messages_do_not_mix(transports):
    meshes, full = (submesh((2, 1), 0), submesh((2, 1), 4)), np.ones((4,), np.float32)
    crossings = {"x": crossing_of(full, ((0, R), (0, R)), meshes)}
    ends = [
        (
            transports[0].channel(kind, (0, 1), meshes[0], None, crossings),
            transports[1].channel(kind, (0, 1), None, meshes[1], crossings),
        )
        for kind in ("cotangent", "tied parameter")
    ]
    first, second = next(numbers), next(numbers)
    arrived = [receiver.receive(number)["x"] for _, receiver in ends for number in (second, first)]
    for factor, (sender, _) in enumerate(ends):
        for number in (first, second):
            sender.send({"x": place(full * (10 * factor + number), meshes[0], (0, R))}, number)
    wanted = [10 * factor + number for factor in range(2) for number in (second, first)]
    assert [float(array[0]) for array in arrived] == wanted


def test_a_value_that_lies_otherwise_is_refused(transports):
    meshes, full = (submesh((2, 1), 0), submesh((2, 1), 4)), np.ones((4,), np.float32)
    crossings = {"x": crossing_of(full, ((0, R), (0, R)), meshes)}
    sender = transports[0].channel("activation", (0, 1), meshes[0], None, crossings)
    with pytest.raises(ValueError, match="x lies as .* this channel was opened for"):
        sender.send({"x": place(full, meshes[0], (R, R))}, next(numbers))


def test_numbers_reach_the_hosts_that_have_no_part_in_their_stage(transports):
    like, number = jax.ShapeDtypeStruct((), np.float32), next(numbers)
    homes = {"loss": Home(1, like), "first": Home(0, like)}
    both = [transport.shared("report", homes) for transport in transports]
    values = {"first": place(np.float32(3), submesh((2, 1), 0), (R, R))}, {
        "loss": place(np.float32(7), submesh((2, 1), 4), (R, R)), "of all": np.float32(1)
    }  # fmt: skip
    found = [shared.all_of(own, number) for shared, own in zip(both, values, strict=True)]
    assert [{name: float(array) for name, array in all_.items()} for all_ in found] == [
        {"loss": 7, "first": 3},
        {"loss": 7, "first": 3, "of all": 1},
    ]


def test_what_does_not_come_is_named(transports, offices):
    meshes, full = (submesh((1, 1), 0), submesh((1, 1), 4)), np.ones((4,), np.float32)
    crossings = {"x": crossing_of(full, ((R, R), (R, R)), meshes)}
    receiver = transports[1].channel("activation", (0, 1), None, meshes[1], crossings)
    sender = transports[0].channel("activation", (0, 1), meshes[0], None, crossings)
    number = next(numbers)
    arrived = receiver.receive(number)
    offices[1].arrivals.check()
    time.sleep(1.5 * LIMIT_S)
    late = "1RECV_F0<0: the activation of stage 0 from host 0"
    assert offices[1].arrivals.waiting_for == late
    with pytest.raises(TrainingError, match=re.escape(late) + r" has not come for \d+ s"):
        offices[1].arrivals.check()
    before_s = offices[1].arrivals.waited_s
    sender.send({"x": place(full, meshes[0], (R, R))}, number)
    jax.block_until_ready(arrived)
    until_s = time.monotonic() + 10
    while offices[1].arrivals.waited_s < before_s + LIMIT_S:
        assert time.monotonic() < until_s
        time.sleep(0.01)
    offices[1].arrivals.check()
    assert offices[1].arrivals.waiting_for == ""


def test_kinds_are_told_apart():
    assert len(set(KINDS)) == len(KINDS)
