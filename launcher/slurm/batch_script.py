"""The batch script of a job: submitit's, with what comes before and after the processes of the nodes.

`srun` starts one launcher process on each node, and ends all when one fails. What then becomes of the job is
decided in bash, after the last process has ended, because the batch shell is the one part of a job that needs
no Python of the nodes' container and sees all of them:

- a process noted a failure: the job fails with that exit status;
- all were told to stop (time, preemption) and did, with a checkpoint: the job is requeued;
- one died without a word (a killed process), or lost the others (a crashed node): the job is requeued, a few
  times.

A job that is being cancelled is not requeued.
"""

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ClusterError
from launcher.slurm.job_folder import ends_folder, slurm_folder
from launcher.slurm.job_request import JobRequest

NO_SUBMITIT = (
    'submitit is not installed, and jobs are submitted with it: pip install "jax-launcher[slurm]"'
)
SUBMITIT = "submitit"
_AFTER = """\
status=$?
shopt -s nullglob
again() {
  if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then
    echo "launcher: the job is being cancelled, and is not requeued: $1"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    echo "launcher: requeued: $1"
  else
    printf '3\\n%s\\n' "$1, and Slurm does not requeue the job: submit it again" >"$ends/job.failed"
  fi
}
failed=("$ends"/*.failed) stopped=("$ends"/*.stopped)
if [ ${#failed[@]} -gt 0 ]; then
  first=$(ls -tr "${failed[@]}" | head -n 1)
  read -r status <"$first"
  echo "launcher: $(basename "$first" .failed): $(tail -n 1 "$first")"
elif [ $status -eq 0 ] && [ ${#stopped[@]} -gt 0 ]; then
  status=75
  again "$(tail -n 1 "${stopped[0]}")"
elif [ $status -ne 0 ]; then
  echo "$SLURM_JOB_ID $(date +%s)" >>"$ends/../deaths"
  lost=("$ends"/*.lost)
  reason="a process or a node died without a word (srun ended with status $status)"
  [ ${#lost[@]} -eq 0 ] || reason=$(tail -n 1 "${lost[0]}")
  if [ "$(grep -c "^$SLURM_JOB_ID " "$ends/../deaths")" -le MAX_RESTARTS ]; then
    again "$reason"
  else
    printf '5\\n%s\\n' "$reason; more than max_restarts=MAX_RESTARTS times" >"$ends/job.failed"
    status=5
  fi
fi
exit $status"""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlace:
    """Where a job works.

    Attributes:
        name: What Slurm shows.
        code: The copy of the code.
        folder: The working folder: relative paths of the config start there.
    """

    name: str
    run_dir: Path
    code: Path
    folder: Path


def need_submitit() -> None:
    """Raise ClusterError if submitit is not installed."""
    if importlib.util.find_spec(SUBMITIT) is None:
        raise ClusterError(NO_SUBMITIT)


def make_executor(request: JobRequest, place: JobPlace):
    """Return submitit's executor of a job. Nothing is written."""
    need_submitit()
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        """Makes scripts without Slurm too: `dry_run` shows what a login node would submit."""

        @classmethod
        def affinity(cls) -> int:
            """What submitit decides by whether it can be used here."""
            return 1

    executor = Executor(folder=slurm_folder(place.run_dir))
    executor.parameters = _parameters(request, place)
    return executor


def batch_command(request: JobRequest, place: JobPlace) -> str:
    """What `srun` starts on each node. `-P`: a copy of the code goes before the working folder."""
    python = request.python or shlex.quote(sys.executable)
    return f"{python} -P -u -m launcher.cli.job {shlex.quote(str(place.run_dir))}"


def batch_script(request: JobRequest, place: JobPlace) -> str:
    """The text of the batch script."""
    executor = make_executor(request, place)
    return executor._make_submission_file_text(batch_command(request, place), "")


def _parameters(request: JobRequest, place: JobPlace) -> dict[str, object]:
    """What submitit writes into the script."""
    options = {name.replace("_", "-"): value for name, value in request.sbatch.items()}
    parameters = {
        "job_name": place.name,
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "time": request.time,
        "nodes": request.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": request.gpus_per_node or None,
        "cpus_per_task": request.cpus_per_task,
        "mem": f"{request.mem_gb * 1024:.0f}M" if request.mem_gb is not None else None,
        "exclusive": request.exclusive or None,
        "constraint": request.constraint,
        "signal_delay_s": request.warn_s,
        "wckey": None,
        "stderr_to_stdout": True,
        "setup": _before(request, place),
        "srun_args": _srun_arguments(request),
        "teardown": _AFTER.replace("MAX_RESTARTS", str(request.max_restarts)).splitlines(),
        "additional_parameters": {"chdir": str(place.folder), "requeue": True, **options},
    }
    # submitit's own default of `time` is five minutes.
    kept = ("time", "wckey")
    return {name: value for name, value in parameters.items() if value is not None or name in kept}


def _srun_arguments(request: JobRequest) -> list[str]:
    # srun does not take the number of CPUs from the job.
    cpus = [f"--cpus-per-task={request.cpus_per_task}"] if request.cpus_per_task else []
    return ["--kill-on-bad-exit=1", "--open-mode=append", *cpus, *request.srun]


def _before(request: JobRequest, place: JobPlace) -> list[str]:
    """What runs on the first node before the processes start."""
    ends = shlex.quote(str(ends_folder(place.run_dir)))
    code, folder = shlex.quote(str(place.code)), shlex.quote(str(place.folder))
    token = [
        "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \\n')"
    ]
    return [
        "trap : TERM USR1 USR2  # of the processes; this shell decides what comes after",
        f"ends={ends}",
        'mkdir -p "$ends" && rm -f "$ends"/*',
        *request.setup,
        *_exports(request.env),
        f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}:{folder}",
        *(token if request.nodes > 1 else ()),
    ]


def _exports(env: dict[str, str]) -> Sequence[str]:
    return [f"export {name}={shlex.quote(str(value))}" for name, value in env.items()]
