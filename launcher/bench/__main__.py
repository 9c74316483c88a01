"""`python -m launcher.bench NAME key=value ...`: run a benchmark, print its table.

A benchmark is a function from its settings to the exit status; `BENCHMARKS` names them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence

from launcher.bench import (
    checkpoint,
    contest,
    emulated,
    fidelity,
    gpu,
    memory,
    overhead,
    paper,
    planner,
    transfers,
)
from launcher.errors import ConfigError, LauncherError

BENCHMARKS: Mapping[str, Callable[[Mapping[str, str]], int]] = {
    "checkpoint": checkpoint.run,
    "contest": contest.run,
    "emulated": emulated.run,
    "fidelity": fidelity.run,
    "gpu": gpu.run,
    "memory": memory.run,
    "overhead": overhead.run,
    "paper": paper.run,
    "planner": planner.run,
    "transfers": transfers.run,
}


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that the command line names; returns the exit status."""
    if list(arguments) in (["-h"], ["--help"]):
        sys.stdout.write(_help())
        return 0
    try:
        name, settings = _parsed(arguments)
        return BENCHMARKS[name](settings)
    except LauncherError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status


def _help() -> str:
    """What there is, by the first line of each module; its settings are in the module's head."""
    lines = ["python -m launcher.bench NAME key=value ...", ""]
    for name, benchmark in BENCHMARKS.items():
        first, *_ = sys.modules[benchmark.__module__].__doc__.splitlines()
        lines.append(f"  {name:<11} {first.split('`: ')[-1]}")
    lines += [
        "",
        "Status 1: what was measured misses a bar. The settings of each: launcher/bench/NAME.py",
    ]
    return "\n".join(lines) + "\n"


def _parsed(arguments: Sequence[str]) -> tuple[str, dict[str, str]]:
    if not arguments or arguments[0] not in BENCHMARKS:
        given = (
            f"no benchmark is called {arguments[0]!r}" if arguments else "no benchmark was named"
        )
        names = ", ".join(BENCHMARKS)
        raise ConfigError(f"{given}: give one of {names}, then key=value ..., or --help")
    name, *settings = arguments
    wrong = [setting for setting in settings if "=" not in setting]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} is not key=value: write for example data=folder")
    return name, dict(setting.split("=", 1) for setting in settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
