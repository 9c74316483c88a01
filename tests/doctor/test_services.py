"""Ray, Slurm, W&B and the plan: as they answer, and as they do not."""

import pytest
from doctor_fakes import HANGS, answers, only, says, statuses

from launcher.doctor.findings import Status
from launcher.doctor.planning import check_plan
from launcher.doctor.ray_session import check_ray
from launcher.doctor.slurm import check_slurm, parse
from launcher.doctor.tracking import check_wandb
from launcher.doctor.versions import parse_requirement

NEED = parse_requirement("submitit>=1.5")
RAY_ANSWER = says('noise\n{"answer": 42, "nodes": 3, "gpus": 24}\n')
KEY = "0123456789abcdef" * 3


def ray(outcome, *, address=None, connect=lambda *_: None):
    environment = {"RAY_ADDRESS": address} if address else {}
    return only(check_ray(answers({"probe_ray": outcome}), environment, connect))


def slurm(outcome, *, commands=("sinfo", "sbatch", "squeue"), submitit="1.5.3", **environment):
    return list(
        check_slurm(
            answers({"sinfo": outcome}),
            lambda name: f"/usr/bin/{name}" if name in commands else None,
            environment,
            (NEED, submitit),
        )
    )


def wandb(*, version="0.31.0", logged_in=False, reach=lambda *_: None, **environment):
    return list(check_wandb(version, environment, logged_in, reach))


def test_a_local_ray_session():
    assert ray(RAY_ANSWER).what.startswith("a local Ray session starts, runs a task and ends")
    finding = ray(HANGS)
    assert finding.status is Status.FAILED
    assert finding.what == "no local Ray session: no answer within 60 s"
    broken = says(status=1, stderr="ModuleNotFoundError: No module named 'ray'\n")
    assert "No module named 'ray'" in ray(broken).what


def test_a_session_has_a_token_of_its_own():
    seen = []

    def run(command, limit_s, environment):
        seen.append(environment)
        return RAY_ANSWER

    list(check_ray(run, {}, lambda *_: None))
    list(check_ray(run, {"RAY_ADDRESS": "head:6379"}, lambda *_: None))
    assert len(seen[0]["RAY_AUTH_TOKEN"]) == 64
    assert "RAY_AUTH_TOKEN" not in seen[1]


@pytest.mark.parametrize("address", ["head:6379", "ray://head:10001", "auto"])
def test_a_ray_cluster(address):
    finding = ray(RAY_ANSWER, address=address)
    assert finding.status is Status.OK
    assert finding.what.endswith("answers: 3 nodes, 24 GPUs")
    assert f"no Ray cluster at RAY_ADDRESS={address}" in ray(HANGS, address=address).what


def test_a_ray_cluster_where_nobody_listens():
    asked = []

    def refuse(*where):
        asked.append(where)
        return "connection refused"

    finding = ray(RAY_ANSWER, address="ray://head:10001", connect=refuse)
    assert finding.what.endswith("ray://head:10001: connection refused")
    assert asked == [("head", 10001, 3.0)]


def test_slurm_that_is_not_here():
    assert only(slurm(None, commands=())).status is Status.ABSENT
    unconfigured = says(status=1, stderr="sinfo: fatal: Could not establish a configuration source")
    assert only(slurm(unconfigured)).status is Status.ABSENT


def test_slurm_that_is_well():
    found = slurm(says("gpu*|up|2|idle|gpu:8\ngpu*|up|1|mix|gpu:8\n"))
    assert statuses(found) == ["ok", "ok"]
    assert found[0].what == "Slurm partition gpu*: 3 nodes (2 idle, 1 mix), with gpu:8"


def test_slurm_nodes_that_are_lost():
    lost, _ = slurm(says("a|up|2|idle|(null)\na|up|1|drain|(null)\na|up|1|idle*|(null)\n"))
    assert lost.status is Status.WARNING
    assert "4 nodes (2 idle, 1 drain, 1 idle (not answering)); 2 of 4 take no jobs" in lost.what
    closed = slurm(says("a|down|2|idle|(null)\n"))
    assert statuses(closed) == ["warning", "failed", "ok"]
    assert "Slurm partition a (closed)" in closed[0].what
    assert "1 partition and no node that takes jobs" in closed[1].what


def test_a_state_of_saved_power_is_usable():
    assert [group.is_usable for group in parse("a|up|1|idle~|x\na|up|1|down*|x\n")] == [True, False]


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (HANGS, "no answer within 15 s"),
        (says(status=1, stderr="Unable to contact slurm controller\n"), "Unable to contact"),
    ],
)
def test_a_controller_that_does_not_answer(outcome, reason):
    finding = slurm(outcome)[0]
    assert finding.status is Status.FAILED
    assert f"Slurm's controller does not answer: {reason}" in finding.what


def test_slurm_in_a_container_of_a_job():
    some, job, submitit = slurm(
        None, commands=(), submitit=None, SLURM_JOB_ID="17", SLURM_JOB_NODELIST="n[1-2]"
    )
    assert some.what == "Slurm without sinfo, sbatch, squeue"
    assert job.what == "inside Slurm job 17, nodes n[1-2]"
    assert submitit.what == "submitit is not installed, and submitit>=1.5 is asked for"
    assert submitit.cure == 'pip install "jax-launcher[slurm]"'


def test_submitit_that_is_too_old():
    assert (
        "submitit 1.4, and submitit>=1.5" in slurm(says("a|up|1|idle|x"), submitit="1.4")[-1].what
    )


def test_wandb_offline_and_online():
    login, server = wandb()
    assert "not logged in: runs are logged offline" in login.what
    assert server.what == "api.wandb.ai answers"
    assert "runs are logged online" in wandb(logged_in=True)[0].what
    assert "runs are logged nowhere" in wandb(logged_in=True, WANDB_MODE="disabled")[0].what


def test_wandb_that_cannot_be_reached():
    def reach(*_):
        return "no route"

    assert wandb(reach=reach)[1].status is Status.ABSENT
    finding = wandb(logged_in=True, reach=reach)[1]
    assert finding.status is Status.WARNING
    assert finding.what == "api.wandb.ai cannot be reached within 3 s: no route"


def test_wandb_that_cannot_start():
    assert only(wandb(version=None)).what == "wandb is not installed"
    assert only(wandb(WANDB_MODE="on")).what.startswith("WANDB_MODE=on is none of online, ")
    finding = wandb(WANDB_MODE="online")[0]
    assert finding.status is Status.WARNING
    assert finding.cure == "wandb login, or WANDB_MODE=offline"


def test_wandb_shows_no_secret():
    environment = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": f"https://me:{KEY}@wandb.example:8443"}
    found = wandb(logged_in=True, reach=lambda *_: "refused", **environment)
    assert KEY not in str(found)
    assert "wandb.example cannot be reached" in found[1].what


def test_a_plan_that_is_not_made():
    refused = says(status=2, stderr="launcher: cluster=cpu8 is unknown\n")
    finding = only(check_plan(answers({"-m launcher mode=plan": refused})))
    assert finding.status is Status.FAILED
    assert finding.what == "no plan of the tiny GPT (status 2): launcher: cluster=cpu8 is unknown"
    assert "python -m launcher mode=plan" in finding.cure
    assert "within 60 s" in only(check_plan(answers({"launcher": HANGS}))).what
    # It says that all went well, and no file is there.
    assert only(check_plan(answers({"launcher": says("done")}))).status is Status.FAILED
