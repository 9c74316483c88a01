"""Runs over two hosts by the real command and a real Ray: one that loses a host, and ends that are asked for.

Each is compared with the same run in one process, number by number.
"""

import os
import re
import signal
import time

import pytest
from process_run import PATIENCE_S, Run
from ray_things import family, is_alive, ray_folder, two_machines, wait_until

from launcher.errors import ClusterError, StoppedBySignal, TrainingError

pytestmark = pytest.mark.ray
HOSTS = (
    "cluster=cpu8", "cluster.hosts=2", "cluster.devices_per_host=2", "model.dtype=fp64",
    "train.eval_every=0", "checkpoint.every_steps=5",
)  # fmt: skip
RAY = ("runtime=ray", *HOSTS)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The run that all others must equal."""
    run = Run(tmp_path_factory.mktemp("one") / "run")
    assert run.finish("runtime=emulate", *HOSTS) == 0, run.output()
    return run


def is_like(run: Run, other: Run) -> bool:
    """Whether every row has the numbers of the other run's, and none is missing or twice."""
    rows, others = run.rows(), other.rows()
    assert [sorted(row) for row in rows] == [sorted(row) for row in others]
    return all(
        value == pytest.approx(theirs[key], rel=1e-9)
        for row, theirs in zip(rows, others, strict=True)
        for key, value in row.items()
    )


def host_pid(run: Run, host: int) -> int:
    """The process of a host's newest start."""
    return int(re.findall(rf"host {host} \([^)]*, process (\d+)\)", run.output())[-1])


def started(run: Run, rows: int, *more: str):
    """A run that has trained for so long, its process, and all others that belong to it."""
    process = run.start(*RAY, *more)
    run.wait_for_rows(process, rows)
    processes = family(process.pid)
    return process, processes, ray_folder(processes)


def assert_nothing_left(processes: set[int], folder) -> None:
    wait_until(lambda: not any(map(is_alive, processes)))
    assert not folder.exists()


def test_a_run_that_loses_a_host_ends_like_one_that_does_not(one_process, tmp_path):
    run = Run(tmp_path / "run")
    process, processes, folder = started(run, 17)
    os.kill(host_pid(run, 1), signal.SIGKILL)
    assert process.wait(PATIENCE_S) == 0, run.output()
    said = r"host 1 \(.*\) was lost while training: its process ended; it.* of stage 1 (in|after) step \d+"
    assert re.search(said, run.output())
    assert re.search(r"going on after step (15|20|25)\n", run.output())
    assert is_like(run, one_process)
    summary = run.summary()
    assert summary["status"] == "done"
    assert summary["loss"] == pytest.approx(one_process.summary()["loss"], rel=1e-9)
    assert summary["goodput_restart_s"] > 0
    assert_nothing_left(processes, folder)


def test_a_run_that_is_stopped_goes_on_in_one_process(one_process, tmp_path):
    run = Run(tmp_path / "run")
    process, processes, folder = started(run, 12)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == StoppedBySignal.exit_status, run.output()
    assert_nothing_left(processes, folder)
    done = len(run.rows())
    assert (run.folder / "checkpoints" / f"step-{done:08d}").exists()
    assert (
        f"stopped by SIGTERM after step {done} of 60; to go on: python -m launcher" in run.output()
    )
    assert run.finish("runtime=emulate", *HOSTS) == 0, run.output()
    assert [row["step"] for row in run.rows() if "loss" in row] == list(range(1, 61))
    assert is_like(run, one_process)


def test_nobody_is_at_the_address(tmp_path):
    run = Run(tmp_path / "run")
    assert run.finish(*RAY, "runtime.address=127.0.0.1:9") == ClusterError.exit_status
    assert "launcher: no Ray cluster answers at 127.0.0.1:9: " in run.output()
    assert (run.folder / "plan.json").exists()


@pytest.mark.slow
def test_a_host_that_is_stopped_is_noticed_in_time(tmp_path):
    run = Run(tmp_path / "run")
    process, processes, folder = started(run, 20, "runtime.max_restarts=0", "train.steps=5000")
    os.kill(host_pid(run, 0), signal.SIGSTOP)
    began_s = time.monotonic()
    assert process.wait(PATIENCE_S) == TrainingError.exit_status
    assert time.monotonic() - began_s < 18
    assert "was lost while training: it gives no sign of life for 10 s" in run.output()
    assert run.summary()["status"] == "failed"
    assert_nothing_left(processes, folder)


@pytest.mark.slow
def test_ctrl_c_at_a_terminal(tmp_path):
    """It reaches every process of the terminal's group, and none of Ray's."""
    run = Run(tmp_path / "run")
    process, processes, folder = started(run, 20, "train.steps=5000")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE_S) == 130, run.output()
    done = len(run.rows())
    assert (run.summary()["status"], run.summary()["steps"]) == ("interrupted", done)
    assert "was lost" not in run.output()
    assert_nothing_left(processes, folder)


@pytest.mark.slow
def test_nothing_outlives_a_killed_run(tmp_path):
    run = Run(tmp_path / "run")
    process, processes, folder = started(run, 20, "train.steps=5000")
    process.kill()
    process.wait()
    assert_nothing_left(processes, folder)


@pytest.mark.slow
def test_gpus_that_are_not_there(tmp_path):
    run = Run(tmp_path / "run")
    more = ("runtime=ray", "cluster=dgx-h100", "cluster.hosts=2", "model.size=tiny")
    assert run.finish(*more) == ClusterError.exit_status, run.output()
    said = r"launcher: the plan needs 2 hosts with 8 GPUs each, and this machine has 1: .*: 0 GPUs"
    assert re.search(said, run.output())


@pytest.mark.slow
def test_on_the_machine_that_is_left(tmp_path, monkeypatch):
    """A cluster of two machines loses one, and the run is planned anew for the other."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ab" * 32)
    with two_machines(tmp_path / "ray.log") as (address, say):
        run = Run(tmp_path / "run")
        process = run.start(
            *RAY, f"runtime.address={address}", "replan=true", "parallel=auto", "parallel.pp=null",
            "parallel.tp=null", "runtime.heartbeat_s=0.2", "train.steps=300",
        )  # fmt: skip
        run.wait_for_rows(process, 20)
        say("lose")
        assert process.wait(PATIENCE_S) == 0, run.output()
    assert "going on with 1 of 2 hosts (replan=true)" in run.output()
    assert re.search(r"going on after step [1-9]\d*, from", run.output())
    assert [row["step"] for row in run.rows() if "loss" in row] == list(range(1, 301))
