"""What no job can ask for, and what Slurm refuses: one line, the key, nothing written, nothing submitted."""

import pytest
from bad_inputs import bad
from fake_slurm import fake_slurm  # noqa: F401

SUBMIT = "mode=submit"
SWEEP = ("--multirun", "hydra/launcher=slurm", "seed=0,1")
KEY = "cluster.slurm"
MIXED = ("mode=submit", "cluster=v100-a100")

COMBINATIONS = [
    bad(SUBMIT, f"{KEY}.nodes=x", says=f"{KEY}.nodes=x is of the wrong type: give a whole number"),
    bad(SUBMIT, f"{KEY}.partitoin=x", says=f"did you mean {KEY}.partition?"),
    bad(SUBMIT, f"+{KEY}.env={{2A: b}}", says=f"{KEY}.env has '2A' ... such as NCCL_DEBUG"),
    bad("dry_run=true", says="dry_run=true ... mode=train makes none: take mode=submit"),
    bad(
        "hydra/launcher=slurm", says="hydra/launcher=slurm submits the points of a sweep ... mode=submit"
    ),
    bad(*SWEEP, SUBMIT, says="mode=submit contradicts hydra/launcher=slurm ... leave one out"),
    bad(*SWEEP, "hydra.launcher.nodes=0", says="hydra.launcher.nodes=0 is not in 1..100000"),
    bad(*SWEEP, "hydra.launcher.nods=2", says="hydra.launcher.nods=2 ... did you mean"),
    bad(*SWEEP, "train.steps=5,-1", says="train.steps=-1 is less than 1"),
    bad(*MIXED, says="cluster=v100-a100 has several kinds of hosts ... cluster.slurm.nodes"),
    bad(
        SUBMIT, "model=custom", "model.target=no_such_thing:build",
        says="model.target=no_such_thing:build: there is no module ... PYTHONPATH",
    ),
    bad(SUBMIT, "profile.dir=x", says="profile.dir=x contradicts mode=train"),
]  # fmt: skip

UNKNOWN = "sbatch: error: invalid partition specified: gpu\nallocation failure: Invalid partition"


@pytest.mark.usefixtures("fake_slurm")
@pytest.mark.parametrize("case", COMBINATIONS, ids=str)
def test_no_job_can_ask_for_it(refuse, case):
    refuse(case)


@pytest.mark.parametrize(
    "arguments", [(SUBMIT, f"{KEY}.partition=gpu"), (*SWEEP, f"{KEY}.partition=gpu")], ids=str
)
def test_slurm_refuses_in_its_own_words(refuse, fake_slurm, arguments):  # noqa: F811
    fake_slurm.say("refusal", UNKNOWN)
    says = f"invalid partition specified: gpu; ... ({KEY}.partition=gpu): correct it"
    refuse(bad(*arguments, says=says, status=3))
    assert fake_slurm.submitted == 0


def test_slurm_that_is_not_here(refuse, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    says = "there is no sbatch on PATH ... login node ... dry_run=true ... mode=train"
    refuse(bad(*SWEEP, says=says, status=3))


def test_submitit_that_is_not_installed(refuse, fake_slurm, monkeypatch):  # noqa: F811
    monkeypatch.setattr("launcher.slurm.batch_script.SUBMITIT", "submitit_of_nobody")
    refuse(
        bad(
            SUBMIT, says='submitit is not installed ... pip install "jax-launcher[slurm]"', status=3
        )
    )
