"""What the time of a run went into, from its first start to now, whatever stopped it in between.

Goodput is the share of all that time in which steps were made that count (the field's term: Google's ML
Goodput, 2024). The rest is told by its kind:

    start_s        getting ready the first time: planning, data, weights
    compile_s      compiling, also after a restart
    restart_s      from the last sign of life of a run that was stopped until it is ready again
    data_s         devices that wait for a batch
    evaluation_s   evaluations
    checkpoint_s   steps that wait for a checkpoint
    lost_s         steps that were made again, because the run went back to a checkpoint
    other_s        what is left: writing rows, ending

The account is a small file in the run's folder, written every few seconds, so that a killed run leaves it
too. It does not survive the power of its machine: nothing but this report depends on it.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from launcher.small_file import write_if_possible

GOODPUT_NAME = "goodput.json"
KINDS = (
    "step_s", "start_s", "compile_s", "restart_s", "data_s", "evaluation_s", "checkpoint_s", "lost_s",
)  # fmt: skip
_EVERY_S = 2.0  # between two writes


class Goodput:
    """The account of a run; of one that was stopped before it goes on with what its folder has.

    Attributes:
        started_s: when this start of the run began, by the clock of the world.
        restarted: whether there was an account to go on with.
    """

    def __init__(
        self, run_dir: Path | None = None, *, clock: Callable[[], float] = time.time,
        started_s: float | None = None,
    ) -> None:  # fmt: skip
        """`clock` is that of the world; without a folder nothing is read or written.

        `started_s` is when this start of the run began, by that clock; None: now.
        """
        self._path, self._clock = run_dir and run_dir / GOODPUT_NAME, clock
        self._began_s = self.started_s = clock() if started_s is None else started_s
        self._written_s = -math.inf
        self._spent_s = dict.fromkeys(KINDS, 0.0)
        earlier = _read(self._path)
        self.restarted = earlier is not None
        if earlier is not None:
            self._spent_s |= {kind: earlier[kind] for kind in KINDS}
            self._spent_s["restart_s"] += max(self._began_s - earlier["until_s"], 0.0)
            self._began_s = min(earlier["began_s"], self._began_s)

    def add(self, kind: str, seconds: float) -> None:
        """Book seconds; what is no time at all (a clock that was set back) is nothing."""
        self._spent_s[kind] += max(seconds, 0.0)
        if self._clock() - self._written_s >= _EVERY_S:
            self.write()

    def ready(self, compile_s: float) -> None:
        """Book what passed since this account was opened, of which some was compiling."""
        self.add("compile_s", compile_s)
        kind = "restart_s" if self.restarted else "start_s"
        self.add(kind, self._clock() - self.started_s - compile_s)

    def went_back(self, kept_step_s: float) -> None:
        """Book as lost the steps that are made again: all but so many seconds of them."""
        lost_s = max(self._spent_s["step_s"] - kept_step_s, 0.0)
        self._spent_s["step_s"] -= lost_s
        self.add("lost_s", lost_s)

    @property
    def step_s(self) -> float:
        """The seconds of all steps that count."""
        return self._spent_s["step_s"]

    def report(self) -> dict[str, float]:
        """The share of good time, and the seconds of each kind, under the names of the summary."""
        total_s = max(self._clock() - self._began_s, sum(self._spent_s.values()))
        share = self.step_s / total_s if total_s > 0 else 0.0
        other_s = total_s - sum(self._spent_s.values())
        spent = {f"goodput_{kind}": seconds for kind, seconds in self._spent_s.items()}
        return {"goodput": share, **spent, "goodput_other_s": other_s}

    def write(self) -> None:
        """Write the account; a disk that has no room for it stops no run."""
        self._written_s = self._clock()
        if self._path is None:
            return
        account = {"began_s": self._began_s, "until_s": self._written_s, **self._spent_s}
        write_if_possible(self._path, json.dumps(account) + "\n")


def _read(path: Path | None) -> Mapping[str, float] | None:
    """The account of an earlier start; None if there is none that can be read."""
    if path is None:
        return None
    try:
        account = json.loads(path.read_text())
        wanted = {name: float(account[name]) for name in ("began_s", "until_s", *KINDS)}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return wanted if all(map(math.isfinite, wanted.values())) else None
