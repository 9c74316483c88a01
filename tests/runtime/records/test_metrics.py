"""Step times, throughput, MFU, and the rows and summaries made of them."""

import itertools
import json
import math

import numpy as np
import pytest

from launcher.runtime.records.metrics import (
    Meter,
    PlanMetrics,
    StepTimer,
    TrainSummary,
    eval_row,
    finite,
    is_evaluation,
    to_json,
)

TRAIN_KEYS = (
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "step_s",
    "tokens_per_s",
    "tflops_per_device",
    "mfu",
    "predicted_step_s",
    "peak_bytes_per_device",
)


def make_meter(**changes) -> Meter:
    fields = {
        "model_flops_per_step": 8e12,
        "num_devices": 4,
        "peak_flops_per_s": 10e12,
        "global_batch": 16,
        "units_per_sample": 128,
        "sample_unit": "tokens",
        "predicted_step_s": 0.4,
    }
    return Meter(**fields | changes)


def make_row(meter: Meter, **changes) -> dict:
    fields = {
        "step": 3,
        "loss": 2.5,
        "learning_rate": 1e-3,
        "grad_norm": 0.7,
        "step_s": 0.5,
        "peak_bytes_per_device": 1000,
        "model_metrics": {},
    }
    return meter.train_row(**fields | changes)


def test_laps_run_from_completion_to_completion():
    timer = StepTimer(clock=lambda: 0.0)
    assert [timer.lap(5.0), timer.lap(6.0), timer.lap(6.5)] == [5.0, 1.0, 0.5]


def test_restart_leaves_out_what_passed_since_the_last_lap():
    timer = StepTimer(clock=iter([0.0, 100.0, 103.0]).__next__)
    timer.lap(1.0)
    timer.restart()
    assert timer.lap(101.5) == 1.5
    assert timer.wall_s == 103.0


@pytest.mark.parametrize(
    ("laps_s", "median_s", "timed_steps"),
    [
        ([], None, 0),
        ([9.0], 9.0, 0),
        ([9.0, 4.0], 4.0, 0),
        # 9 and 4 are warm-up.
        ([9.0, 4.0, 1.0], 1.0, 1),
        ([9.0, 4.0, 1.0, 3.0, 2.0], 2.0, 3),
        ([9.0, 4.0, 1.0, 2.0], 1.5, 2),
    ],
)
def test_median_step_leaves_out_the_warm_up(laps_s, median_s, timed_steps):
    timer = StepTimer(clock=lambda: 0.0)
    for completed_s in itertools.accumulate(laps_s):
        timer.lap(completed_s)
    assert (timer.median_s, timer.timed_steps) == (median_s, timed_steps)


def test_steps_that_were_watched_are_left_out_of_the_median():
    timer = StepTimer(clock=lambda: 0.0)
    typical = {3.0: True, 3.5: True, 4.0: True, 90.0: False, 91.0: True, 94.0: True}
    for completed_s, is_typical in typical.items():
        timer.lap(completed_s, is_typical=is_typical)
    assert (timer.median_s, timer.timed_steps) == (1.0, 3)  # of 0.5, 1 and 3 s


def test_a_short_run_takes_a_step_of_its_warm_up_before_one_that_was_watched():
    timer = StepTimer(clock=lambda: 0.0)
    timer.lap(9.0, is_typical=False)
    assert (timer.median_s, timer.timed_steps) == (None, 0)
    timer.lap(11.0)
    timer.lap(99.0, is_typical=False)
    assert (timer.median_s, timer.timed_steps) == (2.0, 0)


def test_speed_of_a_step():
    # 16 samples x 128 tokens / 0.5 s; 8 TFLOP / 4 devices / 0.5 s = 4 TFLOP/s of a peak of 10.
    assert make_meter().speed(0.5) == {
        "step_s": 0.5,
        "tokens_per_s": 4096.0,
        "tflops_per_device": 4.0,
        "mfu": 0.4,
    }


def test_samples_are_called_samples():
    meter = make_meter(sample_unit="samples", units_per_sample=1)
    assert meter.speed(0.5)["samples_per_s"] == 32.0
    assert "tokens_per_s" not in meter.speed(0.5)


def test_mfu_of_an_unknown_peak_is_null_not_a_guess():
    assert make_meter(peak_flops_per_s=None).speed(0.5)["mfu"] is None


@pytest.mark.parametrize("step_s", [None, 0.0])
def test_speed_without_a_step_time_is_null(step_s):
    speed = make_meter().speed(step_s)
    assert (speed["tokens_per_s"], speed["tflops_per_device"], speed["mfu"]) == (None, None, None)


def test_train_row_has_the_documented_keys_in_order():
    assert tuple(make_row(make_meter())) == TRAIN_KEYS


def test_train_row_adds_model_metrics_and_keeps_our_names():
    metrics = {"accuracy": np.float32(0.5), "loss": 9.0, "eval_loss": 8.0}
    row = make_row(make_meter(), model_metrics=metrics)
    assert row["accuracy"] == 0.5
    assert (row["loss"], row["model_loss"]) == (2.5, 9.0)
    assert row["model_eval_loss"] == 8.0
    assert not is_evaluation(row)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_is_not_finite_becomes_null(value):
    row = make_row(make_meter(), loss=value, grad_norm=value, model_metrics={"aux": value})
    assert (row["loss"], row["grad_norm"], row["aux"]) == (None, None, None)
    assert json.loads(to_json(row))["loss"] is None
    assert eval_row(1, value) == {"step": 1, "eval_loss": None}


def test_finite_keeps_integers_whole():
    assert to_json({"a": finite(3), "b": finite(np.int32(3)), "c": None}) == (
        '{"a": 3, "b": 3.0, "c": null}'
    )


def test_plan_metrics_name_the_worst_stage_and_all_of_them():
    plan = PlanMetrics(
        step_s=0.4,
        bubble_fraction=0.25,
        peak_bytes_per_device=(10.0, 30.0),
        communicated_bytes=1e6,
        tflops_per_device=5.0,
        solver_s=1.5,
        num_programs=9,
        compile_s=4.5,
    )
    assert plan.as_row() == {
        "predicted_step_s": 0.4,
        "predicted_bubble_fraction": 0.25,
        "predicted_peak_bytes_per_device": 30.0,
        "predicted_peak_bytes_per_stage": (10.0, 30.0),
        "predicted_communicated_bytes": 1e6,
        "predicted_tflops_per_device": 5.0,
        "solver_s": 1.5,
        "num_programs": 9,
        "compile_s": 4.5,
    }


def test_summary_puts_measured_beside_predicted():
    meter = make_meter()
    summary = TrainSummary(
        status="done",
        steps=5,
        planned_steps=5,
        loss=2.0,
        best_loss=1.9,
        eval_loss=None,
        wall_s=3.0,
        measured={**meter.speed(0.5), "peak_bytes_per_device": 77},
        timed_steps=38,
        predicted_step_s=meter.predicted_step_s,
    )
    row = summary.as_row()
    assert row["measured_step_s"] == 0.5
    assert row["measured_tokens_per_s"] == 4096.0
    assert row["measured_peak_bytes_per_device"] == 77
    assert row["predicted_step_s"] == 0.4
    assert row["measured_over_predicted_step_s"] == pytest.approx(1.25)
    assert json.loads(to_json(row))["eval_loss"] is None
