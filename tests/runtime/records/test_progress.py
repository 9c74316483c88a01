"""What a person sees: log lines and how many of them, the live bar, phases, the final lines."""

import contextlib
import dataclasses
import io
import logging

import pytest
from rich.console import Console

from launcher.logs import ConsoleHandler
from launcher.runtime.records.metrics import Meter, TrainSummary, eval_row
from launcher.runtime.records.progress import (
    BarSink,
    LineRate,
    LogSink,
    is_milestone,
    phase,
    progress_sink,
)
from launcher.runtime.records.progress_text import describe_row, duration, final_lines, loss_text

LOGGER = "launcher.runtime.records.progress"
METER = Meter(
    model_flops_per_step=1e12,
    num_devices=2,
    peak_flops_per_s=4e12,
    global_batch=8,
    units_per_sample=512,
    sample_unit="tokens",
    predicted_step_s=0.25,
)
SUMMARY = TrainSummary(
    status="done",
    steps=40,
    planned_steps=40,
    loss=1.5,
    best_loss=1.25,
    eval_loss=1.75,
    wall_s=125.0,
    measured={**METER.speed(0.5), "peak_bytes_per_device": None},
    timed_steps=38,
    predicted_step_s=0.25,
)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make_row(step: int, meter: Meter = METER, loss: float = 2.5) -> dict:
    return meter.train_row(
        step=step,
        loss=loss,
        learning_rate=1e-3,
        grad_norm=1.0,
        step_s=0.5,
        peak_bytes_per_device=None,
        model_metrics={},
    )


def make_console(*, terminal: bool, width: int = 80) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, force_interactive=terminal, width=width
    )


@pytest.fixture(autouse=True)
def a_capable_terminal(monkeypatch):
    """Rich draws nothing live on a dumb terminal, even when told that it is interactive."""
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, LOGGER)
    return lambda: [record.getMessage() for record in caplog.records]


def due_steps(steps: int, step_s: float, first: int = 1) -> list[int]:
    clock = Clock()
    rate = LineRate(steps, clock)
    due = []
    for step in range(first, steps + 1):
        clock.now_s += step_s
        if rate.is_due(step):
            due.append(step)
    return due


def test_a_quick_run_gets_its_first_steps_and_every_tenth():
    assert due_steps(steps=40, step_s=0.1) == [1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40]


def test_slow_steps_get_a_line_every_ten_seconds():
    # Steps of 4 s: every third is 10 s or more after the line before.
    assert due_steps(steps=10_000, step_s=4.0)[:7] == [1, 2, 3, 6, 9, 12, 15]


def test_a_long_run_gets_a_line_a_minute():
    due = due_steps(steps=20_000, step_s=1.0)
    assert [due[-2] - due[-3], due[-3] - due[-4]] == [60, 60]
    assert len(due) < 500


def test_a_resumed_run_also_gets_its_first_steps():
    assert due_steps(steps=1000, step_s=0.1, first=501)[:4] == [501, 502, 503, 600]


@pytest.mark.parametrize("steps", [1, 3, 10, 99, 1000])
def test_milestones_are_at_most_ten_and_end_with_the_last_step(steps):
    milestones = [step for step in range(1, steps + 1) if is_milestone(step, steps)]
    assert len(milestones) == min(steps, 10)
    assert milestones[-1] == steps


def test_log_lines_say_all_there_is(lines, tmp_path):
    clock = Clock()
    sink = LogSink(METER, 40, tmp_path, clock)
    for step, took_s in ((1, 90.0), (2, 30.0), (3, 0.5)):  # the first two are the warm-up
        clock.now_s += took_s
        sink.write(make_row(step))
    sink.write(eval_row(3, 2.25))
    numbers = "loss 2.5000  8.19k tokens/s  1 TFLOP/s/device  MFU 25.0 %  500 ms per step"
    assert lines() == [
        f"step  1/40  {numbers}",
        f"step  2/40  {numbers}",
        f"step  3/40  {numbers}  ETA 18.5 s",
        "step  3/40  eval_loss 2.2500",
    ]


def test_log_lines_admit_what_is_unknown(lines, tmp_path):
    meter = dataclasses.replace(METER, peak_flops_per_s=None)
    LogSink(meter, 40, tmp_path, Clock()).write(make_row(1, meter, loss=float("nan")))
    assert "loss not finite  8.19k tokens/s  1 TFLOP/s/device  MFU ?" in lines()[0]


