"""Compute-only builders against their definitions."""

import pytest

from launcher.autopar.programs.instructions import Op
from launcher.autopar.programs.schedules import (
    SCHEDULE_NAMES,
    GPipe,
    Interleaved,
    OneForwardOneBackward,
    ZbH1,
    schedule_by_name,
)
from launcher.errors import ConfigError

SHAPES = [(1, 1), (1, 5), (2, 1), (2, 8), (4, 2), (4, 4), (4, 9), (7, 3), (8, 32)]
# Of the interleaved schedule: submeshes, stages on each, microbatches.
GROUPED = [
    (1, 2, 3),
    (2, 2, 2),
    (2, 3, 8),
    (3, 2, 3),
    (4, 2, 4),
    (4, 2, 16),
    (4, 4, 40),
    (8, 3, 24),
    (3, 3, 30),
    (2, 5, 40),
]
CASES = [
    (schedule, p, m) for schedule in (GPipe(), OneForwardOneBackward(), ZbH1()) for p, m in SHAPES
] + [(Interleaved(virtual_stages=v), p * v, m) for p, v, m in GROUPED]


def texts(compute_lists):
    return [" ".join(str(entry)[1:] for entry in entries) for entries in compute_lists]


def test_gpipe_runs_all_forwards_first():
    assert texts(GPipe().build(2, 3)) == ["F0 F1 F2 B0 B1 B2"] * 2


def test_1f1b_has_fewer_forwards_ahead_in_later_stages():
    assert texts(OneForwardOneBackward().build(3, 5)) == [
        "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4",
    ]


def test_interleaved_takes_its_microbatches_in_groups():
    # Figure 4 of Narayanan et al. 2021, with 2 devices: stages 0 and 2 on one, 1 and 3 on the other.
    lists = Interleaved(virtual_stages=2).build(4, 4)
    assert [" ".join(map(str, entries)) for entries in lists] == [
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3",
    ]


def test_zb_h1_postpones_more_weight_gradients_in_later_stages():
    assert texts(ZbH1().build(3, 5)) == [
        "F0 F1 F2 I0 W0 F3 I1 W1 F4 I2 W2 I3 W3 I4 W4",
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 F4 I3 W2 I4 W3 W4",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 F4 I4 W2 W3 W4",
    ]


@pytest.mark.parametrize(("schedule", "num_stages", "num_microbatches"), CASES)
def test_each_stage_runs_every_microbatch_once_and_in_order(schedule, num_stages, num_microbatches):
    compute_lists = schedule.build(num_stages, num_microbatches)
    num_submeshes = num_stages // schedule.virtual_stages
    assert len(compute_lists) == num_submeshes
    ops = [Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT]
    ops = ops if schedule.splits_backward else [Op.FORWARD, Op.BACKWARD]
    for submesh, entries in enumerate(compute_lists):
        assert len(entries) == len(ops) * num_microbatches * schedule.virtual_stages
        assert {entry.stage for entry in entries} == set(range(submesh, num_stages, num_submeshes))
        for stage in range(submesh, num_stages, num_submeshes):
            for op in ops:
                own = [entry for entry in entries if (entry.op, entry.stage) == (op, stage)]
                assert [entry.microbatch for entry in own] == list(range(num_microbatches))


@pytest.mark.parametrize(("schedule", "num_stages", "num_microbatches"), CASES)
def test_the_promised_stash_peak_is_that_of_the_lists(schedule, num_stages, num_microbatches):
    last = Op.BACKWARD_WEIGHT if schedule.splits_backward else Op.BACKWARD
    for entries in schedule.build(num_stages, num_microbatches):
        for stage in {entry.stage for entry in entries}:
            own = [entry for entry in entries if entry.stage == stage]
            kept = [(entry.op is Op.FORWARD) - (entry.op is last) for entry in own]
            peak = max(sum(kept[: end + 1]) for end in range(len(kept)))
            assert peak == schedule.stash_peak(stage, num_stages, num_microbatches)
            match schedule:
                case GPipe():
                    assert peak == num_microbatches
                case OneForwardOneBackward():
                    assert peak == min(num_microbatches, num_stages - stage)
                case ZbH1():
                    assert peak == min(num_microbatches, num_stages)


@pytest.mark.parametrize(("p", "v", "m"), GROUPED)
def test_an_interleaved_submesh_keeps_as_much_as_the_paper_says(p, v, m):
    """The first submesh has p (1 + (p - 1) / (p v)) microbatches under way, in v-ths of each."""
    entries = Interleaved(virtual_stages=v).build(p * v, m)[0]
    kept = [1 if entry.op is Op.FORWARD else -1 for entry in entries]
    peak = max(sum(kept[: end + 1]) for end in range(len(kept)))
    assert peak == min(m * v, p * v + p - 1)


def test_names_choose_classes():
    assert schedule_by_name("gpipe") == GPipe()
    assert schedule_by_name("1f1b") == OneForwardOneBackward()
    assert schedule_by_name("zb_h1") == ZbH1()
    assert schedule_by_name("interleaved", 3) == Interleaved(virtual_stages=3)
    assert set(SCHEDULE_NAMES) == {"gpipe", "1f1b", "interleaved", "zb_h1"}


@pytest.mark.parametrize("name", ["zb_h2", "1F1B", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ConfigError, match=rf"parallel\.schedule={name}: choose one of gpipe, 1f1b"):
        schedule_by_name(name)


def test_only_the_interleaved_schedule_has_virtual_stages():
    for name in ("gpipe", "1f1b", "zb_h1"):
        with pytest.raises(
            ConfigError, match=rf"virtual_stages=2 is not 1, .*schedule={name} takes"
        ):
            schedule_by_name(name, 2)
    with pytest.raises(ConfigError, match=r"virtual_stages=1 is less than 2, .*take .*=1f1b"):
        schedule_by_name("interleaved")


def test_interleaved_groups_must_be_whole():
    with pytest.raises(
        ConfigError,
        match=r"parallel\.num_microbatches=6 is no multiple of the 4 submeshes .*: give a multiple of 4",
    ):
        Interleaved(virtual_stages=2).build(8, 6)
    with pytest.raises(ConfigError, match=r"7 stages cannot .*parallel\.virtual_stages=2: take a"):
        Interleaved(virtual_stages=2).build(7, 4)


@pytest.mark.parametrize(
    "schedule", [GPipe(), OneForwardOneBackward(), Interleaved(virtual_stages=2), ZbH1()]
)
def test_numbers_below_one_name_their_key(schedule):
    with pytest.raises(ConfigError, match=r"a pipeline of 0 stages, .*parallel\.pp=0: set it"):
        schedule.build(0, 4)
    with pytest.raises(ConfigError, match=r"0 microbatches, .*parallel\.num_microbatches=0: set"):
        schedule.build(4, 0)
