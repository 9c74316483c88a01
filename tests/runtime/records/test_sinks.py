"""The files that sinks write: metrics.jsonl row by row, summary.json whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest

from launcher.autopar.text.atomic_file import write_atomically
from launcher.errors import StorageError
from launcher.runtime.records.metrics import Meter, PlanMetrics, TrainSummary
from launcher.runtime.records.sinks import JsonlSink, SummarySink, check_metrics, drop_rows_after
from launcher.runtime.records.summary_file import write_summary

METER = Meter(
    model_flops_per_step=1e9,
    num_devices=2,
    peak_flops_per_s=None,
    global_batch=8,
    units_per_sample=1,
    sample_unit="samples",
    predicted_step_s=0.25,
)
PLAN = PlanMetrics(
    step_s=0.25,
    bubble_fraction=0.1,
    peak_bytes_per_device=(5.0, 6.0),
    communicated_bytes=100.0,
    tflops_per_device=0.1,
    solver_s=2.0,
)
SUMMARY = TrainSummary(
    status="done",
    steps=4,
    planned_steps=4,
    loss=1.5,
    best_loss=1.25,
    eval_loss=1.75,
    wall_s=2.0,
    measured={**METER.speed(0.5), "peak_bytes_per_device": None},
    timed_steps=38,
    predicted_step_s=0.25,
)


def fail_with(number: int):
    """Make a stand-in for a system call that fails (root may write anywhere, so modes won't do)."""

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def read_rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_rows_can_be_read_as_soon_as_they_are_written(tmp_path):
    sink = JsonlSink(tmp_path)
    sink.write({"step": 1, "loss": 2.0, "mfu": None})
    assert read_rows(tmp_path) == [{"step": 1, "loss": 2.0, "mfu": None}]
    sink.write({"step": 1, "eval_loss": 2.5})
    sink.finish(SUMMARY)
    assert read_rows(tmp_path)[1] == {"step": 1, "eval_loss": 2.5}


def test_a_resumed_run_appends(tmp_path):
    for step in (1, 2):
        sink = JsonlSink(tmp_path)
        sink.write({"step": step})
        sink.finish(SUMMARY)
    assert read_rows(tmp_path) == [{"step": 1}, {"step": 2}]


def test_metrics_on_a_full_disk(tmp_path):
    # The one device that really is full.
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    sink = JsonlSink(tmp_path)
    with pytest.raises(StorageError, match=r"metrics\.jsonl \(No space left on device; 12 bytes"):
        sink.write({"step": 1})
    sink.finish(SUMMARY)


def test_metrics_that_cannot_be_appended_to_are_found_before_there_are_any(tmp_path):
    check_metrics(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl .*Is a directory"):
        check_metrics(tmp_path)


def test_metrics_in_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(
        StorageError, match=r"cannot write .*gone.metrics\.jsonl .*hydra\.run\.dir="
    ):
        JsonlSink(tmp_path / "gone")


def test_summary_holds_measured_and_predicted(tmp_path):
    sink = SummarySink(tmp_path, PLAN)
    sink.write({"step": 1})
    assert not (tmp_path / "summary.json").exists()
    sink.finish(SUMMARY)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "done"
    assert (summary["loss"], summary["best_loss"], summary["eval_loss"]) == (1.5, 1.25, 1.75)
    assert (summary["measured_step_s"], summary["predicted_step_s"]) == (0.5, 0.25)
    assert summary["measured_over_predicted_step_s"] == 2.0
    assert summary["measured_mfu"] is None
    assert summary["predicted_peak_bytes_per_stage"] == [5.0, 6.0]
    assert summary["solver_s"] == 2.0


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    for loss in (2.0, 1.0):
        path = write_summary(tmp_path, {"loss": loss})
    assert json.loads(path.read_text()) == {"loss": 1.0}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "text", "cure"),
    [
        (errno.ENOSPC, "No space left on device", "free some space there"),
        (errno.EROFS, "Read-only file system", "set hydra.run.dir to a folder that can be written"),
        (errno.EACCES, "Permission denied", "set hydra.run.dir to a folder that can be written"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_storage_that_fails_keeps_the_old_file(tmp_path, monkeypatch, call, number, text, cure):
    path = tmp_path / "summary.json"
    path.write_text("old")
    monkeypatch.setattr(os, call, fail_with(number))
    with pytest.raises(StorageError, match=rf"summary\.json \({text}.*\).*{cure}") as caught:
        write_atomically(path, "new")
    assert ("; 3 bytes needed, " in str(caught.value)) == (number == errno.ENOSPC)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_storage_error_names_the_folder_even_if_it_is_gone(tmp_path):
    with pytest.raises(StorageError, match=r"\(No such file .*\); hydra\.run\.dir=.*gone: set"):
        write_atomically(tmp_path / "gone" / "summary.json", "new")


def test_storage_error_ends_in_status_6():
    assert StorageError.exit_status == 6


def test_rows_after_a_checkpoint_are_taken_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_rows_after(tmp_path, 2)  # there is no file
    assert not path.exists()
    rows = ['{"step": 1, "loss": 2.0}', '{"step": 2, "loss": 1.0}', '{"step": 2, "eval_loss": 3.0}']
    kept = "".join(f"{row}\n" for row in rows)
    # Rows that come again, a line that is none, and one that was cut short.
    path.write_text(kept + '{"step": 3, "loss": 0.5}\nnonsense\n[]\n{"step": 2, "lo')
    drop_rows_after(tmp_path, 2)
    assert path.read_text() == kept
    drop_rows_after(tmp_path, 2)
    assert path.read_text() == kept


def test_rows_that_cannot_be_read(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        drop_rows_after(tmp_path, 2)
