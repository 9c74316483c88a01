"""Slurm's commands: whether they are there, what the controller says of jobs, and what it refuses."""

import getpass
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from launcher.errors import ClusterError
from launcher.slurm.job_request import JobRequest

_LIMIT_S = 60.0  # Slurm itself tries for nine seconds
# Of Slurm's words -> the field that they are about.
_ABOUT: Mapping[str, str] = {
    "account": "account",
    "partition": "partition",
    "qos": "qos",
    "time limit": "time",
    "feature": "constraint",
    "more processors": "cpus_per_task",
    "memory": "mem_gb",
    "generic resource": "gpus_per_node",
    "gres": "gpus_per_node",
    "node count": "nodes",
    "node configuration": "nodes",
}
# What Slurm's commands say when there is no configuration here, or no controller answers.
_AWAY = (
    "configuration source",
    "resolve_ctls_from_dns_srv",
    "slurm.conf",
    "unable to contact slurm controller",
    "unable to establish connection",
    "zero bytes were transmitted or received",
    "socket timed out",
    "connection refused",
    "connect failure",
)
_WAYS_ON = (
    "run this on a login node (or module load slurm); see the batch script with dry_run=true, and submit it "
    "yourself; or train on this machine with mode=train"
)


def need_slurm() -> None:
    """Raise ClusterError if jobs cannot be submitted from here."""
    if shutil.which("sbatch") is None:
        raise ClusterError(
            f"Slurm is not here: there is no sbatch on PATH (mode=submit, hydra/launcher=slurm). Ways on: "
            f"{_WAYS_ON}"
        )


def test_request(script: str, request: JobRequest) -> None:
    """Ask Slurm whether it would take a job, and submit nothing."""
    done = _run(["sbatch", "--test-only"], script)
    if done.returncode:
        raise refused(done.stderr or done.stdout, request)


def refused(words: str, request: JobRequest) -> ClusterError:
    """What to say when Slurm does not take a job: its words, and the key that they are about."""
    said = _said(words)
    if any(sign in said.lower() for sign in _AWAY):
        return ClusterError(
            f"Slurm is not there: sbatch says: {said} (mode=submit, hydra/launcher=slurm). Ways on: see "
            f"`scontrol ping`; {_WAYS_ON}"
        )
    name = next((field for sign, field in _ABOUT.items() if sign in said.lower()), None)
    if name is None:
        return ClusterError(
            f"sbatch refuses the job: {said}: correct cluster.slurm (see the batch script with dry_run=true)"
        )
    given = f"{request.keys[name]}={_shown(request, name)}"
    return ClusterError(
        f"sbatch refuses the job: {said} ({given}): correct it; `sinfo` lists what this cluster has"
    )


def _said(words: str) -> str:
    """Slurm's lines as one, each without the name of the command and how bad it is."""
    lines = (re.sub(r"^.*?\b(error|fatal): ", "", line.strip()) for line in words.splitlines())
    return "; ".join(filter(None, lines)) or "no reason given"


def _shown(request: JobRequest, name: str) -> object:
    values = {
        "partition": request.partition, "account": request.account, "qos": request.qos,
        "time": request.time, "constraint": request.constraint, "mem_gb": request.mem_gb,
        "cpus_per_task": request.cpus_per_task, "gpus_per_node": request.gpus_per_node,
        "nodes": request.nodes,
    }  # fmt: skip
    return "null" if values[name] is None else values[name]


def states_of_jobs() -> Mapping[str, str]:
    """Job id -> state, of all jobs of this user that are waiting or at work."""
    done = _run(["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%i %T"])
    if done.returncode:
        raise ClusterError(
            f"squeue does not answer: {' '.join(done.stderr.split())}: see `scontrol ping`, and try again"
        )
    rows = (line.split() for line in done.stdout.splitlines())
    return {row[0]: row[1].lower() for row in rows if len(row) == 2}


def last_state(job_id: str) -> str | None:
    """What the controller remembers of a job that has ended; None: nothing any more."""
    done = _run(["scontrol", "--oneliner", "show", "job", job_id])
    words = dict(word.partition("=")[::2] for word in done.stdout.split())
    return words.get("JobState", "").lower() or None


def _run(command: Sequence[str], given: str | None = None) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=_LIMIT_S
        )
    except FileNotFoundError as error:
        raise ClusterError(
            f"there is no {command[0]} on PATH: run this on a login node (module load slurm)"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(
            f"{command[0]} gives no answer within {_LIMIT_S:.0f} s: see `scontrol ping`, and try again"
        ) from error
