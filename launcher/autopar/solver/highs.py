"""HiGHS without PuLP: models from arrays, and not a word on standard output."""

import ctypes
import functools
import os

import highspy
import numpy as np

from launcher.autopar.solver.tight_form import Rows, TightForm


def silent_model() -> highspy.Highs:
    """A model of which HiGHS says nothing."""
    take_banner()
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    return model


@functools.cache
def take_banner() -> None:
    """Make the process's first model, whose banner no option can suppress, with nobody listening."""
    try:
        stdout = os.dup(1)
    except OSError:  # it is closed: nobody listens
        return
    flush_all = ctypes.CDLL(None).fflush
    nowhere = os.open(os.devnull, os.O_WRONLY)
    flush_all(None)
    os.dup2(nowhere, 1)
    try:
        highspy.Highs()
        flush_all(None)
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def highs_lp(form: TightForm, rows: Rows) -> highspy.HighsLp:
    """A problem's ILP, with these rows."""
    order = np.argsort(rows.row, kind="stable")
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(form.costs), len(rows.upper)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = form.costs, np.zeros(lp.num_col_), form.upper
    lp.row_lower_, lp.row_upper_ = rows.lower, rows.upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    counts = np.bincount(rows.row, minlength=len(rows.upper))
    lp.a_matrix_.start_ = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    lp.a_matrix_.index_ = rows.column[order].astype(np.int32)
    lp.a_matrix_.value_ = rows.value[order]
    kinds = highspy.HighsVarType
    lp.integrality_ = [kinds.kInteger] * form.num_binaries + [kinds.kContinuous] * (
        lp.num_col_ - form.num_binaries
    )
    return lp
