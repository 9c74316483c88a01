"""Running a program instruction by instruction: each is a handful of lines over a stage's state.

Nothing here waits for a device: programs are dispatched, transfers are posted, and only what the caller
reads is fetched. What each instruction reads, makes and frees stands in docs/schedules.md.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from launcher.autopar.graphs.trace import Role
from launcher.autopar.programs.instructions import Instruction, Op
from launcher.autopar.programs.launches import Launch, launches
from launcher.autopar.realized.messages import Edge
from launcher.autopar.realized.realize import RealizedPlan
from launcher.errors import TrainingError
from launcher.runtime.steps.executor import Batch, StepResult
from launcher.runtime.steps.launch_watch import LaunchWatch
from launcher.runtime.steps.links import NORM, Links, hand_over_copies
from launcher.runtime.steps.loose_metrics import LooseMetrics
from launcher.runtime.steps.means import LOSS, Means
from launcher.runtime.steps.memory_error import Doing, is_memory_error, memory_error, memory_errors
from launcher.runtime.steps.neighbours import Neighbours
from launcher.runtime.steps.placement import PlacedBatch, Placer
from launcher.runtime.steps.stage_state import StageState, Stash
from launcher.runtime.steps.transport import Channel

Arrays = dict
Action = Callable[[], object]
"""Does what a launch says, and returns arrays that are there when it is done."""

_AFTER_GRADIENTS = frozenset((Op.UPDATE, Op.SEND_TIED_PARAMETER, Op.RECEIVE_TIED_PARAMETER))


class Pipeline:
    """The instructions of a realized plan, over the stages of this process."""

    def __init__(
        self, realized: RealizedPlan, stages: Sequence[StageState], links: Links,
        loose: LooseMetrics, *, seed: int, watch: LaunchWatch,
    ):  # fmt: skip
        self.realized, self.links, self._loose, self._watch = realized, links, loose, watch
        self.stages = {stage.index: stage for stage in stages}
        count = realized.plan.num_microbatches
        programs = {stage.index: stage.programs for stage in stages}
        self.place = Placer(programs, loose, num_microbatches=count, seed=seed).place
        self._means = Means(realized, programs, loose, links.transport)
        self._traced = realized.planner.model.traced
        self._num_steps = 0
        self._neighbours = Neighbours(realized)
        self._handlers: dict[Op, Callable[[StageState, Instruction], object]] = {
            Op.FORWARD: self._forward, Op.BACKWARD: self._backward,
            Op.BACKWARD_INPUT: self._backward_input, Op.BACKWARD_WEIGHT: self._backward_weight,
            Op.SYNCHRONIZE: self._synchronize, Op.NORM: self._norm, Op.UPDATE: self._update,
            Op.FREE_ACTIVATION: self._free_activation, Op.FREE_COTANGENT: self._free_cotangent,
            Op.FREE_STASH: self._free_stash,
            Op.SEND_ACTIVATION: self._send_activation, Op.RECEIVE_ACTIVATION: self._receive_activation,
            Op.SEND_COTANGENT: self._send_cotangent, Op.RECEIVE_COTANGENT: self._receive_cotangent,
            Op.SEND_TIED_GRADIENT: self._send_tied_gradient,
            Op.RECEIVE_TIED_GRADIENT: self._receive_tied_gradient,
            Op.SEND_NORM: self._send_norm, Op.RECEIVE_NORM: self._receive_norm,
            Op.SEND_TIED_PARAMETER: self._send_tied_parameter,
            Op.RECEIVE_TIED_PARAMETER: self._receive_tied_parameter,
        }  # fmt: skip
        self.actions = [
            (launch, self._action(launch))
            for launch in launches(realized.program, realized.wiring)
            if launch.first.stage in self.stages
        ]

    def _action(self, launch: Launch) -> Action:
        first, ops = launch.first, launch.ops
        is_both = ops[:2] == (Op.FORWARD, Op.BACKWARD)
        handler = self._forward_backward if is_both else self._handlers[first.op]
        if launch.is_fused and ops[-1] is Op.SYNCHRONIZE:
            handler = partial(handler, ends=True)
        return partial(handler, self.stages[first.stage], first)

    def step(self, placed: PlacedBatch) -> StepResult:
        """Dispatch a whole step."""
        self.begin(placed)
        for launch, action in self.actions:
            try:
                self._watch.begins(launch)
                self._watch.launched(launch, action())
            except jax.errors.JaxRuntimeError as error:
                if not is_memory_error(error):
                    raise
                raise self._out_of_memory(error, launch) from error
        return self.finish()

    def _out_of_memory(self, error: jax.errors.JaxRuntimeError, launch: Launch) -> TrainingError:
        devices = self.stages[launch.first.stage].programs.devices
        return memory_error(error, self.realized.plan, Doing.step(launch.first), devices)

    def begin(self, placed: PlacedBatch) -> None:
        """Take a step's input; the actions come next."""
        self._placed = placed
        self._reported: dict[str, list] = defaultdict(list)
        for stage in self.stages.values():
            doing = Doing.beginning(stage.index)
            with memory_errors(self.realized.plan, doing, stage.programs.devices):
                stage.accumulators = stage.compiled.zeros()
            stage.state_before = stage.state
            stage.beginnings.begin(stage.loss_scale)
        for scalars in placed.loose:
            self._report(scalars)

    def finish(self) -> StepResult:
        """What the step yields, once all actions are done; nothing else may be left of it."""
        left = self.links.transport.num_unread + sum(
            len(buffers) for stage in self.stages.values() for buffers in stage.microbatch_buffers
        )
        assert not left, f"{left} buffers are left of a step"
        first = next(iter(self.stages.values()))
        means = self._means.of(self._reported, self._num_steps)
        self._num_steps += 1
        return StepResult(
            loss=means.pop(LOSS),
            grad_norm=first.norm,
            metrics=means,
            loss_scale=first.loss_scale and first.loss_scale.scale,
        )

    def give_up(self) -> None:
        """Wake the threads that wait for a message of one that has failed."""
        self.links.transport.give_up()

    def gradients(self, batch: Batch, step: int) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and the synchronised gradients of a batch, for checks; all state stays as it was."""
        self.begin(self.place(batch, step))
        for launch, action in self.actions:
            if launch.first.op not in _AFTER_GRADIENTS:
                action()
        found = {}
        for stage in self.stages.values():
            found |= {path: stage.gradients[path] for path in stage.programs.owned}
            stage.state, stage.state_before = stage.state_before, {}
            stage.gradients, stage.norms = {}, {}
        means = self._means.of(self._reported, self._num_steps)
        self._num_steps += 1
        return means[LOSS], found

    # Compute

    def _forward(self, stage: StageState, instruction: Instruction):
        """exports, new state, kept = forward(params, state, batch, key, imports)"""
        stash = self._stash(stage, instruction.microbatch)
        exports, new_state, stash.kept = stage.compiled.forward(
            stage.params, stage.state, stash.batch, stash.key, stash.imports
        )
        stage.state = {**stage.state, **new_state}
        stage.stash[instruction.microbatch] = stash
        self._collect(exports)
        if self._neighbours.later[stage.index]:
            stage.exports[instruction.microbatch] = exports
            for peer in self._neighbours.fed_here[stage.index]:
                moved = self.links.activations[stage.index, peer].hand_over(exports)
                self.stages[peer].imports.setdefault(instruction.microbatch, {}).update(moved)
        return exports, stash.kept

    def _stash(self, stage: StageState, microbatch: int) -> Stash:
        placed = self._placed.stages[stage.index]
        self._collect_inputs(stage)
        imports = stage.imports.pop(microbatch, {})
        return Stash(placed.batches[microbatch], placed.keys[microbatch], imports)

    # The last backward pass of a stage that overlaps `ends`: with synchronize in the same program it takes
    # and makes what that does, in place of the accumulators.

    def _forward_backward(self, stage: StageState, instruction: Instruction, *, ends: bool = False):
        """exports, new state, accumulators, returns = forward_backward(...)"""
        compiled = stage.compiled
        run = compiled.forward_backward_synchronize if ends else compiled.forward_backward
        stash = self._stash(stage, instruction.microbatch)
        cotangents = stage.beginnings.of({})
        exports, new_state, summed, returns = run(
            stage.params, stage.state, stash.batch, stash.key, stash.imports, cotangents,
            *self._summands(stage, ends=ends),
        )  # fmt: skip
        stage.state = {**stage.state, **new_state}
        stage.stash[instruction.microbatch] = stash
        self._collect(exports)
        self._return(stage, instruction.microbatch, returns)
        self._take(stage, summed, ends=ends)
        return exports, summed, returns

    def _backward(self, stage: StageState, instruction: Instruction, *, ends: bool = False):
        """accumulators, returns = backward(params, stash, cotangents, accumulators)"""
        run = stage.compiled.backward_synchronize if ends else stage.compiled.backward
        k, stash = instruction.microbatch, stage.stash[instruction.microbatch]
        cotangents = stage.beginnings.of(stage.cotangents.pop(k, {}))
        summed, returns = run(
            stage.params, stash.batch, stash.key, stash.imports, *stash.kept, cotangents,
            *self._summands(stage, ends=ends),
        )  # fmt: skip
        self._return(stage, k, returns)
        self._take(stage, summed, ends=ends)
        return summed, returns

    def _backward_input(self, stage: StageState, instruction: Instruction):
        """kept for the weights, returns = backward_input(params, stash, cotangents)"""
        k, stash = instruction.microbatch, stage.stash[instruction.microbatch]
        cotangents = stage.beginnings.of(stage.cotangents.pop(k, {}))
        stash.weight_kept, returns = stage.compiled.backward_input(
            stage.params, stash.batch, stash.key, stash.imports, *stash.kept, cotangents
        )
        stash.hold_for_weights(stage.programs.microbatch.split)
        self._return(stage, k, returns)
        return stash.weight_kept, returns

    def _backward_weight(self, stage: StageState, instruction: Instruction, *, ends: bool = False):
        """accumulators = backward_weight(params, stash, kept for the weights, accumulators)"""
        compiled, stash = stage.compiled, stage.stash[instruction.microbatch]
        run = compiled.backward_weight_synchronize if ends else compiled.backward_weight
        summed = run(
            stage.params, stash.batch, stash.key, stash.imports, *stash.kept, stash.weight_kept,
            *self._summands(stage, ends=ends),
        )  # fmt: skip
        self._take(stage, summed, ends=ends)
        return summed

    def _summands(self, stage: StageState, *, ends: bool) -> tuple:
        """What a backward pass adds its gradients to."""
        if not ends:
            return (stage.accumulators,)
        grouped = stage.programs.ending.grouped(stage.accumulators)
        return (*grouped, self._lent_to(stage))

    def _take(self, stage: StageState, summed, *, ends: bool) -> None:
        stage.accumulators, *made = summed if ends else (summed,)
        if ends:
            self._take_gradients(stage, *made)

    def _return(self, stage: StageState, microbatch: int, returns: Arrays) -> None:
        """Keep the cotangents for those that they are sent to; hand over what stays on the submesh."""
        if not self._neighbours.earlier[stage.index]:
            return
        stage.returns[microbatch] = returns
        for peer in self._neighbours.returned_here[stage.index]:
            moved = self.links.cotangents[stage.index, peer].hand_over(returns)
            self._add_cotangents(self.stages[peer], microbatch, stage.index, moved)

    def _synchronize(self, stage: StageState, instruction: Instruction):
        """gradients, squared norm = synchronize(accumulators, tied gradients)"""
        del instruction
        sums, own = stage.accumulators, stage.programs.owned
        # What belongs to other stages may not have been read yet.
        stage.accumulators = {path: total for path, total in sums.items() if path not in own}
        summed = {path: sums[path] for path in stage.programs.summed}
        gradients, square = stage.compiled.synchronize(summed, self._lent_to(stage))
        self._take_gradients(stage, gradients, square)
        return gradients, square

    def _lent_to(self, stage: StageState) -> dict[str, list[jax.Array]]:
        """The gradients that other stages have for parameters of this one."""
        for user in self._neighbours.users_here[stage.index]:
            channel = self.links.tied_gradients[user, stage.index]
            lent = self._lent_gradients(self.stages[user], stage.index)
            self._add_tied(stage, channel.hand_over(lent))
        return stage.tied_gradients

    def _take_gradients(self, stage: StageState, gradients: Arrays, square: jax.Array) -> None:
        stage.gradients, stage.tied_gradients = gradients, {}
        for index in self._neighbours.siblings[stage.index]:
            self.stages[index].norms[stage.index] = square

    def _norm(self, stage: StageState, instruction: Instruction) -> None:
        """The norms stay apart until the update adds them up, in the order of the stages."""

    def _update(self, stage: StageState, instruction: Instruction):
        """params, optimizer state, state, loss scale, norm = update(...)"""
        del instruction
        owned, changing = stage.programs.owned_paths, stage.programs.layout.new_state
        made = stage.compiled.update(
            {path: stage.params[path] for path in owned},
            stage.optimizer_state,
            {path: stage.gradients[path] for path in owned},
            [stage.norms[index] for index in sorted(stage.norms)],
            stage.loss_scale,
            {path: stage.state_before[path] for path in changing},
            {path: stage.state[path] for path in changing},
        )
        stage.params = {**stage.params, **made.params}
        stage.state = {**stage.state, **made.state}
        stage.optimizer_state, stage.loss_scale = made.optimizer_state, made.loss_scale
        stage.norm, stage.state_before = made.norm, {}
        stage.gradients, stage.norms = {}, {}
        for user in self._neighbours.users_here[stage.index]:
            channel, peer = self.links.tied_parameters[stage.index, user], self.stages[user]
            peer.params = {**peer.params, **hand_over_copies(channel, stage.params)}
        return made

    # Frees: the last reader has been dispatched, and what it reads is released when it is done.

    def _free_activation(self, stage: StageState, instruction: Instruction) -> None:
        del stage.exports[instruction.microbatch]

    def _free_cotangent(self, stage: StageState, instruction: Instruction) -> None:
        del stage.returns[instruction.microbatch]

    def _free_stash(self, stage: StageState, instruction: Instruction) -> None:
        del stage.stash[instruction.microbatch]

    # Messages. A send posts, and does not wait; a receive takes what was posted.

    def _send_activation(self, stage: StageState, instruction: Instruction):
        return self._send(
            self.links.activations, instruction, stage.exports[instruction.microbatch]
        )

    def _send(
        self, channels: Mapping[Edge, Channel], instruction: Instruction, values: Arrays
    ) -> object:
        return channels[instruction.stage, instruction.peer].send(values, self._number(instruction))

    def _number(self, instruction: Instruction) -> int:
        """Of a message, among all that its channel carries."""
        return self._num_steps * self.realized.plan.num_microbatches + (instruction.microbatch or 0)

    def _receive_activation(self, stage: StageState, instruction: Instruction):
        received = self._receive(self.links.activations, instruction)
        stage.imports.setdefault(instruction.microbatch, {}).update(received)
        return received

    def _send_cotangent(self, stage: StageState, instruction: Instruction):
        return self._send(self.links.cotangents, instruction, stage.returns[instruction.microbatch])

    def _receive_cotangent(self, stage: StageState, instruction: Instruction):
        received = self._receive(self.links.cotangents, instruction)
        self._add_cotangents(stage, instruction.microbatch, instruction.peer, received)
        return received

    def _receive(self, channels: Mapping[Edge, Channel], instruction: Instruction) -> Arrays:
        return channels[instruction.peer, instruction.stage].receive(self._number(instruction))

    def _add_cotangents(self, stage: StageState, microbatch: int, peer: int, moved: Arrays) -> None:
        received = stage.cotangents.setdefault(microbatch, {})
        for value, array in moved.items():
            received.setdefault(value, {})[peer] = array

    def _send_tied_gradient(self, stage: StageState, instruction: Instruction):
        lent = self._lent_gradients(stage, instruction.peer)
        return self._send(self.links.tied_gradients, instruction, lent)

    def _lent_gradients(self, stage: StageState, owner: int) -> Arrays:
        """The gradients of another stage's parameters; for the first of the owners all are summed up."""
        own = stage.programs.owned
        sums = {path: a for path, a in stage.accumulators.items() if path not in own}
        if sums:
            stage.lent_gradients = dict(stage.compiled.reduce_tied(sums))
            stage.accumulators = {path: a for path, a in stage.accumulators.items() if path in own}
        paths = [path for path in stage.lent_gradients if self.realized.owner[path] == owner]
        return {path: stage.lent_gradients.pop(path) for path in paths}

    def _receive_tied_gradient(self, stage: StageState, instruction: Instruction):
        received = self._receive(self.links.tied_gradients, instruction)
        self._add_tied(stage, received)
        return received

    def _add_tied(self, owner: StageState, moved: Arrays) -> None:
        for path, gradient in moved.items():
            owner.tied_gradients.setdefault(path, []).append(gradient)

    def _send_norm(self, stage: StageState, instruction: Instruction):
        return self._send(self.links.norms, instruction, {NORM: stage.norms[stage.index]})

    def _receive_norm(self, stage: StageState, instruction: Instruction):
        received = self._receive(self.links.norms, instruction)[NORM]
        stage.norms[instruction.peer] = received
        return received

    def _send_tied_parameter(self, stage: StageState, instruction: Instruction):
        return self._send(self.links.tied_parameters, instruction, stage.params)

    def _receive_tied_parameter(self, stage: StageState, instruction: Instruction):
        received = self._receive(self.links.tied_parameters, instruction)
        stage.params = {**stage.params, **received}
        return received

    # Reports

    def _collect(self, exports: Arrays) -> None:
        named = self._traced.metrics | {LOSS: self._traced.loss}
        self._report({name: exports[value] for name, value in named.items() if value in exports})

    def _collect_inputs(self, stage: StageState) -> None:
        """Parameters and state that are metrics; copies, since the update takes its parameters."""
        for name, source in self._loose.inputs.items():
            if source.role is Role.STATE and source.path in stage.state:
                self._report({name: stage.state[source.path]})
            elif source.role is Role.PARAM and self.realized.owner[source.path] == stage.index:
                self._report({name: jnp.copy(stage.params[source.path])})

    def _report(self, scalars: Mapping) -> None:
        for name, value in scalars.items():
            self._reported[name].append(value)
