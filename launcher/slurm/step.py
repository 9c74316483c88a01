"""Which process of a job step this is: what `srun` says in the environment of each process that it starts.

A launcher process outside of `srun`, or alone in its step, is none of several, and gets no `Step`.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_NUMBERS = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_NUM_TASKS",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A process among several of a job step.

    Attributes:
        node: The number of its node in the step.
        local_rank: Its number among the processes of its node.
    """

    job_id: str
    step_id: str
    node: int
    num_nodes: int
    local_rank: int
    num_tasks: int
    host: str

    @property
    def leads(self) -> bool:
        """Whether this process composes the config and drives the run."""
        return self.node == 0 and self.local_rank == 0

    @property
    def is_surplus(self) -> bool:
        """Whether another process of the same node does the node's work."""
        return self.local_rank > 0


def step_here(environment: Mapping[str, str]) -> Step | None:
    """Return which process of which step this is; None: it is alone."""
    found = {name: environment.get(name, "") for name in _NUMBERS}
    if not all(text.isdigit() for text in found.values()):
        return None
    _, local_rank, node, num_nodes, num_tasks = map(int, found.values())
    if num_tasks == 1:
        return None
    return Step(
        job_id=environment.get("SLURM_JOB_ID", "0"),
        step_id=environment.get("SLURM_STEP_ID", "0"),
        node=node,
        num_nodes=num_nodes,
        local_rank=local_rank,
        num_tasks=num_tasks,
        host=environment.get("SLURMD_NODENAME") or socket.gethostname(),
    )


def meeting_folder(step: Step, environment: Mapping[str, str]) -> Path:
    """Where the processes of a step that no batch script of ours has started meet: the home is shared."""
    cache = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cluster = environment.get("SLURM_CLUSTER_NAME", "slurm")
    return Path(cache) / "launcher" / "srun" / f"{cluster}-{step.job_id}.{step.step_id}"


def own_address(environment: Mapping[str, str]) -> str:
    """The IP under which the other nodes reach this one: that of its way to where the job was started."""
    other = environment.get("SLURM_LAUNCH_NODE_IPADDR") or socket.gethostname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((other, 9))  # of a datagram socket: nothing is sent
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostbyname(socket.gethostname())


def leave_variables(environment: "os._Environ[str]") -> None:
    """Let processes that this one starts know nothing of the step: each would take itself for one of it."""
    for name in _NUMBERS:
        environment.pop(name, None)
