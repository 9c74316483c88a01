"""What a run leaves behind: rows, step times, evaluations, and how it says that it ended."""

import json
import math
import threading

import jax
import numpy as np
import pytest

from launcher.errors import StorageError, TrainingError
from launcher.runtime.records.metrics import to_json
from launcher.runtime.records.sinks import JsonlSink
from launcher.runtime.training import train_loop


def test_rows_and_summary(fake):
    sink = fake.Sink()
    summary = fake.train(
        fake.Executor([3.0, 1.0, 2.0], peak_bytes=(77, 66)), fake.settings(3), sink
    )
    assert [row["step"] for row in sink.rows] == [1, 2, 3]
    assert [row["loss"] for row in sink.rows] == [3.0, 1.0, 2.0]
    assert sink.rows[1] == {
        "step": 2,
        "loss": 1.0,
        "learning_rate": 0.2,
        "grad_norm": 0.5,
        "step_s": 1.0,
        "tokens_per_s": 32.0,
        "tflops_per_device": 0.0005,
        "mfu": None,
        "predicted_step_s": 0.25,
        "peak_bytes_per_device": 77,
        "aux": 0.25,
    }
    assert sink.summaries == [summary]
    assert (summary.status, summary.steps, summary.planned_steps) == ("done", 3, 3)
    assert (summary.loss, summary.best_loss, summary.eval_loss) == (2.0, 1.0, None)
    assert summary.measured["step_s"] == 1.0
    assert summary.measured["peak_bytes_per_device"] == 77
    assert summary.measured["peak_bytes_per_stage"] == (77, 66)


def test_real_device_scalars_and_an_optax_like_schedule(fake, tmp_path):
    class JaxExecutor(fake.Executor):
        def step(self, step):
            total = jax.numpy.float32(step) + 1
            return fake.StepResult(loss=total, grad_norm=total, metrics={})

    train_loop.run(
        JaxExecutor([]),
        fake.Dataset(),
        fake.settings(2),
        fake.METER,
        [JsonlSink(tmp_path)],
        learning_rate=lambda step: jax.numpy.minimum(1.0, step / 4),
        explain_memory=TrainingError,
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["loss"], row["learning_rate"]) for row in rows] == [(1.0, 0.0), (2.0, 0.25)]


def test_a_step_is_timed_to_its_completion_not_to_when_it_is_read(fake):
    # Where steps run while they are dispatched, the last one before the end is read at once after
    # the one before it, and the first one only after the second.
    now_s = [0.0]
    times_taken = threading.Semaphore(1)

    def clock():
        taken_s = now_s[0]
        if threading.current_thread().name.startswith("completions"):
            times_taken.release()
        return taken_s

    class Synchronous(fake.Executor):
        def step(self, step):
            assert times_taken.acquire(timeout=5)
            now_s[0] += 1.0
            return super().step(step)

    sink = fake.Sink()
    fake.train(Synchronous([1.0] * 4), fake.settings(4), sink, clock=clock)
    assert [row["step_s"] for row in sink.rows] == [1.0] * 4


def test_the_schedule_is_compiled_before_the_first_step(fake):
    executor = fake.Executor([3.0, 2.0])

    def rate(step):
        executor.events.append(f"rate of {step}")
        return 0.1

    train_loop.run(
        executor, fake.Dataset(), fake.settings(2), fake.METER, [], learning_rate=rate,
        explain_memory=lambda error: error,
    )  # fmt: skip
    assert executor.events[:2] == ["rate of 0", "step 0"]


def test_the_time_of_an_evaluation_is_no_steps(fake):
    now_s = [0.0]

    class SlowEvaluation(fake.Executor):
        def step(self, step):
            now_s[0] += 1.0
            return super().step(step)

        def evaluate(self, batch):
            now_s[0] += 100.0
            return super().evaluate(batch)

    sink = fake.Sink()
    executor = SlowEvaluation([1.0] * 6)
    fake.train(
        executor, fake.settings(6, eval_every=3, eval_batches=1), sink, clock=lambda: now_s[0]
    )
    steps_s = [row["step_s"] for row in sink.rows if "loss" in row]
    assert max(steps_s) <= 2.0
    assert sum(steps_s) == 6.0


def test_an_eval_loss_that_is_not_finite_is_null_and_warned_of(fake, caplog):
    class NanEvaluation(fake.Executor):
        def evaluate(self, batch):
            return np.float32("nan")

    sink = fake.Sink()
    fake.train(NanEvaluation([1.0]), fake.settings(1, eval_batches=1), sink)
    assert sink.rows[-1] == {"step": 1, "eval_loss": None}
    assert "eval_loss is nan after step 1, though the training loss is finite" in caplog.text
    assert to_json(sink.rows[-1]) == '{"step": 1, "eval_loss": null}'


def test_a_run_that_was_done_already_has_nothing_to_measure(fake):
    summary = fake.train(fake.Executor([]), fake.settings(3, first_step=3))
    assert (summary.status, summary.steps, summary.loss) == ("done", 3, None)
    assert summary.measured["step_s"] is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(fake, tmp_path, loss):
    sink = fake.Sink()
    with pytest.raises(
        TrainingError,
        match=rf"the loss is {loss} at step 3 of 9 \(the last finite loss was 2, gradient norm 0.5, "
        r"learning rate 0.3\): lower optimizer.learning_rate, "
        r"clip harder with optimizer.clip_norm, "
        r"or compute in model.dtype=fp32",
    ) as caught:
        fake.train(
            fake.Executor([3.0, 2.0, loss, 1.0]), fake.settings(9), JsonlSink(tmp_path), sink
        )
    assert caught.value.exit_status == 5
    assert (sink.summaries[0].status, sink.summaries[0].loss) == ("failed", 2.0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] is None
    assert "NaN" not in lines[-1]


def test_a_sink_that_fails_at_the_end_keeps_no_other_from_ending(fake):
    first, second = fake.Sink(StorageError("disk full")), fake.Sink()
    with pytest.raises(StorageError, match="disk full"):
        fake.train(fake.Executor([1.0]), fake.settings(1), first, second)
    assert second.summaries[0].status == "done"


def test_the_first_error_is_the_one_that_is_told(fake, caplog):
    sink = fake.Sink(StorageError("disk full"))
    with pytest.raises(TrainingError, match="the loss is nan"):
        fake.train(fake.Executor([math.nan]), fake.settings(1), sink)
    assert "disk full (while ending after: the loss is nan" in caplog.text
