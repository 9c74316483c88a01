"""A run that a scheduler stops ends with 75, says how to go on, and then goes on as if nothing had been."""

import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from process_run import PATIENCE_S, Run

STOPPED = 75


def training_rows(run: Run) -> list[dict]:
    """An evaluation that was due at the step after which a run was stopped is left out."""
    return [row for row in run.rows() if "loss" in row]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_in_training(undisturbed, tmp_path, number):
    whole, run = undisturbed[0], Run(tmp_path / "run")
    process = run.start()
    run.wait_for_rows(process, 20)
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == STOPPED
    done = len(training_rows(run))
    assert run.summary()["status"] == "stopped"
    assert (run.folder / "checkpoints" / f"step-{done:08d}").exists()
    said = re.search(
        rf"stopped by {number.name} after step {done} of 60; to go on: (.*)", run.output()
    )
    command = [sys.executable, *shlex.split(said[1])[1:]]
    again = subprocess.run(
        command, cwd=run.folder, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert again.returncode == 0, again.stderr
    assert training_rows(run) == training_rows(whole)
    assert run.summary()["loss"] == whole.summary()["loss"]
    assert run.summary()["goodput_restart_s"] > 0


@pytest.mark.parametrize("phase", ["planning ...", "compiling ..."])
def test_while_it_gets_ready(tmp_path, phase):
    run = Run(tmp_path / "run")
    process = run.start()
    while phase not in run.output():
        assert process.poll() is None, run.output()
        time.sleep(0.01)
    began_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == STOPPED
    assert time.monotonic() - began_s < 10
    assert "stopped by SIGTERM; to go on: python -m launcher" in run.output()
    assert "Traceback" not in run.output()
    assert not run.rows()
