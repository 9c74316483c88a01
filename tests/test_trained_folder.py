"""The folder of a run that has trained: refused commands and other modes leave its record alone."""

import json
import subprocess
import sys

import pytest

from launcher.run_state import STATE_NAME

RECORD = (
    *("config.yaml", "plan.json", "summary.json", "metrics.jsonl", STATE_NAME, "launcher.log"),
    *(".hydra/overrides.yaml", ".hydra/config.yaml"),
)
TINY = (
    *("model=gpt", "model.size=tiny", "model.layers=1", "parallel=single", "train.global_batch=4"),
    *("train.eval_batches=1", "logger=jsonl"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that is done, and a way to give commands in it."""
    folder = tmp_path_factory.mktemp("trained") / "run"

    def command(*words):
        return subprocess.run(
            [sys.executable, "-m", "launcher", *TINY, f"hydra.run.dir={folder}", *words],
            cwd=folder.parent, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    ended = command("train.steps=2")
    assert ended.returncode == 0, ended.stderr
    return folder, command


def record(folder):
    return {name: (folder / name).read_bytes() for name in RECORD}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train.steps=3", "model.hidden=96"), "does not fit"),
        (("train.steps=3", "resume=none"), "take another hydra.run.dir"),
        (("mode=plan",), "which mode=plan would write over"),
        (("mode=profile",), "which mode=profile would write over"),
    ],
)
def test_what_is_refused_in_it_changes_nothing(trained, words, said):
    folder, command = trained
    before = record(folder)
    ended = command(*words)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert record(folder) == before


def test_an_evaluation_goes_beside_it(trained):
    folder, command = trained
    before = record(folder)
    assert command("mode=eval").returncode == 0
    assert record(folder) == before
    found = json.loads((folder / "evaluation" / "summary.json").read_text())
    trained_loss = json.loads(before["summary.json"])["eval_loss"]
    assert found["eval_loss"] == pytest.approx(trained_loss, rel=1e-6)
    assert command("mode=eval").returncode == 0  # again, in the same place
