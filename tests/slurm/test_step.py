"""Which process of a step this is, and what each of them does."""

import os
import signal

import pytest

from launcher.cli import srun_step
from launcher.errors import ClusterError
from launcher.slurm.job_folder import note_end, read_ends
from launcher.slurm.step import meeting_folder, own_address, step_here


def variables(node=0, local_rank=0, nodes=2, tasks=2, **others):
    return {
        "SLURM_PROCID": str(node + local_rank), "SLURM_LOCALID": str(local_rank), "SLURM_NODEID": str(node),
        "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "2", "SLURM_CLUSTER_NAME": "big", **others,
    }  # fmt: skip


@pytest.mark.parametrize(
    "environment",
    [
        {},
        variables(nodes=1, tasks=1),
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NODEID": "0"},
    ],
    ids=["no Slurm", "alone in a step", "a batch shell"],
)
def test_a_process_that_is_none_of_several(environment):
    assert step_here(environment) is None


def test_the_processes_of_a_step():
    first, surplus = step_here(variables()), step_here(variables(local_rank=1, tasks=4))
    other = step_here(variables(node=1))
    assert (first.leads, first.is_surplus) == (True, False)
    assert (surplus.leads, surplus.is_surplus) == (False, True)
    assert (other.leads, other.is_surplus, other.node) == (False, False, 1)


def test_they_meet_where_the_home_is(tmp_path):
    folder = meeting_folder(
        step_here(variables()), {"XDG_CACHE_HOME": str(tmp_path), **variables()}
    )
    assert folder == tmp_path / "launcher/srun/big-7.2"


def test_the_address_is_that_of_the_way_to_the_others():
    assert own_address({"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}) == "127.0.0.1"


def test_alone_it_just_runs():
    assert srun_step.take_part(None, lambda: 5) == 5


def test_one_process_of_a_node_works_and_says_what_is_wasted(capsys):
    only = step_here(variables(nodes=1, tasks=2))
    assert srun_step.take_part(only, lambda: 0) == 0
    assert (
        "srun has started 2 processes on 1 nodes, and one a node is used" in capsys.readouterr().err
    )
    surplus = step_here(variables(local_rank=1, nodes=1, tasks=2))
    assert srun_step.take_part(surplus, lambda: pytest.fail("it has nothing to do")) == 0


@pytest.fixture
def meeting(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "big")
    kept = {
        number: signal.getsignal(number)
        for number in (2, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    }
    yield tmp_path / "launcher/srun/big-7.2"
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_the_first_process_says_how_it_ended_and_leaves_nothing(meeting, monkeypatch):
    monkeypatch.setattr(srun_step, "_PATIENCE_S", 0.3)
    seen = []
    monkeypatch.setattr(
        srun_step.shutil, "rmtree", lambda *_, **__: seen.extend(read_ends(meeting))
    )
    assert srun_step.take_part(step_here(variables()), lambda: 5) == 5
    (end,) = seen
    assert (end.rank, end.end, end.exit_status) == (0, "failed", 5)


def test_the_process_of_another_node_ends_with_the_first(meeting, monkeypatch):
    note_end(meeting, 0, "done", 0, "")
    assert srun_step.take_part(step_here(variables(node=1)), pytest.fail) == 0
    assert {(one.rank, one.end) for one in read_ends(meeting)} == {(0, "done"), (1, "done")}


def test_the_process_of_another_node_outlives_what_warns_the_first(meeting, monkeypatch, capsys):
    def work(step, folder):
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        raise ClusterError("Ray has ended here")

    monkeypatch.setattr(srun_step.ray_nodes, "work", work)
    assert srun_step.take_part(step_here(variables(node=1)), pytest.fail) == 3
    assert capsys.readouterr().err == "launcher: Ray has ended here\n"
    (end,) = read_ends(meeting)
    assert (end.rank, end.end, end.exit_status, end.reason) == (
        1,
        "failed",
        3,
        "Ray has ended here",
    )
