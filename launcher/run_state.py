"""What a run is doing, in `state.json` of its folder, for `python -m launcher.status` and other readers.

A run notes what it begins, and how it ends. One whose process dies notes no end: that nobody holds
the folder any more (`run_lock`) tells it apart from one that is still at work.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from launcher.small_file import write_if_possible

STATE_NAME = "state.json"
TO_GO_ON = "; to go on: "  # in a reason, before the command that goes on with the run

Phase = Literal["starting", "planning", "compiling", "training", "evaluating", "measuring"]
End = Literal["done", "planned", "stopped", "interrupted", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What is noted.

    Attributes:
        since_s: When it began, by the clock of the world.
        exit_status: None: the run has not ended.
        reason: The line that stands on stderr too; None: there is none.
    """

    state: Phase | End
    since_s: float
    exit_status: int | None = None
    reason: str | None = None


def note_phase(run_dir: Path, phase: Phase) -> None:
    """Note what a run begins."""
    _note(run_dir, RunState(state=phase, since_s=time.time()))


def note_end(run_dir: Path, exit_status: int, reason: str | None, *, only_plans: bool) -> None:
    """Note how a run ended."""
    names: dict[int, End] = {
        0: "planned" if only_plans else "done",
        75: "stopped",
        130: "interrupted",
    }
    state = names.get(exit_status, "failed")
    _note(
        run_dir,
        RunState(state=state, since_s=time.time(), exit_status=exit_status, reason=reason),
    )


def _note(run_dir: Path, state: RunState) -> None:
    write_if_possible(run_dir / STATE_NAME, json.dumps(asdict(state)) + "\n")