def test_final_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "outputs" / "one"
    (run_dir / "wandb").mkdir(parents=True)
    for name in ("summary.json", "plan.json", "metrics.jsonl"):
        (run_dir / name).touch()
    assert final_lines(SUMMARY, METER, run_dir) == (
        "done: 40 of 40 steps in 2 min 05 s, loss 1.5000 (best 1.2500), eval_loss 1.7500",
        "speed: 8.19k tokens/s  1 TFLOP/s/device  MFU 25.0 %",
        "step time: 500 ms measured (median of 38 steps, without the first 2), 250 ms predicted "
        "(measured / predicted = 2.00)",
        "written:",
        "  outputs/one/plan.json",
        "  outputs/one/metrics.jsonl",
        "  outputs/one/summary.json",
        "  outputs/one/wandb/",
    )


def test_final_lines_of_a_run_that_never_finished_a_step(tmp_path):
    meter = dataclasses.replace(METER, peak_flops_per_s=None, predicted_step_s=None)
    summary = dataclasses.replace(
        SUMMARY,
        status="failed",
        steps=0,
        loss=None,
        best_loss=None,
        eval_loss=None,
        measured={**meter.speed(None), "peak_bytes_per_device": None},
        predicted_step_s=None,
    )
    assert final_lines(summary, meter, tmp_path) == (
        "failed: 0 of 40 steps in 2 min 05 s",
        "speed: ? tokens/s  ? TFLOP/s/device  MFU ?",
        "MFU is not known: the cluster gives no peak FLOP/s for its devices",
        "step time: none measured, no prediction",
    )


def test_a_run_whose_steps_were_all_watched_says_so(tmp_path):
    measured = {**METER.speed(None), "peak_bytes_per_device": None}
    summary = dataclasses.replace(SUMMARY, measured=measured, timed_steps=0)
    (line,) = [line for line in final_lines(summary, METER, tmp_path) if "step time" in line]
    watched = "all steps were traced or profiled, or came right after"
    assert line == f"step time: none measured ({watched}), 250 ms predicted"


GIB = 2.0**30


@pytest.mark.parametrize(
    ("measured", "predicted", "text"),
    [
        (None, (), None),
        (
            None,
            (GIB, 2 * GIB),
            "at most 2 GiB predicted; these devices do not count what they use",
        ),
        (
            (int(1.5 * GIB), int(GIB)),
            (GIB, 2 * GIB),
            "stage 0 1.5 GiB measured, 1 GiB predicted (measured / predicted = 1.50); "
            "stage 1 1 GiB measured, 2 GiB predicted (measured / predicted = 0.50)",
        ),
    ],
)
def test_the_end_says_what_memory_each_stage_used(measured, predicted, text, tmp_path):
    meter = dataclasses.replace(METER, predicted_peak_bytes_per_stage=predicted)
    peaks = {"peak_bytes_per_device": None, "peak_bytes_per_stage": measured}
    summary = dataclasses.replace(SUMMARY, measured={**METER.speed(0.5), **peaks})
    found = [line for line in final_lines(summary, meter, tmp_path) if line.startswith("memory")]
    assert found == ([] if text is None else [f"memory per device: {text}"])
    assert summary.as_row()["measured_peak_bytes_per_stage"] == measured


def test_the_end_does_not_list_the_memory_of_many_stages(tmp_path):
    meter = dataclasses.replace(METER, predicted_peak_bytes_per_stage=(GIB,) * 12)
    peaks = {"peak_bytes_per_device": 1, "peak_bytes_per_stage": (int(GIB),) * 12}
    summary = dataclasses.replace(SUMMARY, measured={**METER.speed(0.5), **peaks})
    (line,) = (x for x in final_lines(summary, meter, tmp_path) if x.startswith("memory"))
    assert line.count("stage ") == 8
    assert line.endswith("; the other 4 in summary.json")


def promise(summary: TrainSummary, meter: Meter, folder) -> str:
    (line,) = (text for text in final_lines(summary, meter, folder) if text.startswith("step time"))
    return line


@pytest.mark.parametrize(
    ("timed_steps", "text"),
    [
        (0, "step time: 500 ms measured (one step, with its warm-up), 250 ms predicted"),
        (1, "step time: 500 ms measured (median of 1 step, without the first 2), 250 ms predicted"),
    ],
)
def test_the_end_says_which_steps_the_step_time_is_of(timed_steps, text, tmp_path):
    summary = dataclasses.replace(SUMMARY, timed_steps=timed_steps)
    assert promise(summary, METER, tmp_path).startswith(text)


