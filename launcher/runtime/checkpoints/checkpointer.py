"""When checkpoints are written, and that the steps wait for no disk.

At a checkpoint the loop waits only while the arrays are copied to the host, because the next step overwrites
them on the devices; one thread writes, verifies and tidies up meanwhile. If the one before is still being
written, that is waited for too: nothing is left out, and no second copy of the model is held. What a step had
to wait is counted and reported. What fails in the thread is raised at the next step.
"""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from launcher.data.order import batch_number
from launcher.runtime.checkpoints.checkpoint_manifest import Manifest, Progress, RunEntry
from launcher.runtime.checkpoints.checkpoint_store import Checkpoint
from launcher.runtime.records.metrics import finite

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSettings:
    """When to save and what to keep; None: not by steps, not by time."""

    every_steps: int | None
    every_s: float | None
    keep: int
    # Also after an evaluation with the lowest loss so far.
    best: bool


class Checkpoints(Protocol):
    """What the training loop asks for."""

    def is_due(self, num_steps: int, *, ends: bool) -> bool:
        """Whether a checkpoint is to be written after so many steps; `ends`: no step follows."""

    def after_step(
        self, num_steps: int, progress: Progress, eval_loss: float | None, *, is_due: bool
    ) -> float | None:
        """Save if it is due or the best one; give the seconds it took from the steps, None if it did not."""

    def newest(self) -> Checkpoint | None:
        """The newest one that is whole, when all are written; None where there is none."""

    def finish(self) -> None:
        """Wait for what is being written, and raise what failed."""

    def close(self) -> None:
        """The same for a run that has failed already: what fails is logged."""


class Store(Protocol):
    """Where checkpoints go: `CheckpointStore`, or `SharedStore` where several hosts write each together."""

    def best(self) -> tuple[int, float] | None: ...

    def newest_intact(self) -> Checkpoint | None: ...

    def take(self, arrays: Mapping[str, jax.Array]) -> Mapping:
        """Copy what this process writes to the host; returns when the devices may overwrite it."""

    def save(self, manifest: Manifest, arrays: Mapping, *, keep: int) -> Path:
        """Write what was taken."""

    def abandon(self) -> None:
        """Wait for no other process any more."""


class Onlooker:
    """Is told what a `Checkpointer` does; this one lets it."""

    def saves(self) -> None:
        """The steps wait for a checkpoint from now on."""

    def writes(self, num_steps: int) -> None:
        """A checkpoint of so many steps is about to be written, in the background: when this returns."""


class NoCheckpoints:
    """Of a run that writes none."""

    def is_due(self, num_steps: int, *, ends: bool) -> bool:
        del num_steps, ends
        return False

    def after_step(
        self, num_steps: int, progress: Progress, eval_loss: float | None, *, is_due: bool
    ) -> float | None:
        del num_steps, progress, eval_loss, is_due

    def newest(self) -> Checkpoint | None:
        return None

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class Checkpointer:
    """Saves what `snapshot` gives into a store."""

    def __init__(
        self, store: Store, settings: SaveSettings, run: RunEntry,
        snapshot: Callable[[], Mapping[str, jax.Array]],
        *, first_step: int = 0, clock: Callable[[], float] = time.perf_counter,
        since: Callable[[], float] | None = None, onlooker: Onlooker | None = None,
    ):  # fmt: skip
        """`snapshot` gives all arrays where they lie; `first_step` is the one that is saved already.

        `since` is the clock that says when one is due by time; None: `clock` does. Hosts share one.
        """
        self._store, self._settings, self._run = store, settings, run
        self._snapshot, self._clock, self._since = snapshot, clock, since or clock
        self._onlooker = onlooker or Onlooker()
        self._saved_step, self._saved_s = first_step, self._since()
        best = store.best()
        self._best_loss = None if best is None else best[1]
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None

    def is_due(self, num_steps: int, *, ends: bool) -> bool:
        """Whether by steps, by time, or because no step follows."""
        if num_steps == self._saved_step:
            return False
        steps, seconds = self._settings.every_steps, self._settings.every_s
        by_time = seconds is not None and self._since() - self._saved_s >= seconds
        return ends or by_time or (steps is not None and num_steps % steps == 0)

    def after_step(
        self, num_steps: int, progress: Progress, eval_loss: float | None, *, is_due: bool
    ) -> float | None:
        """Save, or only look whether the last save went well."""
        loss = finite(eval_loss)
        is_best = loss is not None and (self._best_loss is None or loss < self._best_loss)
        if is_best:
            self._best_loss = loss
        if is_due or (is_best and self._settings.best and num_steps != self._saved_step):
            return self._save(num_steps, progress, loss)
        if self._writing is not None and self._writing.done():
            self._wait()
        return None

    def newest(self) -> Checkpoint | None:
        """The newest one that is whole; what comes after it is to be saved again."""
        self._wait()
        found = self._store.newest_intact()
        if found is not None:
            self._saved_step = found.manifest.step
        return found

    def finish(self) -> None:
        """Wait for the writer, and end it."""
        try:
            self._wait()
        finally:
            self._writer.shutdown()

    def close(self) -> None:
        """Wait for the writer, but for no other host; what it raises comes too late to end the run."""
        self._store.abandon()
        try:
            self.finish()
        except Exception as error:
            log.error("%s", error)

    def _save(self, num_steps: int, progress: Progress, eval_loss: float | None) -> float:
        begun_s = self._clock()
        self._onlooker.saves()
        self._wait()
        arrays = self._store.take(self._snapshot())
        manifest = Manifest(
            step=num_steps,
            samples=batch_number(num_steps, progress.left_out) * self._run.global_batch,
            eval_loss=eval_loss,
            progress=progress,
            run=self._run,
            arrays={},
        )
        self._saved_step, self._saved_s = num_steps, self._since()
        taken_s = self._clock() - begun_s
        self._writing = self._writer.submit(self._write, manifest, arrays, taken_s)
        return taken_s

    def _write(self, manifest: Manifest, arrays: dict[str, np.ndarray], taken_s: float) -> None:
        begun_s = self._clock()
        self._onlooker.writes(manifest.step)
        path = self._store.save(manifest, arrays, keep=self._settings.keep)
        log.info(
            "checkpoint %s: %.3f s taken from the steps, %.2f s in the background",
            path, taken_s, self._clock() - begun_s,
        )  # fmt: skip

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            if not writing.done():
                self._onlooker.saves()
            writing.result()
