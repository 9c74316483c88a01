"""How many bytes a stage needs on each of its devices.

    always      parameters, optimizer state, gradient accumulators
    per microbatch in flight    what its forward pass keeps for its backward pass
    for a while     the largest layer's recomputed residuals; the synchronised gradients

Counted from the shardings that the solver chose, value by value. Left out: fragmentation, what libraries
allocate for themselves, and the order in which XLA computes inside a program.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from launcher.autopar.graph import Op, Value, used_values
from launcher.autopar.intra_op import IntraOpPlanner, StageSharding
from launcher.autopar.layers import LayerClass
from launcher.autopar.spec import Spec, num_shards
from launcher.autopar.stage_layout import produced_spec
from launcher.autopar.stage_problem import optimizer_spec
from launcher.autopar.trace import Role
from launcher.autopar.wiring import Place, StageWiring
from launcher.autopar.work import aval_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes per device.

    Attributes:
        state_bytes: parameters, optimizer state and accumulators.
        stash_bytes: kept per microbatch in flight.
        workspace_bytes: needed beside them at the worst moment of a backward pass.
        gradient_bytes: the synchronised gradients, when nothing is in flight any more.
    """

    state_bytes: float
    stash_bytes: float
    workspace_bytes: float
    gradient_bytes: float

    def peak_bytes(self, in_flight: int) -> float:
        """The most at any time of a step."""
        running = in_flight * self.stash_bytes + self.workspace_bytes
        return self.state_bytes + max(running, self.gradient_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassMemory:
    """Bytes per device of one layer of a class.

    Attributes:
        residual_bytes: what its forward ops make and its backward ops read.
        input_bytes: slot -> an activation that it reads.
        backward_slots: those of the slots that its backward ops read, without recomputation.
        batch_bytes: its leaves of the batch.
        statistics_bytes: the state that its backward ops read, without and with recomputation.
    """

    state_bytes: float
    gradient_bytes: float
    residual_bytes: float
    input_bytes: Mapping[int, float]
    backward_slots: frozenset[int]
    batch_bytes: float
    statistics_bytes: tuple[float, float]


def class_memories(
    planner: IntraOpPlanner,
    sharding: StageSharding,
    wiring: StageWiring,
    optimizer_ratio: float,
    *,
    shared: bool = True,
) -> dict[str, ClassMemory]:
    """Count one layer of each class of a stage.

    Args:
        optimizer_ratio: bytes of optimizer state per byte of parameters.
        shared: whether a parameter that several classes read counts once. In a range of the stage that
            has only one of them it counts there, whichever that is.
    """
    count = _Counter(sharding, wiring.aliases)
    left_out = wiring.aliases if shared else {}
    return {
        name: count.layer(planner.classes[name], left_out, optimizer_ratio)
        for name in wiring.classes
    }


def stage_memory(
    memories: Mapping[str, ClassMemory], wiring: StageWiring, recompute: str
) -> StageMemory:
    """Add up a stage, for `recompute` "none", "layer" or "full"."""
    counted = [(memories[name], layers) for name, layers in wiring.classes.items()]
    residuals = sum(layers * memory.residual_bytes for memory, layers in counted)
    largest = max(memory.residual_bytes + sum(memory.input_bytes.values()) for memory, _ in counted)
    passed_on = _passed_on_bytes(memories, wiring, recompute)
    match recompute:
        case "none":
            stash, workspace = residuals + passed_on, largest
        case "layer":
            stash, workspace = passed_on, largest
        case "full":
            stash, workspace = 0.0, residuals + _passed_on_bytes(memories, wiring, "layer")
    return StageMemory(
        state_bytes=sum(layers * memory.state_bytes for memory, layers in counted),
        stash_bytes=stash + _received_bytes(memories, wiring, recompute),
        workspace_bytes=workspace,
        gradient_bytes=sum(layers * memory.gradient_bytes for memory, layers in counted),
    )


def _passed_on_bytes(memories: Mapping[str, ClassMemory], wiring: StageWiring, recompute: str):
    """The activations that layers of the stage read of one another in their backward passes."""
    return sum(
        pairs * memories[name].input_bytes[slot]
        for (_, _, name, slot), pairs in wiring.internal.items()
        if recompute != "none" or slot in memories[name].backward_slots
    )


def _received_bytes(memories: Mapping[str, ClassMemory], wiring: StageWiring, recompute: str):
    """What a microbatch in flight holds, read again or not: its batch, state, and what was sent."""
    again = recompute != "none"
    own = sum(
        layers * (memories[name].batch_bytes + memories[name].statistics_bytes[again])
        for name, layers in wiring.classes.items()
    )
    return own + sum(memories[name].input_bytes[slot] for name, slot in wiring.imports)


class _Counter:
    """Local bytes of the values of a class under a stage's picks."""

    def __init__(self, sharding: StageSharding, aliases: Mapping[Place, Place]):
        self.sharding, self.picks, self.aliases = sharding, sharding.picks, aliases
        self.mesh_shape = sharding.settings.mesh.shape

    def local(self, cls: LayerClass, value: Value, spec: Spec) -> float:
        return aval_bytes(cls.joint.avals[value]) / num_shards(spec, self.mesh_shape)

    def state(self, cls: LayerClass, aliases, optimizer_ratio: float) -> tuple[float, float]:
        """(parameters, optimizer state, accumulators; synchronised gradients) of one layer."""
        total = gradients = 0.0
        settings = self.sharding.settings
        for slot, value in enumerate(cls.joint.inputs[: cls.num_slots]):
            place = (cls.name, slot)
            if cls.slots[slot].role not in (Role.PARAM, Role.STATE) or place in aliases:
                continue
            place = self.aliases.get(place, place)
            home = self.picks["slot", *place]
            total += self.local(cls, value, home)
            accumulator = self.picks.get(("accumulator", *place))
            if accumulator is not None:
                shape = cls.joint.avals[value].shape
                where = optimizer_spec(home, shape, settings.mesh, settings.zero)
                total += optimizer_ratio * self.local(cls, value, where)
                total += self.local(cls, value, accumulator)
                gradients += self.local(cls, value, where if settings.zero >= 2 else home)
        return total, gradients

    def residuals(self, cls: LayerClass) -> float:
        return sum(
            self.local(cls, value, produced_spec(cls, value, self.picks)) for value in cls.residuals
        )

    def layer(self, cls: LayerClass, aliases, optimizer_ratio: float) -> ClassMemory:
        state, gradients = self.state(cls, aliases, optimizer_ratio)
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
            state_bytes=state,
            gradient_bytes=gradients,
            residual_bytes=self.residuals(cls),
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
