"""Keeping XLA's CPU backend from running the layers of a program into each other.

Recomputing a layer saves memory only if it waits for the layer's turn: what it reads was kept, and is there
from the start. A barrier ties it to the incoming gradients (`ShardedValues.hold_back`), as `jax.checkpoint`
does, and GPUs heed it. The CPU backend drops barriers before it puts ops in order, first come, first served,
and so computes all layers again, or gathers all their weights, at once. There each layer is a call of its
own, which begins when its operands are there, and whose buffers end with it.

A program's collectives start in one order on all devices, which is what matches those of one device with
those of another: they all have one channel in a `jax.shard_map`. But the CPU backend takes a call for started
once it is entered, and starts what comes after beside it. So a program that has calls has all its collectives
in them, or before them, and the calls take turns: each reads a number that the one before made, and one of
its results cannot be had without that number. In the program's data the order holds for whoever runs it;
executables from the compilation cache, for one, start things in another order than those just compiled.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from launcher.autopar.sharding.shards import Ledger


class Turns:
    """The calls of one program, one after the other, after the collectives written before them.

    Attributes:
        ledger: of this program alone, where its collectives are taken down.
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self._turn: jax.Array | None = None

    def call(self, function: Callable):
        """Run a function as a call that XLA does not inline; what it closes over are operands."""

        def in_turn(turn: jax.Array):
            return turn + 1, _read_by(turn, function())

        turn = jnp.zeros((), jnp.int32) if self._turn is None else self._turn
        with set_xla_metadata(inlineable="false"):
            for result in self.ledger.take_results():
                # By a call as well: XLA would put all these reads into one op, before which all results lie.
                turn += jax.jit(_any_element)(result) if result.size else 0
            self._turn, made = jax.jit(in_turn)(turn)
        self.ledger.take_results()  # whoever waits for the call waits for them
        return made


def _read_by(turn: jax.Array, made):
    """The same arrays, of which one cannot be had without the turn, whatever a compiler leaves out."""
    leaves, structure = jax.tree.flatten(made)
    sizes = {leaf.size: index for index, leaf in enumerate(leaves) if leaf.size}
    if sizes:
        least = sizes[min(sizes)]
        leaves[least] = _with_first(leaves[least], turn)
    return jax.tree.unflatten(structure, leaves)


def _with_first(array: jax.Array, turn: jax.Array) -> jax.Array:
    """The same array, its first element by way of the turn, written in place: a copy would take memory."""
    origin = (0,) * array.ndim
    first = lax.slice(array, origin, (1,) * array.ndim)
    return lax.dynamic_update_slice(
        array, jnp.where(turn < 0, jnp.zeros_like(first), first), origin
    )


def _any_element(array: jax.Array) -> jax.Array:
    """0 or 1, by a number that is there when the array is; which one does not matter."""
    return jnp.clip(array[(0,) * array.ndim].astype(jnp.int32), 0, 1)
