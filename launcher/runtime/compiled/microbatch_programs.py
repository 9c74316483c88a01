"""The programs that a stage runs once per microbatch: forward, backward, the halves of a split backward
pass, and forward and backward in one; those that complete gradients also with what ends the microbatches.

What the forward pass keeps comes as a tuple of dicts, by when it goes (`KeptGroups`); whoever runs the
programs passes them on with a star, and lets go of all but the last after the first half. Accumulators are
donated, and so are the kept values of whose shape and sharding the backward pass makes something. Nothing
else is: imports, leaves of the batch and cotangents may have other readers.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import jax
from jax import lax

from launcher.autopar.intra_op.split_layout import SplitLayout
from launcher.autopar.intra_op.stage_layout import Kept
from launcher.autopar.realized.apart import Turns
from launcher.runtime.compiled.stage_signature import StageSignature

Arrays = dict


@dataclass(frozen=True, slots=True)
class KeptGroups:
    """The kept values by when they go.

    Attributes:
        donated: they become a result of the backward pass, or of its first half.
        released: they are read for the last time there.
        remaining: the second half reads them, if there is one.
    """

    donated: tuple[Kept, ...]
    released: tuple[Kept, ...]
    remaining: tuple[Kept, ...]

    def of(self, kept: Mapping) -> tuple[Arrays, Arrays, Arrays]:
        """Kept values, or anything that is keyed alike, in their groups."""
        groups = self.donated, self.released, self.remaining
        return tuple({name: kept[name] for name in group} for group in groups)


@dataclass(frozen=True, slots=True, eq=False)
class Ending:
    """What a program does with the sums of gradients behind its backward pass.

    Attributes:
        sums: the accumulators that go in, abstractly: those that become results, and then perhaps others.
        received: what else goes in behind them, perhaps nothing.
        made: what comes out in their place.
        run: (accumulators, *received, turns) -> made, on one device's shards.
    """

    sums: tuple[Arrays, ...]
    received: tuple[Arrays, ...]
    made: object
    run: Callable

    @property
    def inputs(self) -> tuple[Arrays, ...]:
        return (*self.sums, *self.received)

    def grouped(self, accumulators: Arrays) -> tuple[Arrays, ...]:
        """Accumulators as they go in."""
        return tuple({path: accumulators[path] for path in group} for group in self.sums)

    def ended(self, summands: Sequence[Arrays], add: Callable, turns: Turns):
        """Let `add` add to the accumulators, and go on from there.

        Args:
            summands: the arguments that `inputs` describes.
            add: accumulators -> the sums of gradients, and anything else.
        """
        count = len(self.sums)
        sums, *others = add(_together(summands[:count]))
        return (self.run(sums, *summands[count:], turns), *others)


class MicrobatchPrograms:
    """Builds and compiles them.

    Args:
        split: whether the backward pass runs in two halves.
        gathers: whether parameters are gathered for every use (ZeRO-3).
    """

    def __init__(self, signature: StageSignature, *, split: bool, gathers: bool):
        self.signature, self.emitter = signature, signature.emitter
        self._recomputes = gathers or signature.layout.recompute != "none"
        self.emitter.calls_layers = signature.devices[0].platform == "cpu"
        # Or it gathers the parameters of all layers before the first one, or makes all at once what the
        # model itself wants to have piece by piece.
        layers = self.emitter.model.layers[signature.layout.first : signature.layout.last]
        has_pieces = any(layer.cls.recomputes for layer in layers)
        self.emitter.calls_forward = self.emitter.calls_layers and (gathers or has_pieces)
        self.is_split = split
        self._abstract = _Exchanged(signature)
        self.groups = self._grouped()

    @property
    def split(self) -> SplitLayout:
        """What passes between the halves."""
        return self.emitter.split

    def compile_forward(self) -> jax.stages.Compiled:
        """(params, state, batch, key, imports) -> (exports, new state, kept groups)"""

        def forward(*arguments):
            exports, new_state, kept = self.emitter.forward(*arguments)
            return exports, new_state, self.groups.of(kept)

        abstract = self._abstract
        inputs = (abstract.params, abstract.state, abstract.batch, abstract.key, abstract.imports)
        return self._compile(forward, inputs, (abstract.exports, abstract.new_state, self._kept))

    @cached_property
    def _passing(self) -> Ending:
        """Accumulators go on as they are."""
        sums = self._abstract.accumulators
        return Ending((sums,), (), sums, lambda accumulators, turns: accumulators)

    def compile_backward(self, ending: Ending | None = None) -> jax.stages.Compiled:
        """(params, batch, key, imports, *kept groups, cotangents, *what the ending takes)
        -> (what it makes, returns)"""
        ending = ending or self._passing

        def backward(params, batch, key, imports, *rest):
            kept, cotangents, turns = _together(rest[:3]), rest[3], self.emitter.turns()
            add = partial(
                self.emitter.backward, params, batch, key, imports, kept, cotangents, turns=turns
            )
            return ending.ended(rest[4:], add, turns)

        abstract = self._abstract
        inputs = (
            abstract.params, abstract.batch, abstract.key, abstract.imports, *self._kept, abstract.cotangents,
            *ending.inputs,
        )  # fmt: skip
        return self._compile(backward, inputs, (ending.made, abstract.returns), donated=(4, 8))

    def compile_backward_input(self) -> jax.stages.Compiled:
        """(params, batch, key, imports, *kept groups, cotangents) -> (kept for weights, returns)"""

        def backward_input(params, batch, key, imports, *rest):
            *groups, cotangents = rest
            return self.emitter.backward_input(
                params, batch, key, imports, _together(groups), cotangents
            )

        abstract = self._abstract
        inputs = (
            abstract.params, abstract.batch, abstract.key, abstract.imports, *self._kept, abstract.cotangents,
        )  # fmt: skip
        return self._compile(
            backward_input, inputs, (self._weight_kept, abstract.returns), donated=(4,)
        )

    def compile_backward_weight(self, ending: Ending | None = None) -> jax.stages.Compiled:
        """(params, batch, key, imports, remaining, kept for weights, *what the ending takes)
        -> what it makes

        Of the batch and the imports it takes those that `split` names.
        """
        ending = ending or self._passing

        def backward_weight(*arguments):
            turns = self.emitter.turns()

            def add(accumulators):
                return (self.emitter.backward_weight(*arguments[:6], accumulators, turns),)

            (made,) = ending.ended(arguments[6:], add, turns)
            return made

        abstract, still = self._abstract, self.split
        *_, remaining = self._kept
        inputs = (
            abstract.params,
            {name: leaf for name, leaf in abstract.batch.items() if name in still.batch},
            abstract.key,
            {value: leaf for value, leaf in abstract.imports.items() if value in still.imports},
            remaining, self._weight_kept, *ending.inputs,
        )  # fmt: skip
        return self._compile(backward_weight, inputs, ending.made, donated=(6,))

    def forward_backward(
        self, params: Arrays, state: Arrays, batch: Arrays, key, imports: Arrays, cotangents: Arrays,
        accumulators: Arrays, turns: Turns | None = None,
    ):  # fmt: skip
        """Both passes of a microbatch, on one device's shards, inside `jax.shard_map`."""
        turns = turns or self.emitter.turns()
        exports, new_state, kept = self.emitter.forward(params, state, batch, key, imports, turns)
        if self._recomputes:
            # Or XLA finds in the forward pass what the backward pass is to compute, or gather, again.
            again = (params, batch, key, imports, kept)
            params, batch, key, imports, kept = lax.optimization_barrier(again)
        accumulators, returns = self.emitter.backward(
            params, batch, key, imports, kept, cotangents, accumulators, turns
        )
        return exports, new_state, accumulators, returns

    def compile_forward_backward(self, ending: Ending | None = None) -> jax.stages.Compiled:
        """(params, state, batch, key, imports, cotangents, *what the ending takes)
        -> as `forward_backward`, with what it makes in place of the accumulators."""
        ending = ending or self._passing

        def both(*arguments):
            turns = self.emitter.turns()

            def add(accumulators):
                made = self.forward_backward(*arguments[:6], accumulators, turns)
                exports, new_state, sums, returns = made
                return sums, exports, new_state, returns

            summed, exports, new_state, returns = ending.ended(arguments[6:], add, turns)
            return exports, new_state, summed, returns

        abstract = self._abstract
        inputs = (
            abstract.params, abstract.state, abstract.batch, abstract.key, abstract.imports,
            abstract.cotangents, *ending.inputs,
        )  # fmt: skip
        outputs = (abstract.exports, abstract.new_state, ending.made, abstract.returns)
        return self._compile(both, inputs, outputs, donated=(6,))

    @property
    def _kept(self) -> tuple[Arrays, Arrays, Arrays]:
        return self.groups.of(self._abstract.kept)

    @property
    def _weight_kept(self) -> Arrays:
        classes = [layer.cls for layer in self.emitter.model.layers]
        return {
            (index, value, spec): self.signature.abstract(classes[index].joint.avals[value], spec)
            for index, value, spec in self.split.weight_kept
        }

    def _grouped(self) -> KeptGroups:
        """Donate as many kept values as there are results like them."""
        abstract = self._abstract
        made = [*abstract.returns.values(), *(self._weight_kept.values() if self.is_split else ())]
        free = Counter(map(_likeness, made))
        for leaf in abstract.accumulators.values():  # they are donated to themselves
            free.pop(_likeness(leaf), None)
        donated, released, remaining = [], [], []
        for name, leaf in abstract.kept.items():
            like = _likeness(leaf)
            if self.is_split and name in self.split.kept:
                remaining.append(name)
            elif free[like]:
                free[like] -= 1
                donated.append(name)
            else:
                released.append(name)
        return KeptGroups(tuple(donated), tuple(released), tuple(remaining))

    def _compile(self, function: Callable, inputs, outputs, donated=()) -> jax.stages.Compiled:
        in_specs, out_specs = (
            jax.tree.map(lambda leaf: leaf.sharding.spec, tree) for tree in (inputs, outputs)
        )
        mapped = self.signature.shard_map(function, in_specs, out_specs, donate_argnums=donated)
        return mapped.lower(*inputs).compile()


class _Exchanged:
    """Everything that the programs exchange, abstractly."""

    def __init__(self, signature: StageSignature):
        layout, avals, of = signature.layout, signature.avals, signature.abstracts
        self.params = of(layout.params, avals.params)
        self.state = of(layout.state, avals.state)
        self.new_state = {path: self.state[path] for path in layout.new_state}
        self.batch = of(layout.batch, avals.batch)
        self.key = signature.abstract_key()
        self.imports = of(layout.imports, avals.values)
        self.exports = of(layout.exports, avals.values)
        self.kept = of(layout.kept, avals.kept)
        self.cotangents = of(layout.cotangents, avals.values)
        self.returns = of(layout.returns, avals.values)
        self.accumulators = of(layout.accumulators, avals.params)


def _likeness(leaf: jax.ShapeDtypeStruct):
    """Equal for arrays that can take each other's place on a device."""
    return leaf.shape, leaf.dtype, leaf.sharding.spec


def _together(groups: Iterable[Mapping]) -> Arrays:
    return {name: array for group in groups for name, array in group.items()}
