"""A signal before there is a run ends the launcher in the documented way, wherever it is.

Each test puts something on the path that sends the signal from within: no waiting, and no chance.
"""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PLUGIN = """
from hydra.plugins.search_path_plugin import SearchPathPlugin

class Sends(SearchPathPlugin):
    def manipulate_search_path(self, search_path):
        {send}
"""
# Where it is -> the file that is imported or called there.
PLACES = {
    "importing": ("hydra/__init__.py", "{send}"),
    "composing": ("hydra_plugins/sends.py", PLUGIN),
    "importing JAX": ("jax/__init__.py", "{send}"),
}


def launch(folder: pathlib.Path, place: str, number: int, *, ignored: bool = False):
    name, text = PLACES[place]
    path = folder / "path" / name
    path.parent.mkdir(parents=True)
    path.write_text(text.format(send=f"import os; os.kill(os.getpid(), {int(number)})"))
    ignoring = ["sh", "-c", f"trap '' {int(number)}; exec \"$@\"", "sh"] if ignored else []
    return subprocess.run(
        [*ignoring, sys.executable, "-m", "launcher", "mode=plan", "hydra.run.dir=run"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{path.parent.parent}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_is_told_to_run_it_again(tmp_path, place, number):
    done = launch(tmp_path, place, number)
    assert done.returncode == 75
    assert done.stderr == (
        f"launcher: stopped by {number.name} before anything was begun; to go on: run the same "
        f"command again\n"
    )


@pytest.mark.parametrize("place", PLACES)
def test_ctrl_c(tmp_path, place):
    done = launch(tmp_path, place, signal.SIGINT)
    assert done.returncode == 130
    assert done.stderr.startswith("launcher: stopped by Ctrl-C")
    assert done.stderr.count("\n") == 1


def test_what_it_was_started_to_ignore_stays_ignored(tmp_path):
    done = launch(tmp_path, "importing", signal.SIGUSR1, ignored=True)
    assert "stopped by" not in done.stderr
    assert done.returncode == 1  # the stand-in for Hydra has nothing in it


def test_nothing_is_left_that_keeps_the_next_run_out(tmp_path):
    assert launch(tmp_path, "importing JAX", signal.SIGTERM).returncode == 75
    (tmp_path / "path" / "jax" / "__init__.py").unlink()
    (tmp_path / "path" / "jax").rmdir()
    again = subprocess.run(
        [sys.executable, "-m", "launcher", "mode=plan", "hydra.run.dir=run", "parallel=single",
         "model.layers=1", "model.hidden=16"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
