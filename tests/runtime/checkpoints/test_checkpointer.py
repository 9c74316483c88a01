"""When checkpoints are due, what a step waits for, and where failures of the writing thread surface."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest

from launcher.errors import StorageError
from launcher.runtime.checkpoints.checkpoint_manifest import ModelEntry, Progress, RunEntry
from launcher.runtime.checkpoints.checkpoint_store import CheckpointStore
from launcher.runtime.checkpoints.checkpointer import Checkpointer, SaveSettings
from launcher.runtime.checkpoints.host_copies import to_host

RUN = RunEntry(
    model=ModelEntry(name="gpt", size="tiny", dtype="fp32", fingerprint="f", overrides={}),
    seed=0, dataset="", global_batch=4, origin=None, config={}, plan="{}",
)  # fmt: skip


class Clock:
    """Tells the time that it was set to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class MemoryStore:
    """Stands for a folder; `gate` holds up saving until it is set."""

    def __init__(self, best=None, error=None) -> None:
        self.saved, self.known_best, self.error = [], best, error
        self.gate = threading.Event()
        self.gate.set()

    def best(self):
        return self.known_best

    def take(self, arrays):
        return to_host(arrays)

    def abandon(self):
        pass

    def save(self, manifest, arrays, *, keep):
        assert self.gate.wait(30)
        if self.error:
            raise self.error
        self.saved.append((manifest.step, manifest.eval_loss, float(arrays["x"]), keep))
        return f"step {manifest.step}"


def settings(**changes) -> SaveSettings:
    return SaveSettings(**{"every_steps": None, "every_s": None, "keep": 2, "best": True} | changes)


def make(store, clock=None, first_step=0, value=None, **changes) -> Checkpointer:
    value = value or {"x": jnp.float32(1.0)}
    return Checkpointer(
        store,
        settings(**changes),
        RUN,
        lambda: value,
        first_step=first_step,
        clock=clock or Clock(),
    )


def run(checkpointer, num_steps, losses=None) -> None:
    """As the training loop goes through its steps."""
    for step in range(1, num_steps + 1):
        is_due = checkpointer.is_due(step, ends=step == num_steps)
        loss = (losses or {}).get(step)
        checkpointer.after_step(step, Progress(), loss, is_due=is_due)
    checkpointer.finish()


def test_by_steps_and_at_the_end():
    store = MemoryStore()
    run(make(store, every_steps=3), 7)
    assert [saved[0] for saved in store.saved] == [3, 6, 7]
    assert store.saved[0] == (3, None, 1.0, 2)


def test_by_time():
    store, clock = MemoryStore(), Clock()
    checkpointer = make(store, clock, every_s=60.0)
    due = []
    for step, now_s in enumerate([10.0, 59.0, 61.0, 62.0, 120.0, 121.5], 1):
        clock.now_s = now_s
        is_due = checkpointer.is_due(step, ends=False)
        checkpointer.after_step(step, Progress(), None, is_due=is_due)
        due.append(is_due)
    checkpointer.finish()
    assert due == [False, False, True, False, False, True]


def test_the_best_evaluations_are_saved_too():
    store = MemoryStore()
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: float("nan"), 9: 1.0}
    run(make(store, every_steps=100), 10, losses)
    assert [saved[:2] for saved in store.saved] == [(2, 3.0), (4, 2.0), (9, 1.0), (10, None)]


def test_best_is_counted_from_what_is_there_and_can_be_off():
    store = MemoryStore(best=(5, 2.0))
    run(make(store, every_steps=100), 4, {1: 2.5, 2: 1.5})
    assert [saved[0] for saved in store.saved] == [2, 4]
    store = MemoryStore()
    run(make(store, every_steps=100, best=False), 4, {1: 2.5, 2: 1.5})
    assert [saved[0] for saved in store.saved] == [4]


def test_a_step_that_is_saved_is_not_saved_again():
    store = MemoryStore()
    checkpointer = make(store, first_step=4, every_steps=2)
    assert not checkpointer.is_due(4, ends=True)
    assert checkpointer.is_due(6, ends=False)
    checkpointer.after_step(6, Progress(), None, is_due=True)
    assert not checkpointer.is_due(6, ends=True)
    checkpointer.finish()


