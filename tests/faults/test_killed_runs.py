"""A run that is killed at any moment goes on as if nothing had been: the same samples, the same numbers."""

import random
import time

import pytest
from process_run import Run, kill

MOMENTS = 50
IN_CI = (0, 1, 2)


@pytest.mark.parametrize(
    "seed",
    [n if n in IN_CI else pytest.param(n, marks=pytest.mark.slow) for n in range(MOMENTS)],
)
def test_a_run_that_is_killed_ends_like_one_that_is_not(undisturbed, tmp_path, seed):
    """Two of three moments lie in training, saving and evaluating, the others anywhere."""
    whole, ready_s, training_s = undisturbed
    draw, run = random.Random(seed), Run(tmp_path / "run")
    process = run.start()
    if seed % 3:
        run.wait_for_rows(process)
        time.sleep(draw.uniform(0.0, training_s))
    else:
        time.sleep(draw.uniform(0.0, ready_s + training_s))
    kill(process)
    rows = run.rows()
    assert rows == whole.rows()[: len(rows)]
    assert run.finish() == 0, run.output()
    assert run.rows() == whole.rows()
    assert run.summary()["loss"] == whole.summary()["loss"]
    assert not list((run.folder / "checkpoints").glob(".*"))
