"""The arrays of a checkpoint on disk: the only module that knows Orbax.

Each array is an entry of its own under its name, whole: shards of a plan leave no trace. Arrays without
entries are left out, since Orbax has no place for them; whoever reads knows their shapes. What one of several
hosts writes is a safetensors file instead. Nothing that is read here can execute code.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from launcher.runtime.checkpoints.weights import read_tensors, write_weights

TENSORS_NAME = "arrays.safetensors"

Arrays = Mapping[str, np.ndarray]

# It tells of things that are as they should be.
logging.getLogger("absl").setLevel(logging.ERROR)


def write_arrays(folder: Path, arrays: Arrays) -> None:
    """Write arrays into a folder that is not there yet."""
    import orbax.checkpoint as ocp

    present = {name: array for name, array in arrays.items() if array.size}
    with _checkpointer() as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(present))


def write_own_arrays(folder: Path, arrays: Arrays) -> None:
    """Write what one host has of a checkpoint, as one safetensors file.

    In a world of `jax.distributed` Orbax lets only the first process write arrays of numpy.
    """
    folder.mkdir()
    write_weights(folder / TENSORS_NAME, arrays, {})


def read_arrays(folder: Path, shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> Arrays:
    """Read the arrays of these names, of all that are there; one without entries may be made anew."""
    if (folder / TENSORS_NAME).exists():
        found = read_tensors(folder / TENSORS_NAME)
        return {name: found[name] for name in shapes}
    import orbax.checkpoint as ocp

    present = [name for name, (_, shape) in shapes.items() if 0 not in shape]
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    wanted = ocp.args.PyTreeRestore(
        item=dict.fromkeys(present, 0), restore_args=dict.fromkeys(present, as_numpy)
    )
    with _checkpointer() as checkpointer:
        read = checkpointer.restore(folder.absolute(), args=wanted)
    empty = {n: np.zeros(shape, dtype) for n, (dtype, shape) in shapes.items() if 0 in shape}
    return {name: np.asarray(array) for name, array in read.items()} | empty


def _checkpointer():
    """One that acts alone, also where this process shares a world of `jax.distributed` with others.

    Otherwise it would synchronise with them, by collectives in the midst of those of the steps.
    """
    import orbax.checkpoint as ocp

    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def checksum(array: np.ndarray) -> str:
    """Of the entries of an array, in the order of its dims."""
    contiguous = np.ascontiguousarray(array)
    return hashlib.blake2b(contiguous.view(np.uint8).reshape(-1), digest_size=16).hexdigest()
