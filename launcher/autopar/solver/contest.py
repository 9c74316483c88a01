"""The file format of the ASPLOS 2025 contest on intra-operator parallelism: problems in, choices out.

    {"problem": {"name": ..., "usage_limit": 24,
                 "nodes": {"intervals": [[0, 3], ...], "costs": [[15, 9], ...], "usages": [[5, 8], ...]},
                 "edges": {"nodes": [[0, 2], ...], "costs": [[3, 0, 1, 2], ...]}}}

A node is live from its interval's first point up to, not including, its last. An edge's costs are
row-major over the strategies of its two nodes. Costs of 1e18 and above forbid.
"""

import contextlib
import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from launcher.autopar.solver.live_memory import Memory
from launcher.autopar.solver.problem import PairwiseProblem
from launcher.autopar.text.atomic_file import write_atomically
from launcher.errors import ConfigError, StorageError
from launcher.regular_file import open_regular

FORBIDDEN = 1e18
LARGEST_BYTES = 2**30  # unpacked: a small file may hold very much


def read_problem(path: Path) -> PairwiseProblem:
    """Read a problem, plain or gzipped; what is not one is a `ConfigError` that names the place."""
    try:
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(open_regular(path))
            if path.suffix == ".gz":
                file = opened.enter_context(gzip.open(file, "rb"))
            text = file.read(LARGEST_BYTES + 1)
        if len(text) > LARGEST_BYTES:
            raise ConfigError(
                f"{path} holds more than {LARGEST_BYTES} bytes of JSON: give a contest problem"
            )
        data = json.loads(text)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path} ({error.strerror or error}): give the path of a contest problem"
        ) from error
    except (EOFError, zlib.error, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not JSON ({' '.join(str(error).split())[:80]}): give a contest problem, "
            f"and one whose name ends in .gz only if it is gzipped"
        ) from error
    return _Reader(path).problem(data)


def write_choice(path: Path, choice: Sequence[int]) -> None:
    """Write the strategy of each node as a JSON list."""
    try:
        write_atomically(path, json.dumps(list(choice)) + "\n")
    except StorageError as error:
        reason = error.__cause__
        raise StorageError(
            f"cannot write {path} ({reason.strerror or reason}): give --out a file in a folder that "
            f"can be written and has space"
        ) from error


class _Reader:
    """Turns the parsed file into a problem, and says where it is not one."""

    def __init__(self, path: Path):
        self._path = path

    def problem(self, data: object) -> PairwiseProblem:
        top = self._field(data, "problem", dict)
        nodes, edges = self._field(top, "nodes", dict), self._field(top, "edges", dict)
        costs = self._rows(nodes, "nodes", "costs")
        usages = self._rows(nodes, "nodes", "usages", sizes=[len(row) for row in costs])
        pairs = self._pairs(edges, "edges", "nodes")
        tables = self._tables(edges, pairs, costs)
        intervals = self._pairs(nodes, "nodes", "intervals")
        for name, found in (("usages", usages), ("intervals", intervals)):
            if len(found) != len(costs):
                self._fail(f"nodes.{name}", f"has {len(found)} entries for {len(costs)} nodes")
        memory = None
        if top.get("usage_limit") is not None:
            limit = self._row([top["usage_limit"]], "usage_limit")[0]
            memory = Memory.of_intervals(usages, intervals, float(limit))
        return _assembled([_forbidding(row) for row in costs], pairs, tables, memory)

    def _tables(self, edges: dict, pairs: np.ndarray, costs: list[np.ndarray]) -> list[np.ndarray]:
        if pairs.size and not (pairs.min() >= 0 and pairs.max() < len(costs)):
            at = int(np.flatnonzero(((pairs < 0) | (pairs >= len(costs))).any(axis=1))[0])
            self._fail(f"edges.nodes[{at}]", f"names node {pairs[at].tolist()} of {len(costs)}")
        shapes = [(len(costs[i]), len(costs[j])) for i, j in pairs.tolist()]
        rows = self._rows(edges, "edges", "costs", sizes=[n * m for n, m in shapes])
        if len(rows) != len(shapes):
            self._fail("edges.costs", f"has {len(rows)} entries for {len(shapes)} edges")
        return [_forbidding(row).reshape(shape) for row, shape in zip(rows, shapes, strict=True)]

    def _rows(self, owner: dict, place: str, name: str, sizes=None) -> list[np.ndarray]:
        rows = self._field(owner, name, list, place)
        read = [self._row(row, f"{place}.{name}[{i}]") for i, row in enumerate(rows)]
        for i, (row, size) in enumerate(zip(read, sizes or [], strict=False)):
            if len(row) != size:
                self._fail(f"{place}.{name}[{i}]", f"has {len(row)} numbers instead of {size}")
        for i, row in enumerate(read):
            if not len(row):
                self._fail(f"{place}.{name}[{i}]", "has no strategy")
        return read

    def _row(self, row: object, place: str) -> np.ndarray:
        try:
            found = np.array(row, np.float64)
        except (TypeError, ValueError, OverflowError):
            self._fail(place, "is not a list of numbers")
        if found.ndim != 1 or np.isnan(found).any() or not isinstance(row, list):
            self._fail(place, "is not a list of numbers")
        return found

    def _pairs(self, owner: dict, place: str, name: str) -> np.ndarray:
        rows = self._field(owner, name, list, place)
        try:
            pairs = np.array(rows if rows else np.zeros((0, 2)))
            whole = pairs.astype(np.int64)
        except (TypeError, ValueError, OverflowError):
            pairs = whole = np.zeros(0)
        is_whole = pairs.dtype.kind in "if" and bool((whole == pairs).all())
        if pairs.shape != (len(rows), 2) or not is_whole:
            self._fail(f"{place}.{name}", "is not a list of pairs of whole numbers")
        return whole

    def _field(self, owner: object, name: str, kind: type, place: str = "") -> dict | list:
        if not isinstance(owner, dict) or not isinstance(owner.get(name), kind):
            what = "an object" if kind is dict else "a list"
            self._fail(f"{place}.{name}".strip("."), f"is not there or not {what}")
        return owner[name]

    def _fail(self, place: str, what: str) -> NoReturn:
        raise ConfigError(
            f"{self._path}: {place} {what}: give a problem in the format of docs/solver.md"
        )


def _forbidding(costs: np.ndarray) -> np.ndarray:
    return np.where(costs >= FORBIDDEN, np.inf, costs)


def _assembled(costs, pairs: np.ndarray, tables, memory: Memory | None) -> PairwiseProblem:
    """Add up edges between the same nodes, and put those from a node to itself into its costs."""
    edges: dict[tuple[int, int], np.ndarray] = {}
    for (i, j), table in zip(pairs.tolist(), tables, strict=True):
        if i == j:
            costs[i] = costs[i] + table.diagonal()
            continue
        key, table = ((i, j), table) if i < j else ((j, i), table.T)
        edges[key] = edges[key] + table if key in edges else table
    return PairwiseProblem(tuple(costs), edges, memory)
