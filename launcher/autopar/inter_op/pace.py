"""What stages add to the step time of each schedule: the search's view, before the simulator judges.

With F, I and W the seconds of a forward, of the gradients of activations and of those of parameters, and c
those of what comes and goes through the cut before a stage:

    schedule       steady, for each microbatch         path, once
    1F1B           F + I + W + c                       F + I + W + c
    GPipe          F + I + W, or c / 2 if more         F + I + W + c
    interleaved    F + I + W, or c / 2 if more         F + I + W + c
    ZB-H1          F + I + W, or F + I + c if more     F + I - W + c

1F1B has as few microbatches in flight as stages follow, so that a round trip through them hides nothing of
what it sends; in ZB-H1 that is hidden behind W; the other two run further ahead. A stage that waits longer
than its neighbours is faster than this says (`critical_loops`). On balanced stages with free transfers all
are the closed forms of docs/schedules.md, but for a constant of ZB-H1.
"""

import numpy as np

from launcher.autopar.inter_op.stage_table import ALPA, Pace, microbatch_time_s
from launcher.autopar.programs.schedules import AbstractSchedule, GPipe, Interleaved, ZbH1


def pace_of(schedule: AbstractSchedule) -> Pace:
    """How the stages of a schedule add up."""
    match schedule:
        case GPipe() | Interleaved():
            return Pace(steady_s=_far_ahead_s, path_s=microbatch_time_s)
        case ZbH1():
            return Pace(steady_s=_zb_steady_s, path_s=_zb_path_s)
        case _:
            return ALPA


def busy_s(rows: np.ndarray) -> np.ndarray:
    """F + I + W: what a microbatch keeps a stage busy for."""
    return rows["forward_s"] + rows["backward_s"]


def _far_ahead_s(rows: np.ndarray) -> np.ndarray:
    return np.maximum(busy_s(rows), rows["received_s"] / 2)


def waited_for_s(rows: np.ndarray) -> np.ndarray:
    """F + I + c: what other stages wait for."""
    return microbatch_time_s(rows) - rows["weight_s"]


def _zb_steady_s(rows: np.ndarray) -> np.ndarray:
    return np.maximum(busy_s(rows), waited_for_s(rows))


def _zb_path_s(rows: np.ndarray) -> np.ndarray:
    return np.maximum(waited_for_s(rows) - rows["weight_s"], 0.0)
