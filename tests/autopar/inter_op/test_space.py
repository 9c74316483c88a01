"""What each mode may combine, and which degrees fill a cluster, against trying all combinations."""

import itertools
from dataclasses import replace

import pytest
from machines import mixed

from launcher.autopar.inter_op.space import (
    PlanOptions,
    divisors,
    fits,
    make_space,
    microbatch_counts,
    stage_views,
)
from launcher.autopar.programs.schedules import SCHEDULE_NAMES
from launcher.autopar.sharding.restrictions import Experts

BATCH = 32


def options(mode, **fields):
    return PlanOptions(mode=mode, **{"global_batch": BATCH, **fields})


MODES = {
    "single": ({}, (1, 1, 1), (0,)),
    "data": ({}, (8, 1, 1), (0,)),
    "zero": ({}, (8, 1, 1), (2,)),
    "zero ": ({"zero": 3}, (8, 1, 1), (3,)),
    "manual": ({}, (8, 1, 1), (0,)),
    "manual ": ({"tp": 2}, (4, 2, 1), (0,)),
    "manual  ": ({"tp": 2, "pp": 2}, (2, 2, 2), (0,)),
    "manual   ": ({"dp": 1, "tp": 4, "pp": 2, "zero": 1}, (1, 4, 2), (1,)),
}


@pytest.mark.parametrize("mode", MODES)
def test_degrees_of_a_mode_without_search(mode, cpu8):
    fields, (data, tensor, stages), zero = MODES[mode]
    space = make_space(options(mode.strip(), **fields), cpu8)
    assert (space.choices.data, space.choices.tensor, space.num_submeshes) == (data, tensor, stages)
    assert space.choices.zero == zero
    assert space.choices.recompute == ("none",)
    assert space.schedules == (("1f1b", 1),)
    ((hosts, devices),) = space.submeshes
    assert hosts * devices == data * tensor
    assert space.num_devices == data * tensor * stages


def test_auto_leaves_everything_open_that_is_not_forced(cpu8):
    space = make_space(options("auto"), cpu8)
    assert (space.choices.data, space.choices.tensor, space.num_submeshes) == (None, None, None)
    assert set(space.submeshes) == {(1, 1), (1, 2), (1, 4), (2, 4)}
    assert len(space.choices.zero) > 1
    assert len(space.choices.recompute) > 1
    assert {name for name, _ in space.schedules} == set(SCHEDULE_NAMES)
    forced = make_space(
        options("auto", dp=2, tp=2, pp=2, zero=3, recompute="full", schedule="gpipe"), cpu8
    )
    assert (forced.choices.data, forced.choices.tensor, forced.num_submeshes) == (2, 2, 2)
    assert (forced.choices.zero, forced.choices.recompute) == ((3,), ("full",))
    assert forced.schedules == (("gpipe", 1),)


def test_virtual_stages_are_open_unless_they_are_given(cpu8):
    for given, expected in ((None, (2, 3, 4)), (3, (3,))):
        asked = options("auto", schedule="interleaved", virtual_stages=given)
        assert make_space(asked, cpu8).schedules == tuple(("interleaved", v) for v in expected)
    assert make_space(options("manual", schedule="interleaved"), cpu8).schedules == (
        ("interleaved", 2),
    )


@pytest.mark.parametrize(
    ("mode", "ep", "experts", "data"),
    [
        ("auto", None, Experts.FREE, None),
        ("auto", 1, Experts.NEVER, None),
        ("auto", 4, Experts.FORCED, 4),
        ("manual", 1, Experts.NEVER, 8),
        ("manual", 8, Experts.FORCED, 8),
    ],
)
def test_expert_parallelism_is_the_data_degree(cpu8, mode, ep, experts, data):
    choices = make_space(options(mode, ep=ep), cpu8).choices
    assert (choices.experts, choices.data) == (experts, data)


def test_experts_are_split_over_the_whole_data_axis_or_not_at_all(cpu8):
    assert fits(options("auto", ep=4, dp=4), cpu8)
    assert not fits(options("auto", ep=4, dp=2), cpu8)
    assert not fits(options("manual", ep=4), cpu8)
    assert fits(options("manual", ep=4, tp=2), cpu8)


