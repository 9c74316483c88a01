"""Stages of equally many layers: where they begin, and that a search keeps to them."""

import itertools
from dataclasses import replace

import pytest

from launcher.autopar.inter_op.cuts import Way, equal_cuts, ways_to_cut
from launcher.autopar.inter_op.search import search
from launcher.autopar.inter_op.space import PlanOptions, make_space
from launcher.autopar.realized.realize import layered_model


@pytest.fixture(scope="module")
def gpt(tiny_gpt):
    return tiny_gpt(layers=8)


def blocks_of(model, cuts):
    """How many attentions each stage has."""
    inputs = model.traced.inputs
    found = []
    for first, last in zip(cuts, cuts[1:], strict=False):
        read = {
            inputs[value].path
            for layer in model.layers[first:last]
            for value in layer.inputs
            if value in inputs
        }
        found.append(sum(path.endswith("attention/qkv/kernel") for path in read))
    return found


def test_layers_with_little_work_do_not_count(gpt):
    model = layered_model(gpt, 1)
    assert len(model.layers) > 8  # embedding and head are layers too
    assert blocks_of(model, equal_cuts(model, 1)) == [8]
    assert blocks_of(model, equal_cuts(model, 4)) == [2, 2, 2, 2]
    assert blocks_of(model, equal_cuts(model, 8)) == [1] * 8


def test_where_they_do_not_divide_stages_differ_by_one(gpt):
    model = layered_model(gpt, 1)
    assert sorted(blocks_of(model, equal_cuts(model, 3))) == [2, 3, 3]


def test_of_more_stages_than_heavy_layers_every_layer_counts(gpt):
    model = layered_model(gpt, 1)
    number = len(model.layers)
    assert equal_cuts(model, number) == tuple(range(number + 1))


@pytest.mark.parametrize("forced", [{}, {"pp": 2}])
def test_a_search_for_equal_layers_finds_no_better_than_one_that_may_balance(gpt, cpu8, forced):
    def find(**more):
        options = PlanOptions(mode="auto", global_batch=16, num_microbatches=8, **forced, **more)
        return search(gpt, cpu8, options, lambda text: None).candidates

    equal, free = find(equal_layers=True), find()
    for candidate in equal:
        stages = candidate.arrangement.stages
        model = candidate.planner.model
        assert (0, *(stage.last for stage in stages)) == equal_cuts(model, len(stages))
        submeshes = len(stages) // candidate.virtual_stages
        assert submeshes == forced.get("pp", submeshes)
    assert min(c.step_s for c in free) <= min(c.step_s for c in equal) * (1 + 1e-9)


@pytest.mark.parametrize("forced", [{}, {"pp": 4}])
def test_equally_many_layers_can_be_had_where_stages_may_not_begin_before_every_layer(
    tiny_gpt, cpu8, forced
):
    """Of 36 blocks, stages begin before every second; 9 for each of 4 stages are a way of their own."""
    model = layered_model(tiny_gpt(layers=36), 1)
    free = PlanOptions(mode="auto", global_batch=16, **forced)
    equal = replace(free, equal_layers=True)
    space = replace(make_space(free, cpu8), most_pieces=24)
    ways = list(ways_to_cut(free, space, model))
    whole = [way for way in ways if way.num_submeshes == forced.get("pp")]
    grouped = {way.virtual_stages: way.cuts for way in whole}
    assert len(grouped[1]) < len(model.layers)
    for way in ways_to_cut(equal, space, model):
        assert set(way.cuts) <= set(grouped[way.virtual_stages]) or way in ways
    nines = Way(schedule="1f1b", virtual_stages=1, num_submeshes=4, cuts=equal_cuts(model, 4))
    assert nines in ways
    assert list(nines.ranges()) == list(itertools.pairwise(nines.cuts))
    assert len(list(replace(nines, num_submeshes=3).ranges())) == 10
    assert blocks_of(model, equal_cuts(model, 4)) == [9, 9, 9, 9]
