"""What the messages of a plan carry: the layouts of both ends, and bytes and seconds that add up."""

import math
from dataclasses import replace

import numpy as np
import pytest

from launcher.autopar.clusters.device import Link
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.autopar.realized.messages import price_messages, scalar_crossing
from launcher.autopar.sharding.spec import local_shape

BATCH = 32


@pytest.fixture(scope="module")
def realized(tiny_gpt, cpu8):
    """Two stages, a host each, four devices along the tensor axis; the embedding is tied."""
    options = PlanOptions(global_batch=BATCH, mode="manual", tp=4, pp=2, zero=0, num_microbatches=2)
    return find_plan(tiny_gpt(layers=3), cpu8, options, lambda text: None).realized


def test_both_ends_lie_as_the_stages_have_them(realized):
    first, second = (stage.layout for stage in realized.stages)
    messages = realized.messages
    for (source, target), ends in (
        ((0, 1), (first.exports, second.imports)),
        ((1, 0), (second.returns, first.cotangents)),
    ):
        table = messages.activations if source == 0 else messages.cotangents
        assert table.keys() == {(source, target)}
        for value, crossing in table[source, target].items():
            assert (crossing.source.spec, crossing.target.spec) == tuple(e[value] for e in ends)
            assert crossing.source.places == tuple((source, d) for d in range(4))
            assert crossing.target.places == tuple((target, d) for d in range(4))
    assert set(messages.activations[0, 1]) == set(realized.sent[0, 1])
    assert set(messages.cotangents[1, 0]) == set(realized.returned[0, 1])


def test_a_tied_parameter_goes_from_owner_to_user_and_its_gradient_back(realized):
    messages = realized.messages
    [((owner, user), carried)] = messages.tied_parameters.items()
    [(path, crossing)] = carried.items()
    assert (owner, user) == realized.wiring.tied[0]
    at_owner, at_user = (realized.stages[s].layout.params[path] for s in (owner, user))
    assert (crossing.source.spec, crossing.target.spec) == (at_owner, at_user)
    back = messages.tied_gradients[user, owner][path]
    assert (back.source.spec, back.target.spec) == (at_user, at_owner)
    assert crossing.bytes_across == back.bytes_across == 4 * 256 * 64  # each byte once


def test_bytes_and_seconds_add_up(realized, cpu8):
    """A network that costs by the byte alone; the planner has split what crosses as far as it goes."""
    links = replace(cpu8, inter_host=Link(bytes_per_s=1000.0, latency_s=0.0))
    messages, across = realized.messages, 4 * BATCH // 2 * 64 * 64
    for carried in (messages.activations[0, 1], messages.cotangents[1, 0]):
        assert sum(crossing.bytes_across for crossing in carried.values()) == across
        assert not any(crossing.gathers for crossing in carried.values())
    seconds = price_messages(messages, realized.stages, links)
    assert seconds.activation_s == {(0, 1): pytest.approx(across / 1000)}
    assert seconds.cotangent_s == {(1, 0): pytest.approx(across / 1000)}
    assert messages.bytes_per_step(5) - messages.bytes_per_step(4) == 2 * across
    weights = 4 * 256 * 64
    held = {edge: local_bytes(carried) for edge, carried in messages.tied_parameters.items()}
    held |= {edge: local_bytes(carried) for edge, carried in messages.tied_gradients.items()}
    assert messages.bytes_per_step(0) == sum(4 * num_bytes for num_bytes in held.values())
    assert seconds.tied_s.keys() == held.keys() == {(0, 1), (1, 0)}
    assert all(weights / 1000 <= seconds.tied_s[edge] < weights / 1000 + 0.01 for edge in held)


def local_bytes(carried):
    """What each device has in the end: all of it came from the other stage or from its neighbours."""
    return sum(
        4 * math.prod(local_shape(c.target.spec, c.shape, c.target.mesh_shape))
        for c in carried.values()
    )


def test_a_number_goes_to_every_device_of_the_other_stage(realized):
    crossing = scalar_crossing(*realized.stages, np.dtype(np.float64))
    assert [(tile.source, tile.target) for tile in crossing.tiles] == [(i, i) for i in range(4)]
    assert (crossing.bytes_across, crossing.gathers) == (4 * 8, ())
