"""How many bytes a stage needs on each of its devices.

    always      parameters, optimizer state, gradient accumulators
    per microbatch in flight    what its forward pass keeps for its backward pass
    for a while     the temporary buffers of a backward pass (`workspace`); the synchronised gradients

Counted from the shardings that the solver chose, value by value, in closed form, for the search. What a
finished plan promises is read off its instructions (`predicted_buffers`). Left out: fragmentation, and what
libraries allocate for themselves.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from launcher.autopar.graphs.graph import Op, Value, used_values
from launcher.autopar.graphs.layers import LayerClass
from launcher.autopar.graphs.trace import Role
from launcher.autopar.graphs.work import aval_bytes
from launcher.autopar.intra_op.intra_op import IntraOpPlanner, StageSharding
from launcher.autopar.intra_op.layer_workspace import (
    LayerWorkspace,
    layer_workspace,
    picks_by_class,
)
from launcher.autopar.intra_op.stage_layout import produced_spec, unread_specs
from launcher.autopar.intra_op.stage_problem import StageSettings
from launcher.autopar.intra_op.wiring import Place, StageWiring
from launcher.autopar.intra_op.wiring_table import WiringTable
from launcher.autopar.sharding.param_costs import optimizer_spec
from launcher.autopar.sharding.spec import Spec, num_shards


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes per device.

    Attributes:
        state_bytes: parameters, optimizer state and accumulators.
        stash_bytes: kept per microbatch in flight.
        workspace_bytes: needed beside them at the worst moment of a backward pass.
        gradient_bytes: the synchronised gradients, when nothing is in flight any more.
        weight_stash_bytes: kept on top of the stash between the halves of a split backward pass.
    """

    state_bytes: float
    stash_bytes: float
    workspace_bytes: float
    gradient_bytes: float
    weight_stash_bytes: float = 0.0

    def peak_bytes(self, in_flight: int) -> float:
        """The most at any time of a step."""
        running = in_flight * self.stash_bytes + self.workspace_bytes
        return self.state_bytes + max(running, self.gradient_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamMemory:
    """Bytes per device of one parameter.

    Attributes:
        optimizer_bytes: its optimizer state, where it is updated.
        accumulator_bytes: the sum of its gradients over microbatches; 0 if no layer makes one.
        gradient_bytes: that sum where the update reads it.
    """

    weight_bytes: float
    optimizer_bytes: float
    accumulator_bytes: float
    gradient_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassMemory:
    """Bytes per device of one layer of a class.

    Attributes:
        params: slot -> what one parameter there takes.
        state_bytes: other state, such as running statistics.
        residual_bytes: what its forward ops make and its backward ops read.
        input_bytes: slot -> an activation that it reads.
        backward_slots: those of the slots that its backward ops read, without recomputation.
        batch_bytes: its leaves of the batch.
        handed_bytes: what the first half of its backward pass leaves for the second, less what of the
            residuals it lets go, without and with recomputation.
        statistics_bytes: the state that its backward ops read, without and with recomputation.
        workspace: the temporary buffers of its passes.
    """

    params: Mapping[int, ParamMemory]
    state_bytes: float
    residual_bytes: float
    input_bytes: Mapping[int, float]
    backward_slots: frozenset[int]
    batch_bytes: float
    handed_bytes: tuple[float, float]
    statistics_bytes: tuple[float, float]
    workspace: LayerWorkspace


def class_memories(
    planner: IntraOpPlanner, sharding: StageSharding, wiring: StageWiring
) -> dict[str, ClassMemory]:
    """Count one layer of each class of a stage."""
    count = _Counter(sharding, wiring.aliases, planner.workspaces)
    return {name: count.layer(planner.classes[name]) for name in wiring.classes}


def unread_memory(planner: IntraOpPlanner, settings: StageSettings) -> list[ParamMemory]:
    """Count the parameters that no layer reads, which lie as `unread_specs` says."""
    traced = planner.model.traced
    specs = unread_specs(planner, settings)
    return [
        _param_memory(aval, specs[traced.inputs[value].path], None, settings)
        for value in planner.model.unread_params()
        for aval in [traced.graph.avals[value]]
    ]


def stage_memory(
    memories: Mapping[str, ClassMemory], wiring: StageWiring, recompute: str,
    unread: Sequence[ParamMemory] = (),
) -> StageMemory:  # fmt: skip
    """Add up a stage, or a range of the layers that `memories` were counted for.

    Args:
        recompute: "none", "layer" or "full".
        unread: what `unread_memory` counts; the stage with the last layer has it.
    """
    summed = range_memory(memories, WiringTable.of([wiring]), recompute, unread)
    return StageMemory(**{name: float(row) for name, (row,) in asdict(summed).items()})


def range_memory(
    memories: Mapping[str, ClassMemory], table: WiringTable, recompute: str,
    unread: Sequence[ParamMemory] = (),
) -> StageMemory:  # fmt: skip
    """The same for many ranges at once: every field is an array with an entry for each."""
    params = [memories[name].params[slot] for name, slot in table.places]
    classes = [memories[name] for name in table.classes]
    again = recompute != "none"

    def held(owned_bytes, borrowed_bytes, unread_bytes) -> np.ndarray:
        rest = table.has_unread * sum(map(unread_bytes, unread))
        return (
            table.owned @ np.array([owned_bytes(param) for param in params], float)
            + table.borrowed @ np.array([borrowed_bytes(param) for param in params], float)
            + rest
        )

    def of_layers(class_bytes) -> np.ndarray:
        return table.layers @ np.array([class_bytes(memory) for memory in classes], float)

    return StageMemory(
        state_bytes=of_layers(lambda memory: memory.state_bytes)
        + held(_owned_bytes, _borrowed_bytes, _owned_bytes),
        stash_bytes=_stash_bytes(memories, table, recompute),
        workspace_bytes=_backward_workspace(memories, table, recompute),
        # What is let go is there until then: halves never lower the peak.
        weight_stash_bytes=np.maximum(0.0, of_layers(lambda memory: memory.handed_bytes[again])),
        gradient_bytes=held(
            lambda param: param.gradient_bytes,
            lambda param: bool(param.accumulator_bytes) * param.weight_bytes,
            lambda param: param.gradient_bytes,
        ),
    )


def _owned_bytes(param: ParamMemory) -> float:
    return _borrowed_bytes(param) + param.optimizer_bytes


def _borrowed_bytes(param: ParamMemory) -> float:
    return param.weight_bytes + param.accumulator_bytes


def _stash_bytes(memories: Mapping[str, ClassMemory], table: WiringTable, recompute: str):
    """What a microbatch in flight holds: residuals, what layers pass on, its batch, state, and what was
    sent, read again or not."""
    again = recompute != "none"
    classes = [memories[name] for name in table.classes]
    own = [memory.batch_bytes + memory.statistics_bytes[again] for memory in classes]
    if not again:
        own = [held + memory.residual_bytes for held, memory in zip(own, classes, strict=True)]
    received = [memories[name].input_bytes[slot] for name, slot in table.imported]
    stash = table.layers @ np.array(own, float) + table.imports @ np.array(received, float)
    return stash if recompute == "full" else stash + _passed_on_bytes(memories, table, recompute)


def _backward_workspace(memories: Mapping[str, ClassMemory], table: WiringTable, recompute: str):
    """The temporary buffers of a backward pass, which goes through the layers one by one."""
    classes = [memories[name] for name in table.classes]

    def greatest(class_bytes) -> np.ndarray:
        sizes = np.array([class_bytes(memory) for memory in classes])
        return np.where(table.layers > 0, sizes, -np.inf).max(axis=1)

    match recompute:
        case "none":
            return greatest(lambda memory: memory.workspace.backward_bytes)
        case "layer":
            return greatest(lambda memory: memory.workspace.again_bytes)
    # All of the forward pass is there again before the first layer goes back, and ends layer by layer;
    # which one that is decides how much the others keep, so here it is the worst.
    residuals = table.layers @ np.array([memory.residual_bytes for memory in classes], float)
    going_back = greatest(lambda memory: memory.workspace.both_bytes - memory.residual_bytes)
    return residuals + _passed_on_bytes(memories, table, "none") + going_back


def _passed_on_bytes(memories: Mapping[str, ClassMemory], table: WiringTable, recompute: str):
    """The activations that layers of the stage read of one another in their backward passes."""
    sizes = [
        memories[name].input_bytes[slot]
        if recompute != "none" or slot in memories[name].backward_slots
        else 0.0
        for name, slot in table.read
    ]
    return table.internal @ np.array(sizes, float)


def _param_memory(aval, home: Spec, accumulator: Spec | None, settings: StageSettings):
    """Count one parameter that lies at `home`."""
    shape = settings.mesh.shape
    where = optimizer_spec(home, aval.shape, settings.mesh, settings.zero)
    kept, num_bytes = settings.optimizer.kept(aval), aval_bytes(aval)
    return ParamMemory(
        weight_bytes=num_bytes / num_shards(home, shape),
        optimizer_bytes=kept.alike_bytes / num_shards(where, shape) + kept.whole_bytes,
        accumulator_bytes=num_bytes / num_shards(accumulator, shape) if accumulator else 0.0,
        gradient_bytes=num_bytes / num_shards(where if settings.zero >= 2 else home, shape),
    )


class _Counter:
    """Local bytes of the values of a class under a stage's picks."""

    def __init__(self, sharding: StageSharding, aliases: Mapping[Place, Place], workspaces: dict):
        self.sharding, self.picks, self.aliases = sharding, sharding.picks, aliases
        self.workspaces, self.by_class = workspaces, picks_by_class(sharding.picks)
        self.mesh_shape = sharding.settings.mesh.shape

    def local(self, cls: LayerClass, value: Value, spec: Spec) -> float:
        return aval_bytes(cls.joint.avals[value]) / num_shards(spec, self.mesh_shape)

    def params(self, cls: LayerClass) -> dict[int, ParamMemory]:
        found = {}
        for slot in (i for i, slot in enumerate(cls.slots) if slot.role is Role.PARAM):
            place = self.aliases.get((cls.name, slot), (cls.name, slot))
            trained = cls.has_gradient(slot)
            found[slot] = _param_memory(
                cls.joint.avals[cls.joint.inputs[slot]],
                self.picks["slot", *place],
                self.picks["accumulator", *place] if trained else None,
                self.sharding.settings,
            )
        return found

    def residuals(self, cls: LayerClass) -> float:
        return sum(
            self.local(cls, value, produced_spec(cls, value, self.picks)) for value in cls.residuals
        )

    def handed(self, cls: LayerClass) -> tuple[float, float]:
        """Between the halves: what the second one reads and the first one has made, or recomputed."""
        read = used_values(cls.weight_ops)
        made = {value for op in cls.input_ops for value in op.results}
        left = sum(
            self.local(cls, value, produced_spec(cls, value, self.picks)) for value in read & made
        )
        for output, value in cls.cotangents.items():
            if value in read:
                left += self.local(cls, value, self.picks["cotangent", cls.name, output])
        specs = {value: produced_spec(cls, value, self.picks) for value in cls.residuals}
        sizes = {value: self.local(cls, value, spec) for value, spec in specs.items()}
        still_read = sum(size for value, size in sizes.items() if value in read)
        return left - (sum(sizes.values()) - still_read), left + still_read

    def layer(self, cls: LayerClass) -> ClassMemory:
        slots = {
            slot: self.local(cls, value, self.picks["slot", cls.name, slot])
            for slot, value in enumerate(cls.joint.inputs[: cls.num_slots])
            if cls.slots[slot].role in (None, Role.BATCH, Role.STATE)
        }
        backward = self._read(cls, cls.backward_ops) & slots.keys()
        either = self._read(cls, cls.forward_ops) & slots.keys() | backward

        def of(role: Role | None, read: Iterable[int]) -> dict[int, float]:
            return {slot: slots[slot] for slot in read if cls.slots[slot].role is role}

        return ClassMemory(
            workspace=layer_workspace(
                cls, self.sharding.settings.mesh, self.by_class, self.aliases, self.workspaces
            ),
            params=self.params(cls),
            state_bytes=sum(slots[slot] for slot in slots if cls.slots[slot].role is Role.STATE),
            residual_bytes=self.residuals(cls),
            handed_bytes=self.handed(cls),
            input_bytes=of(None, slots),
            backward_slots=frozenset(of(None, backward)),
            batch_bytes=sum(of(Role.BATCH, slots).values()),
            statistics_bytes=(
                sum(of(Role.STATE, backward).values()),
                sum(of(Role.STATE, either).values()),
            ),
        )

    def _read(self, cls: LayerClass, ops: Sequence[Op]) -> set[int]:
        """The slots that some op reads, or that are a gradient as they are."""
        gradients = (value for value in cls.gradients.values() if isinstance(value, Value))
        read = used_values(ops).union(gradients)
        return {
            slot for slot, value in enumerate(cls.joint.inputs[: cls.num_slots]) if value in read
        }
