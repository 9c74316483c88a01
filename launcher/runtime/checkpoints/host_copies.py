"""Copies of device arrays on the host: whole, or what this process has of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np


def to_host(arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Copy whole arrays to the host, each shard once; returns when the devices are free to overwrite."""
    shards = _first_replicas(arrays)
    return {name: _assembled(arrays[name], parts) for name, parts in shards.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of an array; `start` is its first index, None where it is the whole array."""

    name: str
    start: tuple[int, ...] | None
    whole_shape: tuple[int, ...]
    data: np.ndarray


def own_pieces(arrays: Mapping[str, jax.Array]) -> list[Piece]:
    """Copy what this process has of arrays that several hold together, every entry in one process only."""
    found = []
    for name, parts in _first_replicas(arrays).items():
        array = arrays[name]
        if array.is_fully_addressable or any(part.data.shape == array.shape for part in parts):
            found.append(Piece(name, None, array.shape, _assembled(array, parts)))
        else:
            found += [Piece(name, _start(part), array.shape, np.array(part.data)) for part in parts]
    return found


def on_host_device(arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Arrays of jax in the host's memory; on an accelerator where jax is given no CPU."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    return jax.device_put(dict(arrays), device)


def _first_replicas(arrays: Mapping[str, jax.Array]) -> dict[str, list]:
    """The shards here that are the first of their replicas, on their way to the host."""
    shards = {
        name: [shard for shard in array.addressable_shards if shard.replica_id == 0]
        for name, array in arrays.items()
    }
    for parts in shards.values():
        for shard in parts:
            shard.data.copy_to_host_async()
    return shards


def _assembled(array: jax.Array, shards: Sequence) -> np.ndarray:
    whole = np.empty(array.shape, array.dtype)
    for shard in shards:
        whole[shard.index] = np.asarray(shard.data)
    return whole


def _start(shard) -> tuple[int, ...]:
    return tuple(block.start or 0 for block in shard.index)
