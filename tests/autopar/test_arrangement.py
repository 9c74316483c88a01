"""Stages for a schedule against an enumeration of all of them."""

import dataclasses
import itertools
import random
from dataclasses import replace

import pytest

from launcher.autopar.arrangement import Arranger
from launcher.autopar.inter_op import StageOption
from launcher.autopar.schedules import Interleaved, OneForwardOneBackward, ZbH1
from launcher.autopar.space import PlanOptions, make_space
from launcher.errors import InfeasiblePlanError

NUM_LAYERS = 5
SHAPES = ((1, 1), (1, 2), (1, 4), (2, 4))  # of a cluster of 2 hosts x 4 devices


def random_arranger(rng, cpu8, schedule, num_microbatches, num_stages=None):
    """At most 3 options for a range of layers on a submesh, whose memory often is too little."""
    table = {
        (first, last, submesh): tuple(
            StageOption(
                seconds=(last - first) * (0.2 + rng.random()) / (1 + submesh),
                once_s=rng.random(),
                fixed_bytes=(last - first) * rng.random(),
                stash_bytes=(last - first) * rng.random() / 2,
                tag=(first, last, submesh, number),
            )
            for number in range(rng.randint(1, 2))
        )
        for first, last in itertools.combinations(range(NUM_LAYERS + 1), 2)
        for submesh in range(len(SHAPES))
    }
    received_s = [rng.random() / 4 for _ in range(NUM_LAYERS + 1)]
    memory = replace(cpu8.device, memory_bytes=rng.choice((1.2, 2.0, 3.0, 50.0)), reserved_bytes=0)
    space = replace(
        make_space(PlanOptions(mode="auto", global_batch=64), cpu8),
        submeshes=SHAPES,
        num_stages=num_stages,
        virtual_stages=schedule.virtual_stages,
    )
    return Arranger(
        cluster=replace(cpu8, device=memory),
        space=space,
        schedule=schedule,
        num_microbatches=num_microbatches,
        options=lambda *key: table[key],
        cuts=range(NUM_LAYERS + 1),
        transfer_s=received_s.__getitem__,
        cures="take less",
    )