def test_what_is_measured_elsewhere_than_predicted_is_not_compared(tmp_path):
    meter = dataclasses.replace(
        METER, peak_flops_per_s=None, incomparable="CPU devices stand for V100"
    )
    summary = dataclasses.replace(SUMMARY, comparable=False)
    lines = final_lines(summary, meter, tmp_path)
    assert [line for line in lines if "MFU" in line] == [
        "speed: 8.19k tokens/s  1 TFLOP/s/device  MFU 25.0 %",  # the summary's own
        "step time: 500 ms measured (median of 38 steps, without the first 2), 250 ms predicted; "
        "not to be compared, and no MFU: CPU devices stand for V100",
    ]
    assert summary.as_row()["measured_over_predicted_step_s"] is None


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (2.31449, "2.3145"), (99999.0, "99999.0000"), (-1.5, "-1.5000"), (0.0, "0.0000"),
        (1.23456e12, "1.235e+12"), (123456.0, "1.235e+05"), (0.00012345, "0.0001234"),
        (None, "not finite"), (float("nan"), "not finite"),
    ],
)  # fmt: skip
def test_losses_read_well_at_any_size(loss, text):
    assert loss_text(loss) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "?"),
        (0.0123, "12.3 ms"),
        (0.9999, "1.00 s"),
        (59.99, "1 min 00 s"),
        (245.0, "4 min 05 s"),
        (7380.0, "2 h 03 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("batch", "text"), [(0.5, "1.00 samples"), (4.9999e5, "1.00M samples"), (7e8, "1.40G samples")]
)
def test_throughput_keeps_three_digits(batch, text, lines, tmp_path):
    meter = dataclasses.replace(
        METER, global_batch=batch, units_per_sample=1, sample_unit="samples"
    )
    LogSink(meter, 40, tmp_path, Clock()).write(make_row(1, meter))
    assert text in lines()[0]


def test_without_a_terminal_there_is_no_bar(tmp_path):
    console = make_console(terminal=False)
    assert isinstance(progress_sink(console, METER, 40, tmp_path), LogSink)


@contextlib.contextmanager
def log_on_terminal():
    """Give a terminal of 80 columns with the log on it, as a run sets it up."""
    console = make_console(terminal=True)
    logger = logging.getLogger("launcher")
    handler = ConsoleHandler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with contextlib.redirect_stdout(console.file):
        yield console
    logger.setLevel(before)
    logger.removeHandler(handler)


def test_the_bar_shows_the_newest_numbers_and_leaves_milestones(tmp_path):
    with log_on_terminal() as terminal:
        sink = progress_sink(terminal, METER, 40, tmp_path)
        assert isinstance(sink, BarSink)
        sink.write(make_row(1))
        sink.write(make_row(4))
        sink.write(eval_row(4, 2.25))
        sink.write(make_row(5, loss=2.125))
        sink.finish(SUMMARY)
    shown = terminal.file.getvalue()
    assert " 5/40" in shown
    assert "loss 2.1250  8.19k tokens/s  1 TFLOP/s/device  MFU 25.0 %" in shown
    assert "ETA" in shown
    assert "step  4/40  loss 2.5000" in shown
    assert "step  4/40  eval_loss 2.2500" in shown
    assert "step  5/40" not in shown
    assert "done: 40 of 40 steps" in shown


def test_the_numbers_fit_a_terminal_of_80_columns(tmp_path):
    console = make_console(terminal=True)
    meter = dataclasses.replace(METER, model_flops_per_step=1.9876e9)
    sink = BarSink(console, meter, 1_000_000, tmp_path)
    sink.write(make_row(999_999, meter, loss=12.3456))
    sink.finish(SUMMARY)
    shown = console.file.getvalue()
    assert " 999999/1000000" in shown
    assert "MFU 0.0 %" in shown
    assert "…" not in shown
    assert len(describe_row(make_row(540), METER, 1000)) <= 80


def test_a_phase_in_a_log(lines):
    clock = Clock()
    with phase(make_console(terminal=False), "compiling 6 programs", clock) as update:
        update("1 of 6")
        clock.now_s += 11
        update("2 of 6")
        update("3 of 6")
        clock.now_s += 5
    assert lines() == [
        "compiling 6 programs ...",
        "compiling 6 programs: 2 of 6",
        "compiling 6 programs: done in 16.0 s",
    ]


def test_a_phase_on_a_terminal():
    with log_on_terminal() as terminal, phase(terminal, "planning [gpt]") as update:
        update("3 of 6")
    shown = terminal.file.getvalue()
    assert "planning [gpt]: 3 of 6" in shown
    assert "0:00:00" in shown
    assert "planning [gpt]: done in" in shown.splitlines()[-1]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_phase_that_fails_is_not_done(lines, is_terminal):
    with (
        pytest.raises(ValueError, match="no plan"),
        phase(make_console(terminal=is_terminal), "planning"),
    ):
        raise ValueError("no plan")
    assert not any("done" in line for line in lines())
