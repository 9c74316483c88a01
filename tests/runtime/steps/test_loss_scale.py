"""Steps that the loss scale skips, as the record of a run has them: rows, rates, lines, and the end."""

import logging
import math

import numpy as np
import pytest

from launcher.errors import ConfigError, TrainingError
from launcher.models.optimizer import DYNAMIC, LossScaling, make_loss_scaling
from launcher.runtime.records.number_watch import MAX_SKIPPED_IN_A_ROW
from launcher.runtime.records.progress import LogSink
from launcher.runtime.records.progress_text import final_lines


def executor_of(fake, norms, scales):
    """Steps with these gradient norms, and these loss scales after them."""

    class Scaled(fake.Executor):
        def step(self, step):
            loss = np.float32("nan" if math.isnan(norms[step]) else 1.0 + step)
            return fake.StepResult(
                loss=loss, grad_norm=np.float32(norms[step]), metrics={},
                loss_scale=None if scales is None else np.float32(scales[step]),
            )  # fmt: skip

    return Scaled([])


BAD = math.inf


def test_a_skipped_step_is_a_row_and_no_error(fake):
    sink = fake.Sink()
    norms = [BAD, math.nan, 0.5, BAD, 0.25]
    executor = executor_of(fake, norms, [8.0, 4.0, 4.0, 2.0, 2.0])
    summary = fake.train(executor, fake.settings(5), sink)
    assert [row["loss_scale"] for row in sink.rows] == [8, 4, 4, 2, 2]
    assert [row["skipped_steps"] for row in sink.rows] == [1, 2, 2, 3, 3]
    assert [row["grad_norm"] for row in sink.rows] == [None, None, 0.5, None, 0.25]
    assert [row["loss"] for row in sink.rows] == [1.0, None, 3.0, 4.0, 5.0]
    # The schedule counts updates: the first is made by the third step.
    np.testing.assert_allclose(
        [row["learning_rate"] for row in sink.rows], [0.1, 0.1, 0.1, 0.2, 0.2]
    )
    assert (summary.status, summary.steps, summary.skipped_steps) == ("done", 5, 3)
    assert (summary.loss, summary.best_loss) == (5.0, 3.0)
    assert summary.as_row()["skipped_steps"] == 3


def test_skipped_steps_have_a_line_each(fake, tmp_path, caplog):
    caplog.set_level(logging.INFO, "launcher")
    norms = [0.5] * 4 + [BAD] + [0.5] * 95
    scales = [8.0] * 4 + [4.0] * 96
    sink = LogSink(fake.METER, 100, tmp_path)
    summary = fake.train(executor_of(fake, norms, scales), fake.settings(100), sink)
    line = "step   5/100  skipped: the gradients overflowed; loss scale 4 from now on"
    assert line in [record.message for record in caplog.records]
    assert (
        "loss 100.0000 (best 1.0000), 1 step skipped, as gradients were not finite" in caplog.text
    )
    assert "skipped" in final_lines(summary, fake.METER, tmp_path)[0]


def test_without_a_dynamic_scale_the_first_overflow_ends_the_run(fake):
    sink = fake.Sink()
    with pytest.raises(TrainingError, match="the gradient norm is inf at step 2 of 3") as caught:
        fake.train(executor_of(fake, [0.5, BAD, 0.5], None), fake.settings(3), sink)
    assert caught.value.exit_status == 5
    assert "loss_scale" not in sink.rows[-1]


def test_a_loss_that_is_not_finite_with_gradients_that_are_is_an_error(fake):
    executor = executor_of(fake, [0.5], [8.0])
    executor.step = lambda step: fake.StepResult(
        loss=np.float32("inf"), grad_norm=np.float32(0.5), metrics={}, loss_scale=np.float32(8)
    )
    with pytest.raises(TrainingError, match="the loss is inf at step 1"):
        fake.train(executor, fake.settings(1))


def test_too_many_in_a_row_end_the_run(fake):
    count = MAX_SKIPPED_IN_A_ROW
    norms = [BAD] * (count - 1) + [0.5] + [BAD] * (count + 5)
    scales = [2.0**60] * len(norms)
    sink = fake.Sink()
    with pytest.raises(
        TrainingError,
        match=rf"overflow at every loss scale: step {2 * count} of {len(norms)} is the last of {count} "
        r"in a row .* scale is down to 1\.15292e\+18 \(optimizer\.loss_scale\): lower optimizer\.lear",
    ) as caught:
        fake.train(executor_of(fake, norms, scales), fake.settings(len(norms)), sink)
    assert caught.value.exit_status == 5
    assert sink.summaries[0].status == "failed"


def test_a_scale_below_one_ends_the_run(fake):
    executor = executor_of(fake, [BAD] * 4, [2.0, 1.0, 0.5, 0.25])
    with pytest.raises(TrainingError, match=r"step 3 of 4 .* in a row .* down to 0\.5 "):
        fake.train(executor, fake.settings(4))


@pytest.mark.parametrize(
    ("given", "dtype", "wanted"),
    [
        ("auto", "fp16", DYNAMIC),
        ("auto", "bf16", LossScaling()),
        ("auto", "fp64", LossScaling()),
        ("dynamic", "fp32", DYNAMIC),
        ("1024", "fp16", LossScaling(scale=1024.0)),
        ("0.5", "fp16", LossScaling(scale=0.5)),
    ],
)
def test_what_optimizer_loss_scale_means(given, dtype, wanted):
    assert make_loss_scaling(given, dtype) == wanted


@pytest.mark.parametrize("given", ["0", "-1", "inf", "nan", "fast"])
def test_other_loss_scales_are_refused(given):
    with pytest.raises(ConfigError, match=f"optimizer.loss_scale={given} is neither auto, dynamic"):
        make_loss_scaling(given, "fp16")
