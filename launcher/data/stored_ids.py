"""Token ids in a file of any size, of which only what is asked for is read.

It is read and not mapped: where a mapped file is cut short under a run, or its server goes away, the
kernel ends the process without a word.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from launcher.errors import StorageError


class OpenFile:
    """A file that stays open for as long as somebody may read it."""

    __slots__ = ("_descriptor",)

    def __init__(self, stream: BinaryIO) -> None:
        """The stream may be closed."""
        self._descriptor = os.dup(stream.fileno())

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self._descriptor)

    @property
    def num_bytes(self) -> int:
        """Its size now."""
        return os.fstat(self._descriptor).st_size

    def read_into(self, buffer: memoryview, at: int) -> int:
        """Read up to as many bytes as the buffer takes; 0 at the end of the file."""
        return os.preadv(self._descriptor, [buffer], at)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredIds:
    """A stretch of ids in an open file.

    Attributes:
        offset_bytes: Where the first one is.
    """

    path: Path
    file: OpenFile
    dtype: np.dtype
    offset_bytes: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> "StoredIds":
        """A stretch of these, without reading it."""
        begin, end, step = part.indices(self.count)
        assert step == 1
        offset_bytes = self.offset_bytes + begin * self.dtype.itemsize
        return replace(self, offset_bytes=offset_bytes, count=max(end - begin, 0))

    def read(self) -> np.ndarray:
        """All of them."""
        ids = np.empty(self.count, self.dtype)
        self.read_into(ids, 0)
        return ids

    def read_into(self, row: np.ndarray, begin: int) -> None:
        """Read as many as the row takes, from a place on.

        Raises:
            StorageError: they are not there any more.
        """
        rest, at = memoryview(row).cast("B"), self.offset_bytes + begin * self.dtype.itemsize
        try:
            while rest:
                num_bytes = self.file.read_into(rest, at)
                if num_bytes == 0:
                    raise self._cut_short(at)
                rest, at = rest[num_bytes:], at + num_bytes
        except OSError as error:
            raise StorageError(
                f"cannot read {self.path} at byte {at}, {error.strerror} (data.path={self.path}): when it "
                f"can be read again, run this again, and it goes on from its last checkpoint"
            ) from error

    def _cut_short(self, at: int) -> StorageError:
        return StorageError(
            f"{self.path} was cut short while it was read: it has {self.file.num_bytes} bytes, and ids are "
            f"wanted at byte {at} (data.path={self.path}): copy or convert it again, and run this again; it "
            f"goes on from its last checkpoint"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWindows:
    """Windows of `length` + 1 ids that lie `length` apart; rows are read when they are taken."""

    ids: StoredIds
    length: int

    def __len__(self) -> int:
        return max(len(self.ids) - 1, 0) // self.length

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """The rows with these numbers."""
        rows = np.empty((len(indices), self.length + 1), self.ids.dtype)
        for row, index in zip(rows, indices, strict=True):
            self.ids.read_into(row, int(index) * self.length)
        return rows
