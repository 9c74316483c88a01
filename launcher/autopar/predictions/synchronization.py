"""What bringing gradients together adds to a step, stage by stage, with or without overlap."""

from launcher.autopar.intra_op.overlapped import saved_s
from launcher.autopar.realized.realize import RealizedPlan
from launcher.autopar.realized.realized_stage import RealizedStage


def synchronization_s(realized: RealizedPlan, stage: RealizedStage) -> float:
    """Seconds of a stage, beside starting a program; with overlap, those behind its last backward pass."""
    all_s = stage.sharding.seconds.synchronize
    if not stage.stage.overlap:
        return all_s
    saved = saved_s(
        realized.planner, stage.sharding, stage.stage.layers, stage.stage.recompute,
        halves=realized.program.splits_backward,
    )  # fmt: skip
    return all_s - float(saved[-1])
