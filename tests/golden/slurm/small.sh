#!/bin/bash

# Parameters
#SBATCH --chdir=/home/me
#SBATCH --job-name=sweep-0
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output='/runs/it'"'"'s 5 %/0/slurm/%j_0_log.out'
#SBATCH --requeue
#SBATCH --signal=USR2@120

# setup
trap : TERM USR1 USR2  # of the processes; this shell decides what comes after
ends='/runs/it'"'"'s 5 %/0/slurm/ends'
mkdir -p "$ends" && rm -f "$ends"/*
export PYTHONPATH=/runs/code${PYTHONPATH:+:$PYTHONPATH}:/home/me

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '/runs/it'"'"'s 5 %/0/slurm/%j_%t_log.out' --kill-on-bad-exit=1 --open-mode=append python -P -u -m launcher.cli.job '/runs/it'"'"'s 5 %/0'


# teardown
status=$?
shopt -s nullglob
again() {
  if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then
    echo "launcher: the job is being cancelled, and is not requeued: $1"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    echo "launcher: requeued: $1"
  else
    printf '3\n%s\n' "$1, and Slurm does not requeue the job: submit it again" >"$ends/job.failed"
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
  if [ "$(grep -c "^$SLURM_JOB_ID " "$ends/../deaths")" -le 3 ]; then
    again "$reason"
  else
    printf '5\n%s\n' "$reason; more than max_restarts=3 times" >"$ends/job.failed"
    status=5
  fi
fi
exit $status