"""What a mesh axis may be used for: any sharding, or only the batch (and, by choice, the experts).

A planner that leaves every axis free searches the square of the choices. On meshes with a data axis, that
axis is held to the batch dim of every value that has one; values without one (weights, statistics) stay
whole or partial along it. Where a model has experts, their dim is the alternative.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

from launcher.autopar.graphs.graph import Op
from launcher.autopar.graphs.layers import LayerClass, LayeredModel
from launcher.autopar.graphs.trace import Role
from launcher.autopar.sharding.rules import AxisStrategy, axis_choices
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED
from launcher.autopar.sharding.tags import Tags, expert_dims, propagate


class Experts(Enum):
    """Whether the data axis may split experts instead of the batch."""

    FREE = "free"
    NEVER = "never"
    FORCED = "forced"


@dataclass(frozen=True, slots=True, eq=False)
class ClassTags:
    """The batch dim and the expert dim of every value of a class's joint graph."""

    batch: Tags
    experts: Tags


def tag_classes(model: LayeredModel) -> dict[str, ClassTags]:
    """Follow the batch and the experts through the layers, from the first to the last."""
    produced: dict[int, int] = {}  # traced value -> batch dim
    tags: dict[str, ClassTags] = {}
    for layer in model.layers:
        cls = layer.cls
        if cls.name not in tags:
            tags[cls.name] = _tag_class(cls, [produced.get(value) for value in layer.inputs])
        batch = tags[cls.name].batch
        for value, inner in zip(layer.outputs, cls.outputs, strict=True):
            if inner in batch:
                produced[value] = batch[inner]
    return tags


def _tag_class(cls: LayerClass, activation_dims: Sequence[int | None]) -> ClassTags:
    seeds: Tags = {}
    for value, slot, dim in zip(
        cls.joint.inputs[: cls.num_slots], cls.slots, activation_dims, strict=True
    ):
        if slot.role is Role.BATCH and cls.joint.avals[value].shape:
            seeds[value] = 0
        elif slot.role is None and dim is not None:
            seeds[value] = dim
    forward = propagate(cls.joint.ops, seeds)
    seeds |= {
        cotangent: forward[cls.outputs[k]]
        for k, cotangent in cls.cotangents.items()
        if cls.outputs[k] in forward
    }
    experts = expert_dims(cls.joint.ops, _params(cls))
    return ClassTags(propagate(cls.joint.ops, seeds), propagate(cls.joint.ops, experts))


def expert_counts(model: LayeredModel) -> set[int]:
    """How many experts the model's layers have; nothing for a model without experts."""
    return {
        cls.joint.avals[value].shape[dim]
        for cls in model.classes
        for value, dim in expert_dims(cls.joint.ops, _params(cls)).items()
    }


def _params(cls: LayerClass) -> set[int]:
    return {
        value
        for value, slot in zip(cls.joint.inputs[: cls.num_slots], cls.slots, strict=True)
        if slot.role is Role.PARAM
    }


@dataclass(frozen=True, slots=True)
class Restrictions:
    """The axes that are held to the batch, and what they may do with experts."""

    batch_axes: frozenset[int]
    experts: Experts = Experts.FREE

    def entries(self, tags: ClassTags, value: int) -> frozenset[int]:
        """What a batch axis may do to a value."""
        allowed = {tags.batch[value]} if value in tags.batch else {REPLICATED, PARTIAL}
        if value not in tags.experts or self.experts is Experts.NEVER:
            return frozenset(allowed)
        expert_dim = {tags.experts[value]}
        return frozenset(expert_dim if self.experts is Experts.FORCED else allowed | expert_dim)

    def op_choices(self, op: Op, tags: ClassTags, num_axes: int) -> list[tuple[AxisStrategy, ...]]:
        """The choices of an op for each axis; all of them where the restriction would leave none.

        What the experts leave none of is taken as if they were free, so that every choice of a plan is
        one of `Experts.FREE`, whatever was asked for.
        """
        free, held = axis_choices(op), _held_choices(self, op, tags)
        return [held if axis in self.batch_axes else free for axis in range(num_axes)]

    def admits(self, op: Op, tags: ClassTags, choice: AxisStrategy) -> bool:
        """Whether a batch axis may do that to what an op reads and leaves."""
        results = zip(op.results, choice.results, strict=True)
        if not all(entry in self.entries(tags, value) for value, entry in results):
            return False
        operands = zip(op.operands, choice.operands, strict=True)
        return all(
            entry < 0 or entry in self.entries(tags, value)
            for value, entry in operands
            if isinstance(value, int) and value in tags.batch
        )


@lru_cache(maxsize=2**16)
def _held_choices(restrictions: Restrictions, op: Op, tags: ClassTags) -> tuple[AxisStrategy, ...]:
    """Those of an op along a batch axis: the same on every mesh."""
    free = axis_choices(op)
    for own in (restrictions, replace(restrictions, experts=Experts.FREE)):
        held = tuple(choice for choice in free if own.admits(op, tags, choice))
        if held:
            return held
    return free
