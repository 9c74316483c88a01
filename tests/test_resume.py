"""Runs that stop and go on, through `main.run` and through the command itself."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from launcher import main
from launcher.cli.compose import load
from launcher.errors import ConfigError, StorageError

QUICK = (
    "logger=jsonl", "model.layers=2", "train.steps=6", "train.eval_every=3", "train.eval_batches=1",
    "checkpoint.every_steps=2", "parallel.num_microbatches=2",
)  # fmt: skip
WHAT_COUNTS = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")


pytestmark = pytest.mark.usefixtures("no_new_backend")


def rows_of(run_dir) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in WHAT_COUNTS if key in row} for row in rows]


def steps_of(run_dir) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def summary_of(run_dir) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def run(run_dir, *more: str) -> int:
    run_dir.mkdir(exist_ok=True)
    group = [] if any(text.startswith("parallel=") for text in more) else ["parallel=data"]
    return main.run(load([*QUICK, *group, *more]), run_dir)


@pytest.fixture(scope="module")
def whole(no_new_backend, tmp_path_factory):
    """The folder of a run of six steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run(run_dir) == 0
    return run_dir


@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of it, as it was after its checkpoint of step 4, with half a row of step 6."""
    run_dir = tmp_path / "stopped"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text()[:-40])
    return run_dir


def test_a_run_leaves_its_checkpoints(whole):
    # The newest three, of which that of step 6 is the best.
    assert steps_of(whole) == ["step-00000003", "step-00000004", "step-00000006"]
    summary = summary_of(whole)
    assert summary["checkpoints"] == 4
    assert 0 < summary["checkpoint_s"] < summary["wall_s"]
    manifest = json.loads((whole / "checkpoints/step-00000004/manifest.json").read_text())[
        "manifest"
    ]
    assert manifest["step"] == 4
    assert manifest["samples"] == 4 * 32
    assert manifest["run"]["config"]["train"]["steps"] == 6
    assert json.loads(manifest["run"]["plan"])["num_microbatches"] == 2
    best = json.loads((whole / "checkpoints/best.json").read_text())
    assert best["best"] == "step-00000006"


def test_it_goes_on_bit_for_bit(whole, stopped, monkeypatch, caplog):
    caplog.set_level("INFO", "launcher")
    monkeypatch.setattr(main, "find_plan", None)  # the plan is that of the checkpoint
    assert run(stopped) == 0
    assert "going on after step 4" in caplog.text
    assert "the plan is that of the checkpoint" in caplog.text
    assert "the learning rate does not go on" not in caplog.text
    assert rows_of(stopped) == rows_of(whole)
    assert steps_of(stopped) == steps_of(whole)
    ours, theirs = summary_of(stopped), summary_of(whole)
    for key in ("status", "steps", "planned_steps", "loss", "best_loss", "eval_loss"):
        assert ours[key] == theirs[key]
    assert run(stopped) == 0
    assert "all 6 steps are done already" in caplog.text
    assert rows_of(stopped) == rows_of(whole)


def test_a_run_that_was_killed_behind_its_last_checkpoint_still_ends(whole, tmp_path, caplog):
    """Of what it leaves behind, its summary is missing, and the weights that are asked for."""
    caplog.set_level("INFO", "launcher")
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    (run_dir / "summary.json").unlink()
    assert run(run_dir, "train.export_weights=true") == 0
    assert "ended before it had written its summary" in caplog.text
    assert rows_of(run_dir) == rows_of(whole)
    assert steps_of(run_dir) == steps_of(whole)
    ours, theirs = summary_of(run_dir), summary_of(whole)
    for key in ("status", "steps", "planned_steps", "loss", "best_loss", "eval_loss"):
        assert ours[key] == theirs[key]
    assert (run_dir / "weights.safetensors").exists()
    assert run(run_dir) == 0
    assert "all 6 steps are done already (" in caplog.text


def test_more_steps_with_a_learning_rate_that_decays_to_the_last(whole, tmp_path, caplog):
    assert run(tmp_path / "a", f"resume={whole}", "train.steps=7", "optimizer.decay=cosine") == 0
    told = "train.steps=7, and the run so far was to have 6: optimizer.decay=cosine ends at the last step"
    assert told in caplog.text


def test_a_place_that_cannot_be_written_to_is_found_before_compiling(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(main, "LocalExecutor", None)
    told = r"no checkpoint can be written in .*/taken: .* \(checkpoint.dir\): give a folder"
    with pytest.raises(StorageError, match=told):
        run(tmp_path / "run", f"checkpoint.dir={tmp_path / 'taken'}")


def test_from_another_folder(whole, tmp_path):
    """From a checkpoint, from a run's folder, and again from its own once it has one."""
    origin = whole / "checkpoints" / "step-00000004"
    assert run(tmp_path / "a", f"resume={origin}") == 0
    assert rows_of(tmp_path / "a") == rows_of(whole)[5:]
    assert run(tmp_path / "a", f"resume={origin}", "train.steps=7") == 0
    assert [row["step"] for row in rows_of(tmp_path / "a")] == [5, 6, 6, 7, 7]
    assert run(tmp_path / "b", f"resume={whole}", "train.steps=7") == 0
    assert [row["step"] for row in rows_of(tmp_path / "b")] == [7, 7]


