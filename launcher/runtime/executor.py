"""Running a plan's program: a loop over instructions, each a handful of lines.

`LocalExecutor` drives all submeshes from one process. Nothing in a step waits for a device: programs are
dispatched, transfers are posted, and only what the caller reads is fetched. What each instruction reads,
makes and frees stands in docs/schedules.md.
"""

import abc
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from launcher.autopar.instructions import Instruction, Op
from launcher.autopar.program import dispatch_order
from launcher.autopar.realize import RealizedPlan
from launcher.autopar.trace import Role
from launcher.models.model import Model
from launcher.models.optimizer import Optimizer
from launcher.runtime.build_programs import build_programs
from launcher.runtime.evaluator import Evaluator, split_batch
from launcher.runtime.initial import initial_values
from launcher.runtime.loose_metrics import LooseMetrics
from launcher.runtime.stage_programs import Compiled, StagePrograms

Arrays = dict


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step yields, as device scalars that need not be there yet."""

    loss: jax.Array
    grad_norm: jax.Array
    metrics: dict[str, jax.Array]


class Executor(abc.ABC):
    """Holds a model's state on devices and advances it step by step."""

    @abc.abstractmethod
    def step(self, batch: Mapping[str, np.ndarray], step: int) -> StepResult:
        """Run one optimizer step on a global batch."""

    @abc.abstractmethod
    def evaluate(self, batch: Mapping[str, np.ndarray]) -> jax.Array:
        """The evaluation loss of a batch."""

    @abc.abstractmethod
    def peak_bytes_per_device(self) -> int | None:
        """The most memory any device has used, where the backend counts it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of all devices."""


@dataclass(slots=True)
class Stash:
    """What a microbatch leaves on a stage until its backward pass."""

    batch: Arrays
    key: jax.Array
    imports: Arrays
    kept: Arrays = field(default_factory=dict)


@dataclass(slots=True)
class StageState:
    """Everything that one stage holds on its devices."""

    programs: StagePrograms
    compiled: Compiled
    params: Arrays
    state: Arrays
    optimizer_state: object
    accumulators: Arrays = field(default_factory=dict)
    gradients: Arrays = field(default_factory=dict)
    stash: dict[int, Stash] = field(default_factory=dict)
    exports: dict[int, Arrays] = field(default_factory=dict)
    returns: dict[int, Arrays] = field(default_factory=dict)
    imports: dict[int, Arrays] = field(default_factory=dict)
    cotangents: dict[int, dict] = field(default_factory=dict)
    tied_gradients: dict[str, list] = field(default_factory=dict)
    norms: dict[int, jax.Array] = field(default_factory=dict)
    norm: jax.Array | None = None


