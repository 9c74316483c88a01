"""Stages for a schedule against an enumeration of all of them."""

import dataclasses
import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from machines import mixed

from launcher.autopar.inter_op.arrangement import Arranger
from launcher.autopar.inter_op.judge import judged_s
from launcher.autopar.inter_op.space import PlanOptions, make_space
from launcher.autopar.inter_op.stage_table import StageChoice, StageOption
from launcher.autopar.programs.schedules import GPipe, Interleaved, OneForwardOneBackward, ZbH1
from launcher.errors import InfeasiblePlanError

NUM_LAYERS = 4
SCHEDULES = (
    GPipe(), OneForwardOneBackward(), ZbH1(),
    Interleaved(virtual_stages=2), Interleaved(virtual_stages=4),
)  # fmt: skip


def one_kind(rng, cpu8):
    """One host of 4 devices."""
    del rng
    return replace(cpu8, num_hosts=1)


def two_kinds(rng, cpu8):
    """A host of 2 devices, and 1 or 2 hosts of 2 others."""
    host = replace(cpu8, num_hosts=1, devices_per_host=2)
    return mixed(host, replace(host, num_hosts=rng.randint(1, 2)))


def with_memory(rng, cluster):
    """Often too little of it, on each kind of hosts its own."""
    if len(cluster.kinds) > 1:
        return replace(cluster, kinds=tuple(with_memory(rng, kind) for kind in cluster.kinds))
    memory_bytes = rng.choice((1.2, 2.0, 3.0, 50.0))
    device = replace(cluster.device, memory_bytes=memory_bytes, reserved_bytes=0)
    return replace(cluster, device=device)


def random_arranger(rng, cluster, schedule, num_microbatches, num_submeshes=None):
    """At most 2 options for a range of layers on a submesh; what they cost differs between kinds."""
    space = replace(
        make_space(PlanOptions(mode="auto", global_batch=64), cluster), num_submeshes=num_submeshes
    )
    table = {
        (first, last, submesh): tuple(
            StageOption(
                forward_s=(last - first) * (0.1 + rng.random()) / (1 + submesh),
                backward_s=(last - first) * (0.4 + rng.random()) / (1 + submesh),
                weight_s=(last - first) * 0.4 * rng.random() / (1 + submesh),
                once_s=rng.random(),
                fixed_bytes=(last - first) * rng.random(),
                workspace_bytes=rng.choice((0.0, rng.random())),
                gradient_bytes=rng.choice((0.0, 2 * rng.random())),
                stash_bytes=(last - first) * rng.random() / 2,
                weight_stash_bytes=(last - first) * rng.random() / 4,
                tag=(first, last, submesh, number),
            )
            for number in range(rng.randint(1, 2))
        )
        for first, last in itertools.combinations(range(NUM_LAYERS + 1), 2)
        for submesh in range(len(space.submeshes))
    }
    received_s = [rng.random() / 4 for _ in range(NUM_LAYERS + 1)]
    return Arranger(
        cluster=with_memory(rng, cluster),
        space=space,
        schedule=schedule,
        num_microbatches=num_microbatches,
        options=lambda *key: table[key],
        cuts=range(NUM_LAYERS + 1),
        transfer_s=received_s.__getitem__,
        cures=lambda times: "take less",
        most_judged=10**6,
    )


