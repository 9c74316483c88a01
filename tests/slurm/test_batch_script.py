"""The batch script: its text, and what bash makes of how the processes ended."""

import pathlib
import subprocess
import sys

import pytest

from launcher.cli import compose
from launcher.slurm.batch_script import JobPlace, batch_script
from launcher.slurm.job_folder import RankEnd, ends_folder, note_end, read_ends
from launcher.slurm.job_request import job_request

EVERYTHING = (
    "cluster=8xp3", "cluster.hosts=2", "cluster.slurm.partition=gpu", "cluster.slurm.account=lab",
    "cluster.slurm.qos=high", "cluster.slurm.time='1-00:00:00'", "cluster.slurm.cpus_per_task=12",
    "cluster.slurm.mem_gb=64", "cluster.slurm.exclusive=true", "cluster.slurm.constraint='a&b'",
    "+cluster.slurm.sbatch={nice: 100, hold: true}", "cluster.slurm.srun=['--container-image=a b.sqsh']",
    "cluster.slurm.setup=['module load cuda']", "+cluster.slurm.env={NCCL_DEBUG: 'a b'}",
    "cluster.slurm.warn_s=300", "cluster.slurm.max_restarts=1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "overrides"), [("small", ("cluster=cpu8",)), ("everything", EVERYTHING)]
)
def test_the_script_is_the_golden_one(golden, name, overrides):
    place = JobPlace(
        name="sweep-0",
        run_dir=pathlib.Path("/runs/it's 5 %/0"),
        code=pathlib.Path("/runs/code"),
        folder=pathlib.Path("/home/me"),
    )
    script = batch_script(job_request(compose.load(overrides)), place)
    golden(f"slurm/{name}.sh", script.replace(sys.executable, "python"))


@pytest.fixture
def end(fake_slurm, tmp_path):
    """Run a batch script whose `srun` does this; return bash's exit status and the lines it prints."""
    place = JobPlace(name="a", run_dir=tmp_path / "a b", code=tmp_path, folder=tmp_path)
    request = job_request(compose.load(("cluster.slurm.max_restarts=2",)))
    script = batch_script(request, place)
    ends = ends_folder(place.run_dir)

    def run(srun: str) -> tuple[int, str, tuple[RankEnd, ...]]:
        fake_slurm.say("srun", f'cd "{ends}"\n{srun}')
        done = subprocess.run(
            ["bash"], input=script, capture_output=True, text=True, cwd=tmp_path,
            env={"PATH": fake_slurm.on_path(), "SLURM_JOB_ID": "7"},
        )  # fmt: skip
        assert done.stderr == ""
        return done.returncode, done.stdout, read_ends(ends)

    return run


REQUEUE = "scontrol requeue 7"


def test_a_job_whose_processes_end_well_is_done(end, fake_slurm):
    assert end("echo 0 >rank-0.done; echo 0 >rank-1.done; exit 0")[:2] == (0, "")
    assert REQUEUE not in fake_slurm.asked


def test_a_failure_on_any_node_fails_the_job_with_its_reason(end, fake_slurm):
    status, said, ends = end(
        "printf '5\\nout of memory on node 1\\n' >rank-1.failed; sleep 0.01\n"
        "printf '3\\nlost node 1\\n' >rank-0.failed; exit 137"
    )
    assert status == 5
    assert said == "launcher: rank-1: out of memory on node 1\n"
    assert [(one.rank, one.exit_status) for one in ends] == [(1, 5), (0, 3)]
    assert REQUEUE not in fake_slurm.asked


def test_a_job_that_was_told_to_stop_is_requeued(end, fake_slurm):
    status, said, _ = end("printf '75\\nSIGUSR2 after step 9\\n' >rank-0.stopped; exit 0")
    assert (status, said) == (75, "launcher: requeued: SIGUSR2 after step 9\n")
    assert REQUEUE in fake_slurm.asked


def test_a_job_that_is_being_cancelled_is_not_requeued(end, fake_slurm):
    fake_slurm.say("state", "COMPLETING\n")
    status, said, _ = end("printf '75\\nSIGTERM\\n' >rank-0.stopped; exit 0")
    assert (status, said) == (
        75,
        "launcher: the job is being cancelled, and is not requeued: SIGTERM\n",
    )
    assert REQUEUE not in fake_slurm.asked


def test_a_job_that_slurm_does_not_requeue_says_so(end, fake_slurm):
    fake_slurm.say("requeue-fails", "")
    _, _, ends = end("printf '75\\nSIGUSR2\\n' >rank-0.stopped; exit 0")
    (failed,) = [one for one in ends if one.end == "failed"]
    assert failed.reason == "SIGUSR2, and Slurm does not requeue the job: submit it again"
    assert (failed.rank, failed.exit_status) == (None, 3)


def test_a_process_that_died_without_a_word_is_started_again_a_few_times(end, fake_slurm):
    for _ in range(2):
        status, said, _ = end("exit 137")
        assert status == 137
        assert (
            "requeued: a process or a node died without a word (srun ended with status 137)" in said
        )
    assert fake_slurm.asked.count(REQUEUE) == 2
    status, _, (failed,) = end("exit 137")
    assert (status, failed.exit_status) == (5, 5)
    assert failed.reason.endswith("(srun ended with status 137); more than max_restarts=2 times")
    assert fake_slurm.asked.count(REQUEUE) == 2


def test_a_run_that_has_lost_its_hosts_is_started_again_with_its_reason(end, fake_slurm):
    status, said, _ = end("printf '5\\nhost 1 was lost\\n' >rank-0.lost; exit 5")
    assert (status, said) == (5, "launcher: requeued: host 1 was lost\n")
    assert REQUEUE in fake_slurm.asked


def test_what_an_earlier_start_has_noted_is_forgotten(end, tmp_path):
    note_end(ends_folder(tmp_path / "a b"), 0, "failed", 5, "earlier")
    assert end("echo 0 >rank-0.done; exit 0")[0] == 0


def test_the_shell_outlives_what_its_processes_are_told(end):
    status, said, _ = end(
        "kill -TERM $PPID; sleep 0.1; printf '75\\nSIGTERM\\n' >rank-0.stopped; exit 0"
    )
    assert (status, said) == (75, "launcher: requeued: SIGTERM\n")
