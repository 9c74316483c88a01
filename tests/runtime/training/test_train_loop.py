"""The training loop over a fake executor: dispatch and reading, batches, evaluation, memory."""

import jax
import pytest

from launcher.errors import ConfigError, TrainingError


def test_a_step_is_read_only_after_the_next_was_dispatched(fake):
    executor = fake.Executor([3.0, 2.0, 1.0])
    fake.train(executor, fake.settings(3))
    assert executor.events == ["step 0", "step 1", "read 0", "step 2", "read 1", "read 2"]


def test_evaluation_every_so_many_steps_and_at_the_end(fake):
    sink = fake.Sink()
    executor = fake.Executor([1.0] * 5)
    summary = fake.train(executor, fake.settings(5, eval_every=2, eval_batches=2), sink)
    evaluations = [row for row in sink.rows if "eval_loss" in row]
    assert evaluations == [{"step": step, "eval_loss": 10.5} for step in (2, 4, 5)]
    assert summary.eval_loss == 10.5
    # The step before is read first, and evaluations are read one behind as well.
    first = executor.events.index("evaluate 0")
    assert executor.events[first - 1 : first + 5] == [
        "read 1",
        "evaluate 0",
        "evaluate 1",
        "read evaluation 0",
        "read evaluation 1",
        "step 2",
    ]


def test_evaluation_only_at_the_end_and_once(fake):
    sink = fake.Sink()
    fake.train(fake.Executor([1.0] * 4), fake.settings(4, eval_batches=1), sink)
    fake.train(fake.Executor([1.0] * 4), fake.settings(4, eval_batches=1, eval_every=4), sink)
    assert [row["step"] for row in sink.rows if "eval_loss" in row] == [4, 4]


def test_batches_are_made_by_one_thread_while_a_step_runs(fake):
    dataset = fake.Dataset()
    ahead = []
    at_step = {
        step: lambda step=step: ahead.append(dataset.made[step + 1].wait(5)) for step in (0, 1)
    }
    fake.train(
        fake.Executor([1.0] * 4, at_step=at_step), fake.settings(4, eval_batches=2), dataset=dataset
    )
    assert ahead == [True, True]
    assert dataset.threads == {"batches_0"}


def test_an_error_of_the_dataset_surfaces(fake):
    class BrokenDataset(fake.Dataset):
        def batch(self, step, batch_size, split="train"):
            if step == 2:
                raise ConfigError("the file data.path=x has changed")
            return super().batch(step, batch_size, split)

    sink = fake.Sink()
    with pytest.raises(ConfigError, match="has changed"):
        fake.train(fake.Executor([1.0] * 4), fake.settings(4), sink, dataset=BrokenDataset())
    assert sink.summaries[0].status == "failed"


def test_a_resumed_run_goes_on_where_it_was(fake):
    sink = fake.Sink()
    summary = fake.train(fake.Executor([1.0] * 5), fake.settings(5, first_step=3), sink)
    assert [row["step"] for row in sink.rows] == [4, 5]
    assert summary.steps == 5


def test_device_memory_that_is_used_up(fake):
    def exhaust():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.\nA table"
        )

    with pytest.raises(
        TrainingError,
        match=r"^after step 1 of 4: explained \(RESOURCE_EXHAUSTED: .* 123 bytes\.\)$",
    ):
        fake.train(fake.Executor([1.0] * 4, at_step={2: exhaust}), fake.settings(4))


def test_device_memory_that_is_used_up_while_a_step_runs(fake):
    class Exhausted:
        def block_until_ready(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    class JaxExecutor(fake.Executor):
        def step(self, step):
            return fake.StepResult(loss=Exhausted(), grad_norm=0.0, metrics={})

    with pytest.raises(TrainingError, match="^after step 0 of 4: explained"):
        fake.train(JaxExecutor([]), fake.settings(4))


def test_other_device_errors_keep_their_name(fake):
    def fail():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fake.train(fake.Executor([1.0] * 4, at_step={2: fail}), fake.settings(4))
