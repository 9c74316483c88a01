"""From the command line to a plan: a tiny model, planned by the very command that users type."""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from launcher.doctor.commands import Outcome, Runner
from launcher.doctor.findings import Finding, failed, ok

LIMIT_S = 60.0
CONFIG_STATUS = 2
# A plan with every kind of parallelism, in a few seconds: the solver runs, the search is short.
CHOICES = (
    "mode=plan",
    "model=gpt",
    "model.size=tiny",
    "cluster=cpu8",
    "parallel=manual",
    "parallel.tp=2",
    "parallel.pp=2",
    "parallel.num_microbatches=4",
    "logger=jsonl",
)


def check_plan(run: Runner) -> Iterator[Finding]:
    """Compose a config and make a plan of it, in a folder that is removed again."""
    with tempfile.TemporaryDirectory(prefix="launcher-doctor-") as folder:
        command = (sys.executable, "-m", "launcher", *CHOICES, f"hydra.run.dir='{folder}/run'")
        start = time.perf_counter()
        outcome = run(command, LIMIT_S, {"HYDRA_FULL_ERROR": "0", "JAX_TRACEBACK_FILTERING": "off"})
        wall_s = time.perf_counter() - start
        is_written = Path(folder, "run", "plan.json").is_file()
    if outcome is not None and outcome.status == 0 and is_written:
        yield ok(f"a plan of the tiny GPT on 8 devices, from the command line, in {wall_s:.1f} s")
    else:
        yield _no_plan(outcome)


def _no_plan(outcome: Outcome | None) -> Finding:
    command = f"python -m launcher {' '.join(CHOICES)}"
    if outcome is None or outcome.status is None:
        return failed(
            f"no plan of the tiny GPT within {LIMIT_S:.0f} s",
            "planning takes seconds where it works; this machine is overloaded, or JAX hangs",
            f"see what the machine is busy with (`top`), then try: {command}",
        )
    return failed(
        f"no plan of the tiny GPT (status {outcome.status}): {outcome.last_words}",
        "the launcher does not work here from end to end, whatever the lines above say",
        f"mend what failed above first; then run it for the whole message: {command}",
    )
