"""`Model`: what the launcher knows of a model, whoever wrote it: shapes, weights, a pure loss."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flax import nnx
from jax import Array

from launcher.models.kernels import Kernels
from launcher.models.layers import Precision, at_least_fp32
from launcher.models.skeleton import Arrays, Shapes, Skeleton, make_skeleton


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A model of some size, ready to be planned and trained."""

    name: str
    size: str
    dtype: str
    sample_unit: str  # what throughput counts: "tokens" or "samples"
    units_per_sample: int
    default_global_batch: int
    vocab_size: int | None  # integers of a batch are below it: tokens, or classes of images
    fingerprint: str  # of the family and all sizes, whatever the dtype
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of the size: model.* key -> value
    kernels: Kernels = field(default_factory=Kernels)  # by which it computes; only decoders choose
    abstract_params: Shapes
    abstract_state: Shapes  # what training changes besides weights, such as BatchNorm's statistics
    make_module: Callable[[nnx.Rngs], nnx.Module]
    skeleton: Skeleton

    def init(self, seed: int) -> tuple[Arrays, Arrays]:
        """Return initial weights and state; the same for a seed, always."""
        return self.skeleton.take_apart(self.make_module(nnx.Rngs(seed)))

    def loss(
        self, params: Arrays, state: Arrays, batch: Arrays, key_data: Array
    ) -> tuple[Array, tuple[Arrays, Arrays]]:
        """Return the training loss, the new state and metrics.

        `key_data`, the two words of a threefry key, is the only source of randomness.
        """
        (loss, metrics), new_state = self.skeleton.call_loss(params, state, batch, key_data)
        return loss.astype(at_least_fp32(loss.dtype)), (new_state, metrics)

    def eval_loss(self, params: Arrays, state: Arrays, batch: Arrays) -> tuple[Array, Arrays]:
        """Return the loss and metrics in evaluation: no dropout, statistics as they were kept."""
        (loss, metrics), _ = self.skeleton.call_loss(params, state, batch, None)
        return loss.astype(at_least_fp32(loss.dtype)), metrics

    def logits(self, params: Arrays, state: Arrays, tokens: Array) -> Array:
        """Score every token of the vocabulary as the next one at each position, in evaluation.

        Only decoders (`vocab_size` tokens) have it.
        """
        return self.skeleton.call_logits(params, state, tokens)

    def example_batch(self, batch_size: int) -> Shapes:
        """Describe a batch of so many samples."""
        return self.skeleton.hollow().example_batch(batch_size)

    @property
    def num_parameters(self) -> int:
        """Count the weights."""
        return sum(math.prod(spec.shape) for spec in self.abstract_params.values())


def make_model(
    make_module: Callable[[nnx.Rngs], nnx.Module],
    *,
    precision: Precision,
    casts: bool = False,
    **description: Any,
) -> Model:
    """Make a model of what builds its module, from shapes alone; `description`: plain fields."""
    skeleton = make_skeleton(make_module, precision=precision, casts=casts)
    return Model(
        make_module=make_module,
        skeleton=skeleton,
        abstract_params=skeleton.kept_shapes(skeleton.params),
        abstract_state=skeleton.kept_shapes(skeleton.state),
        **description,
    )


def fingerprint(family: str, sizes: dict[str, Any]) -> str:
    """Return a short text that changes with any size of a model."""
    text = json.dumps([family, sizes], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
