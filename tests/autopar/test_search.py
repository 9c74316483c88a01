"""What each mode searches, what it refuses and how it says so, and that searching more finds no worse."""

from dataclasses import replace

import optax
import pytest

from launcher.autopar.restrictions import Experts
from launcher.autopar.search import PlanOptions, make_space, search
from launcher.errors import ConfigError, InfeasiblePlanError

BATCH = 32


def options(mode, **fields):
    return PlanOptions(mode=mode, **{"global_batch": BATCH, **fields})


def run(model, cluster, mode, **fields):
    return search(model, cluster, options(mode, **fields), lambda text: None)


@pytest.fixture(scope="module")
def gpt(tiny_gpt):
    return tiny_gpt(layers=4)


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
    assert (space.choices.data, space.choices.tensor, space.num_stages) == (data, tensor, stages)
    assert space.choices.zero == zero
    assert space.choices.recompute == ("none",)
    assert space.schedule == "1f1b"
    ((hosts, devices),) = space.submeshes
    assert hosts * devices == data * tensor
    assert space.num_devices == data * tensor * stages


def test_auto_leaves_everything_open_that_is_not_forced(cpu8):
    space = make_space(options("auto"), cpu8)
    assert (space.choices.data, space.choices.tensor, space.num_stages) == (None, None, None)
    assert set(space.submeshes) == {(1, 1), (1, 2), (1, 4), (2, 4)}
    assert len(space.choices.zero) > 1
    assert len(space.choices.recompute) > 1
    forced = make_space(
        options("auto", dp=2, tp=2, pp=2, zero=3, recompute="full", schedule="gpipe"), cpu8
    )
    assert (forced.choices.data, forced.choices.tensor, forced.num_stages) == (2, 2, 2)
    assert (forced.choices.zero, forced.choices.recompute) == ((3,), ("full",))
    assert forced.schedule == "gpipe"


@pytest.mark.parametrize(
    ("ep", "experts"), [(None, Experts.FREE), (1, Experts.NEVER), (4, Experts.FORCED)]
)
def test_expert_parallelism_is_free_never_or_forced(cpu8, ep, experts):
    assert make_space(options("manual", tp=2, ep=ep), cpu8).choices.experts is experts


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dp": 3}, r"dp 3 x tp 1 x pp 1 is 3 devices, the cluster has 8 \(parallel\.dp"),
        ({"tp": 3}, r"dp 2 x tp 3 x pp 1 is 6 .* has 8 .*parallel\.tp=3.* product is 8"),
        ({"dp": 2, "tp": 2, "pp": 4}, r"is 16 devices, the cluster has 8.*parallel\.pp=4"),
        ({"pp": 16}, r"dp 1 x tp 1 x pp 16 is 16 devices"),
        ({"tp": 8}, r"tensor axis of 8 does not fit a host's 4 devices \(parallel\.tp=8\)"),
        (
            {"tp": 2, "ep": 3},
            r"over the 4 devices .*parallel\.ep=3.* parallel\.ep=1 or parallel\.ep=4",
        ),
    ],
)
def test_degrees_that_cannot_be(cpu8, fields, words):
    with pytest.raises(ConfigError, match=words):
        make_space(options("manual", **fields), cpu8)


def test_a_stage_is_a_rectangle_of_the_cluster(cpu8):
    three_hosts = replace(cpu8, num_hosts=3)
    with pytest.raises(ConfigError, match=r"stage of 6 devices is no rectangle .*multiple of 4"):
        make_space(options("manual", pp=2), three_hosts)


def test_microbatches_divide_the_batch(gpt, cpu8):
    with pytest.raises(ConfigError, match=r"32 samples .* 5 equal .*num_microbatches=5.*divisor"):
        run(gpt, cpu8, "data", num_microbatches=5)


def test_a_microbatch_has_a_sample_for_every_data_shard(gpt, cpu8):
    with pytest.raises(InfeasiblePlanError, match=r"parallel\.num_microbatches=8"):
        run(gpt, cpu8, "data", num_microbatches=8)


def test_more_stages_than_devices(gpt, cpu8):
    with pytest.raises(InfeasiblePlanError, match=r"8 devices .* 20 stages .*parallel\.pp=20"):
        run(gpt, cpu8, "auto", pp=20, num_microbatches=4)


