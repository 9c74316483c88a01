"""Batches made ahead of the steps that need them, by one thread.

One thread makes all of them, those for evaluations too, so a dataset is never asked for two at
once. Those for training are put on the devices by it as well.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

from launcher.data.dataset import Dataset
from launcher.data.order import batch_number

Batch = dict[str, np.ndarray]
T = TypeVar("T")


class BatchQueue:
    """Gives batches in order, each as soon as it is made; an error of the dataset surfaces there.

    `ahead` is how many are made, or being made, beyond the one that was given last; `left_out` are
    batches for training that no step gets.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, ahead: int, left_out: Sequence[int] = ()
    ) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._ahead = ahead
        self._left_out = left_out
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")

    def __enter__(self) -> "BatchQueue":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def batches(self, steps: Iterable[int], split: str) -> Iterator[Batch]:
        """Give the batches of these steps of a split, in order."""
        return self.placed(steps, split, lambda batch, step: batch)

    def placed(
        self, steps: Iterable[int], split: str, place: Callable[[Batch, int], T]
    ) -> Iterator[T]:
        """Give what `place` makes of the batches of these steps of a split, in order."""
        steps = iter(steps)

        def submit(step: int) -> Future[T]:
            return self._worker.submit(self._make, step, split, place)

        queue = deque(submit(step) for step in islice(steps, self._ahead))
        while queue:
            # The next one is asked for first, so that it is made while this one is in use.
            queue.extend(submit(step) for step in islice(steps, 1))
            yield queue.popleft().result()

    def _make(self, step: int, split: str, place: Callable[[Batch, int], T]) -> T:
        number = batch_number(step, self._left_out) if split == "train" else step
        return place(self._dataset.batch(number, self._batch_size, split), step)
