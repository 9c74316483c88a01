"""Layers and their classes: the unit that is differentiated, planned, compiled, and repeated.

Each layer is a graph from its input slots to its output slots. Layers that are alike (same ops, same
shapes, same kinds of inputs) share a `LayerClass`, which is differentiated once into a joint graph:

    joint(inputs, cotangents of the differentiable outputs)
        -> outputs, gradients of the differentiable inputs

Ops of the joint graph that depend on a cotangent are the backward pass, the others the forward pass. What
the backward pass reads of the forward pass are the residuals, which a microbatch keeps in between; a
layer's own inputs are not among them, they are passed again.

The backward pass is in two halves, which a schedule may run apart (Qi et al. 2024, "Zero Bubble Pipeline
Parallelism", section 2): what the gradients of activations need, for earlier layers wait for them, and the
rest, which only gradients of parameters need. An op that both need is in the first half.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.extend.core import primitives as prim

from launcher.autopar.graphs.clustering import Clustering
from launcher.autopar.graphs.graph import (
    CALLS,
    CUSTOM_CALLS,
    Graph,
    Op,
    Value,
    eliminate_dead_code,
    evaluate,
    from_jaxpr,
    live_ops,
    renumber,
    subgraph,
    used_values,
)
from launcher.autopar.graphs.structure import op_signature
from launcher.autopar.graphs.trace import Role, TracedModel
from launcher.autopar.graphs.turned import turn_products
from launcher.autopar.graphs.work import aval_bytes


@dataclass(frozen=True, slots=True)
class Slot:
    """One input of a layer: its role (None: computed by an earlier layer), and whether it is
    differentiated."""

    role: Role | None
    differentiable: bool


@dataclass(frozen=True, eq=False)
class LayerClass:
    """What all layers of a kind share.

    `joint.inputs` are the slots, then the cotangents of `cotangent_outputs`; `joint.outputs` are the
    forward outputs, then the gradients of the differentiable slots, in slot order. `input_ops` and
    `weight_ops` are the two halves of the backward pass; the second reads what the first makes, and
    never the other way round.
    """

    name: str
    slots: tuple[Slot, ...]
    forward: Graph
    joint: Graph
    num_outputs: int
    cotangent_outputs: tuple[int, ...]  # indices into the outputs
    forward_ops: tuple[Op, ...]
    input_ops: tuple[Op, ...]
    weight_ops: tuple[Op, ...]
    residuals: tuple[Value, ...]

    @property
    def num_slots(self) -> int:
        return len(self.slots)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return self.joint.outputs[: self.num_outputs]

    @cached_property
    def backward_ops(self) -> tuple[Op, ...]:
        return (*self.input_ops, *self.weight_ops)

    @cached_property
    def makers(self) -> dict[Value, tuple[int, int]]:
        """Value -> the index of the op of the joint graph that makes it, and which of its results it is."""
        return {
            value: (index, position)
            for index, op in enumerate(self.joint.ops)
            for position, value in enumerate(op.results)
        }

    @property
    def recomputes(self) -> bool:
        """Whether the model itself recomputes something of it (`jax.checkpoint`)."""
        return any(op.primitive is prim.remat_p for op in self.forward.ops)

    def recomputed_ops(self, outputs: Sequence[Value] = ()) -> tuple[Op, ...]:
        """The forward ops that the backward pass, or these outputs, need again."""
        read = used_values(self.backward_ops)
        return live_ops(self.forward_ops, [*read, *self.gradients.values(), *outputs])

    @cached_property
    def gradients(self) -> dict[int, Value]:
        """Slot -> the value of its gradient."""
        differentiable = [i for i, slot in enumerate(self.slots) if slot.differentiable]
        return dict(zip(differentiable, self.joint.outputs[self.num_outputs :], strict=True))

    def has_gradient(self, slot: int) -> bool:
        """Whether a slot's gradient is computed, and not known to be zero while tracing."""
        gradient = self.gradients.get(slot)
        return gradient is not None and not isinstance(gradient, Literal)

    @cached_property
    def cotangents(self) -> dict[int, Value]:
        """Output -> the value of its cotangent."""
        values = self.joint.inputs[self.num_slots : self.num_slots + len(self.cotangent_outputs)]
        return dict(zip(self.cotangent_outputs, values, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer: its class, and the values of the traced model that its slots and outputs are."""

    cls: LayerClass
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LayeredModel:
    """The traced model as a sequence of layers.

    `random_ops` derive the random keys that layers read from the key of the microbatch; whoever runs a
    layer computes the keys it needs, so that layers that differ only in their keys are alike.
    """

    traced: TracedModel
    layers: tuple[Layer, ...]
    classes: tuple[LayerClass, ...]
    random_ops: tuple[Op, ...]

    def producer(self) -> dict[Value, tuple[int, int]]:
        """Value -> (layer, output) that computes it."""
        return {
            value: (i, k)
            for i, layer in enumerate(self.layers)
            for k, value in enumerate(layer.outputs)
        }

    def param_owners(self) -> dict[Value, int]:
        """Parameter -> the layer whose stage updates it: the first with a gradient for it.

        Where no layer has one, the first that reads it. What no layer reads is `unread_params`.
        """
        reads = [
            (value, index, layer.cls.has_gradient(slot))
            for index, layer in reversed(list(enumerate(self.layers)))
            for slot, value in enumerate(layer.inputs)
            if layer.cls.slots[slot].role is Role.PARAM
        ]
        readers = {value: index for value, index, _ in reads}  # the first is written last
        return readers | {value: index for value, index, trained in reads if trained}

    def unread_params(self) -> tuple[Value, ...]:
        """Parameters that no layer reads."""
        read = {value for layer in self.layers for value in layer.inputs}
        return tuple(
            value
            for value, source in self.traced.inputs.items()
            if source.role is Role.PARAM and value not in read
        )


def build_layers(
    traced: TracedModel, clustering: Clustering, *, trains: bool = True
) -> LayeredModel:
    """Turn clustered ops into layers, differentiating each class of layers once.

    Args:
        trains: whether there is a backward pass; without one nothing is kept for it either.
    """
    flows = _gradient_flow(traced) if trains else set()
    final = {traced.loss, *traced.state.values(), *traced.metrics.values()}
    later = _read_later(clustering, final)
    keys = _random_values(traced, clustering.free)
    random_ops = live_ops(clustering.free, keys)
    constant_ops = [op for op in clustering.free if keys.isdisjoint(op.results)]
    classes: dict[Hashable, LayerClass] = {}
    layers = []
    for ops, wanted in zip(clustering.layers, later, strict=True):
        outputs = [value for op in ops for value in op.results if value in wanted]
        whole = (*live_ops(constant_ops, used_values(ops)), *ops)
        graph = subgraph(traced.graph, whole, outputs)
        roles = {v: Role.RANDOM for v in keys} | {v: i.role for v, i in traced.inputs.items()}
        with_cotangent = tuple(k for k, value in enumerate(outputs) if value in flows)
        trained = flows & _upstream(graph, [outputs[k] for k in with_cotangent])
        slots = tuple(Slot(roles.get(value), value in trained) for value in graph.inputs)
        key = _class_key(graph, slots, with_cotangent)
        if key not in classes:
            name = f"layer{len(classes)}"
            classes[key] = _differentiate(name, renumber(graph), slots, with_cotangent)
        layers.append(Layer(classes[key], graph.inputs, tuple(outputs)))
    return LayeredModel(traced, tuple(layers), tuple(classes.values()), random_ops)


def _random_values(traced: TracedModel, free: Sequence[Op]) -> set[Value]:
    """The results of free ops that the random key reaches."""
    sources = {v for v, source in traced.inputs.items() if source.role is Role.RANDOM}
    found: set[Value] = set()
    for op in free:
        if not (sources | found).isdisjoint(op.values):
            found.update(op.results)
    return found


def _read_later(clustering: Clustering, final: set[Value]) -> list[set[Value]]:
    """For each layer, the values that a later layer reads or that the model returns."""
    wanted, result = set(final), []
    for ops in reversed(clustering.layers):
        result.append(set(wanted))
        wanted |= used_values(ops)
    return list(reversed(result))


def _gradient_flow(traced: TracedModel) -> set[Value]:
    """The values that a parameter reaches and that reach the loss, through floating-point numbers."""
    graph = traced.graph
    params = (v for v, source in traced.inputs.items() if source.role is Role.PARAM)
    downstream = {value for value in params if _is_float(graph, value)}
    for op in graph.ops:
        if op.primitive is not prim.stop_gradient_p and not downstream.isdisjoint(op.values):
            downstream.update(value for value in op.results if _is_float(graph, value))
    return downstream & _upstream(graph, [traced.loss])


def _upstream(graph: Graph, wanted: Sequence[Value]) -> set[Value]:
    """The values whose gradients the wanted values can have, and those themselves."""
    upstream = set(wanted)
    for op in reversed(graph.ops):
        if op.primitive is not prim.stop_gradient_p and not upstream.isdisjoint(op.results):
            upstream.update(value for value in op.values if _is_float(graph, value))
    return upstream


def _is_float(graph: Graph, value: Value) -> bool:
    return jnp.issubdtype(graph.avals[value].dtype, jnp.floating)


def _class_key(graph: Graph, slots: Sequence[Slot], with_cotangent: Sequence[int]) -> Hashable:
    dense = renumber(graph)
    ops = tuple(
        (op_signature(op), op.values, tuple(isinstance(o, Literal) for o in op.operands))
        for op in dense.ops
    )
    constants = tuple(id(array) for array in graph.constants.values())
    return ops, tuple(slots), tuple(with_cotangent), dense.outputs, constants


def _differentiate(
    name: str, forward: Graph, slots: tuple[Slot, ...], with_cotangent: tuple[int, ...]
) -> LayerClass:
    differentiable = [i for i, slot in enumerate(slots) if slot.differentiable]
    num_outputs = len(forward.outputs)

    def joint(inputs, cotangents):
        def run(chosen):
            arguments = list(inputs)
            for i, value in zip(differentiable, chosen, strict=True):
                arguments[i] = value
            outputs = evaluate(forward, arguments)
            return [outputs[k] for k in with_cotangent], outputs

        _, pull_back, outputs = jax.vjp(run, [inputs[i] for i in differentiable], has_aux=True)
        return outputs, pull_back(cotangents)[0]

    def abstract(value: Value) -> jax.ShapeDtypeStruct:
        aval = forward.avals[value]
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)

    closed = jax.make_jaxpr(joint)(
        [abstract(v) for v in forward.inputs],
        [abstract(forward.outputs[k]) for k in with_cotangent],
    )
    # With barriers, or a program of both passes would find what `jax.checkpoint` wants to be recomputed.
    flat = from_jaxpr(closed, inline=CALLS | CUSTOM_CALLS, barriers=True)
    graph = renumber(eliminate_dead_code(turn_products(flat)))
    forward_ops, backward_ops, residuals = _split(graph, num_outputs)
    gradients = zip(differentiable, graph.outputs[num_outputs:], strict=True)
    handed_on = [gradient for i, gradient in gradients if slots[i].role is None]
    input_ops = live_ops(backward_ops, handed_on)
    in_first_half = set(map(id, input_ops))
    return LayerClass(
        name=name,
        slots=slots,
        forward=forward,
        joint=graph,
        num_outputs=num_outputs,
        cotangent_outputs=with_cotangent,
        forward_ops=forward_ops,
        input_ops=input_ops,
        weight_ops=tuple(op for op in backward_ops if id(op) not in in_first_half),
        residuals=residuals,
    )


def _split(
    joint: Graph, num_outputs: int
) -> tuple[tuple[Op, ...], tuple[Op, ...], tuple[Value, ...]]:
    """Split a joint graph into forward ops, backward ops, and the residuals between them.

    What the outputs need is forward. What only the gradients need is backward if it depends on a
    cotangent, and also if it is cheap: recomputing it there keeps fewer bytes.
    """
    forward = live_ops(joint.ops, joint.outputs[:num_outputs])
    in_forward = {result for op in forward for result in op.results}
    needed = [op for op in joint.ops if in_forward.isdisjoint(op.results)]
    cheap = _cheap_ops(joint, forward)
    backward = live_ops((*cheap, *needed), joint.outputs[num_outputs:])
    available = {*joint.inputs, *(result for op in backward for result in op.results)}
    read = used_values(backward) | {
        o for o in joint.outputs[num_outputs:] if not isinstance(o, Literal)
    }
    residuals = tuple(sorted(value for value in read if value not in available))
    return forward, backward, residuals


def _cheap_ops(joint: Graph, forward: Sequence[Op]) -> list[Op]:
    """Forward ops that the backward pass recomputes.

    Those that depend on no input (masks), and those that stretch or widen a smaller value.
    """
    constant: set[Value] = set()
    cheap = []
    for op in forward:
        if constant.issuperset(op.values):
            constant.update(op.results)
            cheap.append(op)
        elif str(op.primitive) in ("broadcast_in_dim", "convert_element_type"):
            read = sum(aval_bytes(joint.avals[value]) for value in op.values)
            if read < sum(aval_bytes(joint.avals[value]) for value in op.results):
                cheap.append(op)
    return cheap
