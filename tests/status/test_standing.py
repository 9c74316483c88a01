"""How a run stands: at work, ended, dead, in the queue."""

import dataclasses
import json
import os
import time

import pytest

from launcher import run_lock
from launcher.status.queue import Job
from launcher.status.run_files import read_run
from launcher.status.standing import standing


def stands(folder, jobs=None):
    return standing(read_run(folder.path), {} if jobs is None else jobs)


@pytest.mark.parametrize("phase", ["planning", "compiling", "training", "evaluating"])
def test_a_run_that_holds_its_folder_is_at_work(run, phase):
    folder = run("0").note(phase)
    lock = run_lock.take(folder.path)
    found = stands(folder)
    assert (found.state, found.exit_status) == (phase, None)
    assert f"process {os.getpid()} on" in found.detail
    lock.release()


@pytest.mark.parametrize("before", [None, ("done", 0), ("stopped", 75)])
def test_one_that_has_just_begun_is_starting_whatever_was_before(run, before):
    folder = run("0")
    if before:
        folder.note(*before).summary(status=before[0], measured_step_s=1.0)
    lock = run_lock.take(folder.path)
    found = stands(folder)
    assert (found.state, found.measured_step_s) == ("starting", None)
    lock.release()


def test_one_whose_process_is_gone_is_not_shown_as_training(run):
    folder = run("0").note("training").rows(3.0, 2.0)
    until_s = time.time() - 200
    (folder.path / "goodput.json").write_text(json.dumps({"until_s": until_s}))
    state = json.loads((folder.path / "state.json").read_text())
    (folder.path / "state.json").write_text(json.dumps(state | {"since_s": until_s - 60}))
    found = stands(folder)
    assert (found.state, found.step) == ("died", 2)
    assert found.detail.startswith("while training, last sign of life 3 min 2")
    assert found.detail.endswith("its process is gone: run it again")


@pytest.mark.parametrize(
    ("mode", "status", "state", "detail"),
    [
        ("train", 0, "done", None),
        ("planned", 0, "planned", None),
        ("train", 75, "stopped", "run it again"),
        ("train", 130, "interrupted", "by Ctrl-C"),
        ("train", 4, "failed", "no plan fits"),
        ("train", 1, "failed", "this is a bug of ours"),
    ],
)
def test_an_end_is_told_with_its_reason_and_status(run, mode, status, state, detail):
    reason = detail if state == "failed" else None
    found = stands(run("0").note(mode, status, reason))
    assert (found.state, found.exit_status, found.detail) == (state, status, detail)


def test_the_numbers_of_an_ended_run_are_those_of_its_summary(run):
    folder = run("0").plan().rows(3.0, 2.0, 1.0, eval_loss=1.5).note("train", 0)
    folder.summary(
        status="done", steps=3, best_loss=0.5, measured_step_s=0.3, measured_tokens_per_s=7.0,
        measured_over_predicted_step_s=3.0,
    )  # fmt: skip
    found = stands(folder)
    assert (found.step, found.steps, found.loss, found.best_loss) == (3, 10, 1.0, 0.5)
    assert (found.eval_loss, found.per_s, found.unit) == (1.5, 7.0, "tokens")
    assert (found.measured_step_s, found.predicted_step_s) == (0.3, 0.1)
    assert found.measured_over_predicted == 3.0
    assert found.log == folder.path / "launcher.log"


def test_those_of_a_run_at_work_are_of_its_rows(run):
    folder = run("0").plan().rows(3.0, 2.0, 1.0, 0.9, step_s=0.25).note("training")
    folder.summary(status="stopped", measured_step_s=9.0)  # of the start before
    lock = run_lock.take(folder.path)
    found = stands(folder)
    assert (found.step, found.measured_step_s, found.per_s) == (4, 0.25, 2560)
    assert (found.best_loss, found.measured_over_predicted) == (None, None)
    lock.release()


def test_a_line_that_is_being_written_is_not_counted(run):
    folder = run("0").rows(3.0, 2.0)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    files = read_run(folder.path)
    assert standing(files, {}).step == 2
    assert files.damaged == ()


QUEUE = {"7": Job(state="PENDING", reason="Priority")}


@pytest.mark.parametrize(
    ("noted", "job", "state", "detail"),
    [
        (None, Job(state="PENDING", reason="Priority"), "queued", "job 7: PENDING (Priority)"),
        (
            ("stopped", 75),
            Job(state="PENDING", reason="BeginTime"),
            "queued",
            "PENDING (BeginTime)",
        ),
        (("training", None), Job(state="RUNNING", reason="None"), "training", "job 7: RUNNING"),
        (("stopped", 75), Job(state="RUNNING", reason="None"), "starting", "job 7: RUNNING"),
        (None, Job(state="CONFIGURING", reason="None"), "starting", "job 7: CONFIGURING"),
        (None, Job(state="FAILED", reason="x"), "gone", "job 7: FAILED, before the run began"),
        (
            ("training", None),
            Job(state="NODE_FAIL", reason="x"),
            "died",
            "job 7: NODE_FAIL: run it",
        ),
        (None, None, "gone", "job 7 is no longer in the queue"),
        (("done", 0), None, "done", None),
    ],
)
def test_a_job_of_slurm(run, noted, job, state, detail):
    folder = run("0").job("7")
    if noted:
        folder.note(*noted)
    found = stands(folder, {"7": job} if job else {})
    assert (found.state, found.job) == (state, "7")
    assert found.detail is None if detail is None else detail in found.detail


def test_a_job_where_slurm_does_not_answer(run):
    found = standing(read_run(run("0").job("7").path), None)
    assert (found.state, found.detail) == ("not begun", "job 7; squeue does not answer here")


def test_a_run_of_a_version_that_noted_nothing(run):
    assert stands(run("0").summary(status="done", steps=5)).state == "done"
    assert stands(run("1")).state == "not begun"


def test_values_of_the_wrong_type_are_not_there(run):
    folder = run("0", train={"steps": "many"}, mode=3).note("training")
    state = {"state": ["training"], "since_s": "x", "exit_status": True, "reason": {}}
    (folder.path / "state.json").write_text(json.dumps(state))
    folder.summary(status=3, steps=None, measured_step_s="fast").job(None)
    (folder.path / "plan.json").write_text('{"predicted": 3, "stages": 4}')
    (folder.path / "metrics.jsonl").write_text('{"step": "x"}\n[]\n{"step": 1, "loss": "low"}\n')
    found = dataclasses.asdict(stands(folder))
    empty = {"detail", "exit_status", "mode", "steps", "loss", "per_s", "predicted_step_s", "job"}
    assert {name: found[name] for name in empty} == dict.fromkeys(empty)
    assert found["state"] == "not begun"