def can_be_tiled(cluster, dp, tp, pp, microbatch_size):
    """Try every multiset of submeshes, at most one per device."""
    shapes = [
        (submesh.hosts, submesh.devices)
        for submesh in cluster.submeshes()
        if any(
            submesh.devices % tensor == 0
            and tp in (None, tensor)
            and dp in (None, submesh.hosts * submesh.devices // tensor)
            and microbatch_size % (submesh.hosts * submesh.devices // tensor) == 0
            for tensor in range(1, submesh.devices + 1)
        )
    ]
    numbers = range(1, cluster.num_devices + 1) if pp is None else (pp,)
    return any(
        sum(hosts * devices for hosts, devices in chosen) == cluster.num_devices
        for number in numbers
        for chosen in itertools.combinations_with_replacement(shapes, number)
    )


@pytest.mark.parametrize(("hosts", "per_host"), [(2, 4), (3, 2), (2, 3), (1, 6)])
def test_degrees_fit_in_auto_where_some_stages_use_up_the_cluster(cpu8, hosts, per_host):
    cluster = replace(cpu8, num_hosts=hosts, devices_per_host=per_host)
    degrees = (None, 1, 2, 3, 4, 8)
    for dp, tp, pp in itertools.product(degrees, (None, 1, 2, 3, 4), (None, 1, 2, 3, 5, 9)):
        for size in (1, 2, 6, 8):
            forced = options("auto", dp=dp, tp=tp, pp=pp)
            expected = can_be_tiled(cluster, dp, tp, pp, size)
            assert fits(forced, cluster, size) == expected, (dp, tp, pp, size)


@pytest.mark.parametrize(("hosts", "per_host"), [(2, 4), (3, 4), (1, 6)])
def test_degrees_fit_by_hand_where_their_product_is_the_cluster(cpu8, hosts, per_host):
    cluster = replace(cpu8, num_hosts=hosts, devices_per_host=per_host)
    for dp, tp, pp in itertools.product(range(1, 13), range(1, 9), range(1, 13)):
        width = dp * tp
        is_rectangle = per_host % width == 0 or width % per_host == 0
        in_host = min(width, per_host) % tp == 0
        expected = width * pp == hosts * per_host and is_rectangle and in_host
        assert fits(options("manual", dp=dp, tp=tp, pp=pp), cluster) == expected, (dp, tp, pp)


@pytest.mark.parametrize("shapes", [((1, 4), (1, 2)), ((2, 2), (1, 3)), ((1, 2), (2, 2), (1, 1))])
def test_several_kinds_are_each_used_up_by_stages_of_their_own(cpu8, shapes):
    kinds = [replace(cpu8, num_hosts=hosts, devices_per_host=n) for hosts, n in shapes]
    for dp, tp, pp in itertools.product((None, 1, 2, 4), (None, 1, 2), (None, *range(1, 9))):
        degrees = {"dp": dp, "tp": tp}
        numbers = range(1, 9) if pp is None else (pp,)
        expected = any(
            all(
                can_be_tiled(kind, dp, tp, own, BATCH)
                for kind, own in zip(kinds, shares, strict=True)
            )
            for number in numbers
            for shares in itertools.product(range(1, number + 1), repeat=len(kinds))
            if sum(shares) == number
        )
        forced = options("auto", pp=pp, **degrees)
        assert fits(forced, mixed(*kinds), BATCH) == expected, (dp, tp, pp)


def test_the_space_says_of_which_kind_a_submesh_is(cpu8):
    small = replace(cpu8, num_hosts=1, devices_per_host=2)
    space = make_space(options("auto"), mixed(cpu8, small))
    assert space.submeshes == ((1, 1), (1, 2), (1, 4), (2, 4), (1, 1), (1, 2))
    assert (space.kinds, space.devices, space.num_devices) == ((0, 0, 0, 0, 1, 1), (8, 2), 10)
    assert not any(name == "interleaved" for name, _ in space.schedules)
    part = space.only({1, 5})
    assert (part.submeshes, part.kinds) == (((1, 2), (1, 2)), (0, 1))
    alone = make_space(options("single"), mixed(cpu8, small))
    assert (alone.devices, alone.num_devices) == ((1, 0), 1)
    by_hand = make_space(options("manual", tp=2, pp=5), mixed(cpu8, small))
    assert (by_hand.choices.tensor, by_hand.num_submeshes) == (2, 5)


def test_the_smallest_submeshes_of_large_mixed_clusters_are_left_out(cpu8):
    large = mixed(*(replace(cpu8, num_hosts=n, devices_per_host=8) for n in (8, 2)))
    sizes = {view.num_devices for view in stage_views(options("auto"), large)}
    assert sizes == {4, *range(8, 65, 8)}  # 17 x 5 numbers of devices left, not 65 x 17
    assert fits(options("auto"), large)
    forced = {view.num_devices for view in stage_views(options("auto", pp=24), large)}
    assert min(forced) == 1  # that many stages may need them
    odd = mixed(*(replace(cpu8, num_hosts=n, devices_per_host=3) for n in (15, 15)))
    assert min(view.num_devices for view in stage_views(options("auto"), odd)) == 1


def test_every_view_has_the_forced_degrees_and_a_tensor_axis_inside_a_host(cpu8):
    views = stage_views(options("auto", tp=2), cpu8)
    assert {(view.hosts, view.devices, view.data) for view in views} == {
        (1, 2, 1),
        (1, 4, 2),
        (2, 4, 4),
    }
    assert all(view.tensor <= cpu8.devices_per_host for view in stage_views(options("auto"), cpu8))


def test_microbatches_are_those_that_every_data_axis_can_share(cpu8):
    assert microbatch_counts(options("data"), cpu8) == (4, 2, 1)
    assert microbatch_counts(options("data", global_batch=24), cpu8) == (3, 1)
    assert microbatch_counts(options("data", global_batch=12), cpu8) == ()
    assert microbatch_counts(options("auto"), cpu8) == (32, 16, 8, 4, 2, 1)
    # one stage without a tensor axis has a data axis of eight
    assert microbatch_counts(options("auto", tp=1, pp=1), cpu8) == (4, 2, 1)
    assert microbatch_counts(options("single", global_batch=6), cpu8) == (6, 3, 2, 1)


def test_divisors_are_all_divisors():
    for number in range(1, 200):
        expected = [value for value in range(1, number + 1) if number % value == 0]
        assert divisors(number) == expected
