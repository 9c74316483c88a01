"""A run over several hosts: what each needs, what it is told, and where what they report goes.

The supervisor gets everything from here: the processes' environments, the task, the sinks. The plan is
made before, by whoever calls, and is passed on as the text of plan.json.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.make_plan import Planned
from launcher.config import Config
from launcher.host_process import HostProcess
from launcher.models.model import Model
from launcher.outputs import make_meter, make_sinks
from launcher.resume import own_store
from launcher.runtime.checkpoints.checkpoint_manifest import Progress
from launcher.runtime.hosts.host_contract import HostReady, HostTask
from launcher.runtime.hosts.host_pool import Seat
from launcher.runtime.hosts.host_record import Begun, HostRecord
from launcher.runtime.hosts.host_session import HostRun
from launcher.runtime.hosts.ray_pool import RayPool, ray_address
from launcher.runtime.hosts.supervisor import Policy, Supervisor
from launcher.runtime.records.goodput import Goodput
from launcher.runtime.records.metrics import PlanMetrics, TrainSummary
from launcher.runtime.records.progress import phase
from launcher.runtime.records.sinks import drop_rows_after

LOGS_NAME = "hosts"
_DEVICE_COUNT = "--xla_force_host_platform_device_count"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostsJob:
    """A run that is planned, for the hosts that carry it out.

    Attributes:
        started_s: when the run began, before it was planned.
        progress: of the checkpoint that it goes on from, if it does.
    """

    config: Config
    run_dir: Path
    started_s: float
    console: Console
    cluster: AnyCluster
    model: Model
    planned: Planned
    metrics: PlanMetrics
    progress: Progress | None


def train_on_hosts(job: HostsJob, on_fewer: Callable[[int], HostsJob]) -> TrainSummary:
    """Train over the hosts of the plan; `on_fewer` plans the same run anew for so many."""
    runtime = job.config.runtime
    run = _host_run(job)
    address = ray_address(runtime.address, os.environ)
    log_path = job.run_dir.absolute() / LOGS_NAME / "ray.log"
    jobs = {run: job}

    def fewer(num_hosts: int) -> HostRun:
        smaller = on_fewer(num_hosts)
        made = _host_run(smaller)
        jobs[made] = smaller
        return made

    policy = Policy(
        max_restarts=runtime.max_restarts,
        heartbeat_s=runtime.heartbeat_s,
        fewer_hosts=fewer if job.config.replan and len(job.cluster.kinds) == 1 else None,
        saved_step=lambda: max(own_store(job.config, job.run_dir).steps(), default=0),
    )
    with RayPool(address, len(run.seats), log_path) as pool:
        with phase(job.console, f"joining Ray at {address}" if address else "starting Ray"):
            pool.connect(with_gpus=run.seats[0].num_gpus > 0)
        supervisor = Supervisor(
            pool, run, policy, partial(phase, job.console),
            lambda begun, ready: _open_record(jobs[begun], ready, is_first=begun is run),
        )  # fmt: skip
        return supervisor.run()


def _host_run(job: HostsJob) -> HostRun:
    cluster = job.cluster
    emulated = not cluster.has_accelerators
    widths = [kind.devices_per_host for kind in cluster.kinds for _ in range(kind.num_hosts)]
    logs = job.run_dir.absolute() / LOGS_NAME
    seats = tuple(
        Seat(
            environment=emulating(width, os.environ) if emulated else {},
            num_gpus=0 if emulated else width,
            log_path=logs / f"host-{host}.log",
        )
        for host, width in enumerate(widths)
    )
    task = HostTask(
        config=job.config,
        run_dir=job.run_dir.absolute(),
        plan_text=(job.run_dir / "plan.json").read_text(),
        cluster=cluster,
        host=0,
        num_hosts=len(widths),
        emulated=emulated,
        started_s=job.started_s,
    )
    return HostRun(seats=seats, task=task, factory=HostProcess)


def emulating(num_devices: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a process's CPU is so many devices, and threads suffice for them."""
    flags = [f for f in environment.get("XLA_FLAGS", "").split() if not f.startswith(_DEVICE_COUNT)]
    threads = max(int(environment.get("NPROC", 0)), 2 * num_devices + 4)
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join((*flags, f"{_DEVICE_COUNT}={num_devices}")),
        "NPROC": str(threads),
    }


def _open_record(job: HostsJob, ready: Sequence[HostReady], *, is_first: bool) -> HostRecord:
    """Once the hosts are ready: the same files, lines and W&B run as of one process.

    `is_first`: not after the run has been planned anew.
    """
    config, first_step = job.config, ready[0].first_step
    if config.checkpoint.writes or first_step or not is_first:
        drop_rows_after(job.run_dir, first_step)
    metrics = dataclasses.replace(
        job.metrics,
        num_programs=sum(host.num_programs for host in ready),
        compile_s=max(host.compile_s for host in ready),
    )
    meter = make_meter(
        job.planned, job.model, job.cluster, emulated=not job.cluster.has_accelerators
    )
    sinks = make_sinks(
        config, job.run_dir, job.console, meter, config.train.steps, metrics,
        resumes=first_step > 0 or not is_first,
    )  # fmt: skip
    begun = Begun(
        planned_steps=config.train.steps,
        first_step=first_step,
        progress=job.progress if first_step else None,
    )
    return HostRecord(sinks, meter, begun, lambda: Goodput(job.run_dir))
