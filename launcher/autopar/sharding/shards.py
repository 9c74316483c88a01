"""Values on one device: local shards under several shardings, and the steps that turn one into another.

Everything here runs inside `jax.shard_map`. What `copies` lists, `ShardedValues.get` executes, once per
value and spec, however many ops read it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.graph import Op, Operand, Value
from launcher.autopar.sharding.collectives import Collective, describe, of_op, of_step
from launcher.autopar.sharding.copies import Copies
from launcher.autopar.sharding.reshard import Kind, Step, reshard
from launcher.autopar.sharding.rules import Strategy, run_local
from launcher.autopar.sharding.spec import Spec, local_shape, partial_axes, replicated


@dataclass(slots=True)
class Ledger:
    """The collectives of a program, taken down in the order in which they are written.

    A shard that is resharded again by the same step, in another layer that reads the same parameter, is
    marked as a repetition.
    """

    collectives: list[Collective] = field(default_factory=list)
    _results: list[jax.Array] = field(default_factory=list)
    _seen: dict[tuple[int, Step], jax.Array] = field(default_factory=dict)
    _originals: dict[int, jax.Array] = field(default_factory=dict)
    _held: list[jax.Array] = field(default_factory=list)

    def same(self, shard: jax.Array, original: jax.Array) -> None:
        """A shard is another one again, which the compiler may find out."""
        self._originals[id(shard)] = self._originals.get(id(original), original)
        self._held.append(shard)

    def moved(self, step: Step, shard: jax.Array, mesh: LogicalMesh, place: str) -> jax.Array:
        """Execute a resharding step of a shard, and take it down if it communicates."""
        result = apply_step(step, shard, mesh)
        if step.kind.communicates:
            original = self._originals.get(id(shard), shard)
            key = (id(original), step)
            repeats = key in self._seen
            self._seen[key] = original  # held, so that no other array gets its id
            self.collectives.append(of_step(step, shard.dtype, mesh, place, repeats=repeats))
            self._results.append(result)
        return result

    def computed(
        self, op: Op, strategy: Strategy, mesh: LogicalMesh, operands: Sequence
    ) -> Sequence:
        """Compute an op on local shards, and take down what it communicates by itself."""
        found = list(of_op(op, strategy, mesh))
        results = run_local(op, strategy, mesh, operands)
        self.collectives += found
        self._results += results if found else []
        return results

    def of_program(self) -> "Ledger":
        """A ledger for one more program, which are traced side by side: all write to the same list."""
        return Ledger(self.collectives)

    def take_results(self) -> list[jax.Array]:
        """What the collectives made since the last time that somebody asked."""
        taken, self._results = self._results, []
        return taken


def apply_step(step: Step, shard: jax.Array, mesh: LogicalMesh) -> jax.Array:
    """Execute one resharding step on a local shard."""
    name = mesh.axis_names[step.axis]
    source_dim, target_dim = step.source[step.axis], step.target[step.axis]
    match step.kind:
        case Kind.ALL_GATHER:
            return _gathered(shard, name, source_dim)
        case Kind.ALL_REDUCE:
            return lax.psum(shard, name)
        case Kind.REDUCE_SCATTER:
            return lax.psum_scatter(shard, name, scatter_dimension=target_dim, tiled=True)
        case Kind.ALL_TO_ALL:
            return lax.all_to_all(shard, name, target_dim, source_dim, tiled=True)
        case Kind.SLICE:
            size = shard.shape[target_dim] // mesh.shape[step.axis]
            return lax.dynamic_slice_in_dim(shard, lax.axis_index(name) * size, size, target_dim)
        case Kind.MASK:
            return jnp.where(lax.axis_index(name) == 0, shard, jnp.zeros_like(shard))


def _gathered(shard: jax.Array, name: str, dim: int) -> jax.Array:
    """The shards of an axis side by side along a dim.

    They are gathered one after the other and put in order then: to gather along an inner dim, XLA reorders
    all shards before as well, and holds these copies as long as the shards are there.
    """
    if dim == 0:
        return lax.all_gather(shard, name, axis=0, tiled=True)
    stacked = jnp.moveaxis(lax.all_gather(shard, name), 0, dim)
    return stacked.reshape(*shard.shape[:dim], -1, *shard.shape[dim + 1 :])


def reshard_local(
    shard: jax.Array,
    aval,
    source: Spec,
    target: Spec,
    mesh: LogicalMesh,
    ledger: Ledger | None = None,
) -> jax.Array:
    """Turn a local shard of one spec into that of another; `ledger` takes down the collectives."""
    ledger = ledger or Ledger()
    for step in reshard(aval.shape, aval.dtype.itemsize, source, target, mesh):
        shard = ledger.moved(step, shard, mesh, "input or gradient")
    return shard


def pack(shard: jax.Array, spec: Spec) -> jax.Array:
    """Give a partial shard a leading dim per partial axis, so that it can leave `shard_map`."""
    return shard.reshape((1,) * len(partial_axes(spec)) + shard.shape)


def unpack(shard: jax.Array, spec: Spec) -> jax.Array:
    """The inverse of `pack`."""
    return shard.reshape(shard.shape[len(partial_axes(spec)) :])


class ShardedValues:
    """The values of one graph on this device, each under the specs it was produced or asked for in.

    `via` says to which spec a value is brought before its readers are served; `ledger` takes down the
    collectives, in the order in which they are written.
    """

    def __init__(self, avals: Sequence[jax.core.ShapedArray], mesh: LogicalMesh, ledger: Ledger):
        self.avals, self.mesh = avals, mesh
        self.via: Mapping[Value, Spec] = {}
        self._ledger = ledger
        self._copies = Copies(avals, mesh)
        self._shards: dict[tuple[Value, Spec], jax.Array] = {}
        self._later: dict[tuple[Value, Spec], Callable[[], jax.Array]] = {}

    def put(self, value: Value, spec: Spec, shard: jax.Array) -> None:
        """Define a value by its shard under one spec."""
        self._copies.put(value, spec)
        self._shards[value, spec] = shard

    def put_later(self, value: Value, spec: Spec, make: Callable[[], jax.Array]) -> None:
        """Give a shard of a value that is made when it is first read, if it is; there may be several."""
        self._copies.put_more(value, spec)
        self._later[value, spec] = make

    def get(self, value: Value, spec: Spec, place: str = "output") -> jax.Array:
        """The shard of a value under a spec, resharding it on the first request."""
        for step in self._copies.steps(value, spec, self.via.get(value)):
            shard = self.at_hand(value, step.source)
            self._shards[value, step.target] = self._moved(step, shard, place)
        return self.at_hand(value, spec)

    def output(self, output: Operand, spec: Spec) -> jax.Array:
        """An output's shard; what JAX knew at trace time is a literal."""
        return self.get(output, spec) if isinstance(output, Value) else jnp.asarray(output.val)

    def at_hand(self, value: Value, spec: Spec) -> jax.Array:
        """A shard that is there, under a spec in which the value is held."""
        if (value, spec) not in self._shards:
            self._shards[value, spec] = self._later.pop((value, spec))()
        return self._shards[value, spec]

    def hold_back(self, values: Collection[Value], until: Sequence[jax.Array]) -> list[jax.Array]:
        """Let what is at hand of some values be read when other arrays are there; returns those."""
        names = [name for name in (*self._later, *self._shards) if name[0] in values]
        behind = lax.optimization_barrier((*(self.at_hand(*name) for name in names), *until))
        for name, shard in zip(names, behind, strict=False):
            self._ledger.same(shard, self._shards[name])
            self._shards[name] = shard
        return list(behind[len(names) :])

    def _moved(self, step: Step, shard: jax.Array, place: str) -> jax.Array:
        return self._ledger.moved(step, shard, self.mesh, place)

    def run(self, ops: Sequence[Op], strategies: dict[tuple[Value, ...], Strategy]) -> None:
        """Compute ops on local shards; `strategies` by the results of an op."""
        for op in ops:
            strategy = strategies[op.results]
            operands = [
                self.get(operand, strategy.operand_spec(i), describe(op))
                if isinstance(operand, Value)
                else operand.val
                for i, operand in enumerate(op.operands)
            ]
            results = self._computed(op, strategy, operands)
            for i, (value, shard) in enumerate(zip(op.results, results, strict=True)):
                self.put(value, strategy.result_spec(i), shard)

    def _computed(self, op: Op, strategy: Strategy, operands: Sequence) -> Sequence[jax.Array]:
        return self._ledger.computed(op, strategy, self.mesh, operands)

    def zeros(self, value: Value, spec: Spec) -> jax.Array:
        """A local shard of zeros for a value."""
        aval = self.avals[value]
        return jnp.zeros(local_shape(spec, aval.shape, self.mesh.shape), aval.dtype)

    def put_constants(self, constants: dict[Value, jax.Array]) -> None:
        """Define closed-over arrays, which every device holds whole."""
        for value, array in constants.items():
            self.put_later(value, replicated(self.mesh.num_axes), partial(jnp.asarray, array))
