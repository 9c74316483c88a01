"""Steps that somebody wants to look into: traced ones, and those that jax's profiler records.

Only a run that asks for some has this in the way of its steps, and only those steps are slowed down.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from launcher.autopar.programs.timeline import Timeline
from launcher.autopar.text.atomic_file import storage_error, write_atomically
from launcher.autopar.text.wording import percent, seconds
from launcher.runtime.steps.executor import Batch, Executor, StepResult
from launcher.runtime.steps.local_executor import LocalExecutor
from launcher.runtime.traces.recording import Recording
from launcher.runtime.traces.trace_file import TRACE_NAME, trace_text
from launcher.runtime.traces.trace_page import PAGE_NAME, trace_page

log = logging.getLogger(__name__)

PROFILE_NAME = "profile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What to look at, and what to write.

    Attributes:
        trace_steps: Counted from 1, as in all that a run prints; so are `profile_steps`.
        planned: The step as the plan has it.
        title: Of the page.
        incomparable: Why a time measured here says nothing of a planned one; None where it does.
    """

    run_dir: Path
    trace_steps: frozenset[int]
    profile_steps: frozenset[int]
    planned: Timeline
    title: str
    incomparable: str | None


class WatchedExecutor(Executor):
    """Passes everything on to another executor, the watched steps in another way."""

    def __init__(self, executor: LocalExecutor, watch: Watch):
        self._executor, self._watch = executor, watch
        self._recordings: list[Recording] = []
        self._profiles_into: Path | None = None

    def place(self, batch: Batch, step: int):
        return self._executor.place(batch, step)

    def step(self, placed) -> StepResult:
        number = placed.step + 1
        if number in self._watch.trace_steps:
            return self._trace(placed)
        if number in self._watch.profile_steps:
            return self._profile(placed, number)
        return self._executor.step(placed)

    def evaluate(self, batch: Batch) -> jax.Array:
        return self._executor.evaluate(batch)

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._executor.restore(arrays)

    def peak_bytes_per_stage(self) -> tuple[int, ...] | None:
        return self._executor.peak_bytes_per_stage()

    def close(self) -> None:
        """Also of a run that ended in the midst of its profiled steps."""
        self._end_profile()
        self._executor.close()

    def _trace(self, placed) -> StepResult:
        result, recording = self._executor.traced_step(placed)
        self._recordings.append(recording)
        watch, planned = self._watch, self._watch.planned
        text = trace_text(planned, recording.program, self._recordings)
        write_atomically(watch.run_dir / TRACE_NAME, text)
        page = trace_page(watch.title, planned, self._recordings, watch.incomparable)
        write_atomically(watch.run_dir / PAGE_NAME, page)
        bubble = f"bubble {percent(recording.bubble_fraction)}"
        if recording.is_one_program:
            bubble = "all of it one program"
        log.info(
            "step %d traced: %s, %s (planned: %s, bubble %s): %s, %s",
            recording.step, seconds(recording.step_s), bubble, seconds(planned.step_s),
            percent(planned.bubble_fraction), watch.run_dir / PAGE_NAME, TRACE_NAME,
        )  # fmt: skip
        return result

    def _profile(self, placed, number: int) -> StepResult:
        if self._profiles_into is None:
            self._begin_profile(number)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = self._executor.step(placed)
        if number + 1 not in self._watch.profile_steps:
            self._executor.wait()
            self._end_profile()
        return result

    def _begin_profile(self, number: int) -> None:
        """Consecutive steps are one profile, named for the first of them."""
        self._executor.wait()
        folder = self._watch.run_dir / PROFILE_NAME / f"step_{number}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(folder, error, needed_bytes=0) from error
        jax.profiler.start_trace(folder)
        self._profiles_into = folder

    def _end_profile(self) -> None:
        if self._profiles_into is None:
            return
        folder, self._profiles_into = self._profiles_into, None
        jax.profiler.stop_trace()
        log.info("profiled from step %s on: %s", folder.name.removeprefix("step_"), folder)
