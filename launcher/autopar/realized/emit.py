"""Solved stage -> functions on local shards: what was priced is what is written.

`StageEmitter.forward` and `.backward`, or `.backward_input` and `.backward_weight` in its place, are plain
functions of local shards, to be run inside `jax.shard_map` over the stage's mesh. They walk the stage's
layers, compute every op by the strategy it was given, and insert the resharding steps that the planner
priced; XLA is left no choice of its own.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from types import SimpleNamespace

import jax

from launcher.autopar.graphs.graph import Value, used_values
from launcher.autopar.graphs.layers import LayerClass
from launcher.autopar.graphs.trace import Role
from launcher.autopar.intra_op.intra_op import IntraOpPlanner, StageSharding
from launcher.autopar.intra_op.split_layout import (
    ANY_SHARD,
    Source,
    SpecsOnly,
    SplitLayout,
    WeightKept,
    split_layout,
)
from launcher.autopar.intra_op.stage_inputs import Cotangents, StageInputs, merge
from launcher.autopar.intra_op.stage_layout import StageLayout, read_later
from launcher.autopar.intra_op.stage_problem import BACKWARD_COPY, FORWARD_COPY
from launcher.autopar.realized.apart import Turns
from launcher.autopar.sharding.rules import Strategy
from launcher.autopar.sharding.shards import Ledger, ShardedValues, pack, unpack
from launcher.autopar.sharding.spec import Spec

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
        self._new_values = ShardedValues
        # See `apart`; whoever knows the devices sets them: for backward and for forward passes.
        self.calls_layers = self.calls_forward = False

    def turns(self) -> Turns:
        """The turns of a program that begins."""
        return Turns(self.ledger.of_program())

    # The programs; those that are part of another one are given its turns.

    def forward(
        self, params: Arrays, state: Arrays, batch: Arrays, key_data, imports: Arrays,
        turns: Turns | None = None,
    ):  # fmt: skip
        """One microbatch forward.

        Returns (exports, new state, kept values), keyed as in the layout.
        """
        turns = turns or self.turns()
        inputs = self._inputs(params, state, batch, key_data, imports, turns)
        values = {}
        for index in range(self.layout.first, self.layout.last):
            run = partial(self._run_forward, index, inputs, values)
            values[index] = self._run_apart(index, run, turns) if self.calls_forward else run()
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
        cotangents: Arrays, accumulators: Arrays, turns: Turns | None = None,
    ):  # fmt: skip
        """One microbatch backward.

        Returns (accumulators with the microbatch's gradients added, gradients of the imports).
        """
        turns = turns or self.turns()
        inputs = self._inputs(params, self._kept_state(kept), batch, key_data, imports, turns)
        sums = self._unpacked(accumulators)
        returned: dict[Value, jax.Array] = {}
        values = self._recomputed(inputs) if self.layout.recompute == "full" else {}
        incoming = Cotangents(cotangents)
        for index in self._backwards():
            own = values[index] if index in values else self._resumed(index, inputs, kept)
            both = partial(self._both_halves, index, own, self._totals(index, incoming), sums)
            handed_on, out, changed = self.apart(both, turns)
            merge(handed_on, out, incoming, returned)
            sums |= changed
        return self._packed(sums), returned

    def backward_input(
        self, params: Arrays, batch: Arrays, key_data, imports: Arrays, kept: Arrays,
        cotangents: Arrays,
    ):  # fmt: skip
        """The first half of `backward`, and what it recomputes.

        Returns (what the second half reads of it, keyed as in `split`; gradients of the imports).
        """
        turns, returned = self.turns(), {}
        inputs = self._inputs(params, self._kept_state(kept), batch, key_data, imports, turns)
        weight_kept: dict[WeightKept, jax.Array] = {}
        values = self._recomputed(inputs) if self.layout.recompute == "full" else {}
        incoming = Cotangents(cotangents)
        for index in self._backwards():
            own = values[index] if index in values else self._resumed(index, inputs, kept)
            half = partial(self._input_half, index, own, self._totals(index, incoming))
            handed_on, out, left = self.apart(half, turns)
            merge(handed_on, out, incoming, returned)
            weight_kept |= left
        return weight_kept, returned

    def backward_weight(
        self, params: Arrays, batch: Arrays, key_data, imports: Arrays, kept: Arrays,
        weight_kept: Arrays, accumulators: Arrays, turns: Turns,
    ):  # fmt: skip
        """The second half of `backward`. Of its inputs it reads no more than `split` says.

        Returns the accumulators with the microbatch's gradients added.
        """
        sums = self._unpacked(accumulators)
        inputs = self._inputs(params, {}, batch, key_data, imports, turns)
        for index in self._backwards():
            own = self._between(index, inputs, kept, weight_kept)
            sums |= self.apart(partial(self._added, index, own, sums), turns)
        return self._packed(sums)

    # What goes in and out

    def _inputs(
        self, params: Arrays, state: Arrays, batch: Arrays, key_data, imports: Arrays, turns: Turns
    ) -> StageInputs:
        return StageInputs(
            self.model, self.layout, self.mesh, turns.ledger,
            params=params, state=state, batch=batch, key_data=key_data, imports=imports,
        )  # fmt: skip

    def _kept_state(self, kept: Arrays) -> Arrays:
        """The state that the microbatch saw, for running all of its forward pass again."""
        if self.layout.recompute != "full":
            return {}
        return {
            self.model.traced.inputs[self.model.layers[i].inputs[slot]].path: kept[i, value]
            for (i, value) in self.layout.kept
            for slot in [self.model.layers[i].cls.joint.inputs.index(value)]
        }

    def _unpacked(self, accumulators: Arrays) -> dict[str, jax.Array]:
        return {p: unpack(a, self.layout.accumulators[p]) for p, a in accumulators.items()}

    def _packed(self, sums: Arrays) -> dict[str, jax.Array]:
        return {p: pack(a, self.layout.accumulators[p]) for p, a in sums.items()}

    def _output(self, values: Mapping[int, ShardedValues], value: Value, spec: Spec) -> jax.Array:
        index, output = self.producer[value]
        cls = self.model.layers[index].cls
        return values[index].output(cls.outputs[output], spec)

    # The values of a layer

    def _values(self, cls: LayerClass, copies: str, ledger: Ledger) -> ShardedValues:
        """A layer's values before any: its closed-over arrays."""
        own = self._new_values(cls.joint.avals, self.mesh, ledger)
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

    def _start(self, index: int, inputs: StageInputs, values) -> ShardedValues:
        """The values of a layer before its first op: constants and inputs."""
        layer = self.model.layers[index]
        own = self._values(layer.cls, FORWARD_COPY, inputs.ledger)
        for slot, traced_value in enumerate(layer.inputs):
            spec, value = self.slot_spec(layer.cls, slot), layer.cls.joint.inputs[slot]
            if traced_value in self.producer:
                own.put(value, spec, self._output(values, traced_value, spec))
            else:
                own.put_later(value, spec, partial(self._given, inputs, index, slot))
        return own

    def _run_forward(self, index: int, inputs: StageInputs, values) -> ShardedValues:
        own, cls = self._start(index, inputs, values), self.model.layers[index].cls
        own.run(cls.forward_ops, self.strategies[cls.name])
        return own

    def _run_apart(
        self, index: int, run: Callable[[], ShardedValues], turns: Turns
    ) -> ShardedValues:
        """The same as a call; what is read of it later is its result."""
        read = read_later(self.model, self.layout, index, self.slot_spec)
        found = self._values(self.model.layers[index].cls, FORWARD_COPY, turns.ledger)

        def shards():
            own = run()
            return {name: own.get(*name) for name in read}

        for name, shard in turns.call(shards).items():
            found.put_later(*name, partial(jax.numpy.asarray, shard))
        return found

    def _given(self, inputs: StageInputs, index: int, slot: int) -> jax.Array:
        """A layer's input that enters the stage."""
        layer = self.model.layers[index]
        role, spec = layer.cls.slots[slot].role, self.slot_spec(layer.cls, slot)
        return inputs.read(role, layer.inputs[slot], spec)

    def _resumed(self, index: int, inputs: StageInputs, kept: Arrays) -> ShardedValues:
        """The values of a layer before its backward ops, from what was kept."""
        layer = self.model.layers[index]
        own = self._values(layer.cls, FORWARD_COPY, inputs.ledger)
        for slot, traced_value in enumerate(layer.inputs):
            value, is_state = layer.cls.joint.inputs[slot], layer.cls.slots[slot].role is Role.STATE
            if traced_value not in self.producer and not is_state:
                spec = self.slot_spec(layer.cls, slot)
                own.put_later(value, spec, partial(self._given, inputs, index, slot))
        for (owner, value), spec in self.layout.kept.items():
            if owner == index:
                own.put_later(value, spec, partial(self._kept, kept, (owner, value)))
        return own

    def _run_again(self, cls: LayerClass, own: ShardedValues, totals: Mapping) -> dict:
        """The layer's forward ops again, once its cotangents are there, which are returned.

        Without that order the compiler may recompute all layers first, and hold what each of them keeps.
        """
        ops = cls.recomputed_ops()
        there = [output for output, total in totals.items() if total is not None]
        shards = own.hold_back(used_values(ops), [totals[output] for output in there])
        own.run(ops, self.strategies[cls.name])
        return {**totals, **dict(zip(there, shards, strict=True))}

    def _kept(self, kept: Arrays, name) -> jax.Array:
        return unpack(kept[name], self.layout.kept[name])

    def _recomputed(self, inputs: StageInputs) -> dict[int, ShardedValues]:
        """The whole forward pass again."""
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

    # The halves of the backward pass

    def apart(self, function: Callable, turns: Turns):
        """Run a layer's part of a program, or what ends one, as a call of its own where that is needed."""
        return turns.call(function) if self.calls_layers else function()

    def _backwards(self) -> Iterator[int]:
        return reversed(range(self.layout.first, self.layout.last))

    def _totals(self, index: int, incoming: Cotangents) -> dict[int, jax.Array | None]:
        """The cotangents of a layer's outputs, as far as any came."""
        layer = self.model.layers[index]
        return {output: incoming.total(layer.outputs[output]) for output in layer.cls.cotangents}

    def _both_halves(self, index: int, own: ShardedValues, totals: Mapping, sums: Arrays):
        """One layer's backward pass, which writes to nothing outside: what it hands on, what leaves the
        stage, and the accumulators that it added to."""
        handed_on, returned = self._first_half_of(index, own, totals)
        return handed_on, returned, self._added(index, own, sums)

    def _input_half(self, index: int, own: ShardedValues, totals: Mapping):
        """One layer's first half: what it hands on, what leaves the stage, what the second half reads."""
        handed_on, returned = self._first_half_of(index, own, totals)
        left = {
            (index, start.value, start.spec): pack(own.at_hand(start.value, start.spec), start.spec)
            for start in self.split.starts[index]
            if start.source is Source.FIRST_HALF
        }
        return handed_on, returned, left

    def _first_half_of(self, index: int, own: ShardedValues, totals: Mapping):
        """One layer's first half: the gradients for earlier layers, and those that leave the stage."""
        layer = self.model.layers[index]
        if self.layout.recompute == "layer":
            totals = self._run_again(layer.cls, own, totals)
        own.via = self._copies(layer.cls, BACKWARD_COPY)
        for output, value in layer.cls.cotangents.items():
            spec, total = self.picks["cotangent", layer.cls.name, output], totals[output]
            own.put(value, spec, own.zeros(value, spec) if total is None else total)
        own.run(layer.cls.input_ops, self.strategies[layer.cls.name])
        handed_on: dict[Value, list] = defaultdict(list)
        returned: dict[Value, list] = defaultdict(list)
        for slot, value in layer.cls.gradients.items():
            traced_value = layer.inputs[slot]
            if layer.cls.slots[slot].role is Role.PARAM:
                continue
            if traced_value in self.producer:
                spec = self._cotangent_spec(traced_value)
                if isinstance(value, Value) and spec is not None:
                    handed_on[traced_value].append(own.get(value, spec))
            elif traced_value in self.layout.returns:
                spec = self.layout.returns[traced_value]
                returned[traced_value].append(own.output(value, spec))
        return dict(handed_on), dict(returned)

    def _cotangent_spec(self, traced_value: Value) -> Spec | None:
        index, output = self.producer[traced_value]
        return self.picks.get(("cotangent", self.model.layers[index].cls.name, output))

    def _added(self, index: int, own: ShardedValues, sums: Arrays) -> dict[str, jax.Array]:
        """Make the gradients of a layer's parameters; the sums with them added, where there are any."""
        layer, added = self.model.layers[index], {}
        own.run(layer.cls.weight_ops, self.strategies[layer.cls.name])
        for slot, value in layer.cls.gradients.items():
            if layer.cls.slots[slot].role is Role.PARAM:
                path = self.model.traced.inputs[layer.inputs[slot]].path
                spec = self.layout.accumulators.get(path)
                if spec is not None and isinstance(value, Value):
                    added[path] = added.get(path, sums[path]) + own.get(value, spec)
        return added

    def _between(self, index: int, inputs: StageInputs, kept: Arrays, weight_kept: Arrays):
        """The values of a layer between the halves, as the first one left them."""
        cls = self.model.layers[index].cls
        own = self._new_values(cls.joint.avals, self.mesh, inputs.ledger)
        copied = self.split.copied[index]
        own.via = {v: s for v, s in self._copies(cls, BACKWARD_COPY).items() if v not in copied}
        for start in self.split.starts[index]:
            value, spec = start.value, start.spec
            match start.source:
                case Source.KEPT:
                    make = partial(self._kept, kept, (index, value))
                case Source.INPUT:
                    make = partial(self._given, inputs, index, cls.joint.inputs.index(value))
                case Source.CONSTANT:
                    make = partial(jax.numpy.asarray, cls.joint.constants[value])
                case Source.ZEROS:
                    make = partial(own.zeros, value, spec)
                case Source.FIRST_HALF:
                    make = partial(unpack, weight_kept[index, value, spec], spec)
            own.put_later(value, spec, make)
        return own

    @cached_property
    def split(self) -> SplitLayout:
        """What the first half leaves for the second, found by going through both with specs alone."""
        walk = copy.copy(self)
        walk._new_values = SpecsOnly
        kept = dict.fromkeys(self.layout.kept, ANY_SHARD)
        cotangents = dict.fromkeys(self.layout.cotangents, ANY_SHARD)
        sums = dict.fromkeys(self.layout.accumulators, ANY_SHARD)
        inputs = SimpleNamespace(ledger=Ledger())  # of which no shard is asked for
        values = walk._recomputed(inputs) if self.layout.recompute == "full" else {}
        incoming = Cotangents(cotangents)
        found: dict[int, SpecsOnly] = {}
        for index in self._backwards():
            own = values[index] if index in values else walk._resumed(index, inputs, kept)
            handed_on, out = walk._first_half_of(index, own, walk._totals(index, incoming))
            merge(handed_on, out, incoming, {})
            own.begin_second_half()
            walk._added(index, own, sums)
            found[index] = own
        return split_layout(self.model, self.layout, found)
