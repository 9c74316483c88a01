"""How many arrays the programs of a stage take and make: what starting them costs beside a fixed time.

Left out: scalars, and what differs for parameters that several stages read.
"""

from dataclasses import dataclass

from launcher.autopar.graphs.work import aval_bytes
from launcher.autopar.realized.realize import RealizedStage


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchArrays:
    """Arrays of each program of a stage."""

    forward: int
    backward: int
    synchronize: int
    update: int


def launch_arrays(stage: RealizedStage, param_avals, *, is_alone: bool) -> LaunchArrays:
    """Count them.

    Args:
        is_alone: the stage is the plan's only one, whose step is one program: it takes and makes what an
            update does.
    """
    layout, optimizer = stage.layout, stage.settings.optimizer
    states = sum(
        optimizer.kept(aval).alike_bytes // max(1, aval_bytes(aval))
        for aval in (param_avals[path] for path in layout.params)
    )
    update = (
        2 * (len(layout.params) + states) + len(layout.accumulators) + 3 * len(layout.new_state)
    )
    if is_alone:
        return LaunchArrays(forward=0, backward=0, synchronize=0, update=update)
    read = len(layout.params) + len(layout.batch) + len(layout.imports)
    made = len(layout.exports) + len(layout.new_state) + len(layout.kept)
    back = len(layout.cotangents) + len(layout.returns)
    return LaunchArrays(
        forward=read + len(layout.state) + made,
        backward=read + len(layout.kept) + back + 2 * len(layout.accumulators),
        synchronize=2 * len(layout.accumulators),
        update=update,
    )
