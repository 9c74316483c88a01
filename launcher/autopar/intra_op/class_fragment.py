"""The nodes and edges inside one class of layers, on one mesh: what stage problems are put together from."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
from jax.extend.core import Literal

from launcher.autopar.graphs.graph import Op, Value
from launcher.autopar.graphs.layers import LayerClass
from launcher.autopar.graphs.trace import Role
from launcher.autopar.intra_op.stage_problem import (
    BACKWARD_COPY,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD_COPY,
    EdgeCost,
    Key,
    NodeCost,
    Part,
    StageSettings,
)
from launcher.autopar.sharding.collectives import combine_cost
from launcher.autopar.sharding.param_costs import (
    ParamCosts,
    param_costs,
    reshard_matrix,
    scattered_spec,
    state_spec,
)
from launcher.autopar.sharding.ports import Port
from launcher.autopar.sharding.restrictions import ClassTags
from launcher.autopar.sharding.rules import (
    AxisStrategy,
    Strategy,
    axis_choices,
    shapes_of,
    strategies,
)
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED, Spec, all_specs, replicated


@dataclass(frozen=True, slots=True)
class Reader:
    """Where a value is read, and when."""

    port: Port
    part: Part


@dataclass(frozen=True, slots=True)
class OpChoices:
    """What one op of a class may choose.

    Attributes:
        costs: Seconds, by strategy.
        reads: Its operands, each with the specs that the strategies read it in, and its place among
            the readers: what is read alike in the same place is read once.
        results: The specs that they leave each result in.
    """

    strategies: tuple[Strategy, ...]
    costs: np.ndarray
    reads: tuple[tuple[Value, tuple[Spec, ...], int], ...]
    results: tuple[tuple[Spec, ...], ...]


class ClassFragment:
    """The nodes and edges inside one layer class, on one mesh.

    Of the settings only the mesh, the restrictions, whether ZeRO-3 shards the parameters and whether
    gradients are scattered matter; what other ZeRO stages change is asked for by `param_costs`.

    Args:
        op_choices: what is known of its ops; what is found out is added. ZeRO changes nothing of them.
    """

    def __init__(
        self, cls: LayerClass, tags: ClassTags, settings: StageSettings,
        op_choices: dict[Hashable, OpChoices] | None = None,
    ):  # fmt: skip
        self.cls, self.tags, self.settings = cls, tags, settings
        self._op_choices = {} if op_choices is None else op_choices
        self.mesh = settings.mesh
        self.choices: dict[Key, tuple] = {}
        self.nodes: list[NodeCost] = []
        self.edges: list[EdgeCost] = []
        self.source: dict[Value, Port] = {}  # where each value is produced
        self._readers: dict[tuple[str, Value], list[Reader]] = defaultdict(list)  # by program
        self._param_costs: dict[int, dict[int, ParamCosts]] = {}
        self._add_inputs()
        self._add_ops()
        self._add_accumulators()
        for (kind, value), readers in self._readers.items():
            self._connect(kind, value, readers)

    def key(self, kind: str, index: int) -> Key:
        return (kind, self.cls.name, index)

    def aval(self, value: Value):
        return self.cls.joint.avals[value]

    def exit(self, value: Value, *, backward: bool) -> Port:
        """Where readers outside the layer get a value from, in the forward or the backward program."""
        kind = BACKWARD_COPY if backward else FORWARD_COPY
        key = self.key(kind, value)
        return Port(key, self.choices[key]) if key in self.choices else self.source[value]

    def matrix(self, value: Value, source: Port, specs) -> np.ndarray:
        """Resharding cost of a value from each choice of a node to each of a reader's specs."""
        return reshard_matrix(self.aval(value), source.specs, tuple(specs), self.mesh)

    def boundary_specs(self, value: Value) -> tuple[Spec, ...]:
        """In which specs a value may leave the stage: whole sums only."""
        return self._input_specs(value, None)

    def _add_inputs(self) -> None:
        inputs = self.cls.joint.inputs
        for index, slot in enumerate(self.cls.slots):
            key = self.key("slot", index)
            self.offer(key, self._input_specs(inputs[index], slot.role))
            self.source[inputs[index]] = Port(key, self.choices[key])
        for output, value in self.cls.cotangents.items():
            key = self.key("cotangent", output)
            self.offer(key, self._input_specs(value, None))
            self.source[value] = Port(key, self.choices[key])
        for value in inputs:
            if value not in self.source:  # a closed-over array
                key = self.key("constant", value)
                self.offer(key, (replicated(self.mesh.num_axes),))
                self.source[value] = Port(key, self.choices[key])

    def _input_specs(self, value: Value, role: Role | None) -> tuple[Spec, ...]:
        """Where an input may lie: never partial; along a batch axis as the restrictions say."""
        whole = replicated(self.mesh.num_axes)
        if role in (Role.RANDOM, Role.CONSTANT):
            return (whole,)
        shape = self.aval(value).shape
        specs = all_specs(shape, self.mesh.shape)
        restrictions = self.settings.restrictions
        for axis in restrictions.batch_axes:
            entries = restrictions.entries(self.tags, value)
            held = tuple(spec for spec in specs if spec[axis] in entries)
            specs = held or tuple(spec for spec in specs if spec[axis] == REPLICATED)
        if role is Role.PARAM and self.settings.zero == 3:
            specs = tuple(dict.fromkeys(state_spec(s, shape, self.mesh.shape) for s in specs))
        return specs

    def _add_ops(self) -> None:
        cls = self.cls
        forward, again, first_half, second_half = (
            set(map(id, ops))
            for ops in (cls.forward_ops, cls.recomputed_ops(), cls.input_ops, cls.weight_ops)
        )
        for index, op in enumerate(cls.joint.ops):
            part = Part(
                forward=id(op) in forward,
                again=id(op) in again,
                backward_input=id(op) in first_half,
                backward_weight=id(op) in second_half,
            )
            self._add_op(index, op, part)

    def _add_op(self, index: int, op: Op, part: Part) -> None:
        known, key = self._known_choices(index, op), self.key("op", index)
        self.choices[key] = known.strategies
        self.nodes.append(NodeCost(key, known.costs, part, self.cls.name))
        programs = _programs(part)
        for operand, specs, place in known.reads:
            self._read(operand, Port(key, specs, place), programs)
        for value, specs in zip(op.results, known.results, strict=True):
            self.source[value] = Port(key, specs)

    def _known_choices(self, index: int, op: Op) -> OpChoices:
        """What an op may choose, found out once."""
        name = self.name_of_choices(index)
        if name not in self._op_choices:
            self._op_choices[name] = self.choices_of(index, op)
        return self._op_choices[name]

    def name_of_choices(self, index: int) -> Hashable:
        """What tells an op's choices from others of the class."""
        return index

    def offer(self, key: Key, choices: tuple) -> None:
        """Give a node its choices."""
        self.choices[key] = choices

    def active_choices(self, op: Op) -> list[tuple[AxisStrategy, ...]]:
        """What an op may do along each axis; nothing along those of one device."""
        idle = axis_choices(op)[:1]  # the replicated choice comes first
        allowed = self.settings.restrictions.op_choices(op, self.tags, self.mesh.num_axes)
        return [c if n > 1 else idle for c, n in zip(allowed, self.mesh.shape, strict=True)]

    def strategies_of(self, index: int, op: Op) -> tuple[Strategy, ...]:
        """The strategies of an op; where nothing divides evenly, with axes that it leaves idle."""
        del index
        shape, active, idle = self.mesh.shape, self.active_choices(op), axis_choices(op)[:1]
        return strategies(op, shapes_of(op), shape, active) or strategies(
            op, shapes_of(op), shape, [(*c, *idle) for c in active]
        )

    def place_of(self, index: int, op: Op, operand: int) -> int:
        """What tells operands apart beside their specs: nothing, where all of these are there."""
        del index, op, operand
        return 0

    def choices_of(self, index: int, op: Op) -> OpChoices:
        """The strategies of an op, with what comes of them."""
        found = self.strategies_of(index, op)
        return OpChoices(
            strategies=found,
            costs=self.costs_of(op, found),
            reads=tuple(
                (
                    value,
                    tuple(s.operand_spec(operand) for s in found),
                    self.place_of(index, op, operand),
                )
                for operand, value in enumerate(op.operands)
                if not isinstance(value, Literal)
            ),
            results=tuple(
                tuple(s.result_spec(result) for s in found) for result in range(len(op.results))
            ),
        )

    def costs_of(self, op: Op, found: Sequence[Strategy]) -> np.ndarray:
        """Seconds of an op, by strategy."""
        division = np.array([strategy.work_division(self.mesh.shape) for strategy in found])
        seconds = self.settings.compute.op_s(op, division)
        return seconds + [combine_cost(op, strategy, self.mesh) for strategy in found]

    def _read(self, value: Value, port: Port, programs: Iterable[tuple[str, Part]]) -> None:
        """Take down a reader, in each program that it is part of."""
        for kind, own in programs:
            if all(port != known.port for known in self._readers[kind, value]):
                self._readers[kind, value].append(Reader(port, own))

    def _connect(self, kind: str, value: Value, readers: Sequence[Reader]) -> None:
        """Edges from a value to its readers in one program, by way of a copy where there are several."""
        source = self.source[value]
        leaves = value in (self._gradient_values if kind == BACKWARD_COPY else self.cls.outputs)
        by_both = value if self._is_read_by_both(value) else None
        if len(readers) + leaves > 1:
            key = self.key(kind, value)
            specs = [spec for port in (source, *(r.port for r in readers)) for spec in port.specs]
            self.offer(key, tuple(dict.fromkeys(specs)))
            copy = Port(key, self.choices[key])
            part = self._part_of_copy(kind, readers, leaves=leaves)
            self._add_edge(value, source, copy, part, by_both)
            source = copy
        for reader in readers:
            self._add_edge(value, source, reader.port, reader.part, by_both)

    def _is_read_by_both(self, value: Value) -> bool:
        """Whether the backward pass reads what running the forward pass again reads as well."""
        forward = self._readers.get((FORWARD_COPY, value), ())
        return (BACKWARD_COPY, value) in self._readers and any(r.part.again for r in forward)

    def _part_of_copy(self, kind: str, readers: Sequence[Reader], *, leaves: bool) -> Part:
        """When a copy is made: once more, or in the first half of the backward pass, if a reader is there."""
        if kind == FORWARD_COPY:
            return Part(forward=True, again=any(reader.part.again for reader in readers))
        first_half = leaves or any(reader.part.backward_input for reader in readers)
        return BACKWARD_INPUT if first_half else BACKWARD_WEIGHT

    def _add_edge(
        self, value: Value, source: Port, target: Port, part: Part, by_both: Value | None
    ) -> None:
        matrix, group = self.matrix(value, source, target.specs), self.cls.name
        specs = () if by_both is None else target.specs
        self.edges.append(EdgeCost(source.key, target.key, matrix, part, group, by_both, specs))

    @cached_property
    def _gradient_values(self) -> frozenset[Value]:
        """The gradients that leave the layer, to be summed elsewhere."""
        params = set(self.param_slots)
        found = (v for slot, v in self.cls.gradients.items() if slot not in params)
        return frozenset(value for value in found if not isinstance(value, Literal))

    @property
    def param_slots(self) -> tuple[int, ...]:
        return tuple(i for i, slot in enumerate(self.cls.slots) if slot.role is Role.PARAM)

    def _add_accumulators(self) -> None:
        """Sum the gradients of parameters over microbatches."""
        for slot in filter(self.cls.has_gradient, self.param_slots):
            key, value = self.key("accumulator", slot), self.cls.gradients[slot]
            self.offer(key, self._accumulator_specs(value, self.aval(value).shape))
            self._read(value, Port(key, self.choices[key]), _programs(BACKWARD_WEIGHT))

    def param_costs(self, zero: int) -> Mapping[int, ParamCosts]:
        """What each parameter slot costs once per step, at a ZeRO stage."""
        if zero not in self._param_costs:
            self._param_costs[zero] = {
                slot: param_costs(
                    self.aval(self.cls.joint.inputs[slot]), self.choices[self.key("slot", slot)],
                    self.choices.get(self.key("accumulator", slot), ()), self.settings.optimizer,
                    self.mesh, zero=zero,
                    memory_bytes_per_s=self.settings.compute.memory_bytes_per_s,
                )
                for slot in self.param_slots
            }  # fmt: skip
        return self._param_costs[zero]

    def _accumulator_specs(self, value: Value, shape) -> tuple[Spec, ...]:
        specs = all_specs(shape, self.mesh.shape, partial=True)
        restrictions = self.settings.restrictions
        for axis in restrictions.batch_axes:
            entries = restrictions.entries(self.tags, value) | {PARTIAL, REPLICATED}
            specs = tuple(spec for spec in specs if spec[axis] in entries)
        if self.settings.scatter:
            sizes = self.mesh.shape
            specs = tuple(dict.fromkeys(scattered_spec(spec, shape, sizes) for spec in specs))
        return specs


@cache
def _programs(part: Part) -> tuple[tuple[str, Part], ...]:
    """The programs that an op is in, by the kind of copies that they read, and what of it each is."""
    forward = ((FORWARD_COPY, Part(forward=True, again=part.again)),) if part.forward else ()
    backward_part = replace(part, forward=False, again=False)
    backward = ((BACKWARD_COPY, backward_part),) if part.backward else ()
    return forward + backward
