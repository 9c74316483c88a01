"""The evaluation loss on the stages of a running plan, forward only, a microbatch at a time."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import jax
import numpy as np

from launcher.autopar.evaluation import realize_evaluation
from launcher.autopar.realize import RealizedPlan
from launcher.models.model import Model
from launcher.runtime.placement import split_batch
from launcher.runtime.stage_programs import StagePrograms


class Evaluator:
    """Compiled on first use: a run that never evaluates pays nothing.

    Args:
        programs: the training programs, whose devices and parameters evaluation shares.
    """

    def __init__(self, realized: RealizedPlan, model: Model, programs: Sequence[StagePrograms]):
        self.realized, self.model, self.training = realized, model, programs

    @cached_property
    def _stages(self) -> list[StagePrograms]:
        plan = self.realized.plan
        microbatch_size = plan.global_batch // plan.num_microbatches
        stages = realize_evaluation(self.realized, self.model, microbatch_size)
        return [
            StagePrograms(
                stage.emitter, trained.devices, trained.optimizer,
                owned=trained.owned, tied={}, num_norms=0, settings=stage.settings,
            )
            for stage, trained in zip(stages, self.training, strict=True)
        ]  # fmt: skip

    @cached_property
    def _forward(self) -> list[jax.stages.Compiled]:
        return [stage.microbatch.compile_forward() for stage in self._stages]

    def loss(self, batch: Mapping[str, np.ndarray], states) -> jax.Array:
        """The mean loss over a batch of whole microbatches; `states` hold `params` and `state`."""
        microbatches = split_batch(batch, self.realized.plan.num_microbatches)
        losses = [self._microbatch_loss(microbatch, states) for microbatch in microbatches]
        return sum(losses[1:], start=losses[0]) / len(losses)

    def _microbatch_loss(self, microbatch: Mapping[str, np.ndarray], states) -> jax.Array:
        crossing: dict[int, jax.Array] = {}
        traced = self._stages[0].emitter.model.traced
        for stage, forward, held in zip(self._stages, self._forward, states, strict=True):
            layout = stage.layout
            leaves = {
                name: jax.device_put(microbatch[name], stage.sharding(spec, microbatch[name].ndim))
                for name, spec in layout.batch.items()
            }
            imports = {
                value: jax.device_put(crossing[value], stage.sharding(spec, crossing[value].ndim))
                for value, spec in layout.imports.items()
            }
            params = {path: held.params[path] for path in layout.params}
            state = {path: held.state[path] for path in layout.state}
            key = jax.device_put(np.zeros(2, np.uint32), stage.whole)
            exports, _, _ = forward(params, state, leaves, key, imports)
            crossing |= exports
        return crossing[traced.loss]
