"""How the processes of a step find each other, and notice that one is gone."""

import stat
import threading
import time

import pytest

from launcher.errors import ClusterError
from launcher.slurm import meeting, ray_nodes
from launcher.slurm.job_folder import note_end
from launcher.slurm.meeting import (
    Head,
    SignsOfLife,
    Watch,
    announce,
    note_joined,
    wait_for_all,
    wait_for_head,
)

HEAD = Head(address="10.0.0.1:6379", token="secret", num_cpus=2)


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(meeting, "BEAT_S", 0.05)
    monkeypatch.setattr(meeting, "PATIENCE_S", 0.4)


def test_the_head_is_found_and_its_token_is_for_its_owner(tmp_path):
    threading.Timer(0.3, lambda: announce(tmp_path, HEAD)).start()
    assert wait_for_head(tmp_path, lambda: False) == HEAD
    assert stat.S_IMODE((tmp_path / "head.json").stat().st_mode) == 0o600


def test_a_run_that_needs_no_other_node_ends_their_waiting(tmp_path):
    assert wait_for_head(tmp_path, lambda: True) is None


@pytest.mark.usefixtures("quickly")
def test_a_first_process_that_gives_no_sign_is_given_up(tmp_path):
    watch = Watch(tmp_path)
    with SignsOfLife(tmp_path):
        until_s = time.monotonic() + 1.0
        while time.monotonic() < until_s:
            watch.look()
            time.sleep(0.02)
    says = r"first node has given no sign of life for 0 s .* which all nodes must share"
    with pytest.raises(ClusterError, match=says):
        wait_for_head(tmp_path, lambda: False)


def test_nodes_that_have_not_joined_are_named(tmp_path):
    note_joined(tmp_path, 1)
    wait_for_all(tmp_path, 2, 0.0, lambda: None)
    says = r"2 of 4 nodes have not joined within 0 s \(node 2, 3 of the job\): see their output"
    with pytest.raises(ClusterError, match=says):
        wait_for_all(tmp_path, 4, 0.0, lambda: None)


def start(tmp_path, monkeypatch, script):
    monkeypatch.setattr(ray_nodes, "_RAY", ("/bin/sh", "-c", script))
    return ray_nodes._start((), "127.0.0.1", 1, tmp_path / "ray.log")


def test_ray_that_does_not_start_ends_in_its_own_words(tmp_path, monkeypatch):
    node = start(tmp_path, monkeypatch, "echo no port is free; exit 4")
    with pytest.raises(
        ClusterError, match=r"Ray has ended on \S+ with status 4: no port is free: see"
    ):
        node.wait_until_started()
    node.end()
    assert not node.folder.exists()


def test_ray_that_never_starts_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_nodes, "START_LIMIT_S", 0.2)
    node = start(tmp_path, monkeypatch, "sleep 60")
    with pytest.raises(ClusterError, match=r"Ray has not started on \S+ within 0 s .*doctor"):
        node.wait_until_started()
    node.end()


def test_ray_does_not_hear_the_warnings_of_slurm(tmp_path, monkeypatch):
    node = start(
        tmp_path, monkeypatch, "kill -USR2 $$; kill -USR1 $$; echo Ray runtime started; sleep 60"
    )
    node.wait_until_started()
    node.end()
    assert node.process.returncode == -9


def test_a_worker_whose_ray_ends_with_the_first_node_is_no_failure(tmp_path, monkeypatch):
    announce(tmp_path, HEAD)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    monkeypatch.setattr(
        ray_nodes, "_RAY", ("/bin/sh", "-c", "echo Ray runtime started; sleep 1; exit 1")
    )
    step = ray_nodes.Step(
        job_id="1", step_id="0", node=1, num_nodes=2, local_rank=0, num_tasks=2, host="b"
    )
    threading.Timer(2.0, lambda: note_end(tmp_path, 0, "done", 0, "")).start()
    ray_nodes.work(step, tmp_path)
    assert (tmp_path / "rank-1.joined").exists()
