"""The stages of a plan that lie in this process, all of them or those of one host, driven together.

A plan of one stage runs a step as one program where it can, any other plan instruction by instruction.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import numpy as np

from launcher.autopar.programs.needed_programs import needed_programs
from launcher.autopar.realized.realize import RealizedPlan
from launcher.models.model import Model
from launcher.models.optimizer import Optimizer
from launcher.runtime.checkpoints.weights import held_arrays
from launcher.runtime.compiled.build_programs import build_programs
from launcher.runtime.compiled.compile_all import Compilation, compile_all
from launcher.runtime.compiled.stage_programs import Compiled
from launcher.runtime.compiled.update import first_loss_scale
from launcher.runtime.steps.cotangents import Cotangents
from launcher.runtime.steps.evaluator import Evaluator
from launcher.runtime.steps.executor import Batch, Executor, StepResult
from launcher.runtime.steps.initial import Values, initial_values, place_values
from launcher.runtime.steps.launch_watch import LaunchWatch
from launcher.runtime.steps.links import Links
from launcher.runtime.steps.loose_metrics import LooseMetrics
from launcher.runtime.steps.memory_error import Doing, memory_errors
from launcher.runtime.steps.memory_use import peak_bytes
from launcher.runtime.steps.pipeline import Pipeline
from launcher.runtime.steps.placing import put
from launcher.runtime.steps.stage_state import StageState
from launcher.runtime.steps.tracing import traced_step
from launcher.runtime.steps.training_state import (
    device_arrays,
    place_optimizer,
    restored_loss_scale,
    values,
)
from launcher.runtime.steps.transport import InProcess, Transport
from launcher.runtime.steps.whole_step import WholeStep, is_one_loop
from launcher.runtime.traces.recording import Recording

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What of a plan lies in this process, and how its stages reach the others.

    Attributes:
        watch: looks on while steps are dispatched.
    """

    stages: tuple[int, ...]
    transport: Transport
    watch: LaunchWatch = LaunchWatch()


