"""Errors that are kept for later."""

import gc
import weakref

import pytest

from launcher.errors import InfeasiblePlanError, without_frames


class Table:
    """Stands for what a search holds when it fails."""


def test_a_kept_error_keeps_nothing_else_alive():
    tables = []

    def fail():
        table = Table()
        tables.append(weakref.ref(table))
        raise InfeasiblePlanError("no plan fits")

    try:
        fail()
    except InfeasiblePlanError as error:
        kept = without_frames(error)
    gc.collect()
    assert tables[0]() is None
    with pytest.raises(InfeasiblePlanError, match="no plan fits"):
        raise kept