def test_a_model_that_does_not_fit_is_told_in_bytes(gpt, cpu8):
    small = replace(cpu8, device=replace(cpu8.device, memory_bytes=2**20))
    with pytest.raises(InfeasiblePlanError, match=r"[\d,]+ bytes too many .*parallel\.zero=3"):
        run(gpt, small, "data", num_microbatches=4)


def test_microbatches_are_tried_from_small_to_large_and_next_to_the_best(gpt, cpu8):
    tried = []
    found = search(gpt, cpu8, options("data"), tried.append)
    counts = [int(text.split()[0]) for text in tried]
    assert counts[0] == BATCH // 8  # a sample for each of the eight devices
    best = found.candidates[0].num_microbatches
    assert {c for c in (2 * best, best // 2) if c and BATCH % c == 0} <= set(counts)
    totals = [candidate.result.total_s for candidate in found.candidates]
    assert totals == sorted(totals)
    assert found.ilp_solved >= len(found.candidates)
    assert found.priced >= len(found.candidates)


def test_stages_are_placed_side_by_side(gpt, cpu8):
    (candidate,) = run(gpt, cpu8, "manual", tp=2, pp=4, num_microbatches=4).candidates
    used = [(h, d) for hosts, devices in candidate.placement for h in hosts for d in devices]
    assert len(used) == len(set(used)) == 8


def grid():
    """All degrees of eight devices in rectangles, and ZeRO where there is a data axis."""
    for tp in (1, 2, 4):
        for pp in (1, 2, 4, 8):
            if tp * pp <= 8:
                dp = 8 // (tp * pp)
                for zero in (0, 2) if dp > 1 else (0,):
                    yield {"dp": dp, "tp": tp, "pp": pp, "zero": zero}


@pytest.mark.parametrize("num_microbatches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_auto_is_no_slower_than_any_plan_by_hand(gpt, cpu8, num_microbatches):
    """In the objective of the search; the simulator's view is in test_make_plan."""
    (best,) = run(gpt, cpu8, "auto", num_microbatches=num_microbatches).candidates
    for degrees in grid():
        if BATCH // num_microbatches % degrees["dp"] or degrees["pp"] > 4:
            continue  # eight stages are of other layers
        (manual,) = run(
            gpt, cpu8, "manual", num_microbatches=num_microbatches, **degrees
        ).candidates
        assert best.result.total_s <= manual.result.total_s * (1 + 1e-9), degrees


def test_less_memory_is_slower_and_recomputed_for(gpt, cpu8):
    plans = []
    for mebibytes in (2048, 3, 2):
        device = replace(cpu8.device, memory_bytes=mebibytes * 2**20)
        (found,) = run(gpt, replace(cpu8, device=device), "auto", num_microbatches=8).candidates
        plans.append(found.result)
        for index, choice in enumerate(found.result.stages):
            held = min(8, len(found.result.stages) - index) * choice.option.stash_bytes
            assert choice.option.fixed_bytes + held <= device.memory_bytes
    roomy, *tight = (result.total_s for result in plans)
    assert roomy < tight[0] < tight[1]
    recomputed = [{choice.option.tag.recompute for choice in result.stages} for result in plans]
    assert recomputed[0] == {"none"}
    assert recomputed[-1] == {"layer"}


def test_the_optimizer_counts(gpt, cpu8):
    """Without state, what Adam's moments keep from fitting fits."""

    def needed(optimizer):
        (found,) = run(gpt, cpu8, "data", num_microbatches=2, optimizer=optimizer).candidates
        return found.result.stages[0].option.fixed_bytes

    parameters = 4 * gpt.num_parameters
    assert needed(optax.adamw(1e-3)) - needed(optax.sgd(0.1)) == pytest.approx(
        2 * parameters, rel=1e-3
    )


def test_a_batch_that_the_data_axis_cannot_share(gpt, cpu8):
    with pytest.raises(ConfigError, match=r"global batch of 12 .*multiple of 8"):
        run(gpt, cpu8, "data", global_batch=12, num_microbatches=None)
