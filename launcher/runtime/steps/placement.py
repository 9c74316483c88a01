"""A global batch on the devices, before the step that reads it.

Placing happens in the thread that makes the batches, one step ahead, so that a step finds its microbatches
and random keys where its stages want them. Keys are cut apart by one program per stage: thousands of tiny
copies would take longer than the step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from launcher.runtime.compiled.stage_programs import StagePrograms
from launcher.runtime.compiled.stage_signature import StageSignature
from launcher.runtime.steps.executor import Batch
from launcher.runtime.steps.loose_metrics import LooseMetrics, Scalars
from launcher.runtime.steps.placing import put


@dataclass(frozen=True, slots=True)
class StageInput:
    """What one stage reads from the host: per microbatch, its leaves of the batch and its random key."""

    batches: Sequence[dict[str, jax.Array]]
    keys: Sequence[jax.Array]


@dataclass(frozen=True, slots=True)
class PlacedBatch:
    """One step's input.

    Attributes:
        stages: by index, of the stages of this process.
        loose: per microbatch, the metrics that no stage computes.
    """

    step: int
    stages: Mapping[int, StageInput]
    loose: Sequence[Scalars]


@dataclass(frozen=True, slots=True)
class StackedBatch:
    """The input of a step that is one program: leaves and keys with a leading dim of microbatches."""

    step: int
    leaves: dict[str, jax.Array]
    keys: jax.Array
    loose: Sequence[Scalars]


def split_batch(batch: Batch, num_microbatches: int) -> list[dict[str, np.ndarray]]:
    """Cut a global batch into microbatches of consecutive samples."""
    parts = {name: np.split(array, num_microbatches) for name, array in batch.items()}
    return [{name: parts[name][k] for name in parts} for k in range(num_microbatches)]


def random_keys(seed: int, step: int, num_microbatches: int) -> np.ndarray:
    """The keys of a step's microbatches: the seed, and their numbers in the run."""
    numbers = step * num_microbatches + np.arange(num_microbatches)
    return np.stack([np.full_like(numbers, seed), numbers], axis=1).astype(np.uint32)


class Placer:
    """Places the microbatches of a step on every stage that reads them."""

    def __init__(
        self, programs: Mapping[int, StagePrograms], loose: LooseMetrics, *,
        num_microbatches: int, seed: int,
    ):  # fmt: skip
        self._programs, self._loose = programs, loose
        self._num_microbatches, self._seed = num_microbatches, seed
        self._cut = {
            index: _compile_cut(stage, num_microbatches) for index, stage in programs.items()
        }

    def place(self, batch: Batch, step: int) -> PlacedBatch:
        """Put a batch where the stages read it; returns before the copies are done."""
        keys = random_keys(self._seed, step, self._num_microbatches)
        microbatches = split_batch(batch, self._num_microbatches)
        stages = {
            index: StageInput(
                place_microbatches(microbatches, stage), self._cut[index](put(keys, stage.whole))
            )
            for index, stage in self._programs.items()
        }
        return PlacedBatch(step, stages, [self._loose.of_microbatch(key) for key in keys])


class StackedPlacer:
    """Places a step's input for a stage whose step is one program."""

    def __init__(
        self, programs: StagePrograms, loose: LooseMetrics, *, num_microbatches: int, seed: int
    ):
        self._programs, self._loose = programs, loose
        self._num_microbatches, self._seed = num_microbatches, seed
        self._shardings = {name: stacked_sharding(programs, name) for name in programs.layout.batch}

    def place(self, batch: Batch, step: int) -> StackedBatch:
        """Put a batch on the stage's devices; returns before the copies are done."""
        count = self._num_microbatches
        keys = random_keys(self._seed, step, count)
        stacked = {
            name: np.reshape(batch[name], (count, -1, *batch[name].shape[1:]))
            for name in self._shardings
        }
        leaves = put(stacked, self._shardings)
        loose = [self._loose.of_microbatch(key) for key in keys]
        return StackedBatch(step, leaves, put(keys, self._programs.whole), loose)


def stacked_sharding(programs: StagePrograms, name: str) -> NamedSharding:
    """Where a leaf of the batch lies with a leading dim of microbatches."""
    one = programs.sharding(programs.layout.batch[name], programs.avals.batch[name].ndim)
    return NamedSharding(one.mesh, PartitionSpec(None, *one.spec))


def place_microbatches(
    microbatches: Sequence[Batch], stage: StageSignature
) -> list[dict[str, jax.Array]]:
    """Put the leaves that a stage reads on its devices."""
    layout = stage.layout
    if not layout.batch:
        return [{} for _ in microbatches]
    shardings = {
        name: stage.sharding(spec, stage.avals.batch[name].ndim)
        for name, spec in layout.batch.items()
    }
    own = [{name: microbatch[name] for name in shardings} for microbatch in microbatches]
    return put(own, [shardings] * len(own))


def _compile_cut(programs: StagePrograms, num_microbatches: int) -> jax.stages.Compiled:
    """(all keys) -> the key of each microbatch."""
    whole = programs.whole
    keys = jax.ShapeDtypeStruct((num_microbatches, 2), np.uint32, sharding=whole)
    cut = jax.jit(lambda keys: [keys[k] for k in range(num_microbatches)], out_shardings=whole)
    return cut.lower(keys).compile()
