"""Compute-only builders against their definitions."""

import pytest

from launcher.autopar.instructions import Op
from launcher.autopar.schedules import (
    SCHEDULE_NAMES,
    GPipe,
    OneForwardOneBackward,
    schedule_by_name,
)
from launcher.errors import ConfigError

SHAPES = [(1, 1), (1, 5), (2, 1), (2, 8), (4, 2), (4, 4), (4, 9), (7, 3), (8, 32)]


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


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SHAPES)
def test_each_stage_runs_every_microbatch_once_and_in_order(name, num_stages, num_microbatches):
    compute_lists = schedule_by_name(name).build(num_stages, num_microbatches)
    assert len(compute_lists) == num_stages
    for stage, entries in enumerate(compute_lists):
        assert len(entries) == 2 * num_microbatches
        for op in (Op.FORWARD, Op.BACKWARD):
            own = [entry for entry in entries if entry.op is op]
            assert [entry.microbatch for entry in own] == list(range(num_microbatches))
            assert all(entry.stage == stage for entry in own)


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SHAPES)
def test_the_promised_stash_peak_is_that_of_the_lists(name, num_stages, num_microbatches):
    schedule = schedule_by_name(name)
    for stage, entries in enumerate(schedule.build(num_stages, num_microbatches)):
        kept = [1 if entry.op is Op.FORWARD else -1 for entry in entries]
        peak = max(sum(kept[: end + 1]) for end in range(len(kept)))
        assert peak == schedule.stash_peak(stage, num_stages, num_microbatches)
        # gpipe keeps all m microbatches, 1f1b those of the p - i stages from its own on
        least = num_microbatches if name == "gpipe" else num_stages - stage
        assert peak == min(num_microbatches, least)


def test_names_choose_classes():
    assert schedule_by_name("gpipe") == GPipe()
    assert schedule_by_name("1f1b") == OneForwardOneBackward()


@pytest.mark.parametrize("name", ["interleaved", "zb_h1", "1F1B", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ConfigError, match=rf"parallel\.schedule={name}: choose one of gpipe, 1f1b"):
        schedule_by_name(name)


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
def test_numbers_below_one_name_their_key(name):
    with pytest.raises(ConfigError, match=r"a pipeline of 0 stages, .*parallel\.pp=0: set it"):
        schedule_by_name(name).build(0, 4)
    with pytest.raises(ConfigError, match=r"0 microbatches, .*parallel\.num_microbatches=0: set"):
        schedule_by_name(name).build(4, 0)
