"""Slurm: its commands, whether the controller answers, and what its nodes are doing."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from launcher.doctor.commands import Outcome, Runner
from launcher.doctor.findings import Finding, absent, failed, ok, warning
from launcher.doctor.installation import compare
from launcher.doctor.versions import Requirement
from launcher.doctor.wording import counted

LIMIT_S = 15.0  # Slurm itself tries for nine seconds
_UNCONFIGURED = "configuration source"  # sinfo: Could not establish a configuration source
COMMANDS = ("sinfo", "sbatch", "squeue")
QUERY = ("sinfo", "--noheader", "--format=%P|%a|%D|%t|%G")
USABLE = ("idle", "mix", "alloc", "comp", "resv", "plnd")  # now, or when it is their turn


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGroup:
    """One line of sinfo: nodes of a partition in the same state."""

    partition: str
    is_up: bool
    num_nodes: int
    state: str  # without the signs that sinfo adds to it
    answers: bool
    resources: str

    @property
    def is_usable(self) -> bool:
        """Whether jobs run on these nodes, now or when it is their turn."""
        return self.is_up and self.answers and self.state in USABLE


def check_slurm(
    run: Runner,
    which: Callable[[str], str | None],
    environment: Mapping[str, str],
    submitit: tuple[Requirement, str | None],
) -> Iterator[Finding]:
    """Look for the commands, ask the controller, and see what submitting needs.

    Args:
        which: finds a command on PATH.
        submitit: what is asked for and the version that is installed.
    """
    job = environment.get("SLURM_JOB_ID")
    missing = [name for name in COMMANDS if which(name) is None]
    if len(missing) == len(COMMANDS) and not job:
        yield absent("Slurm: none of its commands is on PATH; only mode=submit needs them")
        return
    if missing:
        yield warning(
            f"Slurm without {', '.join(missing)}",
            "jobs cannot be submitted or watched from here; inside a container that is usual",
            "add Slurm's bin folder to PATH (module load slurm), or submit from a login node",
        )
    if "sinfo" not in missing:
        outcome = run(QUERY, LIMIT_S, {})
        if outcome is not None and _UNCONFIGURED in outcome.stderr:
            yield absent("Slurm's commands are installed, and no cluster is configured for them")
            return
        yield from _cluster(outcome)
    if job:
        yield ok(_job(job, environment))
    yield _submitit(*submitit)


def parse(sinfo: str) -> tuple[NodeGroup, ...]:
    """Read the lines of `QUERY`."""
    rows = [line.split("|") for line in sinfo.splitlines() if line.count("|") == 4]
    return tuple(
        NodeGroup(
            partition=partition,
            is_up=available.strip() == "up",
            num_nodes=int(count),
            # The signs stand for power saving, reservations and reboots; * for no answer.
            state=state.strip().lower().rstrip("*~#!%$@^-+"),
            answers="*" not in state,
            resources=resources.strip(),
        )
        for partition, available, count, state, resources in rows
    )


def _cluster(outcome: Outcome | None) -> Iterator[Finding]:
    if outcome is None or outcome.status != 0:
        silent = outcome is None or outcome.status is None
        reason = f"no answer within {LIMIT_S:.0f} s" if silent else outcome.last_words
        yield failed(
            f"Slurm's controller does not answer: {reason}",
            "no job can be submitted, and none that waits will start; running ones go on",
            "try `scontrol ping`; if it stays down, tell the administrators; in a container see that "
            "/etc/slurm and munge's socket are mounted",
        )
        return
    groups = parse(outcome.stdout)
    partitions = {group.partition: group for group in groups}
    for name in partitions:
        yield from _partition(name, [group for group in groups if group.partition == name])
    if not any(group.is_usable for group in groups):
        yield failed(
            f"Slurm has {counted(len(partitions), 'partition')} and no node that takes jobs",
            "whatever is submitted waits until nodes come back",
            "see `sinfo -R` for why nodes are down or drained",
        )


def _partition(name: str, groups: list[NodeGroup]) -> Iterator[Finding]:
    count: Counter[str] = Counter()
    for group in groups:
        count[group.state + ("" if group.answers else " (not answering)")] += group.num_nodes
    states = ", ".join(f"{number} {state}" for state, number in count.items())
    resources = {group.resources for group in groups} - {"(null)", ""}
    each = f", with {' or '.join(sorted(resources))}" if resources else ""
    total = sum(count.values())
    closed = "" if all(group.is_up for group in groups) else " (closed)"
    line = f"Slurm partition {name}{closed}: {counted(total, 'node')} ({states}){each}"
    num_lost = sum(group.num_nodes for group in groups if not group.is_usable)
    if num_lost:
        yield warning(
            f"{line}; {num_lost} of {total} take no jobs",
            "jobs that need more nodes than are left wait until these come back",
            "see `sinfo -R` for the reasons, or ask for fewer nodes",
        )
    else:
        yield ok(line)


def _job(job: str, environment: Mapping[str, str]) -> str:
    details = {
        "partition": environment.get("SLURM_JOB_PARTITION"),
        "nodes": environment.get("SLURM_JOB_NODELIST"),
        "GPUs here": environment.get("SLURM_GPUS_ON_NODE"),
    }
    known = "".join(f", {name} {value}" for name, value in details.items() if value)
    return f"inside Slurm job {job}{known}"


def _submitit(need: Requirement, version: str | None) -> Finding:
    if compare(need, version) is None:
        return ok(f"submitit {version}, which submits jobs")
    return warning(
        f"submitit {version or 'is not installed'}, and {need.name}{need.bounds} is asked for",
        "the launcher cannot submit jobs by itself (mode=submit)",
        'pip install "jax-launcher[slurm]"',
    )