class LocalExecutor(Executor):
    """All submeshes in this process; values cross between them by `jax.device_put`."""

    def __init__(
        self, realized: RealizedPlan, model: Model, optimizer: Optimizer, grid: np.ndarray,
        *, seed: int, progress: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        """Place and compile everything. `grid` are the devices, hosts by devices per host."""
        self.realized, self.model, self.seed = realized, model, seed
        self.plan = realized.plan
        self.traced = realized.planner.model.traced
        self.order = dispatch_order(realized.program)
        self.stages = self._build(optimizer, grid, progress)
        self._evaluator = Evaluator(realized, model, [stage.programs for stage in self.stages])
        self._loose = LooseMetrics(realized.planner.model)
        self._mailbox: dict[Instruction, object] = {}
        self._handlers = {
            Op.FORWARD: self._forward, Op.BACKWARD: self._backward, Op.SYNCHRONIZE: self._synchronize,
            Op.NORM: self._norm, Op.UPDATE: self._update,
            Op.SEND_ACTIVATION: self._send_activation, Op.RECEIVE_ACTIVATION: self._receive_activation,
            Op.SEND_COTANGENT: self._send_cotangent, Op.RECEIVE_COTANGENT: self._receive_cotangent,
            Op.SEND_TIED_GRADIENT: self._send_tied_gradient,
            Op.RECEIVE_TIED_GRADIENT: self._receive_tied_gradient,
            Op.SEND_NORM: self._send_norm, Op.RECEIVE_NORM: self._receive_norm,
            Op.SEND_TIED_PARAMETER: self._send_tied_parameter,
            Op.RECEIVE_TIED_PARAMETER: self._receive_tied_parameter,
        }  # fmt: skip

    # Setting up

    def _build(self, optimizer: Optimizer, grid: np.ndarray, progress) -> list[StageState]:
        programs = build_programs(self.realized, self.model, optimizer, grid)
        held: list[dict[Role, Arrays]] = [{Role.PARAM: {}, Role.STATE: {}} for _ in programs]
        for source, array in initial_values(self.model, self.seed):
            for built, own in zip(programs, held, strict=True):
                specs = built.layout.params if source.role is Role.PARAM else built.layout.state
                if source.path in specs:
                    where = built.sharding(specs[source.path], array.ndim)
                    own[source.role][source.path] = jax.device_put(array, where)
        stages = []
        for index, (built, own) in enumerate(zip(programs, held, strict=True)):
            progress(f"stage {index + 1} of {len(programs)}")
            params = own[Role.PARAM]
            optimizer_state = built.init_optimizer({p: params[p] for p in sorted(built.owned)})
            stages.append(
                StageState(built, built.compile(), params, own[Role.STATE], optimizer_state)
            )
        return stages

    # One step

    def step(self, batch: Mapping[str, np.ndarray], step: int) -> StepResult:
        self._begin(batch, step)
        for instruction in self.order:
            self._handlers[instruction.op](self.stages[instruction.stage], instruction)
        assert not self._mailbox, "a sent value was never received"
        return StepResult(
            loss=_mean(self._losses),
            grad_norm=self.stages[0].norm,
            metrics={name: _mean(values) for name, values in self._metrics.items()},
        )

    def _begin(self, batch: Mapping[str, np.ndarray], step: int) -> None:
        self._microbatches = split_batch(batch, self.plan.num_microbatches)
        self._step = step
        self._losses: list[jax.Array] = []
        self._metrics: dict[str, list] = defaultdict(list)
        for stage in self.stages:
            stage.accumulators = stage.compiled.zeros()
        for k in range(self.plan.num_microbatches):
            for name, value in self._loose.of_microbatch(self._key_data(k)).items():
                self._metrics[name].append(value)

    def gradients(self, batch: Mapping[str, np.ndarray], step: int) -> tuple[jax.Array, dict]:
        """The loss and the synchronised gradients of a batch, without the update; for checks."""
        self._begin(batch, step)
        skipped = {Op.UPDATE, Op.SEND_TIED_PARAMETER, Op.RECEIVE_TIED_PARAMETER}
        for instruction in self.order:
            if instruction.op not in skipped:
                self._handlers[instruction.op](self.stages[instruction.stage], instruction)
        found = {}
        for stage in self.stages:
            found |= {path: stage.gradients[path] for path in stage.programs.owned}
        return _mean(self._losses), found

    def _forward(self, stage: StageState, instruction: Instruction) -> None:
        """exports, state, stash = forward(params, state, microbatch, key, imports)"""
        k, programs = instruction.microbatch, stage.programs
        batch = {
            name: jax.device_put(self._microbatches[k][name], programs.sharding(spec, rank))
            for name, spec in programs.layout.batch.items()
            for rank in [self._microbatches[k][name].ndim]
        }
        key = jax.device_put(self._key_data(k), programs.whole)
        stash = Stash(batch, key, stage.imports.pop(k, {}))
        self._collect_inputs(stage, instruction.stage)
        exports, new_state, stash.kept = stage.compiled.forward(
            stage.params, stage.state, batch, key, stash.imports
        )
        stage.state = {**stage.state, **new_state}
        stage.stash[k], stage.exports[k] = stash, exports
        self._collect(exports)

    def _collect(self, exports: Arrays) -> None:
        if self.traced.loss in exports:
            self._losses.append(exports[self.traced.loss])
        for name, value in self.traced.metrics.items():
            if value in exports:
                self._metrics[name].append(exports[value])

    def _collect_inputs(self, stage: StageState, index: int) -> None:
        """Parameters and state that are metrics; copies, since the update takes its parameters."""
        for name, source in self._loose.inputs.items():
            if source.role is Role.STATE and source.path in stage.state:
                self._metrics[name].append(stage.state[source.path])
            elif source.role is Role.PARAM and self.realized.owner[source.path] == index:
                self._metrics[name].append(jnp.copy(stage.params[source.path]))

    def _backward(self, stage: StageState, instruction: Instruction) -> None:
        """accumulators, returns = backward(params, stash, cotangents, accumulators)"""
        k, stash = instruction.microbatch, stage.stash.pop(instruction.microbatch)
        received = stage.cotangents.pop(k, {})
        cotangents = {
            value: self._cotangent(stage, value, received)
            for value in stage.programs.layout.cotangents
        }
        stage.accumulators, stage.returns[k] = stage.compiled.backward(
            stage.params,
            stash.batch,
            stash.key,
            stash.imports,
            stash.kept,
            cotangents,
            stage.accumulators,
        )
        stage.exports.pop(k, None)

    def _cotangent(self, stage: StageState, value: int, received: Mapping) -> jax.Array:
        """The sum of what later stages sent back; the loss begins with its share of the mean."""
        if value == self.traced.loss:
            dtype = stage.programs.avals.values[value].dtype
            one = np.asarray(1.0 / self.plan.num_microbatches, dtype)
            return jax.device_put(one, stage.programs.whole)
        parts = received.get(value)
        if not parts:
            aval = stage.programs.avals.values[value]
            where = stage.programs.sharding(
                stage.programs.layout.cotangents[value], len(aval.shape)
            )
            return jax.device_put(jnp.zeros(aval.shape, aval.dtype), where)
        return sum(parts[1:], start=parts[0])

    def _synchronize(self, stage: StageState, instruction: Instruction) -> None:
        """gradients, squared norm = synchronize(accumulators, tied gradients)"""
        own = stage.programs.owned
        sums = {path: a for path, a in stage.accumulators.items() if path in own}
        stage.gradients, square = stage.compiled.synchronize(sums, stage.tied_gradients)
        stage.norms = {instruction.stage: square}
        stage.accumulators, stage.tied_gradients = {}, {}

    def _norm(self, stage: StageState, instruction: Instruction) -> None:
        """The norms stay apart until the update adds them up, in the order of the stages."""

    def _update(self, stage: StageState, instruction: Instruction) -> None:
        """params, optimizer state = update(params, optimizer state, gradients, norms)"""
        owned = sorted(stage.programs.owned)
        updated, stage.optimizer_state, stage.norm = stage.compiled.update(
            {path: stage.params[path] for path in owned},
            stage.optimizer_state,
            {path: stage.gradients[path] for path in owned},
            [stage.norms[index] for index in sorted(stage.norms)],
        )
        stage.params = {**stage.params, **updated}
        stage.gradients, stage.norms = {}, {}

    # Messages. A send posts what lies where the receiver wants it; a receive takes it.

    def _post(self, instruction: Instruction, value: object) -> None:
        self._mailbox[instruction] = value

    def _take(self, instruction: Instruction):
        return self._mailbox.pop(instruction.partner)

    def _send_activation(self, stage: StageState, instruction: Instruction) -> None:
        target = self.stages[instruction.peer].programs
        values = self.realized.sent[instruction.stage, instruction.peer]
        exports = stage.exports[instruction.microbatch]
        self._post(instruction, _moved(exports, values, target, target.layout.imports))

    def _receive_activation(self, stage: StageState, instruction: Instruction) -> None:
        stage.imports.setdefault(instruction.microbatch, {}).update(self._take(instruction))

    def _send_cotangent(self, stage: StageState, instruction: Instruction) -> None:
        target = self.stages[instruction.peer].programs
        values = self.realized.returned[instruction.peer, instruction.stage]
        returns = stage.returns[instruction.microbatch]
        self._post(instruction, _moved(returns, values, target, target.layout.cotangents))

    def _receive_cotangent(self, stage: StageState, instruction: Instruction) -> None:
        received = stage.cotangents.setdefault(instruction.microbatch, {})
        for value, array in self._take(instruction).items():
            received.setdefault(value, []).append(array)

    def _tied(self, users: Mapping[str, tuple[int, ...]], owner: int, user: int) -> list[str]:
        return [p for p in sorted(users) if user in users[p] and self.realized.owner[p] == owner]

    def _send_tied_gradient(self, stage: StageState, instruction: Instruction) -> None:
        target = self.stages[instruction.peer].programs
        paths = self._tied(self.realized.contributors, instruction.peer, instruction.stage)
        own = stage.programs.owned
        sums = {path: a for path, a in stage.accumulators.items() if path not in own}
        reduced = stage.compiled.reduce_tied(sums) if sums else {}
        self._post(
            instruction,
            {p: jax.device_put(reduced[p], target.gradient_sharding(p)) for p in paths},
        )

    def _receive_tied_gradient(self, stage: StageState, instruction: Instruction) -> None:
        for path, gradient in self._take(instruction).items():
            stage.tied_gradients.setdefault(path, []).append(gradient)

    def _send_norm(self, stage: StageState, instruction: Instruction) -> None:
        target = self.stages[instruction.peer].programs
        self._post(instruction, jax.device_put(stage.norms[instruction.stage], target.whole))

    def _receive_norm(self, stage: StageState, instruction: Instruction) -> None:
        stage.norms[instruction.peer] = self._take(instruction)

    def _send_tied_parameter(self, stage: StageState, instruction: Instruction) -> None:
        target = self.stages[instruction.peer].programs
        paths = self._tied(self.realized.users, instruction.stage, instruction.peer)
        self._post(
            instruction,
            {p: jax.device_put(stage.params[p], target.param_sharding(p)) for p in paths},
        )

    def _receive_tied_parameter(self, stage: StageState, instruction: Instruction) -> None:
        stage.params = {**stage.params, **self._take(instruction)}

    # Reading the state

    def _key_data(self, microbatch: int) -> np.ndarray:
        """The random key of a microbatch: its number in the run, under the run's seed."""
        number = self._step * self.plan.num_microbatches + microbatch
        return np.array([self.seed, number], np.uint32)

    def params(self) -> dict[str, np.ndarray]:
        """All parameters, on the host."""
        found = {}
        for index, stage in enumerate(self.stages):
            own = [path for path in stage.params if self.realized.owner[path] == index]
            found |= {path: np.asarray(stage.params[path]) for path in own}
        return found

    def state(self) -> dict[str, np.ndarray]:
        """All other state, such as BatchNorm's statistics, on the host."""
        return {p: np.asarray(a) for stage in self.stages for p, a in stage.state.items()}

    def evaluate(self, batch: Mapping[str, np.ndarray]) -> jax.Array:
        return self._evaluator.loss(batch, self.stages)

    def peak_bytes_per_device(self) -> int | None:
        used = [
            (device.memory_stats() or {}).get("peak_bytes_in_use")
            for stage in self.stages
            for device in stage.programs.mesh.devices.flat
        ]
        return max(used) if used and None not in used else None

    def close(self) -> None:
        self.stages = []


def _moved(arrays: Arrays, values, target: StagePrograms, specs: Mapping) -> Arrays:
    """Copy values to another stage's devices, sharded as it wants them."""
    return {v: jax.device_put(arrays[v], target.sharding(specs[v], arrays[v].ndim)) for v in values}


def _mean(scalars: Sequence[jax.Array]) -> jax.Array:
    return sum(scalars[1:], start=scalars[0]) / len(scalars)
