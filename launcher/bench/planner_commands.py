"""Planning as a user has it done: the command line, in a process of its own, until plan.json is there.

What counts is the wall time from the command to the file, with all that comes before planning: starting
Python, reading the config, building the model. The CPU time beside it is that of the whole process, which
also writes plan.html.
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.autopar.plans.plan import Plan
from launcher.autopar.plans.plan_file import read_plan
from launcher.bench.chart import Bars, bar_chart
from launcher.errors import LauncherError


@dataclass(frozen=True, slots=True)
class Command:
    """What to plan, and how long that may take."""

    title: str
    words: tuple[str, ...]
    bar_s: float


COMMANDS: Mapping[str, Command] = {
    "gpt-39b": Command("GPT-39B", ("model=gpt", "model.size=39b", "cluster=8xp3"), 30.0),
    "moe-70b": Command("MoE-70B", ("model=moe", "model.size=70b", "cluster=8xp3"), 60.0),
    "wrn-13b": Command("Wide-ResNet-13B", ("model=wrn", "model.size=13b", "cluster=8xp3"), 60.0),
    "gpt-1t": Command(
        "GPT-1T", ("model=gpt", "model.size=1t", "cluster=dgx-a100", "cluster.hosts=384"), 120.0
    ),
}


@dataclass(frozen=True, slots=True)
class Timed:
    """A plan, and the seconds that the command took for it."""

    plan: Plan
    wall_s: float
    cpu_s: float


def time_command(words: Sequence[str]) -> Timed:
    """Plan in a process of its own, for a folder that is removed again."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run" / "plan.json"
        words = (*words, "parallel=auto", "mode=plan", f"hydra.run.dir={file.parent}")
        before_s, began_s = _children_s(), time.time()
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *words], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise LauncherError(
                f"python -m launcher {' '.join(words)} ended with status {done.returncode}, not 0: "
                f"{said[-1] if said else 'it said nothing'}"
            )
        # Both clocks are the system's, as a file's time is.
        return Timed(read_plan(file), file.stat().st_mtime - began_s, _children_s() - before_s)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def report_command(command: Command) -> bool:
    """Print a row; says whether the bar was missed."""
    timed = time_command(command.words)
    plan = timed.plan
    sys.stdout.write(
        f"python -m launcher {' '.join(command.words)}: plan.json after {timed.wall_s:.1f} s "
        f"(bar {command.bar_s:g} s), {timed.cpu_s:.1f} s of CPU; a step takes "
        f"{plan.predicted.step_s:.3f} s, gap {100 * plan.search.optimality_gap:.2g} %\n"
    )
    sys.stdout.flush()
    return timed.wall_s > command.bar_s


@dataclass(frozen=True, slots=True)
class Series:
    """A command with one number in it, which grows.

    Attributes:
        key: That has the number.
        times: What the picture counts, for each 1 of the key.
    """

    title: str
    words: tuple[str, ...]
    key: str
    numbers: tuple[int, ...]
    times: int
    below: str


SERIES: Mapping[str, Series] = {
    "layers": Series(
        "Planning GPT with hidden 2048 for 8 V100s",
        ("model=gpt", "model.size=1.3b", "cluster=1xp3"),
        "model.layers",
        (8, 16, 24, 48, 96),
        1,
        "layers",
    ),
    "hosts": Series(
        "Planning GPT-2.6B for 8 to 512 V100s",
        ("model=gpt", "model.size=2.6b", "cluster=8xp3"),
        "cluster.hosts",
        (1, 2, 4, 8, 16, 32, 64),
        8,
        "devices",
    ),
}
_COLOURS = {"wall": "forward", "CPU": "backward"}


def report_series(series: Series, numbers: Sequence[int]) -> str:
    """Print a row per number; returns the picture."""
    groups = []
    for number in numbers:
        timed = time_command((*series.words, f"{series.key}={number}"))
        label = str(number * series.times)
        sys.stdout.write(
            f"{series.title}, {label} {series.below}: plan.json after {timed.wall_s:.1f} s, "
            f"{timed.cpu_s:.1f} s of CPU\n"
        )
        sys.stdout.flush()
        groups.append(Bars(label=label, values={"wall": timed.wall_s, "CPU": timed.cpu_s}))
    return bar_chart(series.title, "seconds", _COLOURS, groups, series.below)