class LocalExecutor(Executor):
    """Holds the stages' state; `compilation` says what was compiled, and in what time."""

    def __init__(
        self, realized: RealizedPlan, model: Model, optimizer: Optimizer, grid: np.ndarray,
        *, seed: int, progress: Callable[[str], None] = lambda text: None,
        weights: Values | None = None, evaluates: bool = False,
        restored: Mapping[str, np.ndarray] | None = None, part: Part | None = None,
    ):  # fmt: skip
        """Place and compile everything.

        Args:
            grid: the devices, hosts by devices per host.
            weights: what to begin with; None: what the model draws from the seed.
            restored: the arrays of a checkpoint, for optimizer state and loss scale; None: the first ones.
            evaluates: whether evaluations are to come. Without it the first one compiles.
            part: what of the plan lies here; None: all of it.
        """
        part = part or Part(stages=tuple(range(len(realized.stages))), transport=InProcess())
        self.realized, self.model, self.seed, self.plan = realized, model, seed, realized.plan
        self._programs = build_programs(realized, model, optimizer, grid, part.stages)
        self._optimizer = optimizer
        self._loose = LooseMetrics(realized.planner.model)
        self._transport, self._watch = part.transport, part.watch
        self._evaluator = Evaluator(realized, model, self._programs, self._transport)
        self._progress, self._evaluates = progress, evaluates
        loops = is_one_loop(realized.program, self._loose)
        first = initial_values(model, seed) if weights is None else weights
        self.stages = list(self._hold(first, optimizer, restored))
        self.steps = self._compile_loop() if loops else self.pipeline

    # Setting up

    def _hold(
        self, first: Values, optimizer: Optimizer, restored: Mapping[str, np.ndarray] | None
    ) -> Iterator[StageState]:
        """Bring the initial values where they will lie."""
        scale = first_loss_scale(optimizer.loss_scaling)
        if restored is not None:
            scale = restored_loss_scale(restored, scale)
        held = place_values(self.plan, self._programs, first)
        for index, built in self._programs.items():
            own = held[index]
            with memory_errors(self.plan, Doing.placing(index), built.devices):
                if restored is None:
                    owned = {path: own.params[path] for path in sorted(built.owned)}
                    optimizer_state = built.init_optimizer(owned)
                else:
                    optimizer_state = place_optimizer(restored, built)
            yield StageState(
                index=index,
                programs=built,
                params=own.params,
                state=own.state,
                optimizer_state=optimizer_state,
                loss_scale=put(scale, built.whole),
            )

    def _compile_loop(self) -> WholeStep:
        """The step of the only stage as one program."""
        traced = self.realized.planner.model.traced
        loop = WholeStep(self.stages[0], self._loose, self.plan, traced, seed=self.seed)
        self._compile_all({"step": partial(self._compile, 0, loop.compile)})
        loop.take(self.compilation.executables["step"])
        return loop

    @cached_property
    def pipeline(self) -> Pipeline:
        """The plan's program, instruction by instruction."""
        self._compile_all(dict(self._compilations()))
        for stage in self.stages:
            stage.compiled = _of_stage(self.compilation, stage.index)
            stage.beginnings = Cotangents(self.realized, stage.index, stage.programs)
        links = Links(self.realized, self._programs, self._transport)
        return Pipeline(
            self.realized, self.stages, links, self._loose, seed=self.seed, watch=self._watch
        )

    def _compile_all(self, of_step: Mapping[str, Callable[[], jax.stages.Compiled]]) -> None:
        of_evaluation = self._evaluator.compilations() if self._evaluates else {}
        self.compilation = compile_all({**of_step, **of_evaluation}, self._progress)
        if of_evaluation:
            self._evaluator.take(self.compilation.executables)

    def _compilations(self) -> Iterator[tuple[str, Callable[[], jax.stages.Compiled]]]:
        """Each program that the plan's instructions need, by stage and name."""
        needed = needed_programs(self.realized.program, self.realized.wiring)
        for index, programs in self._programs.items():
            for name, compile_ in programs.compilations(("zeros", *needed[index])).items():
                yield _key(index, name), partial(self._compile, index, compile_)

    def _compile(self, stage: int, compile_: Callable[[], jax.stages.Compiled]):
        with memory_errors(self.plan, Doing.compiling(stage), self._programs[stage].devices):
            return compile_()

    # Training

    def place(self, batch: Batch, step: int):
        return self.steps.place(batch, step)

    def step(self, placed) -> StepResult:
        # A pipeline says by itself which instruction it was.
        with memory_errors(self.plan, Doing.whole_step(), self.stages[0].programs.devices):
            return self.steps.step(placed)

    def traced_step(self, placed) -> tuple[StepResult, Recording]:
        """A step, and what each of its launches took: it waits for all of them."""
        self.wait()
        return traced_step(self.steps, placed, self.realized.program)

    def wait(self) -> None:
        """Return when all steps are done."""
        jax.block_until_ready([(stage.params, stage.state) for stage in self.stages])

    def gradients(self, batch: Batch, step: int) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and the synchronised gradients of a batch, for checks; all state stays as it was."""
        return self.pipeline.gradients(batch, step)

    def evaluate(self, batch: Batch) -> jax.Array:
        return self._evaluator.loss(batch, self._by_index)

    # Reading the state

    def arrays(self) -> dict[str, jax.Array]:
        """All parameters and state where they lie, until the next step takes them."""
        return held_arrays(self.realized.owner, self._by_index)

    @property
    def _by_index(self) -> dict[int, StageState]:
        return {stage.index: stage for stage in self.stages}

    def training_arrays(self) -> dict[str, jax.Array]:
        """Everything that training changes, as a checkpoint has it, until the next step takes it."""
        return device_arrays(self.realized.owner, self.stages)

    def params(self) -> dict[str, np.ndarray]:
        """All parameters, on the host."""
        found = {}
        for stage in self.stages:
            own = [path for path in stage.params if self.realized.owner[path] == stage.index]
            found |= {path: np.asarray(stage.params[path]) for path in own}
        return found

    def state(self) -> dict[str, np.ndarray]:
        """All other state, such as BatchNorm's statistics, on the host."""
        return {p: np.asarray(a) for stage in self.stages for p, a in stage.state.items()}

    def peak_bytes_per_stage(self) -> tuple[int, ...] | None:
        peaks = [peak_bytes(stage.programs.mesh.local_devices) for stage in self.stages]
        return None if None in peaks else tuple(peaks)

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.wait()
        for stage in self.stages:
            stage.release()
        fresh = self._hold(values(arrays, self.model), self._optimizer, arrays)
        for stage, other in zip(self.stages, fresh, strict=True):
            stage.params, stage.state = other.params, other.state
            stage.optimizer_state, stage.loss_scale = other.optimizer_state, other.loss_scale

    def close(self) -> None:
        for stage in self.stages:
            stage.release()


def _key(stage: int, name: str) -> str:
    return f"{stage}:{name}"


def _of_stage(compilation: Compilation, stage: int) -> Compiled:
    prefix = _key(stage, "")
    own: Mapping[str, jax.stages.Compiled] = {
        name.removeprefix(prefix): executable
        for name, executable in compilation.executables.items()
        if name.startswith(prefix)
    }
    return Compiled(**own)
