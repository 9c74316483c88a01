"""What starting its programs adds to a stage's options, where a cluster file says that this takes time.

As `predictions.predict` has it for a finished plan: each program takes so long to start, and each array that
it takes or makes so much longer; one thread of a machine starts the programs of all its submeshes in turn.
"""

from dataclasses import replace
from functools import lru_cache, partial

from launcher.autopar.clusters.device import Device
from launcher.autopar.graphs.optimizer_state import OptimizerFootprint
from launcher.autopar.inter_op.stage_table import StageOption, Starts
from launcher.autopar.intra_op.intra_op import IntraOpPlanner
from launcher.autopar.intra_op.launch_arrays import launch_arrays


class ProgramStarts:
    """Adds it to the options of a device's kind.

    How many arrays there are depends on the layers and on what is recomputed, not on how they are sharded.
    """

    def __init__(self, planner: IntraOpPlanner, device: Device, optimizer: OptimizerFootprint):
        self._device = device
        self._arrays = lru_cache(maxsize=None)(partial(launch_arrays, planner, optimizer=optimizer))

    @property
    def are_free(self) -> bool:
        """Whether starting programs takes no time."""
        return self._device.starts_programs_for_free

    def with_starts(
        self, option: StageOption, first: int, last: int, *, splits_backward: bool
    ) -> StageOption:
        """The option for layers [first, last), as if no other submesh shared its machine."""
        arrays = self._arrays(first, last, option.tag.recompute)
        back_s = self._seconds(arrays.backward)
        synchronize_s = 0.0 if option.tag.overlap else self._seconds(arrays.synchronize)
        starts = Starts(
            forward_s=self._seconds(arrays.forward),
            backward_s=2 * back_s if splits_backward else back_s,
            weight_s=back_s if splits_backward else 0.0,
            once_s=synchronize_s + self._seconds(arrays.update),
        )
        return replace(option, starts=starts).among(1)

    def _seconds(self, num_arrays: int) -> float:
        return self._device.program_launch_s + num_arrays * self._device.array_launch_s
