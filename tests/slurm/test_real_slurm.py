"""Jobs on a real Slurm cluster: a sweep, two nodes, preemption, a node that crashes."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

# Notes on which machine it is built. Small, for these tests are of Slurm, and a start should not take long.
NOTING_MODEL = """
import os, pathlib
import jax
import jax.numpy as jnp
from flax import nnx

class Model(nnx.Module):
    def __init__(self, rngs):
        pathlib.Path(os.environ["NOTES"], os.uname().nodename).touch()
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.second = nnx.Linear(16, 8, rngs=rngs)

    def loss(self, batch):
        y = self.second(nnx.relu(self.first(batch["x"])))
        return jnp.mean((y - batch["x"]) ** 2), {}

    def example_batch(self, batch_size):
        return {"x": jax.ShapeDtypeStruct((batch_size, 8), jnp.float32)}

def build(rngs):
    return Model(rngs)
"""
SMALL = (
    "logger=jsonl", "model=custom", "model.target=noting:build", "train.global_batch=16",
    "train.eval_batches=0",
)  # fmt: skip
ONE_HOST = (*SMALL, "cluster.hosts=1", "cluster.devices_per_host=1", "parallel=single")
TWO_HOSTS = (
    *SMALL, "cluster.hosts=2", "cluster.devices_per_host=2", "parallel=manual", "parallel.pp=2",
    "parallel.num_microbatches=2",
)  # fmt: skip
SUBMIT = ("mode=submit", "hydra.run.dir=run")
SWEEP = ("--multirun", "hydra/launcher=slurm", "hydra.sweep.dir=sweep", *ONE_HOST, "seed=0,1,2")
# Long enough to be interrupted.
STEPS = 6000
LONG = (*ONE_HOST, *SUBMIT, f"train.steps={STEPS}", "checkpoint.every_steps=500")


def steps(run_dir: pathlib.Path) -> list[int]:
    """The steps that are in the metrics, in their order."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def has_checkpoint(run_dir: pathlib.Path) -> bool:
    """Whether there is one to go on from: steps are done while it is written."""
    return any((run_dir / "checkpoints").glob("step-*"))


def output(run_dir: pathlib.Path) -> str:
    """What the job's first node has written."""
    return "".join(path.read_text() for path in (run_dir / "slurm").glob("*_0_log.out"))


