"""How many bytes a stage needs on each of its devices.

    always      parameters, optimizer state, gradient accumulators
    per microbatch in flight    what its forward pass keeps for its backward pass
    for a while     the largest layer's recomputed residuals; the synchronised gradients

Counted from the shardings that the solver chose, value by value. Left out: fragmentation, what libraries
allocate for themselves, and the order in which XLA computes inside a program.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.autopar.graph import Value, used_values
from launcher.autopar.intra_op import IntraOpPlanner, StageSharding
from launcher.autopar.layers import LayerClass
from launcher.autopar.spec import Spec, num_shards
from launcher.autopar.stage_layout import produced_spec
from launcher.autopar.stage_problem import optimizer_spec
from launcher.autopar.trace import Role
from launcher.autopar.wiring import StageWiring
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


@dataclass(frozen=True, slots=True)
class ClassMemory:
    """Bytes per device of one layer of a class."""

    state_bytes: float
    gradient_bytes: float
    residual_bytes: float
    input_bytes: float


def class_memories(
    planner: IntraOpPlanner, sharding: StageSharding, wiring: StageWiring, optimizer_ratio: float
) -> dict[str, ClassMemory]:
    """Count one layer of each class of a stage.

    Args:
        optimizer_ratio: bytes of optimizer state per byte of parameters.
    """
    count = _Counter(sharding)
    found = {}
    for name in wiring.classes:
        cls = planner.classes[name]
        state, gradients = count.state(cls, wiring.aliases, optimizer_ratio)
        found[name] = ClassMemory(state, gradients, count.residuals(cls), count.inputs(cls))
    return found


def stage_memory(
    memories: Mapping[str, ClassMemory], wiring: StageWiring, recompute: str
) -> StageMemory:
    """Add up a stage, for `recompute` "none", "layer" or "full"."""
    counted = [(memories[name], layers) for name, layers in wiring.classes.items()]
    residuals = sum(layers * memory.residual_bytes for memory, layers in counted)
    inputs = sum(layers * memory.input_bytes for memory, layers in counted)
    largest = max(memory.residual_bytes + memory.input_bytes for memory, _ in counted)
    match recompute:
        case "none":
            stash, workspace = residuals + inputs, largest
        case "layer":
            stash, workspace = inputs, largest
        case "full":
            imported = {name for name, _ in wiring.imports}
            stash = sum(memories[name].input_bytes for name in imported)
            workspace = residuals + inputs
    return StageMemory(
        state_bytes=sum(layers * memory.state_bytes for memory, layers in counted),
        stash_bytes=stash,
        workspace_bytes=workspace,
        gradient_bytes=sum(layers * memory.gradient_bytes for memory, layers in counted),
    )


class _Counter:
    """Local bytes of the values of a class under a stage's picks."""

    def __init__(self, sharding: StageSharding):
        self.sharding, self.picks = sharding, sharding.picks
        self.mesh_shape = sharding.settings.mesh.shape

    def local(self, cls: LayerClass, value: Value, spec: Spec) -> float:
        return aval_bytes(cls.joint.avals[value]) / num_shards(spec, self.mesh_shape)

    def state(self, cls: LayerClass, aliases, optimizer_ratio: float) -> tuple[float, float]:
        """(parameters, optimizer state, accumulators; synchronised gradients) of one layer."""
        total = gradients = 0.0
        settings = self.sharding.settings
        for slot, value in enumerate(cls.joint.inputs[: cls.num_slots]):
            key = ("slot", cls.name, slot)
            if cls.slots[slot].role not in (Role.PARAM, Role.STATE) or key[1:] in aliases:
                continue
            home = self.picks[key]
            total += self.local(cls, value, home)
            accumulator = self.picks.get(("accumulator", cls.name, slot))
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

    def inputs(self, cls: LayerClass) -> float:
        """The activations and batch leaves that a layer's backward pass reads again."""
        read = used_values(cls.backward_ops)
        return sum(
            self.local(cls, value, self.picks["slot", cls.name, slot])
            for slot, value in enumerate(cls.joint.inputs[: cls.num_slots])
            if cls.slots[slot].role in (None, Role.BATCH) and value in read
        )
