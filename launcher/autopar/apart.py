"""Keeping XLA's CPU backend from running the layers of a backward pass into each other.

Recomputing a layer saves memory only if it waits for the layer's turn: what it reads was kept, and is there
from the start. A barrier ties it to the incoming gradients (`ShardedValues.hold_back`), as `jax.checkpoint`
does, and GPUs heed it. The CPU backend drops barriers before it puts ops in order, first come, first served,
and so computes all layers again, or gathers all their weights, at once. There each layer is a call of its
own, which begins when its operands are there, and whose buffers end with it.
"""

from collections.abc import Callable

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def call_apart(function: Callable):
    """Run a function as a call that XLA does not inline; what it closes over are operands."""
    with set_xla_metadata(inlineable="false"):
        return jax.jit(function)()
