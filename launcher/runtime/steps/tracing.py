"""Playing a step for the clock: what it computes is what `Pipeline.step` computes, to the bit.

One thread per submesh plays that submesh's launches in their order and waits for the results of each, so
that begin and end of every launch are true and submeshes still run side by side. A message is on its way
while its sender goes on: another thread watches for its arrival. A traced step is slower than others by what
these overlap, the dispatch of a launch with the one before it.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import jax

from launcher.autopar.programs.instructions import RECEIVE_OF_READER, Op
from launcher.autopar.programs.launches import Launch
from launcher.autopar.programs.program import Program
from launcher.runtime.steps.executor import StepResult
from launcher.runtime.steps.memory_error import Doing, memory_errors
from launcher.runtime.steps.pipeline import Action, Pipeline
from launcher.runtime.steps.placement import PlacedBatch, StackedBatch
from launcher.runtime.steps.whole_step import WholeStep
from launcher.runtime.traces.recording import Recording, Span

_READ_IN_THE_STEP = frozenset(RECEIVE_OF_READER.values())


def traced_step(
    steps: Pipeline | WholeStep, placed: PlacedBatch | StackedBatch, program: Program
) -> tuple[StepResult, Recording]:
    """Run a step, and say what each launch took; the devices must be idle."""
    run = _run_whole if isinstance(steps, WholeStep) else _run_pipeline
    result, spans = run(steps, placed, program)
    return result, Recording(placed.step + 1, program, tuple(spans))


def _run_pipeline(
    pipeline: Pipeline, placed: PlacedBatch, program: Program
) -> tuple[StepResult, list[Span]]:
    play = _Play(pipeline, program)
    pipeline.begin(placed)
    spans = play.run()
    return pipeline.finish(), spans


def _run_whole(
    whole: WholeStep, placed: StackedBatch, program: Program
) -> tuple[StepResult, list[Span]]:
    """All there is to see of a step that is one program is how long it takes."""
    start_s = time.perf_counter()
    result = whole.step(placed)
    jax.block_until_ready((result.loss, result.grad_norm))
    end_s = time.perf_counter() - start_s
    [entries] = program.lists
    return result, [Span(Launch(0, entries), 0.0, end_s)]


def read_late(order: Sequence[Launch]) -> list[Launch]:
    """The same launches, every receive as late as possible: directly before what reads it.

    A thread waits at a receive, which untraced steps and the simulator do only where the value is read.
    """
    waiting: dict[tuple[Op, int, int | None], list[Launch]] = defaultdict(list)
    late = []
    for launch in order:
        first = launch.first
        if first.is_receive and first.op in _READ_IN_THE_STEP:
            waiting[first.op, first.stage, first.microbatch].append(launch)
            continue
        for entry in launch.instructions:
            if entry.op in RECEIVE_OF_READER:
                late += waiting.pop(
                    (RECEIVE_OF_READER[entry.op], entry.stage, entry.microbatch), ()
                )
        late.append(launch)
    return late


class _Play:
    """The threads of one step."""

    def __init__(self, pipeline: Pipeline, program: Program):
        self._pipeline = pipeline
        self._lists: list[list[tuple[Launch, Action]]] = [[] for _ in program.lists]
        actions = dict(pipeline.actions)
        for launch in read_late(tuple(actions)):
            self._lists[launch.submesh].append((launch, actions[launch]))
        homes = program.submesh_of
        sends = [e for entries in program.lists for e in entries if e.is_send]
        self._num_channels = len({(homes[e.stage], homes[e.peer]) for e in sends})
        self._doubles = jax.config.jax_enable_x64  # may hold for this thread only
        self._errors: list[BaseException] = []

    def run(self) -> list[Span]:
        """Play all lists; the first error of any thread is raised, when all have ended."""
        with (
            ThreadPoolExecutor(max(1, self._num_channels), "arrivals") as watchers,
            ThreadPoolExecutor(len(self._lists), "submesh") as players,
        ):
            self._watchers, self._start_s = watchers, time.perf_counter()
            played = [players.submit(self._play_list, entries) for entries in self._lists]
            try:
                wait(played)
            except BaseException:  # Ctrl-C, the second one
                self._pipeline.give_up()
                raise
        if self._errors:
            raise self._errors[0]
        return [span for future in played for span in _all_ended(future.result())]

    def _play_list(self, entries: Sequence[tuple[Launch, Action]]) -> list[Span | Future[Span]]:
        try:
            with jax.enable_x64(self._doubles):
                return [self._play(launch, action) for launch, action in entries]
        except BaseException as error:
            # Those that wait for this thread are woken, and fail too: they come later in the list.
            self._errors.append(error)
            self._pipeline.give_up()
            raise

    def _play(self, launch: Launch, action: Action) -> Span | Future[Span]:
        plan, first = self._pipeline.realized.plan, launch.first
        devices = self._pipeline.stages[first.stage].programs.devices
        start_s = time.perf_counter()
        with memory_errors(plan, Doing.step(first), devices):
            results = action()
            if first.is_send:
                return self._watchers.submit(self._end, launch, start_s, results)
            return self._end(launch, start_s, results)

    def _end(self, launch: Launch, start_s: float, results: object) -> Span:
        jax.block_until_ready(results)
        end_s = time.perf_counter()
        return Span(launch, start_s - self._start_s, end_s - self._start_s)


def _all_ended(spans: Sequence[Span | Future[Span]]) -> list[Span]:
    return [span.result() if isinstance(span, Future) else span for span in spans]
