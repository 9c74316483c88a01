"""Steps without finite numbers: forgiven, then gone back from, then the end."""

import math

import numpy as np
import pytest

from launcher.errors import TrainingError
from launcher.runtime.checkpoints.checkpoint_manifest import Progress
from launcher.runtime.checkpoints.checkpointer import NoCheckpoints


class Recorded(NoCheckpoints):
    """Checkpoints of every second step, kept as the steps and the batches trained on until then."""

    def __init__(self, executor):
        self.executor, self.saved = executor, []

    def is_due(self, num_steps, *, ends):
        return num_steps % 2 == 0

    def after_step(self, num_steps, progress, eval_loss, *, is_due):
        if is_due:
            self.saved.append((num_steps, progress, list(self.executor.trained)))
            return 0.0
        return None

    def newest(self):
        if not self.saved:
            return None
        step, progress, trained = self.saved[-1]
        manifest = type("Manifest", (), {"step": step, "progress": progress})
        return type("Checkpoint", (), {"manifest": manifest, "arrays": {"trained": trained}})


@pytest.fixture
def learner(fake):
    """An executor whose loss is that of a batch's number, and that keeps what it was trained on."""

    class Learner(fake.Executor):
        def __init__(self, bad, *, always=False):
            super().__init__([])
            self.bad, self.trained, self.always = bad, [], always

        def place(self, batch, step):
            return int(batch["tokens"][0]), step

        def step(self, placed):
            number, step = placed
            is_bad = number in self.bad or (self.always and step >= min(self.bad))
            if not is_bad:
                self.trained.append(number)
            loss = math.nan if is_bad else float(number)
            norm = np.float32(math.nan if is_bad else 1.0)
            return fake.StepResult(loss=np.float32(loss), grad_norm=norm, metrics={})

        def restore(self, arrays):
            self.trained = list(arrays["trained"])

    return Learner


def settings(fake, **changes):
    return fake.settings(10, **{"nonfinite_steps": 2, "max_rollbacks": 2} | changes)


def test_a_bad_batch_now_and_then_is_forgiven(fake, learner, caplog):
    executor, sink = learner({3, 6, 7}), fake.Sink()
    summary = fake.train(executor, settings(fake), sink)
    assert executor.trained == [0, 1, 2, 4, 5, 8, 9]
    assert (summary.status, summary.steps, summary.skipped_steps) == ("done", 10, 3)
    assert sink.rows[3]["loss"] is None
    assert sink.rows[4]["learning_rate"] == pytest.approx(0.1 * 4)  # updates are counted
    assert "step 8: loss nan, gradient norm nan: forgiven, as 2 of 2 in a row" in caplog.text


def test_a_run_without_any_update_is_no_success(fake, learner):
    sink = fake.Sink()
    told = r"none of the 2 steps was an update, since no gradients were finite \(train.nonfinite_steps=2"
    with pytest.raises(TrainingError, match=told):
        fake.train(learner({0, 1}), fake.settings(2, nonfinite_steps=2), sink)
    assert sink.summaries[0].status == "failed"


def test_more_of_them_are_left_out_from_the_last_checkpoint_on(fake, learner, caplog):
    executor, sink = learner({5, 6, 7}), fake.Sink()
    checkpoints = Recorded(executor)
    summary = fake.train(executor, settings(fake), sink, checkpoints=checkpoints)
    # Not to step 6: a checkpoint in the midst of them is none to go back to.
    assert executor.trained == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12]
    assert (summary.status, summary.steps, summary.loss) == ("done", 10, 12.0)
    assert checkpoints.saved[-1][1].left_out == (5, 6, 7)
    assert "going back to step 4, and on without batches 5, 6, 7" in caplog.text
    assert sink.rewound == [4]


def test_a_resumed_run_leaves_them_out_too(fake, learner):
    executor = learner(set())
    begun = settings(fake, first_step=4, progress=Progress(left_out=(2, 5)))
    fake.train(executor, begun)
    assert executor.trained == [6, 7, 8, 9, 10, 11]


def test_what_does_not_go_away_ends_the_run(fake, learner):
    executor = learner({4}, always=True)
    with pytest.raises(
        TrainingError,
        match=r"the loss is nan at step 7 of 10 \(the last finite loss was 3, .*gone back 2 times "
        r"\(train.max_rollbacks=2\)",
    ):
        fake.train(executor, settings(fake), checkpoints=Recorded(executor))


def test_without_a_checkpoint_there_is_no_way_back(fake, learner):
    with pytest.raises(TrainingError, match=r"; no checkpoint yet \(train.max_rollbacks=2\)$"):
        fake.train(learner({2, 3, 4}), settings(fake))
