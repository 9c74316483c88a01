"""The record of a run over hosts sums up as the journal of one process does, from rows alone."""

import pytest

from launcher.errors import StoppedBySignal, TrainingError
from launcher.runtime.checkpoints.checkpoint_manifest import Progress
from launcher.runtime.hosts.host_contract import HostEvent
from launcher.runtime.hosts.host_record import Begun, HostRecord
from launcher.runtime.records.goodput import Goodput
from launcher.runtime.records.metrics import Meter, eval_row
from launcher.runtime.records.sinks import Sink

METER = Meter(
    model_flops_per_step=8e12, num_devices=4, peak_flops_per_s=None, global_batch=16,
    units_per_sample=1, sample_unit="samples", predicted_step_s=0.25,
)  # fmt: skip


class Told(Sink):
    """Remembers its summary, or refuses it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.summary, self.error = None, error

    def write(self, row) -> None:
        del row

    def finish(self, summary) -> None:
        self.summary = summary
        if self.error is not None:
            raise self.error


def record_of(*sinks: Sink, progress: Progress | None = None, first_step: int = 0) -> HostRecord:
    begun = Begun(planned_steps=50, first_step=first_step, progress=progress)
    return HostRecord(sinks, METER, begun, Goodput, clock=lambda: 7.0)


def take_rows(record: HostRecord, losses, *, first: int = 1, step_s: float = 0.5, **more) -> None:
    for step, loss in enumerate(losses, first):
        row = METER.train_row(
            step=step, loss=loss, learning_rate=0.1, grad_norm=1.0, step_s=step_s,
            peak_bytes_per_device=100 + step, model_metrics={}, **more,
        )  # fmt: skip
        record.take(HostEvent(kind="row", step=step, row=row))


def test_the_summary_of_a_run_that_fails():
    told = Told()
    record = record_of(told)
    take_rows(record, [9.0, 4.0], step_s=30.0)  # the warm-up
    take_rows(record, [3.0, 5.0, float("nan")], first=3, checkpoint_s=0.25, scaling=(2.0, 1))
    record.take(HostEvent(kind="row", step=4, row=eval_row(4, 2.5)))
    record.finish_despite(TrainingError("lost"))
    summary = told.summary
    assert (summary.status, summary.steps, summary.planned_steps) == ("failed", 5, 50)
    assert (summary.loss, summary.best_loss, summary.eval_loss) == (5.0, 3.0, 2.5)
    assert (summary.skipped_steps, summary.checkpoints, summary.checkpoint_s) == (1, 3, 0.75)
    assert (summary.measured["step_s"], summary.timed_steps) == (0.5, 3)
    assert summary.measured["tflops_per_device"] == pytest.approx(4.0)
    assert summary.measured["peak_bytes_per_device"] == 105
    assert summary.measured_over_predicted == 2.0


def test_what_a_checkpoint_has_goes_before():
    progress = Progress(loss=2.0, best_loss=1.0, eval_loss=1.5, skipped_steps=4)
    summary = record_of(progress=progress, first_step=20).summary("stopped")
    assert (summary.steps, summary.loss, summary.best_loss) == (20, 2.0, 1.0)
    assert (summary.eval_loss, summary.skipped_steps) == (1.5, 4)
    assert summary.measured["step_s"] is None


def test_steps_after_a_restart_warm_up_again():
    record = record_of()
    take_rows(record, [4.0] * 6)
    record.rewind(4)
    assert record.num_steps == 4
    take_rows(record, [4.0] * 2, first=5, step_s=90.0)
    take_rows(record, [4.0] * 2, first=7)
    assert record.summary("done").measured["step_s"] == 0.5


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (StoppedBySignal("SIGTERM"), "stopped"),
        (TrainingError("x"), "failed"),
    ],
)
def test_how_a_run_ended(error, status):
    told = Told()
    record_of(told).finish_despite(error)
    assert told.summary.status == status


def test_a_sink_that_fails_keeps_no_other_from_the_summary(caplog):
    broken, told = Told(OSError("full")), Told()
    record = record_of(broken, told)
    record.finish_despite(TrainingError("lost"))
    assert told.summary.status == "failed"
    assert "full (while ending after: lost)" in caplog.text
    with pytest.raises(OSError, match="full"):
        record.finish(told.summary, "done")
    assert told.summary.status == "done"


def test_lines_of_hosts_are_lines_of_the_run(caplog):
    record_of().take(HostEvent(kind="log", step=3, text="the loss jumps", level=30))
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "the loss jumps")
    ]
