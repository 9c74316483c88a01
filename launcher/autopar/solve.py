"""`python -m launcher.autopar.solve INSTANCE.json[.gz] --time-limit S --out solution.json`

Solves a sharding problem in the format of the ASPLOS 2025 contest (`solver/contest.py`) and writes the
strategy of every node. The time limit is wall time from the start of the process, reading and writing
included. Prints the cost, and how much better another choice could be at most.

Exit status: 0 with a choice, proven optimal or not; 2 for bad input, 4 where no choice is allowed or none
was found in time, 6 where the answer cannot be written.
"""

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from launcher.autopar.solver import METHODS, PairwiseProblem, Solution, solve
from launcher.autopar.solver.contest import read_problem, write_choice
from launcher.autopar.solver.least_memory import least_limit
from launcher.errors import ConfigError, InfeasiblePlanError, LauncherError, StorageError
from launcher.logs import ConsoleHandler

_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line as this project does: one line, status 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: see python -m launcher.autopar.solve --help")


def main(arguments: Sequence[str], *, started_s: float) -> int:
    """Solve, write, print; returns the exit status.

    Args:
        started_s: When the process started, on the clock of `time.monotonic`.
    """
    logging.getLogger("launcher").setLevel(logging.INFO)
    logging.getLogger("launcher").addHandler(ConsoleHandler())
    try:
        _solve(_parser().parse_args(arguments), started_s)
    except LauncherError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("stopped; nothing was written\n")
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m launcher.autopar.solve", description="Solve a sharding problem."
    )
    parser.add_argument("instance", type=Path, metavar="INSTANCE.json[.gz]")
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="S", help="wall seconds")
    parser.add_argument("--out", type=Path, default=Path("solution.json"), metavar="FILE")
    parser.add_argument("--method", choices=METHODS, default="auto")
    return parser


def _solve(options: argparse.Namespace, started_s: float) -> None:
    limit_s = options.time_limit
    if not (math.isfinite(limit_s) and limit_s > 0):
        raise ConfigError(f"--time-limit={limit_s:g} is no time: give seconds above 0")
    if not options.out.parent.is_dir():
        raise StorageError(f"--out={options.out}: its folder is not there; make it first")
    problem = read_problem(options.instance)
    end_s = started_s + limit_s - _margin_s(limit_s)
    try:
        solution = solve(problem, time_limit_s=end_s - time.monotonic(), method=options.method)
    except InfeasiblePlanError as error:
        raise _with_least_limit(error, problem, end_s) from error
    write_choice(options.out, solution.choice)
    took_s = time.monotonic() - started_s
    sys.stdout.write(_report(solution, problem, took_s, limit_s) + f"\nwritten to {options.out}\n")


def _margin_s(limit_s: float) -> float:
    """Kept back for what follows the search: other programs may slow this one at its end."""
    return min(10.0, 1.0 + 0.05 * limit_s, 0.5 * limit_s)


def _report(solution: Solution, problem: PairwiseProblem, took_s: float, limit_s: float) -> str:
    lines = [f"cost {solution.cost:.15g}", f"lower bound {solution.lower_bound:.15g}"]
    if solution.is_proven:
        lines.append(f"proven optimal by {solution.method}")
    else:
        lines.append(
            f"not proven optimal within the time limit of {limit_s:g} s: another choice may be up to "
            f"{100 * solution.gap_fraction:.3g} % cheaper (best found by {solution.method})"
        )
    if problem.memory is not None:
        peak = problem.memory.used(solution.choice).max(initial=0.0)
        lines.append(f"peak usage {peak:.15g} of {problem.memory.limit:.15g}")
    lines.append(
        f"{'after':20} {'nodes':>7} {'strategies':>10} {'edges':>7} {'entries':>9} {'points':>7}"
    )
    for stage in solution.stages:
        size = stage.size
        lines.append(
            f"{stage.name:20} {size.nodes:7} {size.strategies:10} {size.edges:7} "
            f"{size.edge_entries:9} {size.memory_points:7}"
        )
    return "\n".join((*lines, f"took {took_s:.1f} s"))


def _with_least_limit(
    error: InfeasiblePlanError, problem: PairwiseProblem, end_s: float
) -> InfeasiblePlanError:
    """Say which memory limit would do, where memory is what is short."""
    if problem.memory is None:
        return error
    return InfeasiblePlanError(f"{error}; {least_limit(problem, end_s)}")


def _process_age_s() -> float:
    """Seconds since this process started; without /proc its CPU time, which is less."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, uptime_s - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.process_time()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], started_s=time.monotonic() - _process_age_s()))
