"""One stage's compiled programs: forward, backward, synchronize, update, on the stage's own devices.

The emitter's functions run inside `jax.shard_map` over the stage's mesh; everything is compiled ahead of
the first step, for the shardings that the plan gives. Gradients are summed over microbatches unreduced
where the plan says so and brought together once, in `synchronize`. The update's ops are sharded between the
places where parameters, optimizer state and gradients lie.

Parameters are keyed by path, values that cross stages by their number in the traced model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launcher.autopar.emit import StageEmitter
from launcher.autopar.param_costs import optimizer_spec
from launcher.autopar.run_sharded import run
from launcher.autopar.shard_as_given import shard_as_given
from launcher.autopar.sharded_graph import ShardedGraph
from launcher.autopar.shards import reshard_local, unpack
from launcher.autopar.spec import (
    REPLICATED,
    Spec,
    local_shape,
    partial_axes,
    replicated,
    to_partition_spec,
)
from launcher.autopar.trace import Role
from launcher.models.optimizer import Optimizer

Arrays = dict


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """The executables of a stage; `reduce_tied` is there where it reads another stage's parameters."""

    forward: jax.stages.Compiled
    backward: jax.stages.Compiled
    synchronize: jax.stages.Compiled
    update: jax.stages.Compiled
    zeros: jax.stages.Compiled
    reduce_tied: jax.stages.Compiled | None


