"""A pipeline whose instructions wait a known time instead of computing.

The program, the state it moves and the copies between devices are those of a real plan; only the
executables are replaced. Each waits on the device's own thread, one after the other on a submesh, and
gives zeros where its results would lie. With `instant` nothing is waited for and nothing copied: what is
left is the executor's own time.
"""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from launcher import models
from launcher.autopar.cluster import load_cluster
from launcher.autopar.instructions import Op
from launcher.autopar.make_plan import find_plan
from launcher.autopar.simulator import Durations, simulate
from launcher.autopar.space import PlanOptions
from launcher.config import GptConfig
from launcher.models.optimizer import Optimizer
from launcher.runtime.local_executor import LocalExecutor
from launcher.runtime.stage_programs import Compiled

SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb_h1", 1))
_SUBMESHES, _MICROBATCHES = 4, 8
_FORWARD_S = 0.02
_WAITS = {
    "forward": _FORWARD_S,
    "backward": 2 * _FORWARD_S,
    "forward_backward": 3 * _FORWARD_S,
    "backward_input": _FORWARD_S,
    "backward_weight": _FORWARD_S,
}


class WaitingPipeline:
    """Four submeshes of one device; `timeline_s` is what the simulator says that a step takes."""

    def __init__(self, schedule: str, virtual_stages: int, *, instant: bool = False):
        self._executor = executor = _executor(schedule, virtual_stages)
        self._placed = executor.place(_batch(executor), 0)
        program = executor.realized.program
        self.num_instructions = sum(map(len, program.lists))
        self.timeline_s = simulate(program, _durations(program.num_stages)).step_s
        pipeline = executor.pipeline
        pipeline.step(self._placed)
        if instant:
            self._replace(lambda number, name, real: _constant(real))
            executor.pipeline.links = _NoCopies(pipeline.links)
        else:
            lanes = [_Lane(stage.programs.whole) for stage in executor.stages[:_SUBMESHES]]
            self._replace(
                lambda number, name, real: _waiting(
                    real, lanes[number % _SUBMESHES], _WAITS.get(name, 0.0)
                )
            )
        self.dispatch_s()
