"""Folders of runs, written as runs write them."""

import json
import pathlib

import pytest
import yaml

from launcher.run_state import note_end, note_phase

CONFIG = {
    "mode": "train",
    "seed": 0,
    "model": {"name": "gpt", "size": "tiny", "hidden": None},
    "parallel": {"name": "auto", "zero": None, "tp": None},
    "data": {"name": "text"},
    "optimizer": {"name": "adamw", "learning_rate": 0.001},
    "logger": {"name": "wandb", "group": None},
    "train": {"steps": 10, "global_batch": 32},
}


def merged(tree: dict, changes: dict) -> dict:
    inner = {
        key: merged(tree[key], value) for key, value in changes.items() if isinstance(value, dict)
    }
    return tree | changes | inner


class Folder:
    """A run's folder, file by file."""

    def __init__(self, path: pathlib.Path, **changes) -> None:
        self.path = path
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(yaml.safe_dump(merged(CONFIG, changes), sort_keys=False))

    def plan(self, step_s: float = 0.1) -> "Folder":
        plan = {
            "global_batch": 32,
            "num_microbatches": 4,
            "schedule": "1f1b",
            "model": {"size": "tiny"},
            "stages": [{}, {}],
            "predicted": {
                "step_s": step_s,
                "bubble_fraction": 0.25,
                "peak_bytes_per_device": [2**20, 3 * 2**20],
            },
        }
        (self.path / "plan.json").write_text(json.dumps(plan))
        return self

    def rows(self, *losses: float, step_s: float = 0.2, eval_loss: float | None = None) -> "Folder":
        rows = [
            {
                "step": step,
                "loss": loss,
                "step_s": step_s,
                "tokens_per_s": 640 / step_s,
                "mfu": None,
            }
            for step, loss in enumerate(losses, start=1)
        ]
        if eval_loss is not None:
            rows.append({"step": len(losses), "eval_loss": eval_loss})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.path / "metrics.jsonl").write_text(text)
        return self

    def note(self, state: str, status: int | None = None, reason: str | None = None) -> "Folder":
        if status is None:
            note_phase(self.path, state)
        else:
            note_end(self.path, status, reason, only_plans=state == "planned")
        return self

    def summary(self, **numbers) -> "Folder":
        (self.path / "summary.json").write_text(json.dumps(numbers))
        return self

    def job(self, job_id: str) -> "Folder":
        (self.path / "job.json").write_text(json.dumps({"job_id": job_id, "submitted": 1.0}))
        return self


@pytest.fixture
def run(tmp_path):
    """Make the folder of a run below a sweep's."""
    return lambda name, **changes: Folder(tmp_path / "sweep" / name, **changes)
