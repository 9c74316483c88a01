"""The command line in this process, before stand-ins of Slurm's commands or a real cluster."""

import dataclasses
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import pytest
from fake_slurm import FakeSlurm, fake_slurm  # noqa: F401

from launcher import cli


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
    """How a command line ended, and what it said."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(tmp_path: pathlib.Path, capsys, monkeypatch):
    """Run `python -m launcher` in this process, in a folder of its own."""
    monkeypatch.setattr(logging, "_handlerList", [])  # Hydra closes all handlers
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["launcher", *arguments])
        capsys.readouterr()
        status = cli.main()
        said = capsys.readouterr()
        return Said(status=status, out=said.out, err=said.err)

    return run


SCRIPT = pathlib.Path(__file__).parent / "cluster.sh"
CANNOT = 77  # exit status of the script where there can be no cluster
PATIENCE_S = 300.0


class SlurmCluster:
    """A real cluster of three nodes on this machine: `cluster.sh` says what it is like."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        done = subprocess.run([SCRIPT, "up", folder, "3"], capture_output=True, text=True)
        if done.returncode == CANNOT:
            pytest.skip(f"no Slurm: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        self.environment = os.environ | {
            "SLURM_CONF": done.stdout.strip(),
            "PYTHONPATH": str(SCRIPT.parents[2]),
            "JAX_PLATFORMS": "cpu",
        }
        self.environment.pop("XLA_FLAGS")  # the tests' own devices

    def run(self, *command: str, folder: pathlib.Path, check: bool = True) -> str:
        """Run a command as on a login node; return what it says."""
        done = subprocess.run(
            command, cwd=folder, env=self.environment, capture_output=True, text=True,
            timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout + done.stderr

    def launcher(self, *arguments: str, folder: pathlib.Path, check: bool = True) -> str:
        """Run `python -m launcher`."""
        command = (sys.executable, "-m", "launcher", *arguments)
        return self.run(*command, folder=folder, check=check)

    def crash(self, node: str) -> None:
        """Kill everything that runs on a node."""
        subprocess.run([SCRIPT, "crash", self.folder, node], check=True, capture_output=True)

    def revive(self, node: str) -> None:
        """Start a node again, and wait until it takes jobs."""
        subprocess.run([SCRIPT, "revive", self.folder, node], check=True, capture_output=True)
        self.wait_until(
            lambda: "idle" in self.run("sinfo", "-h", "-n", node, "-o", "%T", folder=self.folder)
        )

    def queue(self) -> str:
        """The jobs that are waiting or at work, and where."""
        return self.run("squeue", "--noheader", "--format=%i %T %N", folder=self.folder)

    def nodes_at_work(self) -> list[str]:
        """The nodes of each job that is at work: a name, or several in brackets."""
        jobs = (line.split() for line in self.queue().splitlines())
        return [job[2] for job in jobs if job[1] == "RUNNING"]

    def wait_until(self, is_so) -> None:
        """Look until it is so."""
        until_s = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < until_s, self.queue()
            time.sleep(0.1)


@pytest.fixture(scope="session")
def slurm():
    """The cluster of this test session."""
    # Short, because sockets lie in it.
    folder = pathlib.Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        yield SlurmCluster(folder)
    finally:
        subprocess.run([SCRIPT, "down", folder], check=True, capture_output=True)
