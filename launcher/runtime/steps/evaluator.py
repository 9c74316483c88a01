"""The evaluation loss on the stages of a running plan, forward only, a microbatch at a time."""

from collections.abc import Callable, Mapping
from functools import cached_property, partial

import jax
import numpy as np

from launcher.autopar.realized.evaluation import EvaluationPass, realize_evaluation
from launcher.autopar.realized.messages import Edge
from launcher.autopar.realized.realize import RealizedPlan
from launcher.models.model import Model
from launcher.runtime.checkpoints.weights import Held
from launcher.runtime.compiled.compile_all import compile_all
from launcher.runtime.compiled.microbatch_programs import MicrobatchPrograms
from launcher.runtime.compiled.stage_signature import StageSignature
from launcher.runtime.steps.executor import Batch
from launcher.runtime.steps.links import open_channels
from launcher.runtime.steps.means import LOSS, compile_mean
from launcher.runtime.steps.memory_error import Doing, memory_errors
from launcher.runtime.steps.placement import place_microbatches, split_batch
from launcher.runtime.steps.placing import put
from launcher.runtime.steps.transport import Channel, Home, Shared, Transport

Arrays = dict


class Evaluator:
    """Plans and compiles nothing before it is asked to: a run that never evaluates pays nothing.

    Args:
        training: by stage, what trains here, whose devices and parameters evaluation shares.
        transport: carries values between stages.
    """

    def __init__(
        self, realized: RealizedPlan, model: Model, training: Mapping[int, StageSignature],
        transport: Transport,
    ):  # fmt: skip
        self._realized, self._model, self._training = realized, model, training
        self._transport = transport
        self._executables: Mapping[str, jax.stages.Compiled] = {}
        self._num_microbatches = 0  # so far

    @cached_property
    def _pass(self) -> EvaluationPass:
        return realize_evaluation(self._realized, self._model)

    @cached_property
    def _stages(self) -> dict[int, StageSignature]:
        return {
            index: StageSignature(self._pass.stages[index].emitter, trained.devices)
            for index, trained in self._training.items()
        }

    def compilations(self) -> dict[str, Callable[[], jax.stages.Compiled]]:
        """How to compile all that an evaluation runs on its stages, by name."""
        return {_name(index): partial(self._compile, index) for index in self._stages}

    def _compile(self, index: int) -> jax.stages.Compiled:
        stage = self._stages[index]
        with memory_errors(self._realized.plan, Doing.compiling(index), stage.devices):
            programs = MicrobatchPrograms(stage, split=False, gathers=False)
            return programs.compile_forward()

    def take(self, executables: Mapping[str, jax.stages.Compiled]) -> None:
        """Take what was compiled, and prepare the small programs around it."""
        self._executables = executables
        _ = self._channels, self._keys, self._mean, self._shared

    @cached_property
    def _channels(self) -> dict[Edge, Channel]:
        meshes = {index: stage.mesh for index, stage in self._stages.items()}
        return open_channels(self._transport, "evaluation", meshes, self._pass.activations)

    @cached_property
    def _keys(self) -> dict[int, jax.Array]:
        """Nothing is drawn at random, but the programs take a key."""
        zeros = np.zeros(2, np.uint32)
        return {index: put(zeros, stage.whole) for index, stage in self._stages.items()}

    @cached_property
    def _last(self) -> int:
        """The stage that has the loss."""
        loss = self._pass.traced.loss
        [index] = [i for i, s in enumerate(self._pass.stages) if loss in s.layout.exports]
        return index

    @cached_property
    def _mean(self) -> jax.stages.Compiled | None:
        loss, count = self._pass.traced.loss, self._realized.plan.num_microbatches
        stage = self._stages.get(self._last)
        return stage and compile_mean([stage.abstract_export(loss)] * count)

    @cached_property
    def _shared(self) -> Shared:
        aval = self._pass.traced.graph.avals[self._pass.traced.loss]
        like = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        return self._transport.shared("evaluation loss", {LOSS: Home(self._last, like)})

    def loss(self, batch: Batch, held: Mapping[int, Held]) -> jax.Array:
        """The mean loss over a global batch; `held` are the parameters and the state of each stage.

        What nobody has had compiled before is compiled now.
        """
        if not self._executables:
            self.take(compile_all(self.compilations(), lambda text: None).executables)
        parts = split_batch(batch, self._realized.plan.num_microbatches)
        placed = {i: place_microbatches(parts, stage) for i, stage in self._stages.items()}
        losses = [
            self._microbatch_loss({index: own[k] for index, own in placed.items()}, held)
            for k in range(len(parts))
        ]
        own = {} if self._mean is None else {LOSS: self._mean(losses)}
        return self._shared.all_of(own, self._num_microbatches)[LOSS]

    def _microbatch_loss(
        self, leaves: Mapping[int, Arrays], held: Mapping[int, Held]
    ) -> jax.Array | None:
        """Dispatch the forward passes of the stages in turn; each waits for what it is sent."""
        loss = None
        for index, stage in self._stages.items():
            doing = Doing.evaluating(index)
            with memory_errors(self._realized.plan, doing, stage.devices):
                exports = self._forward(index, leaves[index], held[index])
            loss = exports.get(self._pass.traced.loss, loss)
        self._num_microbatches += 1
        return loss

    def _forward(self, index: int, leaves: Arrays, held: Held) -> Arrays:
        """Receive what was sent to a stage, run it, and send on; gives all that it made."""
        layout, imports = self._stages[index].layout, {}
        for edge, channel in self._channels.items():
            if edge[1] == index:
                imports |= channel.receive(self._num_microbatches)
        params = {path: held.params[path] for path in layout.params}
        state = {path: held.state[path] for path in layout.state}
        run = self._executables[_name(index)]
        exports, _, _ = run(params, state, leaves, self._keys[index], imports)
        for edge, channel in self._channels.items():
            if edge[0] == index:
                channel.send(exports, self._num_microbatches)
        return exports


def _name(stage: int) -> str:
    return f"evaluation:{stage}"
