"""What is left of synchronisation behind a backward pass: closed forms, a queue played, real layers."""

from dataclasses import replace

import numpy as np
import pytest

from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.clusters.mesh import logical_mesh
from launcher.autopar.graphs.clustering import cluster
from launcher.autopar.graphs.layers import build_layers
from launcher.autopar.graphs.trace import trace_model
from launcher.autopar.intra_op.intra_op import IntraOpPlanner
from launcher.autopar.intra_op.overlapped import exposed_s, saved_s
from launcher.autopar.intra_op.stage_problem import StageSettings
from launcher.autopar.sharding.restrictions import Restrictions


@pytest.mark.parametrize("layers", [1, 2, 7])
@pytest.mark.parametrize(("pass_s", "reduce_s"), [(2.0, 0.5), (2.0, 2.0), (1.0, 3.0), (1.0, 0.0)])
def test_equal_layers(layers, pass_s, reduce_s):
    """Of fast links one layer is left; slow ones work on without a pause from the first layer on."""
    found = exposed_s(np.full(layers, pass_s), np.full(layers, reduce_s))
    expected = max(reduce_s, layers * reduce_s - (layers - 1) * pass_s)
    assert found[-1] == pytest.approx(expected)


def test_an_embedding_comes_last_and_cannot_hide():
    pass_s, reduce_s = np.array([0.1, 2.0, 2.0, 2.0]), np.array([5.0, 1.0, 1.0, 1.0])
    assert exposed_s(pass_s, reduce_s).tolist() == pytest.approx([5.0, 5.9, 5.9, 5.9])


def played_s(pass_s, reduce_s) -> float:
    """Layer by layer, from the last one: the links take what is final as soon as they are free."""
    now_s = free_s = 0.0
    for layer in reversed(range(len(pass_s))):
        now_s += pass_s[layer]
        free_s = max(free_s, now_s) + reduce_s[layer]
    return free_s - now_s


@pytest.mark.parametrize("seed", range(20))
def test_any_layers(seed):
    rng = np.random.default_rng(seed)
    pass_s, reduce_s = rng.exponential(1.0, 9), rng.exponential(rng.choice([0.3, 1.0, 3.0]), 9)
    found = exposed_s(pass_s, reduce_s)
    for last in range(1, 10):
        assert found[last - 1] == pytest.approx(played_s(pass_s[:last], reduce_s[:last]))


@pytest.fixture(scope="module")
def planner(tiny_gpt):
    traced = trace_model(tiny_gpt(layers=3), 8)
    return IntraOpPlanner(build_layers(traced, cluster(traced, None)))


def solved(planner, machine, *, overlaps: bool = True, zero: int = 0):
    device = replace(machine.device, overlaps_collectives=overlaps)
    mesh = logical_mesh(machine, hosts=2, devices=4, data=8)
    settings = StageSettings(
        mesh=mesh, compute=ComputeModel(device), restrictions=Restrictions(frozenset({0})),
        num_microbatches=2, zero=zero,
    )  # fmt: skip
    return planner.solve(0, len(planner.model.layers), settings)


def whole(planner) -> tuple[int, int]:
    return 0, len(planner.model.layers)


@pytest.mark.parametrize("recompute", ["none", "layer", "full"])
def test_the_layers_of_a_model_go_through_the_links_one_by_one(planner, cpu8, recompute):
    sharding = solved(planner, cpu8)
    by_place = planner.reduce_s(*whole(planner), sharding)
    seen, pass_s, reduce_s = set(), [], []
    for layer in planner.model.layers:
        seconds, again = sharding.group_seconds[layer.cls.name], recompute == "layer"
        pass_s.append(seconds.backward + again * seconds.recomputed("layer"))
        own = {
            value: by_place.get((layer.cls.name, slot)) for slot, value in enumerate(layer.inputs)
        }
        reduce_s.append(sum(s for value, s in own.items() if s is not None and value not in seen))
        seen |= own.keys()
    # Without ZeRO, synchronising is bringing gradients together.
    assert sum(reduce_s) == pytest.approx(sharding.seconds.synchronize)
    saved = saved_s(planner, sharding, whole(planner), recompute)
    for last in range(1, len(pass_s) + 1):
        rest_s = played_s(pass_s[:last], reduce_s[:last])
        assert saved[last - 1] == pytest.approx(sum(reduce_s[:last]) - rest_s)
    assert 0 < saved[-1] < sharding.seconds.synchronize


def test_half_a_backward_pass_hides_less(planner, cpu8):
    sharding = solved(planner, cpu8)
    both, half = (
        saved_s(planner, sharding, whole(planner), "none", halves=halves)[-1]
        for halves in (False, True)
    )
    assert 0 < half < both


def test_new_values_go_home_after_the_update_whatever_overlaps(planner, cpu8):
    """ZeRO-2 brings gradients together in half the time, and the rest cannot be hidden."""
    sharding = planner.reprice(
        *whole(planner),
        replace(solved(planner, cpu8).settings, zero=2),
        solved(planner, cpu8).picks,
    )
    by_place = planner.reduce_s(*whole(planner), sharding)
    saved = saved_s(planner, sharding, whole(planner), "none")[-1]
    assert 0 < saved < 0.7 * sharding.seconds.synchronize
    assert all(seconds > 0 for seconds in by_place.values())


def test_devices_that_do_one_thing_at_a_time_save_nothing(planner, cpu8):
    saved = saved_s(planner, solved(planner, cpu8, overlaps=False), whole(planner), "none")
    assert saved.tolist() == [0.0] * len(planner.model.layers)