@pytest.mark.slow  # a second search, and programs of two stages
def test_on_another_plan(whole, stopped, caplog):
    caplog.set_level("INFO", "launcher")
    assert run(stopped, "parallel=manual", "parallel.pp=2", "parallel.tp=2") == 0
    assert "parallel.name differs from the checkpoint's run: planning anew" in caplog.text
    for ours, theirs in zip(rows_of(stopped), rows_of(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)  # fp32


def test_on_other_devices(whole, stopped, caplog):
    fewer = ("cluster=cpu8", "cluster.hosts=1", "parallel.num_microbatches=auto")
    with pytest.raises(ConfigError, match=r"plan is for 2 x 4 devices \(cluster=local\), and "
                       r"cluster=cpu8 has 1 x 4 \(replan=false\): set replan=true"):  # fmt: skip
        run(stopped, *fewer)
    assert (
        run(
            stopped,
            "cluster=cpu8",
            "cluster.hosts=1",
            "replan=true",
            "parallel.num_microbatches=auto",
        )
        == 0
    )
    plan = json.loads((stopped / "plan.json").read_text())
    assert plan["cluster"]["hosts"] == 1
    assert plan["num_microbatches"] == 2  # as before, though it was free
    for ours, theirs in zip(rows_of(stopped), rows_of(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_only_the_weights(whole, tmp_path):
    assert run(tmp_path / "w", f"resume={whole}", "resume_weights_only=true", "train.steps=1") == 0
    row, evaluation = rows_of(tmp_path / "w")
    assert (row["step"], evaluation["step"]) == (1, 1)
    assert row["loss"] < rows_of(whole)[0]["loss"] - 0.1
    assert run(tmp_path / "e", "mode=eval", f"resume={whole}") == 0
    assert rows_of(tmp_path / "e") == rows_of(whole)[-1:]


def test_a_damaged_one_is_left_out(whole, stopped, caplog):
    (stopped / "checkpoints/step-00000004/manifest.json").write_text("{")
    assert run(stopped) == 0
    assert "is damaged at" in caplog.text
    assert rows_of(stopped) == rows_of(whole)
    assert steps_of(stopped) == steps_of(whole)


def test_none_intact(stopped):
    for path in (stopped / "checkpoints").glob("step-*/manifest.json"):
        path.unlink()
    with pytest.raises(StorageError, match="none of the 2 checkpoints"):
        run(stopped)


REFUSED = [
    (("seed=1",), r"seed=1 is not the 0 of the checkpoint .*resume_weights_only=true"),
    (("train.global_batch=64",), r"train.global_batch=64 is not the 32 of the checkpoint"),
    (
        ("model.layers=3",),
        r"of model=gpt model.size=tiny model.layers=2 does not fit model=gpt model.size=tiny "
        r"model.layers=3: it lacks 36: optimizer/0/mu/blocks/2/"
        r"attention/out/bias, .*, \.\.\.: give model=gpt model.size=tiny model.layers=2$",
    ),
    (
        ("model.vocab_size=300",),
        r"model.vocab_size=300: it has otherwise 3: .*\(float32\[256,64\] there, float32\[300,64\] here\)"
        r".*: give model=gpt model.size=tiny model.layers=2 model.vocab_size=256$",
    ),
    (("optimizer=sgd",), r"it lacks .*optimizer/0/trace.*has besides .*: give optimizer=adamw"),
    (("resume=none",), "has a checkpoint of step 4, and this run would begin at step 0"),
    (("resume_weights_only=true",), "has a checkpoint of step 4, and this run would begin at step 0"),
    (("resume={run}/nowhere",), "resume=.*nowhere is no folder: give a checkpoint, such as"),
    (("resume={run}/.hydra",), "resume=.*hydra has no checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "told"), REFUSED)
def test_what_does_not_fit(stopped, given, told):
    (stopped / ".hydra").mkdir()
    with pytest.raises(ConfigError, match=told):
        run(stopped, *(text.format(run=stopped) for text in given))


def test_weights_of_nothing(tmp_path):
    with pytest.raises(ConfigError, match="resume_weights_only=true finds no checkpoint in"):
        run(tmp_path / "new", "resume_weights_only=true")


def test_without_checkpoints(tmp_path):
    off = ("checkpoint.every_steps=0", "checkpoint.every_minutes=null", "train.steps=1")
    assert run(tmp_path / "off", *off) == 0
    assert not (tmp_path / "off" / "checkpoints").exists()
    assert run(tmp_path / "dir", "train.steps=1", f"checkpoint.dir={tmp_path}/there") == 0
    assert [path.name for path in (tmp_path / "there").glob("step*")] == ["step-00000001"]


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(tmp_path):
    given = [*QUICK, "parallel=data", "train.steps=40", "checkpoint.every_steps=1000"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    def start(run_dir):
        command = [sys.executable, "-m", "launcher", *given, f"hydra.run.dir={run_dir}"]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    assert start(whole).wait(300) == 0
    process = start(stopped)
    path = stopped / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_text().count("\n") > 5):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130
    done = summary_of(stopped)["steps"]
    assert f"step-{done:08d}" in steps_of(stopped)
    assert start(stopped).wait(300) == 0
    # Ctrl-C leaves out the evaluation of its step, if there is one.
    assert [r for r in rows_of(stopped) if "loss" in r] == [
        r for r in rows_of(whole) if "loss" in r
    ]
