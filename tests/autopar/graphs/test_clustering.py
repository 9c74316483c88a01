"""Cuts against an exhaustive search of the same objective, and the layers of real models."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launcher.autopar.graphs.clustering import (
    SLACKS,
    best_cuts,
    cluster,
    crossing_bytes,
    free_ops,
    places_to_cut,
)
from launcher.autopar.graphs.graph import used_values
from launcher.autopar.graphs.layers import build_layers
from launcher.autopar.graphs.trace import Role, trace_model
from launcher.autopar.graphs.work import op_flops
from launcher.errors import ConfigError


def objective(flops, crossing, cuts):
    """(bytes at the costliest cut, sum of squared FLOPs) as a person would compute them."""
    ends = [*cuts[1:], len(flops)]
    sizes = [sum(flops[a:b]) for a, b in zip(cuts, ends, strict=True)]
    return max((crossing[cut] for cut in cuts[1:]), default=0.0), sum(s * s for s in sizes), sizes


def exhaustive(flops, crossing, num_layers):
    """The best objective under the first slack that some cuts keep; None if there are none.

    Every layer has work, but for the last one (what follows the last matrix product).
    """
    for slack in SLACKS:
        bound = max((1 + slack) * sum(flops) / num_layers, max(flops))
        found = []
        for inner in itertools.combinations(range(1, len(flops)), num_layers - 1):
            bottleneck, squares, sizes = objective(flops, crossing, (0, *inner))
            if max(sizes) <= bound * (1 + 1e-9) and all(sizes[:-1]):
                found.append((bottleneck, squares))
        if found:
            return min(found)
    return None


@pytest.mark.parametrize("seed", range(80))
def test_the_cuts_are_those_of_an_exhaustive_search(seed):
    rng = np.random.default_rng(seed)
    num_atoms = int(rng.integers(3, 11))
    num_layers = int(rng.integers(1, min(num_atoms, 4) + 1))
    flops = rng.integers(0, 6, num_atoms).astype(float) * rng.choice([1.0, 1e9])
    flops[rng.integers(num_atoms)] += 1.0
    crossing = rng.integers(1, 9, num_atoms).astype(float)
    num_layers = min(num_layers, len(places_to_cut(flops, crossing)))
    expected = exhaustive(flops.tolist(), crossing.tolist(), num_layers)
    cuts = best_cuts(flops, crossing.copy(), num_layers)
    assert cuts[0] == 0
    assert list(cuts) == sorted(set(cuts))
    assert len(cuts) == num_layers
    if expected is not None:
        found = objective(flops.tolist(), crossing.tolist(), cuts)
        assert found[0] == expected[0]
        assert found[1] == pytest.approx(expected[1], rel=1e-9)


def test_few_bytes_matter_more_than_balance_until_a_layer_has_too_much():
    crossing = np.array([0.0, 9, 1, 9, 9, 9])
    assert best_cuts(np.ones(6), crossing.copy(), 2) == (
        0,
        2,
    )  # 2 + 4 of 6: within 1.5 times a half
    assert best_cuts(np.ones(6), np.array([0.0, 1, 9, 9, 9, 9]), 2) == (0, 3)  # 1 + 5 would not be


def test_layers_start_where_the_fewest_bytes_cross_between_two_heavy_ops():
    assert places_to_cut(np.array([0.0, 5.0, 0.0]), np.array([0.0, 1.0, 1.0])).tolist() == [0, 2]


@pytest.fixture(scope="module")
def traced(tiny_gpt):
    return trace_model(tiny_gpt(layers=6, dropout=0.1), 2)


def test_blocks_become_equal_layers(traced):
    layered = build_layers(traced, cluster(traced))
    names = [layer.cls.name for layer in layered.layers]
    assert len(names) == 8  # the embedding, six blocks, the head
    assert len(set(names[1:7])) == 1
    assert len(layered.classes) == 3


@pytest.mark.parametrize(("num_layers", "classes"), [(1, 1), (2, 2), (3, 3)])
def test_fewer_layers_are_made_of_whole_blocks(traced, num_layers, classes):
    layered = build_layers(traced, cluster(traced, num_layers))
    assert len(layered.layers) == num_layers
    assert len(layered.classes) == classes
    work = [sum(op_flops(op) for op in ops) for ops in cluster(traced, num_layers).layers]
    assert max(work) <= 1.5 * sum(work) / num_layers


def test_more_layers_than_places_to_cut_is_an_error_with_the_largest_number(traced):
    with pytest.raises(
        ConfigError, match=r"parallel\.pp=1000 is more layers than the \d+"
    ) as error:
        cluster(traced, 1000, key="parallel.pp")
    most = int(re.search(r"the (\d+) that", str(error.value)).group(1))
    found = [sum(op_flops(op) for op in ops) for ops in cluster(traced, most).layers]
    assert len(found) == most
    heavy = [op for op in traced.graph.ops if op_flops(op)]
    assert most >= len(heavy)
    assert max(found) == max(map(op_flops, heavy))  # no layer takes what the others leave


@pytest.mark.parametrize("num_layers", [None, 1, 2, 4, 6])
def test_every_op_is_in_exactly_one_layer_or_free_and_the_order_stays(traced, num_layers):
    found = cluster(traced, num_layers)
    position = {id(op): i for i, op in enumerate(traced.graph.ops)}
    layered = [position[id(op)] for ops in found.layers for op in ops]
    free = [position[id(op)] for op in found.free]
    assert sorted([*layered, *free]) == list(range(len(traced.graph.ops)))
    assert layered == sorted(layered)
    assert all(found.layers)


def test_more_layers_than_blocks_cut_the_blocks_alike(traced):
    layered = build_layers(traced, cluster(traced, 12))
    names = [layer.cls.name for layer in layered.layers]
    assert len(names) == 12
    assert names[1:9] == names[1:3] * 4


def test_free_ops_are_those_that_no_input_of_the_model_reaches(traced):
    reached = {
        value
        for value, source in traced.inputs.items()
        if source.role in (Role.PARAM, Role.STATE, Role.BATCH)
    }
    untouched = []
    for op in traced.graph.ops:
        if reached.isdisjoint(op.values):
            untouched.append(op)
        else:
            reached.update(op.results)
    drawn = {value for op in untouched for value in op.results if "bits" in str(op.primitive)}
    assert drawn, "the model has dropout"
    expensive = [op for op in untouched if "random_bits" in str(op.primitive)]
    free = free_ops(traced)
    assert {id(op) for op in free} <= {id(op) for op in untouched}
    assert not {id(op) for op in expensive} & {id(op) for op in free}
    without = {value for op in free for value in op.results}
    for op in untouched:  # the rest of them depend on drawn bits
        if op not in free and op not in expensive:
            assert not without.issuperset(op.values)


def test_crossing_bytes_count_every_value_alive_at_a_boundary(traced):
    free = free_ops(traced)
    skipped = {value for op in free for value in op.results}
    ops = [op for op in traced.graph.ops if op not in free]
    found = crossing_bytes(traced.graph, ops, skipped)
    assert len(found) == len(ops) + 1
    for boundary in range(0, len(ops), 7):
        before = {value for op in ops[:boundary] for value in op.results}
        alive = before & used_values(ops[boundary:])
        avals = [traced.graph.avals[value] for value in alive]
        assert found[boundary] == sum(math.prod(a.shape) * a.dtype.itemsize for a in avals)


def test_a_model_without_matrix_products_is_one_layer(toy_model):
    model = toy_model(
        loss=lambda p, s, b, k: (jnp.sum(p["w"] * b["x"]), (s, {})),
        abstract_params={"w": jax.ShapeDtypeStruct((4,), jnp.float32)},
        batch=lambda size: {"x": jax.ShapeDtypeStruct((4,), jnp.float32)},
    )
    assert len(cluster(trace_model(model, 1)).layers) == 1
