"""The arrays of a checkpoint on disk: the only module that knows Orbax.

Each array is an entry of its own under its name, whole: shards of a plan leave no trace. Arrays without
entries are left out, since Orbax has no place for them; whoever reads knows their shapes. Nothing that is
read here can execute code.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

Arrays = Mapping[str, np.ndarray]

# It tells of things that are as they should be.
logging.getLogger("absl").setLevel(logging.ERROR)


def write_arrays(folder: Path, arrays: Arrays) -> None:
    """Write arrays into a folder that is not there yet."""
    import orbax.checkpoint as ocp

    present = {name: array for name, array in arrays.items() if array.size}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(present))


def read_arrays(folder: Path, shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> Arrays:
    """Read the arrays of these names, of all that are there; an array without entries is made anew."""
    import orbax.checkpoint as ocp

    present = [name for name, (_, shape) in shapes.items() if 0 not in shape]
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    wanted = ocp.args.PyTreeRestore(
        item=dict.fromkeys(present, 0), restore_args=dict.fromkeys(present, as_numpy),
        partial_restore=True,
    )  # fmt: skip
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        read = checkpointer.restore(folder.absolute(), args=wanted)
    empty = {n: np.zeros(shape, dtype) for n, (dtype, shape) in shapes.items() if 0 in shape}
    return {name: np.asarray(array) for name, array in read.items()} | empty


def checksum(array: np.ndarray) -> str:
    """Of the entries of an array, in the order of its dims."""
    contiguous = np.ascontiguousarray(array)
    return hashlib.blake2b(contiguous.view(np.uint8).reshape(-1), digest_size=16).hexdigest()
