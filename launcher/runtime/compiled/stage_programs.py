"""One stage's compiled programs: those of a microbatch, synchronize, update, on the stage's own devices.

The emitter's functions run inside `jax.shard_map` over the stage's mesh; everything is compiled ahead of
the first step, for the shardings that the plan gives. Gradients are summed over microbatches unreduced
where the plan says so and brought together once, in `synchronize`. The update's ops are sharded between the
places where parameters, optimizer state and gradients lie.

Parameters are keyed by path, values that cross stages by their number in the traced model.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from launcher.autopar.realized.emit import StageEmitter
from launcher.autopar.sharding.param_costs import gradient_spec, optimizer_spec
from launcher.autopar.sharding.shards import reshard_local, unpack
from launcher.autopar.sharding.spec import (
    REPLICATED,
    Spec,
    local_shape,
    partial_axes,
    replicated,
)
from launcher.autopar.whole_graph.run_sharded import run
from launcher.autopar.whole_graph.shard_as_given import shard_as_given
from launcher.autopar.whole_graph.sharded_graph import ShardedGraph
from launcher.models.optimizer import Optimizer
from launcher.runtime.compiled.microbatch_programs import Ending, MicrobatchPrograms
from launcher.runtime.compiled.stage_signature import StageSignature
from launcher.runtime.compiled.update import (
    UpdateInputs,
    UpdateResult,
    apply_update,
    first_loss_scale,
    like_result,
)

Arrays = dict


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """The executables of a stage, as far as its instructions need them.

    `forward_backward` is for both of a microbatch at once; `backward_input` and `backward_weight` are the
    halves of a split backward pass; `reduce_tied` is there where another stage's parameters are read. Where
    a stage overlaps, `synchronize` is part of the last of them.
    """

    zeros: jax.stages.Compiled
    update: jax.stages.Compiled
    synchronize: jax.stages.Compiled | None = None
    forward: jax.stages.Compiled | None = None
    backward: jax.stages.Compiled | None = None
    backward_input: jax.stages.Compiled | None = None
    backward_weight: jax.stages.Compiled | None = None
    forward_backward: jax.stages.Compiled | None = None
    backward_synchronize: jax.stages.Compiled | None = None
    backward_weight_synchronize: jax.stages.Compiled | None = None
    forward_backward_synchronize: jax.stages.Compiled | None = None
    reduce_tied: jax.stages.Compiled | None = None


class StagePrograms(StageSignature):
    """Builds and compiles the programs of one stage.

    Args:
        emitter: the stage's local functions.
        devices: the stage's devices, in row-major order of its mesh.
        owned: paths of the parameters that this stage updates; it only reads the others.
        tied: paths of owned parameters whose gradients other stages contribute to, with how many do.
        num_norms: how many stages contribute to the global gradient norm.
        split: whether the backward pass runs in two halves.
    """

    def __init__(
        self, emitter: StageEmitter, devices: Sequence[jax.Device], optimizer: Optimizer, *,
        owned: frozenset[str], tied: Mapping[str, int], num_norms: int, settings,
        split: bool = False,
    ):  # fmt: skip
        super().__init__(emitter, devices)
        self.optimizer, self.settings = optimizer, settings
        self.owned, self.tied, self.num_norms = owned, tied, num_norms
        self.owned_paths = tuple(sorted(owned))
        self.microbatch = MicrobatchPrograms(self, split=split, gathers=settings.zero == 3)

    @property
    def summed(self) -> tuple[str, ...]:
        """The parameters that the stage updates and has gradients of its own for."""
        return tuple(self._accumulators(owned=True))

    def gradient_spec(self, path: str) -> Spec:
        home, aval = self.layout.params[path], self.avals.params[path]
        return gradient_spec(home, aval.shape, self.logical, self.settings.zero)

    def state_spec(self, path: str) -> Spec:
        home, aval = self.layout.params[path], self.avals.params[path]
        return optimizer_spec(home, aval.shape, self.logical, self.settings.zero)

    def optimizer_specs(self, state) -> list[Spec]:
        """Where an optimizer state's leaves lie: like their parameter, split further by ZeRO."""
        return [
            self._optimizer_spec(path, leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        ]

    def _optimizer_spec(self, key_path, leaf) -> Spec:
        keys = (k.key for k in reversed(key_path) if isinstance(k, jax.tree_util.DictKey))
        path = next(keys, None)
        aval = self.avals.params.get(path)
        if aval is None or aval.shape != leaf.shape:
            return replicated(self.logical.num_axes)
        return self.state_spec(path)

    def compilations(self, names: Collection[str]) -> dict[str, Callable[[], jax.stages.Compiled]]:
        """How to compile the fields of `Compiled` that are named, and those that are needed anyway."""
        programs = self.microbatch
        known = {
            "zeros": self._compile_zeros,
            "forward": programs.compile_forward,
            "backward_input": programs.compile_backward_input,
            "synchronize": self._compile_synchronize,
            "update": self.compile_update,
        }
        for name, compile_ in (
            ("backward", programs.compile_backward),
            ("backward_weight", programs.compile_backward_weight),
            ("forward_backward", programs.compile_forward_backward),
        ):
            known[name] = compile_
            known[f"{name}_synchronize"] = partial(compile_, self.ending)
        found = {name: known[name] for name in names}
        if self._accumulators(owned=False):
            found["reduce_tied"] = self._compile_reduce_tied
        return found

    def local_zeros(self) -> Arrays:
        """The accumulators of one device before the first microbatch."""
        zeros, sizes = {}, self.logical.shape
        for path, spec in self.layout.accumulators.items():
            aval = self.avals.params[path]
            leading = (1,) * len(partial_axes(spec))
            zeros[path] = jnp.zeros((*leading, *local_shape(spec, aval.shape, sizes)), aval.dtype)
        return zeros

    def _compile_zeros(self) -> jax.stages.Compiled:
        shapes = self.abstracts(self.layout.accumulators, self.avals.params)
        shardings = {path: shape.sharding for path, shape in shapes.items()}

        def zeros():
            return {path: jnp.zeros(s.shape, s.dtype) for path, s in shapes.items()}

        return jax.jit(zeros, out_shardings=shardings).lower().compile()

    def _accumulators(self, *, owned: bool) -> dict[str, Spec]:
        specs = self.layout.accumulators
        return {path: spec for path, spec in specs.items() if (path in self.owned) == owned}

    @cached_property
    def ending(self) -> Ending:
        """`synchronize` behind the last backward pass, in its program."""
        params, specs, own = (
            self.avals.params,
            self.layout.accumulators,
            self._accumulators(owned=True),
        )
        lent = self._accumulators(owned=False)
        gradients = {path: self.gradient_spec(path) for path in self.owned_paths}
        # Sums that lie as the gradients do become those; what is lent leaves as it came.
        alike = {p: spec for p, spec in specs.items() if p in lent or spec == gradients[p]}
        others = {path: spec for path, spec in own.items() if path not in alike}
        received = self.abstracts({path: gradients[path] for path in self.tied}, params)

        def run(sums, parts, turns):
            end = partial(self.synchronize_shards, sums, parts)
            made = self.emitter.apart(end, turns)
            return {path: sums[path] for path in lent}, *made

        return Ending(
            sums=(self.abstracts(alike, params), self.abstracts(others, params)),
            received=({path: [aval] * self.tied[path] for path, aval in received.items()},),
            made=(
                self.abstracts(lent, params), self.abstracts(gradients, params),
                self._whole_like(jnp.zeros((), self.norm_dtype)),
            ),
            run=run,
        )  # fmt: skip

    def _compile_synchronize(self) -> jax.stages.Compiled:
        """(accumulators, gradients received) -> (gradients, squared norm), of owned parameters."""
        params, accumulators = self.avals.params, self._accumulators(owned=True)
        targets = {path: self.gradient_spec(path) for path in self.owned_paths}
        received = {path: targets[path] for path in self.tied}
        function = self.shard_map(
            self.synchronize_shards,
            (
                self.partition_specs(accumulators, params),
                {
                    path: [spec] * self.tied[path]
                    for path, spec in self.partition_specs(received, params).items()
                },
            ),
            (self.partition_specs(targets, params), PartitionSpec()),
        )
        return function.lower(
            self.abstracts(accumulators, params),
            {path: [a] * self.tied[path] for path, a in self.abstracts(received, params).items()},
        ).compile()

    def synchronize_shards(self, sums: Arrays, received: Mapping[str, Sequence[jax.Array]]):
        """What `_compile_synchronize` compiles, on one device's shards, inside `jax.shard_map`."""
        accumulators = self._accumulators(owned=True)
        targets = {path: self.gradient_spec(path) for path in self.owned_paths}
        gradients, squares = {}, []
        for path, target in targets.items():
            if path in sums:
                gradient = self._reduced(path, sums[path], accumulators[path], target)
            else:  # no layer of this stage has a gradient for it
                aval = self.avals.params[path]
                gradient = jnp.zeros(
                    local_shape(target, aval.shape, self.logical.shape), aval.dtype
                )
            for part in received.get(path, ()):
                gradient = gradient + part
            gradients[path] = gradient
            squares.append(self._square(gradient, target))
        total = sum(squares, start=jnp.zeros((), self.norm_dtype))
        return gradients, lax.psum(total, self.logical.axis_names)

    def _reduced(self, path: str, packed: jax.Array, source: Spec, target: Spec) -> jax.Array:
        shard = unpack(packed, source)
        aval, ledger = self.avals.params[path], self.emitter.ledger.of_program()
        return reshard_local(shard, aval, source, target, self.logical, ledger)

    def _compile_reduce_tied(self) -> jax.stages.Compiled:
        """Accumulators of parameters that another stage owns -> their sums, to be sent there."""
        accumulators = self._accumulators(owned=False)
        targets = {path: self.layout.params[path] for path in accumulators}

        def reduce(sums):
            return {p: self._reduced(p, a, accumulators[p], targets[p]) for p, a in sums.items()}

        params = self.avals.params
        specs = (self.partition_specs(accumulators, params),), self.partition_specs(targets, params)
        function = self.shard_map(reduce, *specs)
        return function.lower(self.abstracts(accumulators, params)).compile()

    @property
    def norm_dtype(self) -> jnp.dtype:
        """The same on all stages, whatever parameters they have."""
        return jnp.result_type(jnp.float32, *(a.dtype for a in self.avals.params.values()))

    def _square(self, gradient: jax.Array, spec: Spec) -> jax.Array:
        """This device's share of the squared norm; replicas count once."""
        replicas = math.prod(
            size
            for entry, size in zip(spec, self.logical.shape, strict=True)
            if entry == REPLICATED
        )
        wide = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
        return jnp.sum(wide * wide) / replicas

    def compile_update(self) -> jax.stages.Compiled:
        """The arguments of `UpdateInputs` -> `UpdateResult`, in place of parameters and optimizer state."""
        arguments, _ = self.sharded_update
        in_specs = jax.tree.map(lambda leaf: leaf.sharding.spec, arguments)

        def update(*local):
            return self.update_shards(UpdateInputs(*local))

        out_specs = like_result(in_specs)
        function = self.shard_map(update, tuple(in_specs), out_specs, donate_argnums=(0, 1))
        return function.lower(*arguments).compile()

    def update_shards(self, inputs: UpdateInputs) -> UpdateResult:
        """The update of one device's shards, inside `jax.shard_map`."""
        _, sharded = self.sharded_update
        structure = jax.tree.structure(like_result(inputs))
        return jax.tree.unflatten(structure, run(sharded, jax.tree.leaves(inputs)))

    @cached_property
    def sharded_update(self) -> tuple[UpdateInputs, ShardedGraph]:
        """The update's abstract arguments, and its ops sharded between where they lie."""
        owned, whole = sorted(self.owned), replicated(self.logical.num_axes)
        avals = {path: self.avals.params[path] for path in owned}
        homes = {path: self.layout.params[path] for path in owned}
        reduced = {path: self.gradient_spec(path) for path in owned}
        changed = {path: self.layout.state[path] for path in sorted(self.layout.new_state)}
        optimizer_state = self.abstract_optimizer_state()
        changing = self.abstracts(changed, self.avals.state)
        inputs = UpdateInputs(
            params=self.abstracts(homes, avals),
            optimizer_state=optimizer_state,
            gradients=self.abstracts(reduced, avals),
            squares=[self._whole_like(jnp.zeros((), self.norm_dtype))] * self.num_norms,
            loss_scale=jax.tree.map(
                self._whole_like, first_loss_scale(self.optimizer.loss_scaling)
            ),
            state_before=changing,
            state_after=changing,
        )
        kept = [*homes.values(), *self.optimizer_specs(optimizer_state)]
        scalars = [whole] * len(jax.tree.leaves(inputs.loss_scale))
        states = list(changed.values())
        given = [*kept, *reduced.values(), *[whole] * self.num_norms, *scalars, *states, *states]
        made = [*kept, *states, *scalars, whole]

        def update(*arguments):
            return apply_update(self.optimizer, UpdateInputs(*arguments))

        return inputs, shard_as_given(update, inputs, given, made, self.logical)

    def _whole_like(self, array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self.whole)

    def abstract_optimizer_state(self):
        """Shapes and shardings of the optimizer state of the owned parameters."""
        params = {path: self.avals.params[path] for path in sorted(self.owned)}
        shapes = jax.eval_shape(
            self.optimizer.transform.init,
            {p: jax.ShapeDtypeStruct(a.shape, a.dtype) for p, a in params.items()},
        )
        leaves, structure = jax.tree.flatten(shapes)
        placed = map(self.abstract, leaves, self.optimizer_specs(shapes))
        return jax.tree.unflatten(structure, placed)

    def init_optimizer(self, params: Arrays):
        """The optimizer's first state, made where it will lie."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_optimizer_state())
        return jax.jit(self.optimizer.transform.init, out_shardings=shardings)(params)
