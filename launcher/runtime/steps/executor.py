"""The interface to whatever runs a plan: all stages in this process, or a host's part of them."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

Batch = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step yields, as device scalars that need not be there yet.

    Attributes:
        loss_scale: the scale after the step, where it is dynamic.
    """

    loss: jax.Array
    grad_norm: jax.Array
    metrics: dict[str, jax.Array]
    loss_scale: jax.Array | None = None


class Executor(abc.ABC):
    """Holds a model's state on devices and advances it step by step."""

    @abc.abstractmethod
    def place(self, batch: Batch, step: int):
        """Put a global batch on the devices, for `step`; called ahead of it, from another thread."""

    @abc.abstractmethod
    def step(self, placed) -> StepResult:
        """Run one optimizer step on a placed batch; returns before the devices are done."""

    @abc.abstractmethod
    def evaluate(self, batch: Batch) -> jax.Array:
        """The evaluation loss of a batch."""

    @abc.abstractmethod
    def peak_bytes_per_stage(self) -> tuple[int, ...] | None:
        """The most memory that any device of each stage has used, where the backend counts it."""

    @abc.abstractmethod
    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from what a checkpoint holds, whatever was computed since."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of all devices."""
