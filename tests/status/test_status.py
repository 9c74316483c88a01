"""The command, and the comparison that it writes."""

import csv
import json
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from launcher.slurm.code_copy import VERSIONS_NAME
from launcher.status.__main__ import main
from launcher.status.queue import Job, find_jobs
from launcher.status.run_files import read_run

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch, tmp_path):
    """A PATH without squeue; a test may put one there."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def table_of(capsys, folder, status=0):
    assert main([str(folder)]) == status
    return capsys.readouterr().out.splitlines()


def rows_of(folder):
    with (folder / "comparison.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_is_a_line_and_writes_nothing(run, capsys):
    folder = run("0").plan().rows(3.0, 2.5, 2.0, eval_loss=2.25, step_s=0.02).note("train", 0).path
    before = {path.name for path in folder.iterdir()}
    assert table_of(capsys, folder) == [
        "run  state  step  loss    eval loss  speed           measured  predicted  memory",
        ".    done   3/10  2.0000  2.2500     32.0k tokens/s  20.0 ms   100 ms     3 MiB",
    ]
    assert {path.name for path in folder.iterdir()} == before


def test_the_code_that_a_sweep_runs_is_no_run(run, tmp_path, capsys):
    folder = run("0").note("train", 0).path.parent
    code = folder / "slurm" / "code-20261129-164819"
    (code / "conf").mkdir(parents=True)
    (code / VERSIONS_NAME).write_text("{}")
    (code / "conf" / "config.yaml").write_text("defaults: []")
    assert not any("code-" in line for line in table_of(capsys, folder))


def test_a_failed_one_says_why_and_where_to_look(run, capsys):
    folder = run("0").note("train", 4, "no plan fits 4 devices (parallel.tp=3): " + "x" * 300).path
    _, line, below = table_of(capsys, folder)
    assert "failed (4)" in line
    assert below.startswith(".: no plan fits 4 devices (parallel.tp=3): xxx")
    assert below.endswith(f"...  (exit status 4); log: {folder}/launcher.log".replace("  ", " "))


def test_the_command_of_one_that_was_stopped_is_whole(run, capsys):
    command = f"python -m launcher {' '.join(f'model.args.key_{n}={n}' for n in range(30))}"
    reason = f"stopped by SIGTERM after step 7 of 10; to go on: {command}"
    folder = run("0").note("stopped", 75, reason).path
    *_, why, way_on = table_of(capsys, folder)
    log = f"{folder}/launcher.log"
    assert why == f".: stopped by SIGTERM after step 7 of 10 (exit status 75); log: {log}"
    assert way_on == f"  to go on: {command}"


def learning(run, tmp_path):
    """A sweep in which the best run is neither the first nor the fastest."""
    for name, rate, eval_loss in (("0", 0.1, 2.0), ("1", 0.01, 1.0), ("10", 0.001, 3.0)):
        folder = run(name, optimizer={"learning_rate": rate}).plan().note("train", 0)
        folder.rows(4.0, 3.0, eval_loss, eval_loss=eval_loss)
    run("2", optimizer={"learning_rate": 1.0}).note("train", 5, "the loss is nan")
    run("3", optimizer={"learning_rate": 2.0}).note("training")
    return tmp_path / "sweep"


def test_a_sweep_that_learns_is_sorted_by_its_evaluations(run, tmp_path, capsys):
    top = learning(run, tmp_path)
    head, columns, *lines = table_of(capsys, top)
    assert head == "5 runs, sorted by eval_loss"
    assert columns.split()[:3] == ["run", "optimizer.learning_rate", "state"]
    assert [line.split()[:2] for line in lines[:3]] == [
        ["1", "0.01"],
        ["0", "0.1"],
        ["10", "0.001"],
    ]
    assert lines[-1] == f"written: {top}/comparison.csv, {top}/comparison.svg"
    rows = rows_of(top)
    assert [row["run"] for row in rows] == ["1", "0", "10", "2", "3"]
    assert rows[0]["optimizer.learning_rate"] == "0.01"
    assert (rows[0]["eval_loss"], rows[0]["predicted_samples_per_s"]) == ("1.0", "320.0")
    assert (rows[3]["state"], rows[3]["exit_status"], rows[3]["reason"]) == (
        "failed", "5", "the loss is nan",
    )  # fmt: skip
    assert rows[4]["state"] == "died"


def test_a_sweep_may_be_named_by_way_of_another_folder(run, tmp_path, capsys):
    top = learning(run, tmp_path)
    _, _, first, *_ = table_of(capsys, top / "1" / ".." / ".." / top.name)
    assert first.split()[:2] == ["1", "0.01"]


def test_a_sweep_over_how_to_run_is_sorted_by_speed(run, tmp_path, capsys):
    for name, parallel, step_s in (("0", "data", 0.3), ("1", "zero", 0.1)):
        run(name, parallel={"name": parallel}).rows(2.0, 2.0, 2.0, step_s=step_s).note("train", 0)
    head, columns, first, *_ = table_of(capsys, tmp_path / "sweep")
    assert head == "2 runs, sorted by measured speed"
    assert columns.split()[:3] == ["run", "parallel", "state"]
    assert first.split()[:2] == ["1", "zero"]


def test_a_sweep_of_plans_is_sorted_by_what_they_promise(run, tmp_path, capsys):
    for name, model, step_s in (("0", "gpt", 0.3), ("1", "moe", 0.1)):
        run(name, mode="plan", model={"name": model}).plan(step_s).note("planned", 0)
    head, _, first, *_ = table_of(capsys, tmp_path / "sweep")
    assert head == "2 runs, sorted by predicted speed"
    assert first.split() == ["1", "moe", "planned", "320", "samples/s", "100", "ms", "3", "MiB"]


def test_without_evaluations_the_loss_decides(run, tmp_path, capsys):
    for seed, loss in (("0", 3.0), ("1", 2.0)):
        run(seed, seed=int(seed)).rows(4.0, loss).note("train", 0)
    assert table_of(capsys, tmp_path / "sweep")[0] == "2 runs, sorted by loss"
    assert [row["seed"] for row in rows_of(tmp_path / "sweep")] == ["1", "0"]


def test_what_follows_from_an_option_is_no_column_unless_it_was_given(run, tmp_path, capsys):
    for name, model, data, hidden, seed in (
        ("0", "gpt", "text", 8, 0),
        ("1", "wrn", "digits", 16, 1),
    ):
        folder = run(name, model={"name": model, "hidden": hidden}, data={"name": data}, seed=seed)
        folder.note("train", 0)
    top = tmp_path / "sweep"
    assert table_of(capsys, top)[1].split()[:4] == ["run", "model", "seed", "state"]
    for name, hidden in (("0", 8), ("1", 16)):
        (top / name / ".hydra").mkdir()
        (top / name / ".hydra" / "overrides.yaml").write_text(f"[model=x, model.hidden={hidden}]")
    assert "model.hidden" in rows_of_again(capsys, top)[0]


def rows_of_again(capsys, top):
    table_of(capsys, top)
    return rows_of(top)


def test_a_sweep_of_many_runs_shows_the_best(run, tmp_path, capsys):
    for seed in range(45):
        run(str(seed), seed=seed).rows(4.0, 100.0 - seed).note("train", 0)
    lines = table_of(capsys, tmp_path / "sweep")
    assert lines[2].split()[0] == "44"
    assert lines[42] == "... 5 more"
    assert len(rows_of(tmp_path / "sweep")) == 45


def test_a_table_of_runs_that_differ_in_much_fits_a_terminal(run, tmp_path, monkeypatch, capsys):
    for number in range(6):
        forced = {f"key_of_a_long_name_{key}": 3 if key == number else None for key in range(6)}
        made = run(str(number), seed=number, train=forced, parallel={"name": f"way_{number}"})
        made.plan().rows(4.0, 3.0, 2.0, eval_loss=2.5, step_s=0.1 + number / 100).note("train", 0)
    top = tmp_path / "sweep"
    monkeypatch.setenv("COLUMNS", "80")
    lines = table_of(capsys, top)
    assert max(map(len, lines[1:8])) <= 120
    assert lines[1].split()[:4] == ["run", "parallel", "seed", "state"]
    (named,) = [line for line in lines if line.startswith("differ too, in comparison.csv: ")]
    left_out = [f"train.key_of_a_long_name_{key}" for key in range(6)]
    assert set(named.partition(": ")[2].split(", ")) <= set(left_out)
    assert rows_of(top)[0].keys() >= {"parallel", "seed", *left_out}
    monkeypatch.setenv("COLUMNS", "400")
    wide = table_of(capsys, top)
    assert wide[1].split()[:9] == ["run", "parallel", "seed", *left_out]
    assert not any(line.startswith("differ too") for line in wide)


def test_a_column_that_does_not_differ_among_the_shown_runs_is_left_out(run, tmp_path, capsys):
    for seed in range(45):
        way = {"name": "data" if seed == 0 else "zero"}
        run(str(seed), seed=seed, parallel=way).rows(4.0, 100.0 - seed).note("train", 0)
    lines = table_of(capsys, tmp_path / "sweep")
    assert lines[1].split()[:3] == ["run", "seed", "state"]
    assert rows_of(tmp_path / "sweep")[-1]["parallel"] == "data"


def test_the_picture_has_a_curve_and_a_bar_for_each_run(run, tmp_path, capsys):
    top = learning(run, tmp_path)
    table_of(capsys, top)
    root = ElementTree.parse(top / "comparison.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    curves = [path for path in root.iter(f"{space}path") if "stroke:var" in path.get("style", "")]
    assert [curve.find(f"{space}title").text for curve in curves] == [
        f"optimizer.learning_rate={rate}" for rate in ("0.001", "0.1", "0.01")  # the best on top
    ]  # fmt: skip
    labels = [text.text for text in root.iter(f"{space}text")]
    assert "optimizer.learning_rate=2.0" in labels
    assert {"200 ms", "failed", "died"} <= set(labels)


def test_the_curve_of_a_long_run_is_read_in_places(run):
    folder = run("0").rows(*(1000.0 - step for step in range(5000)))
    curve = read_run(folder.path).curve
    assert 150 < len(curve) <= 201
    assert curve[0] == (1, 1000.0)
    assert curve[-1] == (5000, -3999.0)
    assert all(loss == 1001.0 - step for step, loss in curve)


def test_the_newest_evaluation_is_found_far_back(run):
    rows = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.5}]
    rows += [{"step": step, "loss": 2.0} for step in range(2, 2000)]
    folder = run("0")
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(folder.path).eval_row == {"step": 1, "eval_loss": 1.5}


def test_a_folder_of_folders(run, tmp_path, capsys):
    run("2026-01-01/a/seed=0", seed=0).note("train", 0)
    run("2026-01-01/a/seed=1", seed=1).note("train", 0)
    (tmp_path / "sweep" / "empty").mkdir()
    assert [line.split()[0] for line in table_of(capsys, tmp_path / "sweep")[2:4]] == [
        "2026-01-01/a/seed=0", "2026-01-01/a/seed=1",
    ]  # fmt: skip


BAD = {
    "nowhere": "nowhere is not there: give the folder of a run or of a sweep",
    "file": "file is no folder",
    "empty": "empty has no run in it",
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_without_a_run(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    assert main([name]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"launcher.status: {BAD[name]}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["a", "b"], [""], ["a\0b"]])
def test_a_command_line_that_is_not_one_folder(arguments, capsys):
    assert main(arguments) == 2
    assert "is not one folder: give that of a run or of a sweep" in capsys.readouterr().err


DAMAGED = {
    "plan.json": ["{", "[1]", "[" * 100_000, "\xff"],
    "summary.json": ['{"steps": '],
    "state.json": ["no"],
    "goodput.json": ["x"],
    "job.json": ["["],
    "config.yaml": ["a: [", "- 1", "a: 1\na: 2"],
    "metrics.jsonl": ["rubbish\nmore\n"],
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in DAMAGED.items() for text in texts]
)
def test_a_damaged_file_is_named_and_the_rest_told(run, capsys, name, text):
    folder = run("0").plan().rows(3.0).note("train", 0).path
    (folder / name).write_bytes(text.encode("latin-1"))
    assert main([str(folder)]) == 2
    said = capsys.readouterr()
    assert str(folder / name) in said.err
    assert said.err.count("\n") == 1
    assert said.out.splitlines()[1].startswith(". ")


def test_a_pipe_in_place_of_a_file_is_not_waited_for(run, capsys):
    folder = run("0").path
    os.mkfifo(folder / "metrics.jsonl")
    assert main([str(folder)]) == 2
    assert "metrics.jsonl, It is a pipe" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(run, tmp_path, capsys):
    top = learning(run, tmp_path)
    (top / "comparison.csv").mkdir()
    assert main([str(top)]) == 6
    said = capsys.readouterr()
    assert "cannot write" in said.err
    assert "sorted by eval_loss" in said.out


def squeue(folder: pathlib.Path, script: str) -> None:
    path = folder / "squeue"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_queue_is_asked_for_the_jobs_of_the_runs(run, tmp_path, capsys, no_slurm):
    run("0", seed=0).job("7")
    run("1", seed=1).job("8_1").note("training")
    run("2", seed=2).job("9")
    squeue(no_slurm, """
        case "$*" in *--jobs=7,8_1,9*) ;; *) exit 1 ;; esac
        echo '7|PENDING|Resources'; echo '8_1|RUNNING|None'; echo '1|RUNNING|None'""")  # fmt: skip
    lines = table_of(capsys, tmp_path / "sweep")
    assert [line.split()[2] for line in lines[2:5]] == ["queued", "training", "gone"]
    assert "0: job 7: PENDING (Resources)" in lines[5]


def test_a_queue_that_does_not_answer_is_said(run, tmp_path, capsys, no_slurm):
    folder = run("0").job("7").path
    lines = table_of(capsys, folder)
    assert "squeue does not answer here" in lines[-1]
    squeue(no_slurm, "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert "squeue does not answer here" in table_of(capsys, folder)[-1]
    squeue(no_slurm, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert "is no longer in the queue" in table_of(capsys, folder)[-1]


def test_what_is_no_number_of_a_job_is_not_asked_for():
    def ask(command):
        assert command[-1] == "--jobs=7"
        return "7|PENDING|Priority\n"

    assert find_jobs(["7", "7;reboot", ""], ask) == {"7": Job(state="PENDING", reason="Priority")}
    assert find_jobs(["x"], ask) == {}


def test_the_real_command(run):
    folder = run("0").note("train", 0).path
    done = subprocess.run(
        [sys.executable, "-m", "launcher.status", str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[1].split()[:2] == [".", "done"]
