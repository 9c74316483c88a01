"""How training over hosts ends early: all after one step, or in an error that names who is missing."""

import signal
import time

import pytest

from launcher.errors import TrainingError

LONG = (
    "parallel=manual", "parallel.pp=2", "parallel.tp=1", "parallel.num_microbatches=2",
    "train.steps=100000", "train.eval_every=0", "train.eval_batches=0", "checkpoint.every_steps=null",
)  # fmt: skip
PATIENCE_S = 240.0


@pytest.fixture
def plan(case):
    """The plan's case, and the folder that has it."""
    made = case(*LONG)
    return made, made.in_one_process("plan", "mode=plan")


def train_for(hosts, steps: int):
    """Begin to train, and return when every host has done so many steps."""
    hosts.prepare()
    asked = [client.ask("train") for client in hosts.clients]
    until_s = time.monotonic() + PATIENCE_S
    while any(beat.steps_done < steps for beat in hosts.beats()):
        assert time.monotonic() < until_s
        assert not any(future.done() for future in asked), [f.exception(0) for f in asked]
        time.sleep(0.05)
    return asked


def test_all_stop_after_one_step_with_a_checkpoint(plan):
    made, folder = plan
    with made.start_hosts("stopped", folder) as hosts:
        asked = train_for(hosts, 3)
        last = hosts.stop()
        ends = [future.result(PATIENCE_S) for future in asked]
        rows = hosts.rows()
    assert [(end.steps, end.stopped, end.summary.status) for end in ends] == [
        (last, True, "stopped")
    ] * 2
    assert rows[-1]["step"] == last or not rows
    names = [path.name for path in (made.folder / "stopped" / "checkpoints").iterdir()]
    assert names == [f"step-{last:08d}"]


def test_a_host_that_hangs_is_named(plan):
    made, folder = plan
    with made.start_hosts("hung", folder, receive_limit_s=3.0) as hosts:
        asked = train_for(hosts, 3)
        hosts.clients[1].process.send_signal(signal.SIGSTOP)
        with pytest.raises(
            TrainingError,
            match=r"of stage 1 from host 1 has not come for \d+ s \(the limit is 3 s\)",
        ):
            asked[0].result(60)
        beat = hosts.clients[0].ask("beat").result(10)
        assert "from host 1" in beat.waiting_for


def test_a_host_that_dies_is_named(plan):
    made, folder = plan
    with made.start_hosts("dead", folder, receive_limit_s=20.0) as hosts:
        asked = train_for(hosts, 3)
        hosts.clients[1].process.kill()
        with pytest.raises(TrainingError, match="of stage 1 from host 1"):
            asked[0].result(60)
