"""Ctrl-C in the midst of training: once, twice, ignored, and outside the main thread."""

import os
import signal
import threading
import time

import pytest

from launcher.errors import StoppedBySignal
from launcher.runtime.training.interrupt import STOP_SIGNALS, stop_at_once


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_comes_where_exceptions_are_dropped_is_not_lost():
    class Collected:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)  # the handler runs in here, and what it raises is dropped

    def get_ready():
        with stop_at_once():
            Collected()
            reached.append("behind it")
            time.sleep(5)

    reached = []
    with pytest.raises(StoppedBySignal, match="^SIGTERM$"):
        get_ready()
    assert reached == ["behind it"]


def test_ctrl_c_finishes_the_step_and_the_summary(fake, caplog):
    sink = fake.Sink()
    before = signal.getsignal(signal.SIGINT)
    executor = fake.Executor([1.0] * 9, at_step={2: interrupt})
    with pytest.raises(KeyboardInterrupt):
        fake.train(executor, fake.settings(9, eval_batches=1), sink)
    assert [row["step"] for row in sink.rows] == [1, 2, 3]
    assert (sink.summaries[0].status, sink.summaries[0].steps) == ("interrupted", 3)
    assert caplog.text.count("Ctrl-C again stops at once") == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_during_an_evaluation(fake):
    class Interrupted(fake.Executor):
        def evaluate(self, batch):
            interrupt()
            return super().evaluate(batch)

    sink = fake.Sink()
    executor = Interrupted([1.0] * 9)
    with pytest.raises(KeyboardInterrupt):
        fake.train(executor, fake.settings(9, eval_every=3, eval_batches=5), sink)
    assert "evaluate 1" not in executor.events
    assert [row["step"] for row in sink.rows] == [1, 2, 3]
    assert sink.summaries[0].eval_loss is None


def test_a_second_ctrl_c_stops_at_once(fake):
    sink = fake.Sink()

    def twice():
        interrupt()
        interrupt()

    executor = fake.Executor([1.0] * 9, at_step={2: twice})
    with pytest.raises(KeyboardInterrupt):
        fake.train(executor, fake.settings(9), sink)
    # Step 1 was dispatched but not read, and step 2 never came to its end.
    assert [row["step"] for row in sink.rows] == [1]
    assert sink.summaries[0].status == "interrupted"


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it(fake):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        summary = fake.train(fake.Executor([1.0] * 4, at_step={2: interrupt}), fake.settings(4))
    finally:
        signal.signal(signal.SIGINT, before)
    assert summary.status == "done"


def test_the_loop_runs_outside_the_main_thread(fake):
    summaries = []
    worker = threading.Thread(
        target=lambda: summaries.append(fake.train(fake.Executor([1.0] * 2), fake.settings(2)))
    )
    worker.start()
    worker.join(30)
    assert summaries[0].status == "done"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_scheduler_s_signal_ends_after_the_step_however_often_it_comes(fake, number, caplog):
    sink = fake.Sink()

    def twice():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    executor = fake.Executor([1.0] * 9, at_step={2: twice})
    with pytest.raises(StoppedBySignal, match=f"{number.name} after step 3 of 9"):
        fake.train(executor, fake.settings(9), sink)
    assert (sink.summaries[0].status, sink.summaries[0].steps) == ("stopped", 3)
    assert caplog.text.count(f"{number.name}: this step is finished") == 1


def test_ctrl_c_after_a_scheduler_s_signal_stops_at_once(fake):
    def both():
        os.kill(os.getpid(), signal.SIGTERM)
        interrupt()

    sink = fake.Sink()
    with pytest.raises(KeyboardInterrupt):
        fake.train(fake.Executor([1.0] * 9, at_step={2: both}), fake.settings(9), sink)
    assert sink.summaries[0].status == "interrupted"


def test_before_training_a_scheduler_s_signal_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)

    def get_ready():
        with stop_at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(StoppedBySignal, match="^SIGTERM$"):
        get_ready()
    assert signal.getsignal(signal.SIGTERM) is before
