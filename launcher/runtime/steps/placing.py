"""Host arrays to devices, also where some of a mesh's devices belong to other processes."""

import jax
import numpy as np
from jax.sharding import Sharding


def put(arrays, shardings):
    """Bring a tree of host arrays where a tree of shardings, or one for all, says; gives global arrays.

    Every process of a sharding has the whole host array, and makes the shards of its own devices.
    `jax.device_put` would compare the arrays of all processes by a collective, out of the order of the
    program's collectives.
    """
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, arrays)
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
        return jax.device_put(arrays, shardings)
    return jax.tree.map(_put_shards, arrays, shardings)


def _put_shards(array, sharding: Sharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
