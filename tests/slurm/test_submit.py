"""Submitting: what is written and printed, and what is left alone."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from fake_slurm import TINY

from launcher.cli import jobs
from launcher.slurm.job_folder import ends_folder, note_end, read_job

SWEEP = ("--multirun", "hydra/launcher=slurm", "hydra.sweep.dir=sweep")
POINTS = (*SWEEP, "seed=0,1,2")


def rows(out: str) -> list[list[str]]:
    """The table: job, state, folder, overrides."""
    lines = out.splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("job "))
    return [line.split(None, 3) for line in lines[begin + 1 : -1]]


def test_a_job_has_all_that_it_needs_in_its_folder(command, fake_slurm, tmp_path):
    said = command(
        "mode=submit", "model=moe", "data=text", "hydra.run.dir=a", "logger.group=g${seed}"
    )
    assert (said.status, said.err) == (0, "")
    assert rows(said.out) == [["101", "submitted", "a"]]
    assert "watch: squeue --jobs=101; end: scancel 101; to submit" in said.out
    assert "python -m launcher mode=submit model=moe data=text" in said.out
    config = yaml.safe_load((tmp_path / "a/config.yaml").read_text())
    assert (config["mode"], config["model"]["name"], config["logger"]["group"]) == (
        "train", "moe", "g0",
    )  # fmt: skip
    job = read_job(tmp_path / "a")
    assert (job["job_id"], job["nodes"]) == ("101", 1)
    script = (tmp_path / "a/slurm/101_submission.sh").read_text()
    assert f"PYTHONPATH={job['code']}" in script
    assert [line.split()[1] for line in fake_slurm.asked] == [
        "--test-only", fake_slurm.asked[1].split()[1],
    ]  # fmt: skip


def test_the_code_is_copied_as_it_is(command, fake_slurm, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/model.py").write_text("raise ImportError('only copied')")
    monkeypatch.syspath_prepend(tmp_path)
    said = command(
        "mode=submit", "model=custom", "model.target=mine.model:build", "hydra.run.dir=a"
    )
    assert said.status == 0, said.err
    code = pathlib.Path(read_job(tmp_path / "a")["code"])
    (tmp_path / "mine/model.py").unlink()
    assert (code / "mine/model.py").is_file()
    assert (code / "launcher/cli/job.py").is_file()
    found = [code / "conf", code / "launcher/conf"]
    assert any((folder / "cluster/cpu8.yaml").is_file() for folder in found)
    assert not list(code.rglob("__pycache__"))
    versions = json.loads((code / "versions.json").read_text())
    assert versions["mine"] == {"from": str(tmp_path / "mine"), "commit": None, "is_clean": None}
    assert versions["packages"]["jax"]


AWAY = {
    "no configuration": (
        "sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
        "sbatch: error: fetch_config: DNS SRV lookup failed\n"
        "sbatch: fatal: Could not establish a configuration source\n",
        "resolve_ctls_from_dns_srv: res_nsearch error: Unknown host; fetch_config: DNS SRV lookup failed; "
        "Could not establish a configuration source",
    ),
    "no file": (
        "sbatch: error: s_p_parse_file: unable to status file /etc/slurm/slurm.conf: No such file\n",
        "s_p_parse_file: unable to status file /etc/slurm/slurm.conf: No such file",
    ),
    "no controller": (
        "allocation failure: Unable to contact slurm controller (connect failure)\n",
        "allocation failure: Unable to contact slurm controller (connect failure)",
    ),
}


@pytest.mark.parametrize("at", ["refusal", "late-refusal"])
@pytest.mark.parametrize("case", AWAY)
def test_a_slurm_that_cannot_be_reached_is_no_refusal(command, fake_slurm, case, at):
    words, says = AWAY[case]
    fake_slurm.say(at, words)
    said = command("mode=submit", "cluster=8xp3", "hydra.run.dir=a")
    assert said.status == 3
    assert said.err.startswith("launcher: Slurm is not there: sbatch says: ")
    assert (
        f"{says} (mode=submit, hydra/launcher=slurm). Ways on: see `scontrol ping`; run" in said.err
    )
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [("mode=submit",), (*SWEEP, "seed=0,1")], ids=str)
def test_a_dry_run_prints_the_scripts_without_slurm_and_writes_nothing(
    command, tmp_path, monkeypatch, arguments
):
    monkeypatch.setenv("PATH", str(tmp_path))
    said = command(*arguments, "dry_run=true", "cluster=8xp3")
    assert (said.status, said.err) == (0, "")
    assert said.out.count("#SBATCH --nodes=8") == (1 if len(arguments) == 1 else 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["hydra/launcher=slurm", "mode=submit"])
def test_scripts_of_a_sweep_say_whose_they_are(tmp_path, way):
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "--multirun", way, "seed=0,1", "dry_run=true",
         "hydra.sweep.dir=sweep", "cluster=8xp3"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    begins = [at for at, line in enumerate(lines) if line == "#!/bin/bash"]
    own = [way] * (way == "mode=submit")
    assert [lines[at - 1] for at in begins] == [
        f"# {tmp_path}/sweep/{seed}: {' '.join((*own, f'seed={seed}'))} dry_run=True cluster=8xp3"
        for seed in range(2)
    ]


def test_a_sweep_is_a_table_and_each_point_a_job(command, fake_slurm, tmp_path):
    said = command(*POINTS, "train.steps=7", "hydra.launcher.qos=high")
    assert (said.status, said.err) == (0, "")
    assert rows(said.out) == [
        [str(101 + seed), "submitted", f"sweep/{seed}", f"seed={seed}"] for seed in range(3)
    ]
    assert "3 submitted, 0 left alone" in said.out
    for seed in range(3):
        config = yaml.safe_load((tmp_path / f"sweep/{seed}/config.yaml").read_text())
        assert (config["seed"], config["train"]["steps"]) == (seed, 7)
        assert config["logger"]["group"] == f"{tmp_path.name}/sweep"
    # One copy of the code for all, and one question to Slurm for jobs that ask for the same.
    assert len({read_job(tmp_path / f"sweep/{seed}")["code"] for seed in range(3)}) == 1
    assert sum("--test-only" in line for line in fake_slurm.asked) == 1
    assert "#SBATCH --qos=high" in (tmp_path / "sweep/0/slurm/101_submission.sh").read_text()


def test_points_that_are_done_or_in_the_queue_are_left_alone(command, fake_slurm, tmp_path):
    command(*POINTS)
    note_end(ends_folder(tmp_path / "sweep/0"), 0, "done", 0, "")
    note_end(ends_folder(tmp_path / "sweep/1"), 0, "failed", 5, "a loss that is not finite")
    fake_slurm.say("queue", "103 PENDING\n")
    said = command(*POINTS, "hydra.launcher.time='2:00:00'")
    assert [row[:2] for row in rows(said.out)] == [
        ["101", "done"], ["104", "submitted"], ["103", "pending"],
    ]  # fmt: skip
    assert "1 submitted, 2 left alone" in said.out


def test_a_point_that_is_to_go_further_is_submitted_again(command, fake_slurm, tmp_path):
    command(*POINTS, "train.steps=7")
    for seed in range(3):
        note_end(ends_folder(tmp_path / f"sweep/{seed}"), 0, "done", 0, "")
    assert {row[1] for row in rows(command(*POINTS, "train.steps=7").out)} == {"done"}
    assert {row[1] for row in rows(command(*POINTS, "train.steps=8").out)} == {"submitted"}
    assert not list(ends_folder(tmp_path / "sweep/0").glob("*.done"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 5\n", "a has a run with seed=5, and this one has seed=0: take another"),
        ("- a\n", "config.yaml is there and no config of a run: remove it"),
        ("{", "config.yaml is there and no config of a run: remove it"),
    ],
)
def test_a_folder_of_another_run_is_left_alone(command, fake_slurm, tmp_path, text, says):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.yaml").write_text(text)
    said = command("mode=submit", "hydra.run.dir=a")
    assert said.status == 2
    assert says in said.err
    assert (tmp_path / "a/config.yaml").read_text() == text
    assert fake_slurm.submitted == 0


def test_a_folder_that_slurm_would_rename(command, fake_slurm):
    said = command("mode=submit", "hydra.run.dir='50%'")
    assert said.status == 2
    assert "50% has a %, which Slurm takes for a sign of its own: take another folder" in said.err
    assert fake_slurm.submitted == 0


def test_points_that_would_share_a_folder(command, fake_slurm):
    said = command(*POINTS, "hydra.sweep.subdir=same")
    assert said.status == 2
    assert "3 points of the sweep have the folder" in said.err
    assert "hydra.sweep.subdir='${hydra.job.num}'" in said.err
    assert fake_slurm.submitted == 0


def test_a_secret_reaches_no_batch_script(command, fake_slurm, monkeypatch):
    monkeypatch.setenv("LAB_API_KEY", "very-secret-0815")
    said = command(*POINTS, "hydra.launcher.setup=['export X=${oc.env:LAB_API_KEY}']")
    assert said.status == 2
    assert "hydra.launcher.setup" in said.err
    assert "holds the secret of the environment variable LAB_API_KEY" in said.err
    assert fake_slurm.submitted == 0


def test_no_point_is_submitted_when_one_is_of_another_run(command, fake_slurm, tmp_path):
    command(*POINTS)
    said = command(*SWEEP, "seed=0,1,3")
    assert said.status == 2
    assert (
        "sweep/2 has a run with seed=2, and this one has seed=3: take another hydra.sweep.dir"
        in said.err
    )
    assert fake_slurm.submitted == 3


def test_a_refusal_half_way_leaves_the_jobs_before_it_and_says_which(command, fake_slurm, tmp_path):
    (tmp_path / "sweep/1/slurm").mkdir(parents=True)
    (fake_slurm.folder / "sbatch").write_text(
        (fake_slurm.folder / "sbatch").read_text().replace(
            '[ ! -e "$here/late', '[ -e "$here/number" ] && touch "$here/late-refusal"; [ ! -e "$here/late'
        )
    )  # fmt: skip
    said = command(*POINTS)
    assert said.status == 3
    assert said.out.splitlines()[1].split() == ["101", "submitted", "sweep/0"]
    assert said.err.startswith("launcher: sbatch refuses the job: ")
    assert not (tmp_path / "sweep/1/job.json").exists()


def test_a_queue_that_does_not_answer(command, fake_slurm, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/job.json").write_text('{"job_id": "7"}')
    fake_slurm.say("squeue-fails", "slurm_load_jobs error: Unable to contact slurm controller")
    said = command("mode=submit", "hydra.run.dir=a")
    assert said.status == 3
    assert "squeue does not answer: slurm_load_jobs error: Unable to contact" in said.err


WAIT = (*POINTS, "hydra.launcher.wait=true")


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr("launcher.slurm.waiting.POLL_S", 0.05)


def when_it_waits(fake_slurm, action) -> None:
    """Act when the queue is looked at."""

    def watch() -> None:
        while not any("squeue" in line for line in fake_slurm.asked):
            time.sleep(0.02)
        time.sleep(0.1)
        action()

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.usefixtures("quickly")
def test_waiting_ends_with_the_jobs_and_with_the_first_failure(command, fake_slurm, tmp_path):
    def end() -> None:
        note_end(ends_folder(tmp_path / "sweep/0"), 0, "done", 0, "")
        note_end(ends_folder(tmp_path / "sweep/1"), 1, "failed", 5, "out of memory")
        fake_slurm.say("show", "JobId=103 JobState=CANCELLED Reason=None")
        fake_slurm.say("queue", "")

    fake_slurm.say("queue", "101 RUNNING\n102 PENDING\n103 PENDING\n")
    when_it_waits(fake_slurm, end)
    said = command(*WAIT)
    assert said.status == 5
    assert said.out.splitlines()[-4:] == [
        "job 101 is running",
        "job 101 is done",
        "job 102 failed on its node 1: out of memory (exit status 5): see sweep/1/slurm/102_0_log.out",
        "job 103 has left the queue without an end (cancelled): see sweep/2/slurm/103_0_log.out",
    ]


@pytest.mark.usefixtures("quickly")
def test_ctrl_c_ends_the_waiting_and_says_what_goes_on(command, fake_slurm):
    fake_slurm.say("queue", "101 RUNNING\n103 PENDING\n")
    main = threading.main_thread()
    when_it_waits(fake_slurm, lambda: signal.pthread_kill(main.ident, signal.SIGINT))
    said = command(*WAIT)
    assert said.status == 130
    assert said.err == (
        "launcher: stopped waiting by Ctrl-C: job 101 (running), job 103 (pending): going on without "
        "this command; end with: scancel 101 103\n"
    )
    assert not [line for line in fake_slurm.asked if "scancel" in line]


def test_ctrl_c_between_two_submissions_says_what_was_submitted(command, fake_slurm, monkeypatch):
    def interrupted(found, collected) -> None:
        collected.append(next(iter(found)))
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "_collect", interrupted)
    said = command(*POINTS)
    assert said.status == 130
    assert said.out.splitlines()[1].split()[:2] == ["101", "submitted"]


def test_submitting_does_not_import_jax(fake_slurm, tmp_path):
    code = (
        "import sys; from launcher import cli; status = cli.main();"
        "assert 'jax' not in sys.modules; sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "mode=submit", *TINY]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
