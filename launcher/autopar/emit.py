"""Solved stage -> functions on local shards: what was priced is what is written.

`StageEmitter.forward` and `.backward` are plain functions of local shards, to be run inside
`jax.shard_map` over the stage's mesh. They walk the stage's layers, compute every op by the strategy it
was given, and insert the resharding steps that the planner priced; XLA is left no choice of its own.
"""

from collections import defaultdict
from collections.abc import Mapping

import jax

from launcher.autopar.graph import Value, evaluate_op
from launcher.autopar.intra_op import IntraOpPlanner, StageSharding
from launcher.autopar.layers import Layer, LayerClass
from launcher.autopar.rules import Strategy
from launcher.autopar.shards import Ledger, ShardedValues, pack, reshard_local, unpack
from launcher.autopar.spec import Spec
from launcher.autopar.stage_layout import StageLayout
from launcher.autopar.stage_problem import BACKWARD_COPY, FORWARD_COPY
from launcher.autopar.trace import Role

Arrays = Mapping


class StageEmitter:
    """The local functions of one stage."""

    def __init__(self, planner: IntraOpPlanner, sharding: StageSharding, layout: StageLayout):
        self.model, self.layout = planner.model, layout
        self.mesh = sharding.settings.mesh
        self.ledger = Ledger()
        self.picks = sharding.picks
        self.aliases = planner.wiring(layout.first, layout.last).aliases
        self.producer = {
            value: (i, k)
            for i in range(layout.first, layout.last)
            for k, value in enumerate(self.model.layers[i].outputs)
        }
        self.strategies: dict[str, dict[tuple[Value, ...], Strategy]] = {
            cls.name: {
                op.results: self.picks["op", cls.name, index]
                for index, op in enumerate(cls.joint.ops)
            }
            for cls in {layer.cls for layer in self.model.layers[layout.first : layout.last]}
        }

    def forward(self, params: Arrays, state: Arrays, batch: Arrays, key_data, imports: Arrays):
        """One microbatch forward.

        Returns (exports, new state, kept values), keyed as in the layout.
        """
        inputs = _StageInputs(self, params, state, batch, key_data, imports)
        values = {}
        for index in range(self.layout.first, self.layout.last):
            values[index] = self._start(index, inputs, values)
            cls = self.model.layers[index].cls
            values[index].run(cls.forward_ops, self.strategies[cls.name])
        exports = {v: self._output(values, v, spec) for v, spec in self.layout.exports.items()}
        new_state = {
            path: self._output(values, value, self.layout.state[path])
            for path, value in self.layout.new_state.items()
        }
        kept = {
            (index, value): pack(values[index].get(value, spec), spec)
            for (index, value), spec in self.layout.kept.items()
        }
        return exports, new_state, kept

    def backward(
        self, params: Arrays, batch: Arrays, key_data, imports: Arrays, kept: Arrays,
        cotangents: Arrays, accumulators: Arrays,
    ):  # fmt: skip
        """One microbatch backward.

        Returns (accumulators with the microbatch's gradients added, gradients of the imports).
        """
        inputs = _StageInputs(self, params, {}, batch, key_data, imports)
        sums = {p: unpack(a, self.layout.accumulators[p]) for p, a in accumulators.items()}
        values = self._recomputed(inputs, kept) if self.layout.recompute == "full" else {}
        incoming = _Cotangents(cotangents)
        returned: dict[Value, jax.Array] = {}
        for index in reversed(range(self.layout.first, self.layout.last)):
            layer = self.model.layers[index]
            if index not in values:
                values[index] = self._resumed(index, inputs, kept)
            values[index].via = self._copies(layer.cls, BACKWARD_COPY)
            self._put_cotangents(layer, values[index], incoming)
            values[index].run(layer.cls.backward_ops, self.strategies[layer.cls.name])
            self._collect(layer, values[index], sums, incoming, returned)
        packed = {p: pack(a, self.layout.accumulators[p]) for p, a in sums.items()}
        return packed, returned

    def _output(self, values: Mapping[int, ShardedValues], value: Value, spec: Spec) -> jax.Array:
        index, output = self.producer[value]
        cls = self.model.layers[index].cls
        return _read(values[index], cls.outputs[output], spec)

    def _values(self, cls: LayerClass, copies: str) -> ShardedValues:
        """A layer's values before any: its closed-over arrays."""
        own = ShardedValues(cls.joint.avals, self.mesh, self.ledger)
        own.via = self._copies(cls, copies)
        own.put_constants(cls.joint.constants)
        return own

    def _copies(self, cls: LayerClass, kind: str) -> dict[Value, Spec]:
        """Where the values of a layer are brought before they are read, forward or backward."""
        return {
            value: spec
            for (found, name, value), spec in self.picks.items()
            if found == kind and name == cls.name
        }

    def slot_spec(self, cls: LayerClass, slot: int) -> Spec:
        name, slot = self.aliases.get((cls.name, slot), (cls.name, slot))
        return self.picks["slot", name, slot]

    def _start(self, index: int, inputs: "_StageInputs", values) -> ShardedValues:
        """The values of a layer before its first op: constants and inputs."""
        layer = self.model.layers[index]
        own = self._values(layer.cls, FORWARD_COPY)
        for slot, traced_value in enumerate(layer.inputs):
            spec = self.slot_spec(layer.cls, slot)
            if traced_value in self.producer:
                shard = self._output(values, traced_value, spec)
            else:
                shard = inputs.read(layer.cls.slots[slot].role, traced_value, spec)
            own.put(layer.cls.joint.inputs[slot], spec, shard)
        return own

    def _resumed(self, index: int, inputs: "_StageInputs", kept: Arrays) -> ShardedValues:
        """The values of a layer before its backward ops, from what was kept."""
        layer = self.model.layers[index]
        own = self._values(layer.cls, FORWARD_COPY)
        for slot, traced_value in enumerate(layer.inputs):
            role, spec = layer.cls.slots[slot].role, self.slot_spec(layer.cls, slot)
            value = layer.cls.joint.inputs[slot]
            if traced_value not in self.producer and role is not Role.STATE:
                own.put(value, spec, inputs.read(role, traced_value, spec))
        for (owner, value), spec in self.layout.kept.items():
            if owner == index:
                own.put(value, spec, unpack(kept[owner, value], spec))
        if self.layout.recompute == "layer":
            own.run(layer.cls.recomputed_ops(), self.strategies[layer.cls.name])
        return own

    def _recomputed(self, inputs: "_StageInputs", kept: Arrays) -> dict[int, ShardedValues]:
        """The whole forward pass again."""
        inputs.state = {
            self.model.traced.inputs[self.model.layers[i].inputs[slot]].path: kept[i, value]
            for (i, value) in self.layout.kept
            for slot in [self.model.layers[i].cls.joint.inputs.index(value)]
        }
        values: dict[int, ShardedValues] = {}
        for index in range(self.layout.first, self.layout.last):
            values[index] = self._start(index, inputs, values)
            layer = self.model.layers[index]
            later = self.model.layers[index + 1 : self.layout.last]
            read = {value for other in later for value in other.inputs}
            pairs = zip(layer.outputs, layer.cls.outputs, strict=True)
            needed = layer.cls.recomputed_ops([inner for value, inner in pairs if value in read])
            values[index].run(needed, self.strategies[layer.cls.name])
        return values

    def _put_cotangents(self, layer: Layer, own: ShardedValues, incoming: "_Cotangents") -> None:
        for output, value in layer.cls.cotangents.items():
            spec = self.picks["cotangent", layer.cls.name, output]
            total = incoming.total(layer.outputs[output], spec)
            own.put(value, spec, own.zeros(value, spec) if total is None else total)

    def _collect(self, layer: Layer, own: ShardedValues, sums, incoming, returned) -> None:
        """Hand on the gradients of a layer's inputs: to an accumulator, an earlier layer, or out."""
        for slot, value in layer.cls.gradients.items():
            traced_value = layer.inputs[slot]
            if layer.cls.slots[slot].role is Role.PARAM:
                path = self.model.traced.inputs[traced_value].path
                spec = self.layout.accumulators.get(path)
                if spec is not None and isinstance(value, Value):
                    sums[path] = sums[path] + _read(own, value, spec)
            elif traced_value in self.producer:
                if isinstance(value, Value):
                    incoming.add(traced_value, own, value)
            elif traced_value in self.layout.returns:
                shard = _read(own, value, self.layout.returns[traced_value])
                known = returned.get(traced_value)
                returned[traced_value] = shard if known is None else known + shard