def summary(run_dir: pathlib.Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


@pytest.fixture
def noting(slurm, tmp_path, monkeypatch):
    """A model that notes its machines; where they are noted."""
    (tmp_path / "noting.py").write_text(NOTING_MODEL)
    (tmp_path / "notes").mkdir()
    monkeypatch.setitem(slurm.environment, "NOTES", str(tmp_path / "notes"))
    return tmp_path / "notes"


@pytest.mark.usefixtures("noting")
def test_a_sweep_of_three_points(slurm, tmp_path):
    said = slurm.launcher(*SWEEP, "hydra.launcher.wait=true", folder=tmp_path)
    jobs = [json.loads((tmp_path / f"sweep/{n}/job.json").read_text())["job_id"] for n in range(3)]
    for number, job in enumerate(jobs):
        assert f"{job}  " in said
        assert f"sweep/{number}  " in said
        assert f"job {job} is done" in said
        assert summary(tmp_path / f"sweep/{number}")["status"] == "done"
    again = slurm.launcher(*SWEEP, folder=tmp_path)
    assert "0 submitted, 3 left alone" in again


def test_slurm_says_what_it_refuses(slurm, tmp_path):
    said = slurm.launcher(*SWEEP, "hydra.launcher.partition=gpus", folder=tmp_path, check=False)
    assert "sbatch refuses the job: invalid partition specified: gpus" in said
    assert "(hydra.launcher.partition=gpus): correct it" in said
    said = slurm.launcher(*SWEEP, "cluster.slurm.nodes=9", folder=tmp_path, check=False)
    assert "(cluster.slurm.nodes=9): correct it" in said
    assert not list(tmp_path.iterdir())
    assert not slurm.queue()


@pytest.mark.usefixtures("noting")
def test_a_job_is_preempted_requeued_and_goes_on_as_the_same_run(slurm, tmp_path):
    run = tmp_path / "run"
    slurm.launcher(*LONG, "logger=wandb", folder=tmp_path)
    slurm.wait_until(lambda: has_checkpoint(run))
    wandb_id = (run / "wandb/run-id.txt").read_text()
    # The shell that submitted has long ended; now others need all nodes.
    slurm.run("srun", "--partition=urgent", "--exclusive", "--nodes=3", "true", folder=tmp_path)
    slurm.wait_until(lambda: not slurm.queue())
    said = output(run)
    assert "launcher: requeued: SIGUSR2 after step" in said
    assert "going on after step" in said
    assert steps(run) == list(range(1, STEPS + 1))
    assert summary(run)["status"] == "done"
    assert (run / "wandb/run-id.txt").read_text() == wandb_id
    assert {path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")} == {
        wandb_id.strip()
    }


@pytest.mark.usefixtures("noting")
def test_a_job_whose_node_crashes_goes_on_from_its_checkpoint_on_another(slurm, tmp_path):
    run = tmp_path / "run"
    slurm.launcher(*LONG, folder=tmp_path)
    slurm.wait_until(lambda: has_checkpoint(run))
    (node,) = slurm.nodes_at_work()
    slurm.crash(node)
    try:
        slurm.wait_until(lambda: slurm.nodes_at_work() not in ([], [node]))
        slurm.wait_until(lambda: not slurm.queue())
    finally:
        slurm.revive(node)
    assert "going on after step" in output(run)
    assert steps(run) == list(range(1, STEPS + 1))
    assert summary(run)["status"] == "done"


def test_a_job_of_two_nodes_trains_on_both(slurm, tmp_path, noting):
    slurm.launcher(*TWO_HOSTS, *SUBMIT, "cluster.slurm.nodes=2", "train.steps=10", folder=tmp_path)
    slurm.wait_until(lambda: not slurm.queue())
    run = tmp_path / "run"
    assert "2 nodes have joined" in output(run), output(run)
    assert steps(run) == list(range(1, 11))
    assert len({path.name for path in noting.iterdir()} & {"node1", "node2", "node3"}) == 2
    ends = {path.name for path in (run / "slurm/ends").glob("rank-*.*")}
    assert {"rank-0.done", "rank-1.done"} <= ends
    slurm_leaves_nothing(slurm)


def slurm_leaves_nothing(slurm) -> None:
    """No process of a job is left on any node."""
    for node in ("node1", "node2", "node3"):
        pid = (slurm.folder / f"{node}.pid").read_text().strip()
        left = subprocess.run(
            ["nsenter", f"--target={pid}", "--pid", "--mount", "ps", "-eo", "args="],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert "ray" not in left, left
        assert sys.executable not in left, left


@pytest.mark.slow
def test_two_nodes_by_a_plain_srun(slurm, tmp_path, noting):
    said = slurm.run(
        "srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "launcher", *TWO_HOSTS,
        "hydra.run.dir=run", "train.steps=10", folder=tmp_path,
    )  # fmt: skip
    assert "2 nodes have joined" in said
    assert steps(tmp_path / "run") == list(range(1, 11))
    assert len({path.name for path in noting.iterdir()} & {"node1", "node2", "node3"}) == 2
    slurm_leaves_nothing(slurm)


@pytest.mark.slow
def test_a_job_of_two_nodes_that_loses_one_goes_on_with_another(slurm, tmp_path, noting):
    run = tmp_path / "run"
    slurm.launcher(
        *TWO_HOSTS,
        *SUBMIT,
        "cluster.slurm.nodes=2",
        "train.steps=2000",
        "checkpoint.every_steps=100",
        folder=tmp_path,
    )
    slurm.wait_until(lambda: has_checkpoint(run))
    (crashed,) = slurm.nodes_at_work()
    second = "node2" if "1" in crashed else "node3"
    slurm.crash(second)
    try:
        slurm.wait_until(lambda: not slurm.queue())
    finally:
        slurm.revive(second)
    assert steps(run) == list(range(1, 2001))
    assert "going on after step" in output(run)
    slurm_leaves_nothing(slurm)


@pytest.mark.slow
def test_a_job_of_two_nodes_is_preempted_and_both_stop_after_the_same_step(slurm, tmp_path, noting):
    run = tmp_path / "run"
    more = ("cluster.slurm.nodes=2", "train.steps=1000", "checkpoint.every_steps=100")
    slurm.launcher(*TWO_HOSTS, *SUBMIT, *more, folder=tmp_path)
    slurm.wait_until(lambda: has_checkpoint(run))
    slurm.run("srun", "--partition=urgent", "--exclusive", "--nodes=3", "true", folder=tmp_path)
    slurm.wait_until(lambda: not slurm.queue())
    (stopped,) = re.findall(r"launcher: requeued: SIGUSR2 after step (\d+) of 1000", output(run))
    assert f"going on after step {stopped}, from" in output(run)
    assert steps(run) == list(range(1, 1001))
    slurm_leaves_nothing(slurm)
