"""The evaluation loss on the stages of a running plan, forward only, a microbatch at a time."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial

import jax
import numpy as np

from launcher.autopar.evaluation import EvaluationPass, realize_evaluation
from launcher.autopar.messages import Edge
from launcher.autopar.realize import RealizedPlan
from launcher.models.model import Model
from launcher.runtime.compile_all import compile_all
from launcher.runtime.executor import Batch
from launcher.runtime.means import compile_mean
from launcher.runtime.memory_error import Doing, memory_errors
from launcher.runtime.microbatch_programs import MicrobatchPrograms
from launcher.runtime.placement import place_microbatches, split_batch
from launcher.runtime.stage_signature import StageSignature
from launcher.runtime.transport import Channel, Transport
from launcher.runtime.weights import Held

Arrays = dict


class Evaluator:
    """Plans and compiles nothing before it is asked to: a run that never evaluates pays nothing.

    Args:
        training: what trains, whose devices and parameters evaluation shares.
        transport: carries values between stages.
    """

    def __init__(
        self, realized: RealizedPlan, model: Model, training: Sequence[StageSignature],
        transport: Transport,
    ):  # fmt: skip
        self._realized, self._model, self._training = realized, model, training
        self._transport = transport
        self._executables: Mapping[str, jax.stages.Compiled] = {}

    @cached_property
    def _pass(self) -> EvaluationPass:
        return realize_evaluation(self._realized, self._model)

    @cached_property
    def _stages(self) -> list[StageSignature]:
        return [
            StageSignature(stage.emitter, trained.devices)
            for stage, trained in zip(self._pass.stages, self._training, strict=True)
        ]

    def compilations(self) -> dict[str, Callable[[], jax.stages.Compiled]]:
        """How to compile all that an evaluation runs on its stages, by name."""
        return {_name(index): partial(self._compile, index) for index in range(len(self._stages))}

    def _compile(self, index: int) -> jax.stages.Compiled:
        stage = self._stages[index]
        with memory_errors(self._realized.plan, Doing.compiling(index), stage.devices):
            programs = MicrobatchPrograms(stage, split=False, gathers=False)
            return programs.compile_forward()

    def take(self, executables: Mapping[str, jax.stages.Compiled]) -> None:
        """Take what was compiled, and prepare the small programs around it."""
        self._executables = executables
        _ = self._channels, self._keys, self._mean

    @cached_property
    def _channels(self) -> dict[Edge, Channel]:
        return {
            (source, target): self._transport.channel(
                "evaluation", self._stages[source].mesh, self._stages[target].mesh, crossings
            )
            for (source, target), crossings in self._pass.activations.items()
        }

    @cached_property
    def _keys(self) -> list[jax.Array]:
        """Nothing is drawn at random, but the programs take a key."""
        return [jax.device_put(np.zeros(2, np.uint32), stage.whole) for stage in self._stages]

    @cached_property
    def _mean(self) -> jax.stages.Compiled:
        loss, count = self._pass.traced.loss, self._realized.plan.num_microbatches
        [stage] = [stage for stage in self._stages if loss in stage.layout.exports]
        return compile_mean([stage.abstract_export(loss)] * count)

    def loss(self, batch: Batch, held: Sequence[Held]) -> jax.Array:
        """The mean loss over a global batch; `held` are the parameters and the state of each stage.

        What nobody has had compiled before is compiled now.
        """
        if not self._executables:
            self.take(compile_all(self.compilations(), lambda text: None).executables)
        parts = split_batch(batch, self._realized.plan.num_microbatches)
        placed = [place_microbatches(parts, stage) for stage in self._stages]
        return self._mean([self._microbatch_loss(own, held) for own in zip(*placed, strict=True)])

    def _microbatch_loss(self, leaves: Sequence[Arrays], held: Sequence[Held]) -> jax.Array:
        """Dispatch the forward passes of the stages in turn; each waits for what it is sent."""
        messages: dict[Edge, object] = {}
        loss = None
        for index, stage in enumerate(self._stages):
            doing = Doing.evaluating(index)
            with memory_errors(self._realized.plan, doing, stage.devices):
                exports = self._forward(index, leaves[index], held[index], messages)
            loss = exports.get(self._pass.traced.loss, loss)
        return loss

    def _forward(self, index: int, leaves: Arrays, held: Held, messages: dict) -> Arrays:
        """Receive what was sent to a stage, run it, and send on; gives all that it made."""
        layout, imports = self._stages[index].layout, {}
        for edge in [edge for edge in messages if edge[1] == index]:
            imports |= self._channels[edge].receive(messages.pop(edge))
        params = {path: held.params[path] for path in layout.params}
        state = {path: held.state[path] for path in layout.state}
        run = self._executables[_name(index)]
        exports, _, _ = run(params, state, leaves, self._keys[index], imports)
        for edge, channel in self._channels.items():
            if edge[0] == index:
                messages[edge] = channel.send(exports)
        return exports


def _name(stage: int) -> str:
    return f"evaluation:{stage}"
