"""`mode=eval`: the held-out loss of given weights, on the stages of a plan, without training.

Weights lie where training would have them; there is no optimizer state, and no training program is
compiled.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from launcher.autopar.realized.realize import RealizedPlan
from launcher.data.dataset import Dataset
from launcher.errors import TrainingError
from launcher.models.model import Model
from launcher.models.optimizer import Optimizer
from launcher.runtime.checkpoints.weights import held_arrays
from launcher.runtime.compiled.build_programs import build_programs
from launcher.runtime.compiled.compile_all import compile_all
from launcher.runtime.records.metrics import Meter, TrainSummary
from launcher.runtime.records.sinks import Sink
from launcher.runtime.steps.evaluator import Evaluator
from launcher.runtime.steps.initial import Values, place_values
from launcher.runtime.steps.memory_error import explained
from launcher.runtime.steps.transport import InProcess
from launcher.runtime.training.batch_queue import BatchQueue
from launcher.runtime.training.interrupt import Interrupt
from launcher.runtime.training.journal import Journal
from launcher.runtime.training.train_loop import TrainSettings, evaluation_loss


class Evaluation:
    """A model on the devices of a plan, for its evaluation loss alone.

    `compilation` says what was compiled, and in what time.
    """

    def __init__(
        self, realized: RealizedPlan, model: Model, optimizer: Optimizer, grid: np.ndarray,
        values: Values, progress: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        """Place and compile everything. `grid` are the devices, hosts by devices per host."""
        self._owner = realized.owner
        programs = build_programs(realized, model, optimizer, grid)
        self._residents = place_values(realized.plan, programs, values)
        self._evaluator = Evaluator(realized, model, programs, InProcess())
        self.compilation = compile_all(self._evaluator.compilations(), progress)
        self._evaluator.take(self.compilation.executables)

    def evaluate(self, batch: Mapping[str, np.ndarray]) -> jax.Array:
        """The loss of a global batch."""
        return self._evaluator.loss(batch, self._residents)

    def arrays(self) -> dict[str, jax.Array]:
        """All parameters and state, where they lie."""
        return held_arrays(self._owner, self._residents)


def run(
    evaluation: Evaluation,
    dataset: Dataset,
    settings: TrainSettings,
    meter: Meter,
    sinks: Sequence[Sink],
    *,
    explain_memory: Callable[[BaseException], TrainingError],
    at_end: Callable[[int, bool], None] = lambda num_steps, interrupted: None,
    clock: Callable[[], float] = time.perf_counter,
) -> TrainSummary:
    """Evaluate, tell the sinks, and give the summary; `settings.first_step` are the weights' steps.

    A request to stop ends it after the batch at work, without a loss, as `Interrupt` says.
    """
    done = settings.first_step
    journal = Journal(done, done, meter, sinks, lambda step: 0.0, clock)
    with Interrupt() as interrupt:
        try:
            with (
                BatchQueue(dataset, settings.global_batch, settings.prefetch) as queue,
                explained(explain_memory),
            ):
                loss = evaluation_loss(evaluation, queue, settings, interrupt)
                journal.record_evaluation(done - 1, loss)
                at_end(done, interrupt.requested)
        except BaseException as error:
            journal.finish_despite(error)
            raise
        summary = journal.finish(interrupt.status)
    interrupt.raise_if_requested("in an evaluation")
    return summary
