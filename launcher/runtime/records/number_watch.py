"""Whether the numbers of a step are finite, and how many steps in a row may be without.

A step whose gradients are not finite changes nothing: every stage leaves its update out (`update`). Under a
dynamic loss scale that is how the scale is fitted. Otherwise it is forgiven a few times in a row, which bad
batches may need, and then it is an error, from which a run may go back to its last checkpoint (`train_loop`).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.errors import TrainingError

log = logging.getLogger(__name__)

# Halvings in a row that no scale of an overflow now and then needs: what overflows is the model itself.
MAX_SKIPPED_IN_A_ROW = 20
# Below 1 the loss is scaled down: not the gradients' smallness is the trouble then.
SMALLEST_LOSS_SCALE = 1.0


class NonFiniteError(TrainingError):
    """Too many steps in a row without finite numbers; `steps` are those, counted from 0."""

    def __init__(self, message: str, steps: Sequence[int]) -> None:
        super().__init__(message)
        self.steps = tuple(steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Those of a step, after which `num_steps` are done; `loss_scale` where it is dynamic."""

    num_steps: int
    loss: float
    grad_norm: float
    learning_rate: float | None
    loss_scale: float | None

    @property
    def is_skipped(self) -> bool:
        """Whether the step was no update."""
        return not math.isfinite(self.grad_norm)

    @property
    def are_finite(self) -> bool:
        """Both of them."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class NumberWatch:
    """Is told of every step; `in_a_row` are the last ones without finite numbers."""

    def __init__(self, planned_steps: int, *, forgiven: int, in_a_row: int) -> None:
        self._planned_steps, self._forgiven = planned_steps, forgiven
        self.in_a_row = in_a_row

    def check(self, numbers: Numbers, loss_before: float | None) -> None:
        """Take note of a step; raise TrainingError where it is one too many."""
        if numbers.are_finite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if numbers.loss_scale is not None and numbers.is_skipped:
            self._check_scale(numbers)
        elif self.in_a_row > self._forgiven:
            raise NonFiniteError(
                self._text(numbers, loss_before),
                range(numbers.num_steps - self.in_a_row, numbers.num_steps),
            )
        else:
            log.warning(
                "step %d: loss %s, gradient norm %s: forgiven, as %d of %d in a row "
                "(train.nonfinite_steps)%s",
                numbers.num_steps, numbers.loss, numbers.grad_norm, self.in_a_row, self._forgiven,
                ", and no update" if numbers.is_skipped else "",
            )  # fmt: skip

    def _text(self, numbers: Numbers, loss_before: float | None) -> str:
        what, other = f"loss is {numbers.loss}", f"gradient norm {numbers.grad_norm:.6g}"
        if math.isfinite(numbers.loss):
            what = f"gradient norm is {numbers.grad_norm}"
            other = f"loss {numbers.loss:.6g}"
        before = "" if loss_before is None else f"the last finite loss was {loss_before:.6g}, "
        rate = numbers.learning_rate
        return (
            f"the {what} at step {numbers.num_steps} of {self._planned_steps} ({before}"
            f"{other}, learning rate {'not finite' if rate is None else format(rate, '.6g')}): "
            f"lower optimizer.learning_rate, clip harder with optimizer.clip_norm, "
            f"or compute in model.dtype=fp32"
        )

    def _check_scale(self, numbers: Numbers) -> None:
        too_many = self.in_a_row >= MAX_SKIPPED_IN_A_ROW
        if not too_many and numbers.loss_scale >= SMALLEST_LOSS_SCALE:
            return
        raise TrainingError(
            f"the gradients overflow at every loss scale: step {numbers.num_steps} of "
            f"{self._planned_steps} is the last of {self.in_a_row} in a row that were "
            f"skipped, and the scale is down to {numbers.loss_scale:.6g} (optimizer.loss_scale): "
            f"lower optimizer.learning_rate, or compute in model.dtype=bf16 or fp32"
        )
