"""`python -m launcher.cli.job FOLDER`: the process of one node of a job, as its batch script starts it.

That of the first node runs the config in the folder, over all nodes; the others join it. Each notes how it
ends before it does: the batch script, later submissions and people learn from that what became of the job. A
run that was told to stop ends with 0 here, so that it ends no other node; the note says that it is not done.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from launcher import run_lock, standard_streams
from launcher.cli.frozen import read_config
from launcher.cli.held import run_held
from launcher.cli.report import noting, reason_of
from launcher.cli.running import run_logged
from launcher.cli.srun_step import join
from launcher.errors import ConfigError, NoRestartLeftError, StoppedBySignal, TrainingError
from launcher.slurm.job_folder import ends_folder, note_end, without_progress
from launcher.slurm.meeting import SignsOfLife
from launcher.slurm.step import step_here

_CHECKPOINT = re.compile(r"step-(\d+)")
# So often in a row a job may be told to stop without having come further: then its time is too short.
MOST_STOPS = 10


def main(arguments: Sequence[str]) -> int:
    """Run, note how it ended, and return the exit status for Slurm."""
    if len(arguments) != 1:
        sys.stderr.write("launcher: give one folder: python -m launcher.cli.job FOLDER\n")
        return ConfigError.exit_status
    run_dir = Path(arguments[0])
    step, ends = step_here(os.environ), ends_folder(run_dir)
    if step is not None and step.is_surplus:
        return 0
    if step is not None and not step.leads:
        return join(step, ends)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _stop)
    raised: list[BaseException] = []
    with SignsOfLife(ends):
        status = run_held(
            lambda left_by: noting(raised, _run(run_dir, left_by))(), run_dir, debug=False
        )
        return _end(run_dir, status, raised[-1] if raised else None)


def _run(run_dir: Path, left_by: run_lock.Holder | None) -> Callable[[], int]:
    return lambda: run_logged(lambda: read_config(run_dir), run_dir, left_by, ends_folder(run_dir))


def _stop(number: int, frame: FrameType | None) -> None:
    """Until the run listens itself: there is nothing to lose yet."""
    del frame
    raise StoppedBySignal(signal.Signals(number).name)


def _end(run_dir: Path, status: int, error: BaseException | None) -> int:
    """Note the end; what was only told to stop is no failure of the step."""
    ends, reason = ends_folder(run_dir), reason_of(error)
    if status == 0:
        note_end(ends, 0, "done", 0, "")
        return 0
    if status != StoppedBySignal.exit_status:
        note_end(
            ends, 0, "lost" if isinstance(error, NoRestartLeftError) else "failed", status, reason
        )
        return status
    step = _newest_checkpoint(run_dir)
    if without_progress(run_dir, step) < MOST_STOPS:
        note_end(ends, 0, "stopped", status, reason)
        return 0
    words = (
        f"stopped {MOST_STOPS} times in a row without a checkpoint after step {step}: give the job more "
        f"time (cluster.slurm.time), or write checkpoints more often (checkpoint.every_minutes)"
    )
    note_end(ends, 0, "failed", TrainingError.exit_status, words)
    sys.stderr.write(f"launcher: {words}\n")
    return TrainingError.exit_status


def _newest_checkpoint(run_dir: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    folder = Path(read_config(run_dir).checkpoint.dir or run_dir / "checkpoints")
    found = (_CHECKPOINT.fullmatch(path.name) for path in folder.glob("step-*"))
    return max((int(match[1]) for match in found if match), default=0)


if __name__ == "__main__":
    standard_streams.outlive_readers()
    sys.exit(main(sys.argv[1:]))
