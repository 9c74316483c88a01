"""The command line in this process, before stand-ins of Slurm's commands or a real cluster."""

import dataclasses
import logging
import pathlib
import sys

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