def all_arrangements(arranger):
    """Yield every (stages, number of submeshes), a stage being (first, submesh, option)."""
    v, space = arranger.schedule.virtual_stages, arranger.space
    every = range(len(space.submeshes))
    for number in range(1, NUM_LAYERS + 1):
        if number % v or arranger.space.num_submeshes not in (None, number // v):
            continue
        for inner in itertools.combinations(range(1, NUM_LAYERS), number - 1):
            bounds = [0, *inner, NUM_LAYERS]
            for submeshes in itertools.product(every, repeat=number // v):
                if v > 1 and (len(set(submeshes)) > 1 or arranger.num_microbatches % (number // v)):
                    continue
                used = Counter()
                for submesh in submeshes:
                    used[space.kinds[submesh]] += math.prod(space.submeshes[submesh])
                if [used[kind] for kind in range(len(space.devices))] != list(space.devices):
                    continue
                ranges = list(zip(itertools.pairwise(bounds), submeshes * v, strict=True))
                choices = (arranger.options(*pair, submesh) for pair, submesh in ranges)
                for options in itertools.product(*choices):
                    yield [
                        (pair[0], submesh, option)
                        for (pair, submesh), option in zip(ranges, options, strict=True)
                    ]


def seconds_of(stages, arranger):
    """The step time of (first layer, submesh, option) ..., by the simulator."""
    firsts = [first for first, _, _ in stages]
    chosen = [
        StageChoice(first=first, last=last, submesh=submesh, option=option)
        for (first, submesh, option), last in zip(stages, [*firsts[1:], NUM_LAYERS], strict=True)
    ]
    return judged_s(chosen, arranger.schedule, arranger.num_microbatches, arranger.transfer_s)


def fits(stages, arranger):
    number, schedule, m = len(stages), arranger.schedule, arranger.num_microbatches
    p = number // schedule.virtual_stages
    for home in range(p):
        own = [(stage, stages[stage][2]) for stage in range(home, number, p)]
        flying = sum(schedule.stash_peak(i, number, m) * option.stash_bytes for i, option in own)
        flying += sum(schedule.split_peak(i, number, m) * o.weight_stash_bytes for i, o in own)
        running = flying + max(option.workspace_bytes for _, option in own)
        ending = sum(option.gradient_bytes for _, option in own)
        fixed = sum(option.fixed_bytes for _, option in own)
        kind = arranger.cluster.kinds[arranger.space.kinds[stages[home][1]]]
        if fixed + max(running, ending) > kind.device.usable_bytes:
            return False
    return True


def as_stages(arrangement):
    return [(choice.first, choice.submesh, choice.option) for choice in arrangement.stages]


def check_regret(seed, cpu8, machine=one_kind, schedules=SCHEDULES, numbers=(1, 2)):
    """The best of all schedules and numbers of microbatches, against all plans; True if there are any."""
    rng, all_s, found_s = random.Random(seed), [], []
    forced = rng.choice((None, None, None, *numbers))
    for schedule, m in itertools.product(schedules, rng.sample((1, 2, 4, 8), 2)):
        arranger = random_arranger(rng, machine(rng, cpu8), schedule, m, forced)
        plans = [stages for stages in all_arrangements(arranger) if fits(stages, arranger)]
        if not plans:
            with pytest.raises(InfeasiblePlanError):
                arranger.find()
            continue
        times_s = [seconds_of(stages, arranger) for stages in plans]
        arranged = arranger.find()
        best = arranged.best
        assert fits(as_stages(best), arranger)
        assert best.step_s == pytest.approx(seconds_of(as_stages(best), arranger), rel=1e-12)
        assert best.step_s == pytest.approx(min(times_s), rel=1e-12)
        assert arranged.bound_s == pytest.approx(min(times_s), rel=1e-12)  # and it is proven
        p = len(best.stages) // schedule.virtual_stages
        assert best.placement == best.placement[:p] * schedule.virtual_stages
        check_places(best, arranger)
        all_s.append(min(times_s))
        found_s.append(best.step_s)
    assert min(found_s, default=0.0) == pytest.approx(min(all_s, default=0.0), rel=1e-12)
    return bool(all_s)


def check_places(best, arranger):
    """Every stage lies on hosts of its kind, no device has two, and none is left."""
    space, cluster, taken = arranger.space, arranger.cluster, []
    homes = len(best.stages) // arranger.schedule.virtual_stages
    for choice, (hosts, devices) in list(zip(best.stages, best.placement, strict=True))[:homes]:
        assert (len(hosts), len(devices)) == space.submeshes[choice.submesh]
        assert cluster.kind_of(hosts) is cluster.kinds[space.kinds[choice.submesh]]
        taken += itertools.product(hosts, devices)
    assert len(taken) == len(set(taken)) == cluster.num_devices


def test_no_plan_of_a_small_joint_space_is_better_than_the_one_found(cpu8):
    assert sum(check_regret(seed, cpu8) for seed in range(12)) > 6


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 400, 25))
def test_no_regret_on_three_hundred_joint_spaces(seed, cpu8):
    assert sum(check_regret(number, cpu8) for number in range(seed, seed + 25)) > 12


def check_kinds(seed, cpu8):
    return check_regret(seed, cpu8, two_kinds, SCHEDULES[:3], (2, 3))


def test_no_plan_on_two_kinds_of_hosts_is_better_than_the_one_found(cpu8):
    assert sum(check_kinds(seed, cpu8) for seed in range(8)) > 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(500, 600, 20))
def test_no_regret_on_one_hundred_spaces_of_two_kinds_of_hosts(seed, cpu8):
    assert sum(check_kinds(number, cpu8) for number in range(seed, seed + 20)) > 10


def test_what_is_not_worth_it_is_not_searched(cpu8):
    arranger = random_arranger(random.Random(5), one_kind(None, cpu8), OneForwardOneBackward(), 4)
    arranged = dataclasses.replace(arranger, worth_s=1e-9).find()
    assert arranged.best is None
    assert arranged.bound_s > 1e-9


def test_what_cannot_be_shared_out_is_told(cpu8):
    schedule = Interleaved(virtual_stages=2)
    arranger = random_arranger(random.Random(2), one_kind(None, cpu8), schedule, 3)
    crowded = dataclasses.replace(arranger, space=replace(arranger.space, num_submeshes=4))
    with pytest.raises(
        InfeasiblePlanError,
        match=r"4 devices cannot .*num_microbatches=3 and p x 2 stages \(parallel\.virtual_stages=2\)",
    ):
        crowded.find()
    poor = replace(arranger.cluster, device=replace(cpu8.device, memory_bytes=1e-3))
    with pytest.raises(InfeasiblePlanError, match="bytes too many .*take less"):
        dataclasses.replace(arranger, cluster=poor).find()


def test_stages_that_fit_one_by_one_may_not_fit_together(cpu8):
    def options(first, last, submesh):
        return [
            StageOption(
                forward_s=0.4,
                backward_s=0.6,
                once_s=0.0,
                fixed_bytes=4.0,
                stash_bytes=0.0,
                tag=None,
            )
        ]

    schedule = Interleaved(virtual_stages=2)
    arranger = random_arranger(random.Random(3), one_kind(None, cpu8), schedule, 2, num_submeshes=2)
    device = replace(cpu8.device, memory_bytes=7.0, reserved_bytes=0)
    arranger = dataclasses.replace(
        arranger, options=options, cluster=replace(arranger.cluster, device=device)
    )
    with pytest.raises(
        InfeasiblePlanError,
        match=r"no plan was found of which 2 stages \(parallel\.virtual_stages=2\) fit .*take less",
    ):
        arranger.find()
    roomy = replace(cpu8, device=replace(device, memory_bytes=8.0))
    assert len(dataclasses.replace(arranger, cluster=roomy).find().best.stages) == 4
