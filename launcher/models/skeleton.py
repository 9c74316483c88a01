"""A Flax module as a pure function of flat dicts of arrays.

A Flax module carries its weights, its statistics and its random streams as attributes. `Skeleton`
is such a module without its arrays: weights and statistics come in as flat dicts from path to array
("blocks/0/attention/qkv/kernel"), random streams start anew in each call, and what the call left in
the statistics is handed back. So the loss depends on its arguments alone, and can be traced, cut
and sharded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from launcher.models.layers import Precision

Arrays = dict[str, Array]
Shapes = dict[str, jax.ShapeDtypeStruct]
Leaves = tuple[tuple[tuple[Any, ...], Any], ...]  # path and variable, in the order of Flax

# The generator whose key is two words, as the loss takes it, whatever JAX's default.
_GENERATOR = "threefry2x32"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Skeleton:
    """A Flax module without its arrays."""

    graph: nnx.GraphDef
    params: Leaves
    state: Leaves
    streams: Leaves
    precision: Precision
    # Whether weights and batches are cast to the compute dtype before the module sees them; our own
    # modules cast where they use them.
    casts: bool

    def call_loss(
        self, params: Arrays, state: Arrays, batch: Arrays, key_data: Array | None
    ) -> tuple[Any, Arrays]:
        """Return what the module's loss returns, and its state afterwards.

        The call is in training mode, with all randomness from `key_data`, or in evaluation mode
        where that is None.
        """
        module = self.assemble(params, state, key_data)
        if key_data is None:
            module.eval()
        else:
            module.train()
        result = module.loss({name: self._computed(array) for name, array in batch.items()})
        return result, self.take_apart(module)[1]

    def call_logits(self, params: Arrays, state: Arrays, tokens: Array) -> Array:
        """Return what the module's `logits` returns in evaluation mode."""
        module = self.assemble(params, state, None)
        module.eval()
        return module.logits(tokens)

    def assemble(self, params: Arrays, state: Arrays, key_data: Array | None) -> nnx.Module:
        """Put arrays into a new module; its random streams start from `key_data`."""
        leaves = _seeded(self.streams, key_data)
        for path, leaf in self.params:
            leaves.append((path, _filled(leaf, self._computed(params[_name(path)]))))
        for path, leaf in self.state:
            leaves.append((path, _filled(leaf, state[_name(path)])))
        return nnx.merge(self.graph, nnx.from_flat_state(leaves), copy=True)

    def hollow(self) -> nnx.Module:
        """Return the module with shapes in place of arrays."""
        leaves = [*self.params, *self.state, *self.streams]
        return nnx.merge(self.graph, nnx.from_flat_state(leaves), copy=True)

    def take_apart(self, module: nnx.Module) -> tuple[Arrays, Arrays]:
        """Return the weights and the state of a module, in the dtypes they are kept in."""
        _, params, _, state = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return self._kept(params), self._kept(state)

    def kept_shapes(self, leaves: Leaves) -> Shapes:
        """Return the shapes of weights or state, in the dtypes they are kept in."""
        shapes = {_name(path): _value(leaf) for path, leaf in leaves}
        return {
            name: jax.ShapeDtypeStruct(shape.shape, self._kept_dtype(shape.dtype))
            for name, shape in shapes.items()
        }

    def _kept(self, state: nnx.State) -> Arrays:
        arrays = {_name(path): _value(leaf) for path, leaf in nnx.to_flat_state(state)}
        return {name: array.astype(self._kept_dtype(array.dtype)) for name, array in arrays.items()}

    def _kept_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return self.precision.master if jnp.issubdtype(dtype, jnp.floating) else dtype

    def _computed(self, array: Array) -> Array:
        if self.casts and jnp.issubdtype(array.dtype, jnp.floating):
            return array.astype(self.precision.compute)
        return array


def make_skeleton(
    make_module: Callable[[nnx.Rngs], nnx.Module], *, precision: Precision, casts: bool
) -> Skeleton:
    """Trace what builds a module, without arrays."""
    graphs = []

    # The graph leaves the trace by the side: it holds no arrays. (`nnx.eval_shape` would return a
    # whole module, but loses arrays that are attributes without being variables.)
    def split() -> tuple[nnx.State, nnx.State, nnx.State]:
        graph, *states = nnx.split(make_module(nnx.Rngs(0)), nnx.Param, nnx.RngState, ...)
        graphs.append(graph)
        return tuple(states)

    params, streams, state = map(nnx.to_flat_state, jax.eval_shape(split))
    return Skeleton(
        graph=graphs[0],
        params=tuple(params),
        state=tuple(state),
        streams=tuple(streams),
        precision=precision,
        casts=casts,
    )


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _filled(leaf: Any, value: Array) -> Any:
    value = jnp.asarray(value)  # layers use methods that arrays of NumPy, from a file say, lack
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def _seeded(streams: Leaves, key_data: Array | None) -> list[tuple[tuple[Any, ...], Any]]:
    """Start every random stream anew, each from a key of its own."""
    if key_data is None:
        # A fixed key for a module that draws in evaluation too; constants, so that a module that
        # does not draw has no random equation in its trace.
        with jax.ensure_compile_time_eval():
            return _seeded(streams, np.zeros(2, np.uint32))
    if not streams:
        return []
    root = jax.random.wrap_key_data(key_data, impl=_GENERATOR)
    leaves = []
    for index, (path, leaf) in enumerate(streams):
        shape = leaf.get_value().shape
        if isinstance(leaf, nnx.RngKey):
            key = jax.random.fold_in(root, index)
            value = jax.random.split(key, shape) if shape else key
        else:
            # Not a tracer, with which Flax counts slowly; nor an array of NumPy, which it would
            # change in place.
            with jax.ensure_compile_time_eval():
                value = jnp.zeros(shape, jnp.uint32)
        leaves.append((path, leaf.replace(value)))
    return leaves
