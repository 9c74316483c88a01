"""An evaluation by itself: its loss in the summary, and device memory that is used up in one line."""

import jax
import pytest

from launcher.errors import TrainingError
from launcher.runtime.training import evaluation_run


def evaluate(fake, executor, sink):
    return evaluation_run.run(
        executor, fake.Dataset(), fake.settings(3, first_step=3, eval_batches=2), fake.METER, [sink],
        explain_memory=lambda error: TrainingError("explained"), clock=lambda: 0.0,
    )  # fmt: skip


def test_the_mean_over_the_batches_is_told_at_the_step_of_the_weights(fake):
    sink = fake.Sink()
    summary = evaluate(fake, fake.Executor([]), sink)
    assert sink.rows == [{"step": 3, "eval_loss": 10.5}]
    assert (summary.status, summary.steps, summary.eval_loss) == ("done", 3, 10.5)


@pytest.mark.parametrize(
    ("text", "raised", "said"),
    [
        ("RESOURCE_EXHAUSTED: 5 bytes", TrainingError, "^explained$"),
        ("INTERNAL: a bug", jax.errors.JaxRuntimeError, "INTERNAL"),
    ],
)
def test_memory_that_is_used_up_is_explained_and_the_sinks_are_finished(fake, text, raised, said):
    class Failing(fake.Executor):
        def evaluate(self, batch):
            raise jax.errors.JaxRuntimeError(text)

    sink = fake.Sink()
    with pytest.raises(raised, match=said):
        evaluate(fake, Failing([]), sink)
    assert [summary.status for summary in sink.summaries] == ["failed"]
