"""What starting its programs adds to a stage's options, where a cluster file says that this takes time.

As `predictions.predict` has it for a finished plan: each program takes so long to start, and each array that
it takes or makes so much longer; one thread of a machine starts the programs of all its submeshes in turn.

Left out: where hosts are machines of their own, that several submeshes may share one of them.
"""

from dataclasses import replace
from functools import lru_cache, partial

from launcher.autopar.clusters.device import Device
from launcher.autopar.graphs.optimizer_state import OptimizerFootprint
from launcher.autopar.inter_op.stage_table import StageOption, Starts
from launcher.autopar.intra_op.intra_op import IntraOpPlanner
from launcher.autopar.intra_op.launch_arrays import LaunchArrays, launch_arrays


class ProgramStarts:
    """Adds it to the options of a device's kind.

    How many arrays there are depends on the layers and on what is recomputed, not on how they are sharded.
    """

    def __init__(self, planner: IntraOpPlanner, device: Device, optimizer: OptimizerFootprint):
        self._device = device
        self._arrays = lru_cache(maxsize=None)(partial(_arrays, planner, optimizer))

    @property
    def are_free(self) -> bool:
        """Whether starting programs takes no time."""
        return not (self._device.program_launch_s or self._device.array_launch_s)

    def with_starts(
        self, option: StageOption, first: int, last: int, *, splits_backward: bool
    ) -> StageOption:
        """The option for layers [first, last), as if no other submesh shared its machine."""
        arrays = self._arrays(first, last, option.tag.recompute)
        back_s = self._seconds(arrays.backward)
        synchronize_s = 0.0 if option.tag.overlap else self._seconds(arrays.synchronize)
        starts = Starts(
            forward_s=self._seconds(arrays.forward),
            backward_s=(1 + splits_backward) * back_s,
            weight_s=splits_backward * back_s,
            once_s=synchronize_s + self._seconds(arrays.update),
        )
        return replace(option, starts=starts).among(1)

    def _seconds(self, num_arrays: int) -> float:
        return self._device.program_launch_s + num_arrays * self._device.array_launch_s


def _arrays(
    planner: IntraOpPlanner, optimizer: OptimizerFootprint, first: int, last: int, recompute: str
) -> LaunchArrays:
    return launch_arrays(planner, first, last, recompute, optimizer)