def test_the_writing_is_not_waited_for_and_the_arrays_are_copies():
    store, value = MemoryStore(), {"x": jnp.float32(1.0)}
    store.gate.clear()
    checkpointer = make(store, value=value, every_steps=1)
    assert checkpointer.after_step(1, Progress(), None, is_due=True) is not None
    assert store.saved == []
    value["x"].delete()  # as a step does that takes it
    value["x"] = jnp.float32(2.0)
    store.gate.set()
    checkpointer.after_step(2, Progress(), None, is_due=True)
    checkpointer.finish()
    assert [saved[2] for saved in store.saved] == [1.0, 2.0]


def test_the_seconds_that_steps_wait_are_counted():
    clock = Clock()

    class Slow(dict):
        def items(self):
            clock.now_s += 1.5
            return super().items()

    checkpointer = make(MemoryStore(), clock, value=Slow(x=jnp.float32(1.0)), every_steps=1)
    assert checkpointer.after_step(1, Progress(), None, is_due=False) is None
    assert checkpointer.after_step(1, Progress(), None, is_due=True) == 1.5
    checkpointer.finish()


def test_what_fails_in_the_thread_ends_the_run():
    store = MemoryStore(error=StorageError("no room"))
    checkpointer = make(store, every_steps=1)
    checkpointer.after_step(1, Progress(), None, is_due=True)
    with pytest.raises(StorageError, match="no room"):
        checkpointer.after_step(2, Progress(), None, is_due=True)
    checkpointer.finish()


def test_what_fails_at_the_end_too(caplog):
    checkpointer = make(MemoryStore(error=StorageError("no room")), every_steps=1)
    checkpointer.after_step(1, Progress(), None, is_due=True)
    with pytest.raises(StorageError, match="no room"):
        checkpointer.finish()
    checkpointer = make(MemoryStore(error=StorageError("no room")), every_steps=1)
    checkpointer.after_step(1, Progress(), None, is_due=True)
    checkpointer.close()
    assert "no room" in caplog.text


def test_the_loop_saves_and_reports(fake, tmp_path):
    store, sink = CheckpointStore(tmp_path), fake.Sink()
    checkpointer = Checkpointer(
        store, settings(every_steps=2), RUN, lambda: {"x": jnp.float32(1.0)}
    )
    summary = fake.train(
        fake.Executor([3.0, 2.0, 1.0, 4.0, 5.0]), fake.settings(5, eval_every=3, eval_batches=1),
        sink, checkpoints=checkpointer,
    )  # fmt: skip
    assert store.steps() == [3, 4, 5]  # 2 is gone, 3 is the best
    found = store.newest_intact().manifest
    assert found.samples == 5 * RUN.global_batch
    assert found.progress == Progress(loss=5.0, best_loss=1.0, eval_loss=10.0, step_s=5.0)
    assert summary.checkpoints == 4
    told = {row["step"]: row["checkpoint_s"] for row in sink.rows if "checkpoint_s" in row}
    assert told.keys() == {3, 4, 5}  # the steps after one
    assert summary.checkpoint_s >= sum(told.values()) > 0


def test_a_failed_run_waits_for_its_checkpoint(fake, tmp_path):
    store = CheckpointStore(tmp_path)
    checkpointer = Checkpointer(
        store, settings(every_steps=1), RUN, lambda: {"x": jnp.float32(1.0)}
    )

    def fails():
        raise RuntimeError("in the midst of a step")

    executor = fake.Executor([1.0] * 3, at_step={2: fails})
    with pytest.raises(RuntimeError, match="in the midst"):
        fake.train(executor, fake.settings(3), checkpoints=checkpointer)
    assert store.newest_intact().manifest.step == 2


def test_a_resumed_record_goes_on(fake):
    before = Progress(loss=2.0, best_loss=1.5, eval_loss=9.0, skipped_steps=2)
    summary = fake.train(
        fake.Executor([0.0] * 4 + [3.0]), fake.settings(5, first_step=4, progress=before)
    )
    assert (summary.loss, summary.best_loss, summary.eval_loss) == (3.0, 1.5, 9.0)
    assert summary.skipped_steps == 2


def test_shards_come_together_on_the_host(fake):
    x = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    host = to_host({"x": jnp.asarray(x), "scalar": jnp.int32(4)})
    np.testing.assert_array_equal(host["x"], x)
    assert host["scalar"].shape == ()
