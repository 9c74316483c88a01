"""`python -m launcher.bench contest data=DIR`: the solver on the problems of the ASPLOS 2025 contest.

Each problem is solved by the command line, in a process of its own and within its time limit. The choice it
wrote is priced here again. `reference.csv` beside the problems has the columns `id`, `timeout_s`,
`best_known` and `xla`.

    data       the folder of the problems; default: the environment variable LAUNCHER_IOPDDL_DIR
    instances  ids, as in B,G; default: all that reference.csv names
    fraction   of each time limit that may be used; default: 1
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.autopar.solver.contest import read_problem
from launcher.bench.settings import check_keys
from launcher.errors import ConfigError

DATA_VARIABLE = "LAUNCHER_IOPDDL_DIR"
_KEYS = ("data", "instances", "fraction")


@dataclass(frozen=True, slots=True)
class Instance:
    """A problem, its time limit, and what others reached; None where nothing is known."""

    name: str
    path: Path
    limit_s: float
    best_known: float | None
    xla: float | None


@dataclass(frozen=True, slots=True)
class Result:
    """What one run of the solver gave; `cost` is None where it gave no choice that is allowed."""

    cost: float | None
    lower_bound: float
    took_s: float


def run(settings: Mapping[str, str]) -> int:
    """Solve the problems and print a row for each; status 1 if one has no allowed choice in time."""
    check_keys("contest", settings, _KEYS)
    fraction = _fraction(settings.get("fraction", "1"))
    wanted = settings["instances"].split(",") if "instances" in settings else None
    failed = 0
    sys.stdout.write(_HEADER)
    for instance in read_instances(_folder(settings), wanted):
        result = solve_instance(instance, instance.limit_s * fraction)
        failed += result.cost is None or result.took_s > instance.limit_s
        sys.stdout.write(row(instance, result))
        sys.stdout.flush()
    return int(failed > 0)


def read_instances(folder: Path, wanted: Iterable[str] | None = None) -> list[Instance]:
    """The problems that reference.csv names, or those wanted of them."""
    table = folder / "reference.csv"
    try:
        rows = list(csv.DictReader(table.read_text().splitlines()))
        found = {row["id"]: _instance(folder, row) for row in rows}
    except OSError as error:
        raise ConfigError(
            f"cannot read {table} ({error.strerror}): set data= or {DATA_VARIABLE} to the folder of "
            f"the contest problems"
        ) from error
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{table} lacks a column or a number ({error}): it needs id, timeout_s, best_known, xla"
        ) from error
    for name in wanted or ():
        if name not in found:
            raise ConfigError(f"instances={name} is not in {table}: it has {', '.join(found)}")
    return [found[name] for name in wanted or found]


def solve_instance(instance: Instance, limit_s: float) -> Result:
    """Run the command line on a problem, and price what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "solution.json"
        command = [sys.executable, "-m", "launcher.autopar.solve", str(instance.path)]
        began = time.monotonic()
        done = subprocess.run(
            [*command, "--time-limit", str(limit_s), "--out", str(out)],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        took_s = time.monotonic() - began
        if done.returncode:
            return Result(None, float("nan"), took_s)
        choice = json.loads(out.read_text())
    problem = read_problem(instance.path)
    bounds = [line.split()[-1] for line in done.stdout.splitlines() if "lower bound" in line]
    cost = problem.cost(choice) if problem.fits(choice) else float("inf")
    return Result(cost if cost < float("inf") else None, float(bounds[-1]), took_s)


_HEADER = (
    f"{'instance':8} {'cost':>14} {'best known':>14} {'excess':>8} {'XLA':>14} {'lower bound':>14} "
    f"{'gap':>8} {'time':>7} {'limit':>6}\n"
)


def row(instance: Instance, result: Result) -> str:
    """One line of the table: excess over the best known, gap to our own lower bound."""
    cost, best = result.cost, instance.best_known
    excess = f"{100 * (cost / best - 1):.3f} %" if cost and best else "?"
    gap = f"{100 * (1 - result.lower_bound / cost):.3f} %" if cost else "?"
    return (
        f"{instance.name:8} {_number(cost):>14} {_number(best):>14} {excess:>8} "
        f"{_number(instance.xla):>14} {_number(result.lower_bound):>14} {gap:>8} "
        f"{result.took_s:5.0f} s {instance.limit_s:4.0f} s\n"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _instance(folder: Path, row: Mapping[str, str]) -> Instance:
    paths = sorted(folder.glob(f"*-{row['id']}.json*"))
    if not paths:
        raise ConfigError(f"{folder} has no problem {row['id']}: a file *-{row['id']}.json[.gz]")
    return Instance(
        name=row["id"],
        path=paths[0],
        limit_s=float(row["timeout_s"]),
        best_known=float(row["best_known"]) if row["best_known"] else None,
        xla=float(row["xla"]) if row["xla"] else None,
    )


def _folder(settings: Mapping[str, str]) -> Path:
    given = settings.get("data") or os.environ.get(DATA_VARIABLE)
    if not given:
        raise ConfigError(f"data is not set: give data=DIR, or set {DATA_VARIABLE} to the folder")
    return Path(given)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ConfigError(f"fraction={text} is not above 0 and at most 1: give such a number")
    return value