def _read(values: ShardedValues, value, spec: Spec) -> jax.Array:
    """A value's shard; what JAX knew at trace time is a literal."""
    return values.get(value, spec) if isinstance(value, Value) else jax.numpy.asarray(value.val)


class _StageInputs:
    """The stage's inputs, as its layers ask for them."""

    def __init__(self, emitter: StageEmitter, params, state, batch, key_data, imports):
        self.emitter = emitter
        self.state = state
        self._params, self._batch, self._imports = params, batch, imports
        self._keys = _derive_keys(emitter, key_data)

    def read(self, role: Role | None, value: Value, spec: Spec) -> jax.Array:
        traced, layout = self.emitter.model.traced, self.emitter.layout
        match role:
            case Role.RANDOM | Role.CONSTANT:
                return self._keys[value]
            case Role.PARAM:
                return self._params[traced.inputs[value].path]
            case Role.STATE:
                return self.state[traced.inputs[value].path]
            case Role.BATCH:
                path = traced.inputs[value].path
                shard, source = self._batch[path], layout.batch[path]
            case None:
                shard, source = self._imports[value], layout.imports[value]
        aval, emitter = traced.graph.avals[value], self.emitter
        return reshard_local(shard, aval, source, spec, emitter.mesh, emitter.ledger)


def _derive_keys(emitter: StageEmitter, key_data) -> dict[Value, jax.Array]:
    """The random keys of all layers, from the microbatch's key; every device computes them whole."""
    traced = emitter.model.traced
    values: dict[Value, jax.Array] = {
        v: jax.numpy.asarray(a) for v, a in traced.graph.constants.items()
    }
    values |= {v: key_data for v, i in traced.inputs.items() if i.role is Role.RANDOM}
    for op in emitter.model.random_ops:
        operands = [values[o] if isinstance(o, Value) else o.val for o in op.operands]
        values |= dict(zip(op.results, evaluate_op(op, operands), strict=True))
    return values


class _Cotangents:
    """Gradients on their way to the layer outputs they belong to, summed in the order they come."""

    def __init__(self, external: Arrays):
        self._external = external
        self._internal: dict[Value, list[tuple[ShardedValues, Value]]] = defaultdict(list)

    def add(self, traced_value: Value, values: ShardedValues, gradient: Value) -> None:
        self._internal[traced_value].append((values, gradient))

    def total(self, traced_value: Value, spec: Spec) -> jax.Array | None:
        parts = [values.get(gradient, spec) for values, gradient in self._internal[traced_value]]
        if traced_value in self._external:
            parts.append(self._external[traced_value])
        return sum(parts[1:], start=parts[0]) if parts else None
