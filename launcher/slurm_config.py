"""What a job asks of Slurm: `cluster.slurm` of a cluster's file, and `hydra.launcher` of a sweep over it.

`launcher.slurm.job_request` makes a request of both, and checks it.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class SlurmConfig:
    """How a cluster takes jobs. null leaves it to the cluster, or to Slurm."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None  # hours:minutes:seconds, or days-hours; in YAML in quotes
    nodes: int | None = None  # null: cluster.hosts, and 1 where the devices are emulated
    gpus_per_node: int | None = None  # null: cluster.devices_per_host, and 0 where emulated
    cpus_per_task: int | None = None  # of the one launcher process of a node
    mem_gb: float | None = None  # of a node
    exclusive: bool | None = None  # whole nodes
    constraint: str | None = None
    sbatch: dict[str, Any] = field(default_factory=dict)  # other options, such as {nice: 100}
    srun: list[str] = field(default_factory=list)  # arguments of srun, such as those of a container
    setup: list[str] = field(default_factory=list)  # lines of bash before the run: modules and such
    env: dict[str, str] = field(default_factory=dict)  # variables of the run
    python: str | None = None  # the interpreter on the nodes, or a command; null: this one
    warn_s: int = 120  # so long before its time is up a job is told, to write a checkpoint
    max_restarts: int = 3  # after a process or a node that died without a word
