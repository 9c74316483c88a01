"""Slurm's commands that are missing or do not answer, and code that is too much to copy."""

import pytest

from launcher.errors import ClusterError, ConfigError
from launcher.slurm import code_copy, commands
from launcher.slurm.code_copy import copy_code
from launcher.slurm.commands import last_state, states_of_jobs


def test_a_command_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"there is no squeue on PATH: run this on a login node"):
        states_of_jobs()


def test_a_command_that_does_not_answer(monkeypatch, fake_slurm):
    monkeypatch.setattr(commands, "_LIMIT_S", 0.2)
    (fake_slurm.folder / "squeue").write_text("#!/bin/bash\nexec sleep 30\n")
    with pytest.raises(
        ClusterError, match=r"squeue gives no answer within 0 s: see `scontrol ping`"
    ):
        states_of_jobs()


def test_what_the_controller_remembers(fake_slurm):
    fake_slurm.say("queue", "7 RUNNING\n8 PENDING\n\n")
    assert states_of_jobs() == {"7": "running", "8": "pending"}
    fake_slurm.say("show", "JobId=7 JobName=a JobState=TIMEOUT Reason=TimeLimit\n")
    assert last_state("7") == "timeout"
    fake_slurm.say("show", "")
    assert last_state("7") is None


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A package of the user's."""
    folder = tmp_path / "mine_of_this_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "data.bin").write_bytes(bytes(4096))
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_package_that_holds_data_is_too_much_to_copy(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(code_copy, "_LARGEST_BYTES", 1024)
    with pytest.raises(
        ConfigError, match=r"model\.target=mine_of_this_test:a: its package .* keep data"
    ):
        copy_code(tmp_path / "code", {"mine_of_this_test:a"})


def test_a_module_and_installed_packages(mine, tmp_path):
    (mine.parent / "single_of_this_test.py").write_text("")
    copy_code(tmp_path / "code", {"single_of_this_test:a", "numpy.linalg:a"})
    assert (tmp_path / "code/single_of_this_test.py").is_file()
    assert not (tmp_path / "code/numpy").exists()


def test_a_sweep_in_a_step_of_several_nodes(command, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("launcher.cli.srun_step._PATIENCE_S", 0.1)
    for name, value in {
        "PROCID": "0", "LOCALID": "0", "NODEID": "0", "STEP_NUM_NODES": "2", "STEP_NUM_TASKS": "2",
        "JOB_ID": "7", "STEP_ID": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    said = command("--multirun", "seed=0,1")
    assert said.status == 2
    assert "--multirun in a step of 2 nodes of Slurm: submit the points as jobs, with" in said.err
    assert not list((tmp_path / "cache/launcher/srun").iterdir())