class StagePrograms:
    """Builds and compiles the programs of one stage.

    Args:
        emitter: the stage's local functions.
        devices: the stage's devices, in row-major order of its mesh.
        owned: paths of the parameters that this stage updates; it only reads the others.
        tied: paths of owned parameters whose gradients other stages contribute to, with how many do.
        num_norms: how many stages contribute to the global gradient norm.
    """

    def __init__(
        self, emitter: StageEmitter, devices: Sequence[jax.Device], optimizer: Optimizer, *,
        owned: frozenset[str], tied: Mapping[str, int], num_norms: int, settings,
    ):  # fmt: skip
        self.emitter, self.layout, self.optimizer = emitter, emitter.layout, optimizer
        self.settings = settings
        self.logical = emitter.mesh
        self.mesh = Mesh(
            np.array(devices, dtype=object).reshape(self.logical.shape), self.logical.axis_names
        )
        self.owned, self.tied, self.num_norms = owned, tied, num_norms
        self.avals = _avals(emitter)

    @property
    def whole(self) -> NamedSharding:
        """Every device of the stage holds the whole array."""
        return NamedSharding(self.mesh, PartitionSpec())

    def sharding(self, spec: Spec, rank: int) -> NamedSharding:
        return NamedSharding(self.mesh, to_partition_spec(spec, rank, self.logical.axis_names))

    def param_sharding(self, path: str) -> NamedSharding:
        return self.sharding(self.layout.params[path], self.avals.params[path].ndim)

    def gradient_spec(self, path: str) -> Spec:
        """Where the summed gradient lies: with ZeRO-2 and 3, where the optimizer state does."""
        home = self.layout.params[path]
        if self.settings.zero < 2:
            return home
        return self.state_spec(path)

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

    def compile(self) -> Compiled:
        """Compile all programs of the stage."""
        return Compiled(
            forward=self.compile_forward(),
            backward=self.compile_backward(),
            synchronize=self.compile_synchronize(),
            update=self.compile_update(),
            zeros=self._compile_zeros(),
            reduce_tied=self._compile_reduce_tied(),
        )

    # Signatures: what each name of the layout looks like from outside.

    def _abstract(self, aval, spec: Spec) -> jax.ShapeDtypeStruct:
        leading = tuple(self.logical.shape[axis] for axis in partial_axes(spec))
        shape = (*leading, *aval.shape)
        return jax.ShapeDtypeStruct(
            shape, aval.dtype, sharding=self.sharding(spec, len(aval.shape))
        )

    def _specs(self, specs: Mapping, avals: Mapping) -> dict:
        names = self.logical.axis_names
        return {k: to_partition_spec(s, len(avals[k].shape), names) for k, s in specs.items()}

    def _abstracts(self, specs: Mapping, avals: Mapping) -> dict:
        return {k: self._abstract(avals[k], spec) for k, spec in specs.items()}

    def _key(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=self.whole)

    def _shard_map(self, function, in_specs, out_specs, **jit_options):
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return jax.jit(mapped, **jit_options)

    def compile_forward(self) -> jax.stages.Compiled:
        layout, avals = self.layout, self.avals
        inputs = (
            (layout.params, avals.params), (layout.state, avals.state), (layout.batch, avals.batch),
        )  # fmt: skip
        imports = (layout.imports, avals.values)
        new_state = {path: layout.state[path] for path in layout.new_state}
        in_specs = (*(self._specs(*i) for i in inputs), PartitionSpec(), self._specs(*imports))
        out_specs = (
            self._specs(layout.exports, avals.values),
            self._specs(new_state, avals.state),
            self._specs(layout.kept, avals.kept),
        )
        function = self._shard_map(self.emitter.forward, in_specs, out_specs)
        arguments = [self._abstracts(*i) for i in inputs]
        return function.lower(*arguments, self._key(), self._abstracts(*imports)).compile()

    def compile_backward(self) -> jax.stages.Compiled:
        layout, avals = self.layout, self.avals
        before = ((layout.params, avals.params), (layout.batch, avals.batch))
        after = (
            (layout.imports, avals.values), (layout.kept, avals.kept),
            (layout.cotangents, avals.values), (layout.accumulators, avals.params),
        )  # fmt: skip
        in_specs = (
            *(self._specs(*i) for i in before), PartitionSpec(), *(self._specs(*i) for i in after),
        )  # fmt: skip
        out_specs = (
            self._specs(layout.accumulators, avals.params),
            self._specs(layout.returns, avals.values),
        )
        function = self._shard_map(self.emitter.backward, in_specs, out_specs, donate_argnums=6)
        arguments = [
            *(self._abstracts(*i) for i in before), self._key(), *(self._abstracts(*i) for i in after),
        ]  # fmt: skip
        return function.lower(*arguments).compile()

    def _compile_zeros(self) -> jax.stages.Compiled:
        shapes = self._abstracts(self.layout.accumulators, self.avals.params)
        shardings = {path: shape.sharding for path, shape in shapes.items()}

        def zeros():
            return {path: jnp.zeros(s.shape, s.dtype) for path, s in shapes.items()}

        return jax.jit(zeros, out_shardings=shardings).lower().compile()

    def gradient_sharding(self, path: str) -> NamedSharding:
        return self.sharding(self.gradient_spec(path), self.avals.params[path].ndim)

    def _accumulators(self, *, owned: bool) -> dict[str, Spec]:
        specs = self.layout.accumulators
        return {path: spec for path, spec in specs.items() if (path in self.owned) == owned}

    def compile_synchronize(self) -> jax.stages.Compiled:
        """(accumulators, gradients received) -> (gradients, squared norm), of owned parameters."""
        params, accumulators = self.avals.params, self._accumulators(owned=True)
        targets = {path: self.gradient_spec(path) for path in sorted(self.owned)}
        received = {path: targets[path] for path in self.tied}
        function = self._shard_map(
            partial(self._synchronize, accumulators, targets),
            (
                self._specs(accumulators, params),
                {
                    path: [spec] * self.tied[path]
                    for path, spec in self._specs(received, params).items()
                },
            ),
            (self._specs(targets, params), PartitionSpec()),
        )
        return function.lower(
            self._abstracts(accumulators, params),
            {path: [a] * self.tied[path] for path, a in self._abstracts(received, params).items()},
        ).compile()

    def _synchronize(self, accumulators, targets, sums, received):
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
        aval, ledger = self.avals.params[path], self.emitter.ledger
        return reshard_local(shard, aval, source, target, self.logical, ledger)

    def _compile_reduce_tied(self) -> jax.stages.Compiled | None:
        """Accumulators of parameters that another stage owns -> their sums, to be sent there."""
        accumulators = self._accumulators(owned=False)
        if not accumulators:
            return None
        targets = {path: self.layout.params[path] for path in accumulators}

        def reduce(sums):
            return {p: self._reduced(p, a, accumulators[p], targets[p]) for p, a in sums.items()}

        params = self.avals.params
        specs = (self._specs(accumulators, params),), self._specs(targets, params)
        function = self._shard_map(reduce, *specs)
        return function.lower(self._abstracts(accumulators, params)).compile()

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
        """(parameters, optimizer state, gradients, squared norms) -> (parameters, state, norm)."""
        arguments, sharded = self.sharded_update
        structure = jax.tree.structure((*arguments[:2], arguments[3][0]))

        def update(*local):
            return jax.tree.unflatten(structure, run(sharded, jax.tree.leaves(local)))

        in_specs = jax.tree.map(lambda leaf: leaf.sharding.spec, arguments)
        out_specs = (*in_specs[:2], PartitionSpec())
        function = self._shard_map(update, in_specs, out_specs, donate_argnums=(0, 1))
        return function.lower(*arguments).compile()

    @cached_property
    def sharded_update(self) -> tuple[tuple, ShardedGraph]:
        """The update's abstract arguments, and its ops sharded between where they lie."""
        owned, whole = sorted(self.owned), replicated(self.logical.num_axes)
        avals = {path: self.avals.params[path] for path in owned}
        homes = {path: self.layout.params[path] for path in owned}
        reduced = {path: self.gradient_spec(path) for path in owned}
        state = self.abstract_optimizer_state()
        norm = jax.ShapeDtypeStruct((), self.norm_dtype, sharding=self.whole)
        norms = [norm] * self.num_norms
        arguments = (self._abstracts(homes, avals), state, self._abstracts(reduced, avals), norms)
        kept = [*homes.values(), *self.optimizer_specs(state)]
        given = [*kept, *reduced.values(), *[whole] * self.num_norms]
        function = partial(apply_update, self.optimizer)
        sharded = shard_as_given(function, arguments, given, [*kept, whole], self.logical)
        return arguments, sharded

    def abstract_optimizer_state(self):
        """Shapes and shardings of the optimizer state of the owned parameters."""
        params = {path: self.avals.params[path] for path in sorted(self.owned)}
        shapes = jax.eval_shape(
            self.optimizer.transform.init,
            {p: jax.ShapeDtypeStruct(a.shape, a.dtype) for p, a in params.items()},
        )
        leaves, structure = jax.tree.flatten(shapes)
        placed = map(self._abstract, leaves, self.optimizer_specs(shapes))
        return jax.tree.unflatten(structure, placed)

    def init_optimizer(self, params: Arrays):
        """The optimizer's first state, made where it will lie."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_optimizer_state())
        return jax.jit(self.optimizer.transform.init, out_shardings=shardings)(params)


def apply_update(optimizer: Optimizer, params: Arrays, state, gradients: Arrays, squares):
    """One optimizer step, clipped by the norm over all stages."""
    norm = jnp.sqrt(sum(squares[1:], start=squares[0]))
    if optimizer.clip_norm is not None:
        scale = jnp.minimum(1.0, optimizer.clip_norm / (norm + 1e-12))
        gradients = {p: g * scale.astype(g.dtype) for p, g in gradients.items()}
    updates, state = optimizer.transform.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, norm


@dataclass(frozen=True, slots=True, eq=False)
class StageAvals:
    """Shapes and dtypes of everything the layout names."""

    params: dict
    state: dict
    batch: dict
    values: dict
    kept: dict


def _avals(emitter: StageEmitter) -> StageAvals:
    model, layout = emitter.model, emitter.layout
    traced = model.traced
    of_path = {
        (source.role, source.path): traced.graph.avals[value]
        for value, source in traced.inputs.items()
    }

    def by_path(role) -> dict:
        return {path: aval for (r, path), aval in of_path.items() if r is role}

    crossing = (*layout.imports, *layout.exports, *layout.cotangents, *layout.returns)
    return StageAvals(
        params=by_path(Role.PARAM),
        state=by_path(Role.STATE),
        batch=by_path(Role.BATCH),
        values={value: traced.graph.avals[value] for value in crossing},
        kept={
            (index, value): model.layers[index].cls.joint.avals[value]
            for index, value in layout.kept
        },
    )
