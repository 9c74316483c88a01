"""The supervisor with hosts that count: what is lost, what is begun anew, what is handed on, how it ends."""

import contextlib
import os
import pathlib
import re
import signal
import time

import pytest
from fake_hosts import FakeHost, Fault, ThreadPool, World

from launcher.errors import ClusterError, LostPeerError, StoppedBySignal, TrainingError
from launcher.runtime.hosts.host_contract import HostTask
from launcher.runtime.hosts.host_pool import Seat, TooFewHostsError
from launcher.runtime.hosts.host_record import Begun, HostRecord
from launcher.runtime.hosts.host_session import HostRun
from launcher.runtime.hosts.supervisor import Policy, Supervisor
from launcher.runtime.records.goodput import Goodput
from launcher.runtime.records.metrics import Meter
from launcher.runtime.records.sinks import Sink
from launcher.runtime.training.interrupt import stop_at_once

HEARTBEAT_S = 0.02
NUM_HOSTS = 3
METER = Meter(
    model_flops_per_step=1.0, num_devices=1, peak_flops_per_s=None, global_batch=1,
    units_per_sample=1, sample_unit="samples", predicted_step_s=None,
)  # fmt: skip


class Told(Sink):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.steps, self.rewinds, self.summaries = [], [], []

    def write(self, row) -> None:
        self.steps.append(row["step"])

    def rewind(self, step: int) -> None:
        self.rewinds.append(step)
        self.steps = [other for other in self.steps if other <= step]

    def finish(self, summary) -> None:
        self.summaries.append(summary)


def hosts(number: int) -> HostRun:
    task = HostTask(
        config=None, run_dir=pathlib.Path("run"), plan_text="", cluster=None, host=0,
        num_hosts=number, emulated=True,
    )  # fmt: skip
    seat = Seat(environment={}, num_gpus=0, log_path=pathlib.Path("log"))
    return HostRun(seats=(seat,) * number, task=task, factory=FakeHost)


def supervise(world: World, told: Told, *, max_restarts: int = 3, fewer=None):
    pool = ThreadPool(world)

    def open_record(run, ready):
        begun = Begun(planned_steps=world.steps, first_step=ready[0].first_step, progress=None)
        return HostRecord([told], METER, begun, Goodput)

    policy = Policy(max_restarts=max_restarts, heartbeat_s=HEARTBEAT_S, fewer_hosts=fewer,
        saved_step=lambda: world.checkpoint,
    )  # fmt: skip
    phase = lambda text: contextlib.nullcontext(lambda state: None)  # noqa: E731
    try:
        with stop_at_once():
            return Supervisor(pool, hosts(NUM_HOSTS), policy, phase, open_record).run()
    finally:
        assert not pool.hosts, "a host is left"


def all_steps(world: World) -> list[int]:
    return list(range(1, world.steps + 1))


def test_hosts_run_to_their_end():
    world, told = World(), Told()
    summary = supervise(world, told)
    assert (summary.status, summary.steps, world.starts) == ("done", 12, 0)
    assert told.steps == all_steps(world)
    assert told.summaries == [summary]
    assert not told.rewinds
    assert summary.as_row()["sent_between_hosts_bytes"] == 30
    assert summary.as_row()["waited_for_hosts_s"] == 2.0


@pytest.mark.parametrize(
    "kind", ["dies", OSError("a socket broke"), LostPeerError("0F0 has not come"), "hangs", "stops"]
)
def test_a_run_that_loses_a_host_goes_on_from_its_checkpoint(kind, caplog):
    world, told = World(faults=(Fault(host=1, kind=kind, step=6),)), Told()
    summary = supervise(world, told)
    assert (summary.status, world.starts) == ("done", 1)
    assert told.rewinds == [4]
    assert told.steps == all_steps(world)
    (line,) = [r.getMessage() for r in caplog.records if "beginning anew" in r.getMessage()]
    assert line.startswith("host 1 (here, 127.0.0.1, process 101) was lost while training: ")
    assert re.search(
        r"its last instruction was 1F0 of stage 1 in step [1-7], and it had done", line
    )
    assert line.endswith("beginning anew (1 of 3)")
    why = {
        "dies": "its process ended", "hangs": "it answers, and has not moved for",
        "stops": "it gives no sign of life",
    }.get(str(kind), str(kind))  # fmt: skip
    assert why in line


