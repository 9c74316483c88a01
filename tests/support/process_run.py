"""A small training run by the real command, in a process that a test may kill."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

# Small steps, so that most of a run is not compiling; and saves so often that a kill often falls into one.
COMMAND = (
    sys.executable, "-m", "launcher", "logger=jsonl", "model.layers=2", "model.hidden=32",
    "model.heads=2", "model.seq_len=32", "parallel=manual", "parallel.pp=2", "parallel.tp=1",
    "parallel.num_microbatches=4", "cluster.hosts=1", "train.steps=60", "train.eval_every=20",
    "train.eval_batches=1", "checkpoint.every_steps=3", "checkpoint.keep=2",
)  # fmt: skip
PATIENCE_S = 300.0


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder, and the command in it."""

    folder: pathlib.Path

    def start(self, *more: str) -> subprocess.Popen:
        """Start, or go on; output goes to a file of its own for each start."""
        self.folder.mkdir(exist_ok=True)
        number = len(list(self.folder.glob("*.out")))
        with (self.folder / f"{number}.out").open("w") as output:
            return subprocess.Popen(
                [*COMMAND, f"hydra.run.dir={self.folder}", *more],
                cwd=self.folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def finish(self, *more: str) -> int:
        """Go on to the end."""
        return self.start(*more).wait(PATIENCE_S)

    def output(self) -> str:
        """What all starts have said, one after the other."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    def rows(self) -> list[dict]:
        """What counts of every row of training."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        kept = ("step", "loss", "grad_norm", "eval_loss")
        return [{key: row[key] for key in kept if key in row} for row in rows]

    def summary(self) -> dict:
        """The run's summary."""
        return json.loads((self.folder / "summary.json").read_text())

    def wait_for_rows(self, process: subprocess.Popen, number: int = 1) -> None:
        """Return when it has written so many rows."""
        until_s = time.monotonic() + PATIENCE_S
        while len(self.rows()) < number:
            assert process.poll() is None, self.output()
            assert time.monotonic() < until_s, self.output()
            time.sleep(0.01)


def kill(process: subprocess.Popen) -> None:
    """End a process, and those that it has started, as a machine that fails does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
