"""`python -m launcher.bench checkpoint`: what checkpoints take from the steps, of the seconds between two.

The real command trains, with a checkpoint every so many steps, on the devices at hand (emulated CPU devices
where there are no others), and its metrics.jsonl tells. For each checkpoint after the first, until the next:

    between   seconds between the two
    waited    of them, those for which a step had to wait until the arrays were on the host
    slowed    by how much the first half of the steps, during which one thread writes and verifies, took
              longer than the second; emulated devices share the cores with that thread

Status 1 if the median share of the last two together is above 5 %.

    every        steps between two checkpoints; default: 200
    checkpoints  how many are measured; default: 3
    overrides    more keys for the launcher, separated by spaces, such as overrides='model=moe parallel=data'
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.bench.settings import check_keys, whole_number
from launcher.errors import TrainingError

_BAR = 0.05


@dataclass(frozen=True, slots=True)
class Taken:
    """Of the steps from one checkpoint to the next."""

    between_s: float
    waited_s: float
    slowed_s: float

    @property
    def share(self) -> float:
        return (self.waited_s + self.slowed_s) / self.between_s


def run(settings: Mapping[str, str]) -> int:
    """Print a row per checkpoint and the median; status 1 if that misses its bar."""
    check_keys("checkpoint", settings, ["every", "checkpoints", "overrides"])
    every, count = whole_number(settings, "every", 200), whole_number(settings, "checkpoints", 3)
    overrides = settings.get("overrides", "").split()
    rows = _rows(every, (count + 2) * every, overrides)
    taken = [_taken(rows[every * (k + 1) : every * (k + 2)]) for k in range(1, count + 1)]
    sys.stdout.write(f"{'':<16}{'between s':>12}{'waited s':>12}{'slowed s':>12}{'share':>9}\n")
    for number, one in enumerate(taken, 2):
        sys.stdout.write(
            f"{f'checkpoint {number}':<16}{one.between_s:12.2f}{one.waited_s:12.4f}"
            f"{one.slowed_s:12.3f}{one.share:9.2%}\n"
        )
    share = statistics.median(one.share for one in taken)
    sys.stdout.write(f"{'median':<52}{share:9.2%}  (bar {_BAR:.0%})\n")
    return 1 if share > _BAR else 0


def _rows(every: int, steps: int, overrides: Sequence[str]) -> list[dict]:
    """Train, and give the row of each step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "launcher", "logger=jsonl", f"hydra.run.dir={folder}",
            f"train.steps={steps}", "train.eval_batches=0", f"checkpoint.every_steps={every}",
            *overrides,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TrainingError(f"the run that was to be measured failed: {done.stderr.strip()}")
        text = (Path(folder) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def _taken(rows: Sequence[dict]) -> Taken:
    """Of the rows after a checkpoint, up to that before which the next one was written."""
    waited_s = rows[0]["checkpoint_s"]
    steps_s = [row["step_s"] for row in rows]
    half = len(steps_s) // 2
    slowed_s = max(0.0, sum(steps_s[:half]) - sum(steps_s[-half:])) if half else 0.0
    return Taken(between_s=waited_s + sum(steps_s), waited_s=waited_s, slowed_s=slowed_s)