def test_a_host_that_is_lost_between_steps(caplog):
    # Slow enough for beats to say what it is doing.
    slow = lambda host, step: time.sleep(5 * HEARTBEAT_S)  # noqa: E731
    world = World(faults=(Fault(host=1, kind="dies", step=6),), doing="saving", on_step=slow)
    supervise(world, Told())
    (line,) = [r.getMessage() for r in caplog.records if "beginning anew" in r.getMessage()]
    assert re.search(r"; it was saving its part of stage 1 after step \d, and it had done \d", line)


def test_no_step_counts_that_not_every_host_has_done():
    """Host 2 never does step 7, and the others have; nor is it told when the run then fails."""
    world, told = World(faults=(Fault(host=2, kind="dies", step=6),)), Told()
    with pytest.raises(TrainingError):
        supervise(world, told, max_restarts=0)
    assert told.steps == all_steps(world)[: len(told.steps)]
    assert len(told.steps) <= 6
    assert [s.status for s in told.summaries] == ["failed"]
    assert told.summaries[0].steps == len(told.steps)


def test_what_a_checkpoint_has_is_told_also_of_a_run_that_ends():
    """Whoever goes on from it makes these steps no more."""
    world, told = World(faults=(Fault(host=1, kind="dies", step=9),)), Told()
    with pytest.raises(TrainingError):
        supervise(world, told, max_restarts=0)
    assert world.checkpoint in (4, 8)  # the host may die before that of step 8 is written
    assert told.steps[: world.checkpoint] == all_steps(world)[: world.checkpoint]
    assert told.summaries[0].steps == len(told.steps)


def test_a_dead_host_explains_what_the_others_say(caplog):
    broken = RuntimeError("connection reset by peer")
    world = World(faults=(Fault(host=0, kind=broken, step=5), Fault(host=2, kind="dies", step=5)))
    supervise(world, Told())
    (line,) = [r.getMessage() for r in caplog.records if "beginning anew" in r.getMessage()]
    assert line.startswith("host 2 ")


def test_it_is_begun_anew_only_so_often():
    faults = tuple(Fault(host=1, kind="dies", step=6, start=start) for start in range(9))
    world, told = World(faults=faults), Told()
    said = (
        r"host 1 .* was lost while training: its process ended; .*; it was begun anew 2 times "
        r"\(runtime.max_restarts=2\): what the host said last is in run/hosts; the run goes on from its"
    )
    with pytest.raises(TrainingError, match=said):
        supervise(world, told, max_restarts=2)
    assert world.starts == 2
    assert [s.status for s in told.summaries] == ["failed"]


def test_without_restarts_it_ends_at_once():
    world = World(faults=(Fault(host=1, kind="dies"),))
    with pytest.raises(TrainingError, match=r"it is not begun anew \(runtime.max_restarts=0\)"):
        supervise(world, Told(), max_restarts=0)
    assert world.starts == 0


@pytest.mark.parametrize("phase", ["start", "open", "prepare"])
def test_a_failed_start_is_tried_again(phase, caplog):
    world, told = World(faults=(Fault(host=1, kind="dies", phase=phase),)), Told()
    assert supervise(world, told).status == "done"
    (line,) = [r.getMessage() for r in caplog.records if "beginning anew" in r.getMessage()]
    doing = {"start": "starting", "open": "opening", "prepare": "preparing"}[phase]
    assert f"was lost while {doing}: its process" in line
    assert told.steps == all_steps(world)


def test_a_verdict_is_not_tried_again():
    verdict = TrainingError("loss is nan at step 4")
    world, told = World(faults=(Fault(host=2, kind=verdict),)), Told()
    with pytest.raises(TrainingError, match="loss is nan at step 4"):
        supervise(world, told)
    assert world.starts == 0
    assert [s.status for s in told.summaries] == ["failed"]


