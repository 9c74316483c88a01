"""The run that all others of this folder are compared with."""

import time

import pytest
from process_run import PATIENCE_S, Run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The same run, that nobody stopped; and the seconds of its training."""
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run")
    began_s = time.monotonic()
    process = run.start()
    run.wait_for_rows(process)
    trains_s = time.monotonic()
    assert process.wait(PATIENCE_S) == 0, run.output()
    return run, trains_s - began_s, time.monotonic() - trains_s
