"""What the supervisor of a run over several hosts and the process of one host say to each other.

One process per host holds the stages that lie there, and runs whole steps by itself. The supervisor starts
the processes, takes them through the phases below, looks at their beats, and ends them. How it reaches them
is its own affair: everything here pickles.

    address = host.open()             every host: where it listens
    ready = host.prepare(addresses)   every host, with the addresses of all: worlds, weights, compilation
    end = host.train()                every host, once all are ready: all steps, nobody in between
    host.close()

While `prepare` and `train` run, `beat`, `hold` and `stop_after` answer from other threads.

Left out: Ray, files of the run (but for checkpoints and goodput.json), and what is shown to people.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.config import Config
from launcher.runtime.records.metrics import Row, TrainSummary

# How long a host waits for what another one is to send before it gives up by itself. The supervisor is to
# notice long before: this is for processes that have lost theirs.
RECEIVE_LIMIT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTask:
    """What a host's process is to do.

    Attributes:
        run_dir: of the run; the hosts share its file system, as that of `checkpoint.dir`.
        plan_text: of plan.json.
        cluster: that the plan is for.
        host: its number in the cluster, as the plan's stages name it.
        emulated: whether CPU devices stand for the cluster's.
        ip: under which the other hosts reach this one.
        started_s: when this start of the run began, by the world's clock: before it was planned.
    """

    config: Config
    run_dir: Path
    plan_text: str
    cluster: AnyCluster
    host: int
    num_hosts: int
    emulated: bool
    ip: str = "127.0.0.1"
    receive_limit_s: float = RECEIVE_LIMIT_S
    started_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAddress:
    """Where a host listens.

    Attributes:
        transfer: "ip:port" of its transfer server.
        coordinator: "ip:port" for the coordinator of the world that it is the first host of, if it is.
        token: digits that no other start of the run has.
    """

    host: int
    transfer: str
    coordinator: str
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReady:
    """A host that could begin to train.

    Attributes:
        first_step: how many steps are done already; all hosts must say the same.
        stages: that lie here, wholly or in part.
        compile_s: what compiling took.
    """

    host: int
    first_step: int
    stages: tuple[int, ...]
    num_programs: int
    compile_s: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEvent:
    """Something for the run's sinks or log; it counts once every host has done `step` steps.

    Attributes:
        kind: "row": `row` is for `Sink.write`; "rewind": for `Sink.rewind(step)`, after which steps count
            again from there; "log": `text` is for the log, with `level` of `logging`.
    """

    kind: Literal["row", "rewind", "log"]
    step: int
    row: Row | None = None
    text: str = ""
    level: int = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBeat:
    """What a host is at.

    Attributes:
        phase: "opened", "preparing", "ready", "training", "ended".
        progress: how far it is, while it prepares.
        steps_begun, steps_done: all its own instructions of these are dispatched; are done on its devices.
            After a "rewind" they go back.
        doing: the last instruction that was dispatched, such as "2F0"; "evaluating", "saving" or "writing"
            (what takes as long as it takes); "" before the first.
        waiting_for: the receive that it waits for, with stage and host of the sender; "" if for none.
        peak_bytes: by stage, the most memory that any of its devices here has used; without those whose
            backend does not count it.
        bytes_sent: to other hosts so far, by kind of message.
        waited_s: the seconds for which its devices had nothing to do but to wait for other hosts.
        events: those since the beat before. Only host 0 has rows, and every row is in one beat only.
    """

    host: int
    phase: str
    progress: str = ""
    steps_begun: int = 0
    steps_done: int = 0
    stage: int | None = None
    doing: str = ""
    waiting_for: str = ""
    peak_bytes: Mapping[int, int] = field(default_factory=dict)
    bytes_sent: Mapping[str, int] = field(default_factory=dict)
    waited_s: float = 0.0
    events: tuple[HostEvent, ...] = ()

    @property
    def is_in_step(self) -> bool:
        """Whether it is at an instruction, and not at what steps say nothing of."""
        return self.doing[:1].isdigit()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEnd:
    """How training ended, when it did not end in an error.

    Attributes:
        steps: done in all, as on every host.
        stopped: `stop_after` ended it.
        summary: for `Sink.finish`, with `status` "done" or "stopped"; only that of host 0 counts.
    """

    host: int
    steps: int
    stopped: bool
    summary: TrainSummary
    bytes_sent: Mapping[str, int]
    waited_s: float


class Host(abc.ABC):
    """The process of one host. `launcher.host_process.HostProcess(task)` is the real one."""

    @abc.abstractmethod
    def open(self) -> HostAddress:
        """Read the plan and find where to listen; quick, and starts no backend."""

    @abc.abstractmethod
    def prepare(self, addresses: Sequence[HostAddress]) -> HostReady:
        """Form the world, bring the weights where they lie, compile everything.

        `addresses` are those of all hosts, by their numbers. No host may train before all are ready.
        """

    @abc.abstractmethod
    def train(self) -> HostEnd:
        """Run all steps that are left, and return when everything that they leave is written.

        What fails raises: a LauncherError as in one process.
        """

    @abc.abstractmethod
    def beat(self) -> HostBeat:
        """What it is at; at once, from any thread, at any time."""

    @abc.abstractmethod
    def hold(self) -> int:
        """Begin no further step until `stop_after` says which is the last; gives how many are begun.

        So that all stop after the same step: ask all, take the largest answer, and tell it to all. It
        answers at once, from any thread.
        """

    @abc.abstractmethod
    def stop_after(self, step: int) -> None:
        """After `hold`: go on until `step` steps are done, write the checkpoint, and end."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of devices and servers. The process can be ended instead."""
