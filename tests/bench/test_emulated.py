"""The figures that the comparison of predicted and measured step times ends with."""

import pytest

from launcher.bench import emulated

IN_ORDER = {"a": (1.0, 1.1), "b": (2.0, 2.0), "c": (4.0, 3.0)}


def test_a_table_in_order_passes():
    *rows, last = emulated.report(IN_ORDER)
    assert rows[1].split() == ["a", "1000.0", "ms", "1100.0", "ms", "0.91"]
    assert last == "rank correlation 1.000 (bar 0.9), median error 9.1% (bar 15%), 3 plans"
    assert emulated.passes(list(IN_ORDER.values()))


@pytest.mark.parametrize(
    "pairs", [[(1.0, 2.0), (2.0, 1.9), (3.0, 3.0)], [(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]]
)
def test_a_wrong_order_or_wrong_times_do_not(pairs):
    assert not emulated.passes(pairs)


def test_a_plan_is_priced_and_run():
    cluster = emulated.load_cluster("cpu8")
    run = emulated.PlannedRun("gpt-single", cluster)
    run.take_turn()
    assert run.predicted_s > 0
    assert len(run.took_s) == emulated._STEPS
    assert run.measured_s >= min(run.took_s)