def all_arrangements(arranger):
    """Yield every (stages, number of submeshes), a stage being (first, submesh, option)."""
    v, total = arranger.schedule.virtual_stages, arranger.space.num_devices
    sizes = [hosts * devices for hosts, devices in SHAPES]
    for number in range(1, NUM_LAYERS + 1):
        if arranger.space.num_stages not in (None, number) or number % v:
            continue
        for inner in itertools.combinations(range(1, NUM_LAYERS), number - 1):
            bounds = [0, *inner, NUM_LAYERS]
            for submeshes in itertools.product(range(len(SHAPES)), repeat=number // v):
                if v > 1 and (len(set(submeshes)) > 1 or arranger.num_microbatches % (number // v)):
                    continue
                if sum(sizes[submesh] for submesh in submeshes) != total:
                    continue
                ranges = list(zip(itertools.pairwise(bounds), submeshes * v, strict=True))
                choices = (arranger.options(*pair, submesh) for pair, submesh in ranges)
                for options in itertools.product(*choices):
                    yield [
                        (pair[0], submesh, option)
                        for (pair, submesh), option in zip(ranges, options, strict=True)
                    ]


def seconds_of(stages, arranger):
    v, m = arranger.schedule.virtual_stages, arranger.num_microbatches
    p = len(stages) // v
    times = [o.seconds + (arranger.transfer_s(first) if first else 0) for first, _, o in stages]
    once_s = v * max(option.once_s for _, _, option in stages)
    return sum(times) + (v * (m - p) + p - 1) * max(times) + once_s


def fits(stages, arranger):
    number, schedule = len(stages), arranger.schedule
    p = number // schedule.virtual_stages
    needed = [0.0] * p
    for stage, (_, _, option) in enumerate(stages):
        held = schedule.stash_peak(stage, number, arranger.num_microbatches)
        needed[stage % p] += option.fixed_bytes + held * option.stash_bytes
    return max(needed) <= arranger.cluster.device.usable_bytes


def as_stages(arrangement):
    return [(choice.first, choice.submesh, choice.option) for choice in arrangement.result.stages]


@pytest.mark.parametrize("schedule", [OneForwardOneBackward(), ZbH1()])
def test_no_arrangement_is_better_than_the_one_found(schedule, cpu8):
    rng = random.Random(0)
    num_found = num_refused = 0
    for _ in range(60):
        forced = rng.choice((None, None, 2, 3))
        arranger = random_arranger(rng, cpu8, schedule, rng.choice((2, 4, 8)), forced)
        fitting = [stages for stages in all_arrangements(arranger) if fits(stages, arranger)]
        if not fitting:
            with pytest.raises(InfeasiblePlanError):
                arranger.best()
            num_refused += 1
            continue
        best = arranger.best()
        assert fits(as_stages(best), arranger)
        least_s = min(seconds_of(stages, arranger) for stages in fitting)
        assert best.result.total_s == pytest.approx(least_s, rel=1e-12)
        num_found += 1
    assert num_found > 20
    assert num_refused > 3


@pytest.mark.parametrize("virtual_stages", [2, 3])
def test_virtual_stages_fit_together_and_are_the_best_where_memory_is_plenty(virtual_stages, cpu8):
    rng = random.Random(1)
    seen = {"best": 0, "fits": 0, "refused": 0}
    for _ in range(60):
        schedule = Interleaved(virtual_stages=virtual_stages)
        arranger = random_arranger(rng, cpu8, schedule, rng.choice((2, 4)))
        arrangements = list(all_arrangements(arranger))
        fitting = [stages for stages in arrangements if fits(stages, arranger)]
        if not fitting:
            with pytest.raises(InfeasiblePlanError):
                arranger.best()
            seen["refused"] += 1
            continue
        try:
            best = arranger.best()
        except InfeasiblePlanError:  # less is tried than there is
            assert arranger.cluster.device.usable_bytes < 50
            continue
        assert fits(as_stages(best), arranger)
        assert best.result.total_s == pytest.approx(seconds_of(as_stages(best), arranger))
        least_s = min(seconds_of(stages, arranger) for stages in fitting)
        is_best = best.result.total_s == pytest.approx(least_s, rel=1e-12)
        assert is_best or arranger.cluster.device.usable_bytes < 50
        seen["best" if is_best else "fits"] += 1
        p = len(best.result.stages) // virtual_stages
        assert best.placement == best.placement[:p] * virtual_stages
    assert seen["best"] > 15
    assert seen["refused"] > 3


def test_what_cannot_be_shared_out_is_told(cpu8):
    schedule = Interleaved(virtual_stages=2)
    arranger = random_arranger(random.Random(2), cpu8, schedule, 3)
    crowded = dataclasses.replace(arranger, space=replace(arranger.space, num_stages=8))
    with pytest.raises(
        InfeasiblePlanError,
        match=r"8 devices cannot .*num_microbatches=3 and p x 2 stages \(parallel\.virtual_stages=2\)",
    ):
        crowded.best()
    poor = replace(arranger.cluster, device=replace(cpu8.device, memory_bytes=1e-3))
    with pytest.raises(InfeasiblePlanError, match="bytes too many .*take less"):
        dataclasses.replace(arranger, cluster=poor).best()


def test_stages_that_fit_one_by_one_may_not_fit_together(cpu8):
    def options(first, last, submesh):
        return [StageOption(seconds=1.0, once_s=0.0, fixed_bytes=4.0, stash_bytes=0.0, tag=None)]

    schedule = Interleaved(virtual_stages=2)
    arranger = random_arranger(random.Random(3), cpu8, schedule, 2, num_stages=4)
    device = replace(cpu8.device, memory_bytes=7.0, reserved_bytes=0)
    arranger = dataclasses.replace(arranger, options=options, cluster=replace(cpu8, device=device))
    with pytest.raises(
        InfeasiblePlanError,
        match=r"no plan was found of which 2 stages \(parallel\.virtual_stages=2\) fit .*take less",
    ):
        arranger.best()
    roomy = replace(cpu8, device=replace(device, memory_bytes=8.0))
    assert len(dataclasses.replace(arranger, cluster=roomy).best().result.stages) == 4
