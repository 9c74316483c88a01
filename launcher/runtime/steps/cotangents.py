"""Where a stage's backward pass begins: the loss's share of the mean, and what later stages sent back."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from launcher.autopar.graphs.graph import Value
from launcher.autopar.realized.realize import RealizedPlan
from launcher.runtime.compiled.stage_programs import StagePrograms
from launcher.runtime.compiled.update import LossScale, compile_loss_cotangent
from launcher.runtime.steps.placing import put

Arrays = dict


class Cotangents:
    """Makes the cotangents of a stage's outputs; all it needs is compiled and placed at set-up."""

    def __init__(self, realized: RealizedPlan, index: int, programs: StagePrograms):
        self._values = tuple(programs.layout.cotangents)
        self._loss = realized.planner.model.traced.loss
        parts = {value: _num_parts(realized, index, value) for value in self._values}
        abstract = {value: programs.abstract_cotangent(value) for value in self._values}
        self._zeros = {
            value: put(np.zeros(like.shape, like.dtype), like.sharding)
            for value, like in abstract.items()
            if value != self._loss and not parts[value]
        }
        self._sums = {
            value: jax.jit(_total).lower([abstract[value]] * count).compile()
            for value, count in parts.items()
            if count > 1
        }
        self._seed: jax.Array | None = None
        if self._loss in abstract:
            scaling = programs.optimizer.loss_scaling
            self._scaled = compile_loss_cotangent(
                scaling, realized.plan.num_microbatches, abstract[self._loss].dtype, programs.whole
            )
            self._seed = None if scaling.dynamic else self._scaled(None)

    def begin(self, loss_scale: LossScale | None) -> None:
        """Take the loss scale of a step."""
        if loss_scale is not None and self._loss in self._values:
            self._seed = self._scaled(loss_scale)

    def of(self, received: Mapping[Value, Mapping[int, jax.Array]]) -> Arrays:
        """The cotangents of a microbatch, from what each stage has sent of a value.

        They are summed in the order of the stages, whichever came first: sums depend on it.
        """
        return {value: self._of_value(value, received) for value in self._values}

    def _of_value(self, value: Value, received) -> jax.Array:
        if value == self._loss:
            return self._seed
        if value in self._zeros:
            return self._zeros[value]
        parts = [received[value][stage] for stage in sorted(received[value])]
        return parts[0] if len(parts) == 1 else self._sums[value](parts)


def _num_parts(realized: RealizedPlan, index: int, value: Value) -> int:
    """How many stages send a cotangent of the value back."""
    return sum(
        value in values for (source, _), values in realized.returned.items() if source == index
    )


def _total(parts: Sequence[jax.Array]) -> jax.Array:
    return sum(parts[1:], start=parts[0])