def test_a_module_that_a_host_lacks_is_no_loss():
    missing = ModuleNotFoundError("No module named 'mine'")
    world = World(faults=(Fault(host=1, kind=missing, phase="make"),))
    said = (
        r"host 1 \(.*\) lacks what this process has: No module named 'mine' \(runtime=ray\): every"
    )
    with pytest.raises(ClusterError, match=said):
        supervise(world, Told())


def test_hosts_that_do_not_see_the_same_checkpoints():
    world = World(first_steps={0: 4, 1: 4, 2: 0})
    said = r"host 0 would go on after step 4, and host 2 after step 0: .*take a folder that all"
    with pytest.raises(ClusterError, match=said):
        supervise(world, Told())


@pytest.mark.parametrize(
    ("number", "error", "status"),
    [
        (signal.SIGTERM, StoppedBySignal, "stopped"),
        (signal.SIGUSR1, StoppedBySignal, "stopped"),
        (signal.SIGINT, KeyboardInterrupt, "interrupted"),
    ],
)
def test_all_hosts_stop_after_the_same_step(number, error, status):
    def on_step(host, step):
        if (host, step) == (1, 20):
            os.kill(os.getpid(), number)

    world, told = World(steps=2000, checkpoint_every=5000, on_step=on_step), Told()
    with pytest.raises(error) as raised:
        supervise(world, told)
    (steps,) = set(world.stopped_at.values())
    assert 20 < steps < 2000
    assert told.steps == all_steps(world)[:steps]
    assert [(s.status, s.steps) for s in told.summaries] == [(status, steps)]
    if error is StoppedBySignal:
        assert str(raised.value) == f"{signal.Signals(number).name} after step {steps} of 2000"


def test_a_host_that_the_scheduler_ended_too_is_not_begun_anew():
    def on_step(host, step):
        if (host, step) == (1, 6):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    world = World(faults=(Fault(host=1, kind="dies", step=6),), on_step=on_step)
    told = Told()
    with pytest.raises(
        StoppedBySignal, match=r"SIGTERM after step \d of 12, in which host 1 \(here"
    ):
        supervise(world, told)
    assert world.starts == 0
    assert [s.status for s in told.summaries] == ["stopped"]


def test_a_signal_before_training_ends_the_run_at_once():
    world = World(faults=(Fault(host=1, kind="hangs", phase="prepare"),))
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(StoppedBySignal, match=r"^SIGTERM$"):
        supervise(world, Told())


def test_too_few_hosts_at_the_first_start():
    with pytest.raises(TooFewHostsError, match="the plan needs 3 hosts, and there are"):
        supervise(World(room=[2]), Told())


def test_going_on_with_fewer_hosts(caplog):
    world, told = World(faults=(Fault(host=2, kind="dies", step=6),), room=[3, 2, 2]), Told()
    assert supervise(world, told, fewer=hosts).status == "done"
    assert len(world.stopped_at) == 2
    assert [s.status for s in told.summaries] == ["failed", "done"]
    assert told.steps[-6:] == [7, 8, 9, 10, 11, 12]
    assert "going on with 2 of 3 hosts (replan=true)" in caplog.text


@pytest.mark.parametrize(("room", "fewer", "given"), [(2, None, "false"), (0, hosts, "true")])
def test_no_going_on_with_fewer_hosts(room, fewer, given):
    world = World(faults=(Fault(host=2, kind="dies", step=6),), room=[3, room])
    said = (
        rf"within 1 s none took its place \(replan={given}\): the plan needs 3 hosts.*replan=true"
    )
    with pytest.raises(TrainingError, match=said):
        supervise(world, Told(), fewer=fewer)


def test_what_a_sink_cannot_write_ends_the_run():
    class Full(Told):
        def write(self, row) -> None:
            raise TrainingError("disk full")

    told = Full()
    with pytest.raises(TrainingError, match="disk full"):
        supervise(World(), told)
    assert len(told.summaries) == 1


def test_a_summary_that_cannot_be_written_is_not_written_again():
    class Full(Told):
        def finish(self, summary) -> None:
            super().finish(summary)
            raise TrainingError("disk full")

    told = Full()
    with pytest.raises(TrainingError, match="disk full"):
        supervise(World(), told)
    assert [summary.status for summary in told.summaries] == ["done"]
