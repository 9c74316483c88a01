"""The executor of one host's stages: as in one process, with an account of how far its devices are."""

import threading
import time
from collections.abc import Mapping
from queue import SimpleQueue

import jax
import numpy as np

from launcher.runtime.hosts.host_progress import HostProgress
from launcher.runtime.hosts.post_office import PostOffice
from launcher.runtime.hosts.shared_clock import SharedClock
from launcher.runtime.steps.executor import Batch, Executor, StepResult
from launcher.runtime.steps.local_executor import LocalExecutor


class HostExecutor(Executor):
    """Runs the steps of a `LocalExecutor`, and watches in a thread of its own for their completion."""

    def __init__(
        self, local: LocalExecutor, progress: HostProgress, office: PostOffice | None,
        clock: SharedClock,
    ):  # fmt: skip
        self.local, self._progress, self._office = local, progress, office
        self._clock = clock
        # Since the start, also those that are made again.
        self._num_steps = self._num_watched = 0
        self._queue: SimpleQueue[tuple[int, int, list[jax.Array]] | None] = SimpleQueue()
        threading.Thread(target=self._watch, name="steps", daemon=True).start()

    def place(self, batch: Batch, step: int):
        return self.local.place(batch, step)

    def step(self, placed) -> StepResult:
        result = self.local.step(placed)
        self._clock.tick(self._num_steps)
        if self._office is not None:
            self._office.begin_step()
        self._num_steps += 1
        self._progress.steps_begun = placed.step + 1
        # The norm comes out of the update, the last that a stage does of a step.
        norms = [stage.norm for stage in self.local.stages if stage.norm is not None]
        if not norms:
            norms = [result.grad_norm]
            self._progress.stepped(placed.step + 1, result.grad_norm)
        self._queue.put((self._num_steps, placed.step + 1, norms))
        return result

    def _watch(self) -> None:
        while (entry := self._queue.get()) is not None:
            count, num_steps, marks = entry
            try:
                jax.block_until_ready(marks)
            except RuntimeError:  # told by who reads the step's numbers
                return
            self._progress.steps_done = num_steps
            self._num_watched = count
            if self._office is not None:
                self._office.let_go(count)

    def evaluate(self, batch: Batch) -> jax.Array:
        self._progress.doing = "evaluating"
        return self.local.evaluate(batch)

    def peak_bytes_per_stage(self) -> tuple[int, ...] | None:
        return self.local.peak_bytes_per_stage()

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.local.restore(arrays)
        while self._num_watched < self._num_steps:  # all are done, and have to be noted
            time.sleep(0.001)

    def close(self) -> None:
        self._queue.put(None)
        self.local.close()
