"""Hosts in threads of this process, that count steps instead of training, and fail as they are told.

For the supervisor's tests: everything about it but Ray and JAX. Steps go in lockstep, as those of real
hosts do, since each needs what the others send.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from launcher.runtime.hosts.host_contract import (
    Host,
    HostAddress,
    HostBeat,
    HostEnd,
    HostEvent,
    HostReady,
)
from launcher.runtime.hosts.host_pool import HostDiedError, HostPool, TooFewHostsError, Whereabouts
from launcher.runtime.records.metrics import TrainSummary

STEP_S = 0.005


@dataclass(frozen=True)
class Fault:
    """What goes wrong at a host, in its start number `start`, when it has begun step `step`.

    `kind`: "dies", "hangs" (beats are answered), "stops" (nothing is), or an exception that is raised.
    """

    host: int
    kind: object
    step: int = 3
    start: int = 0
    phase: str = "train"


@dataclass
class World:
    """What outlives the processes: files, and what a test wants to happen and to know."""

    steps: int = 12
    checkpoint_every: int = 4
    faults: tuple[Fault, ...] = ()
    checkpoint: int = 0
    doing: str = ""  # instead of instructions
    starts: int = -1
    room: list[int] = field(default_factory=lambda: [99])  # hosts that there is room for, by start
    done: dict[int, int] = field(default_factory=dict)
    on_step: Callable[[int, int], None] = lambda host, step: None
    first_steps: dict[int, int] = field(default_factory=dict)
    stopped_at: dict[int, int] = field(default_factory=dict)

    def fault(self, host: int, phase: str, step: int) -> object:
        """What is to go wrong there, if anything."""
        for fault in self.faults:
            place = (fault.host, fault.start, fault.phase)
            if place == (host, self.starts, phase) and (phase != "train" or fault.step == step):
                return fault.kind
        return None


class FakeHost(Host):
    """Counts the steps of one host."""

    def __init__(self, world: World, task, num_hosts: int) -> None:
        self.world, self.host, self.num_hosts = world, task.host, num_hosts
        self.dead, self.frozen = threading.Event(), False
        self.begun = self.steps_done = world.checkpoint
        self.held, self.last = False, None
        self.lock = threading.Lock()
        self.events: list[HostEvent] = []
        self.phase = "opened"
        self._go_wrong("make", 0)

    def open(self) -> HostAddress:
        self._go_wrong("open", 0)
        return HostAddress(host=self.host, transfer="t", coordinator="c", token="1")

    def prepare(self, addresses) -> HostReady:
        assert [address.host for address in addresses] == list(range(self.num_hosts))
        self._go_wrong("prepare", 0)
        self.phase = "ready"
        first_step = self.world.first_steps.get(self.host, self.world.checkpoint)
        self.world.done[self.host] = first_step
        return HostReady(
            host=self.host, first_step=first_step, stages=(self.host,), num_programs=3,
            compile_s=0.5, text="3 programs",
        )  # fmt: skip

    def train(self) -> HostEnd:
        self.phase = "training"
        for step in range(self.begun, self.world.steps):
            if self._ends_before(step):
                break
            self.world.on_step(self.host, step)
            self._go_wrong("train", step)
            self._wait_until(lambda step=step: min(self.world.done.values()) >= step)
            time.sleep(STEP_S)
            self._complete(step + 1)
        self.world.stopped_at[self.host] = self.steps_done
        return HostEnd(
            host=self.host, steps=self.steps_done, stopped=self.last is not None, summary=summary(self),
            bytes_sent={"activation": 6, "norm": 4}, waited_s=float(self.host),
        )  # fmt: skip

    def beat(self) -> HostBeat:
        self._wait_until(lambda: not self.frozen)
        with self.lock:
            events, self.events = tuple(self.events), []
            return HostBeat(
                host=self.host, phase=self.phase, steps_begun=self.begun, steps_done=self.steps_done,
                stage=self.host, events=events,
                doing=self.world.doing or (f"{self.host}F0" if self.begun else ""),
            )  # fmt: skip

    def hold(self) -> int:
        with self.lock:
            self.held = True
            return self.begun

    def stop_after(self, step: int) -> None:
        self.last = step

    def close(self) -> None:
        self.dead.set()

    def _ends_before(self, step: int) -> bool:
        """Wait while held; say whether this step is not to be made any more. Else it has begun."""
        while True:
            with self.lock:
                if not self.held or (self.last is not None and step < self.last):
                    self.begun = step + 1
                    return False
                if self.last is not None:
                    return True
            self._wait_until(lambda: self.last is not None)

    def _complete(self, steps: int) -> None:
        with self.lock:
            self.steps_done = steps
            if self.host == 0:
                row = {
                    "step": steps,
                    "loss": 1.0 / steps,
                    "step_s": STEP_S,
                    "peak_bytes_per_device": 7,
                }
                self.events.append(HostEvent(kind="row", step=steps, row=row))
        self.world.done[self.host] = steps
        if steps % self.world.checkpoint_every == 0:
            # Written when all are done, and by the host that has the rows, when these are told.
            self._wait_until(lambda: min(self.world.done.values()) >= steps)
            if self.host == 0:
                self._wait_until(lambda: not self.events)
                self.world.checkpoint = steps

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            if self.dead.wait(0.001):
                raise HostDiedError("its process ended")

    def _go_wrong(self, phase: str, step: int) -> None:
        match self.world.fault(self.host, phase, step):
            case None:
                return
            case "dies":
                self.dead.set()
            case "stops":
                self.frozen = True
            case BaseException() as error:
                raise error
        self._wait_until(lambda: False)


def summary(host: FakeHost) -> TrainSummary:
    """That of a host which has trained to its end."""
    return TrainSummary(
        status="done", steps=host.steps_done, planned_steps=host.world.steps, loss=0.25,
        best_loss=0.25, eval_loss=None, wall_s=1.0, measured={"step_s": STEP_S}, timed_steps=1,
        predicted_step_s=None,
    )  # fmt: skip


class ThreadPool(HostPool):
    """Threads in the place of processes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.hosts: dict[int, FakeHost] = {}
        self.size, self.kills, self.is_closed = 0, 0, False

    def start(self, seats, patience_s) -> list[Future]:
        assert not self.hosts
        self.world.starts += 1
        self.world.done, self.size = (
            dict.fromkeys(range(len(seats)), self.world.checkpoint),
            len(seats),
        )
        if self.num_places(seats[0]) < len(seats):
            raise TooFewHostsError(
                f"the plan needs {len(seats)} hosts, and there are {self.world.room}"
            )
        return [self._at_once(host) for host in range(len(seats))]

    def _at_once(self, host: int) -> Future:
        future: Future = Future()
        if self.world.fault(host, "start", 0) == "dies":
            future.set_exception(HostDiedError("its process did not start: no memory"))
        else:
            future.set_result(Whereabouts(pid=100 + host, ip="127.0.0.1", machine="here"))
        return future

    def num_places(self, seat) -> int:
        return self.world.room[min(max(self.world.starts, 0), len(self.world.room) - 1)]

    def make(self, host, factory, task) -> Future:
        def make() -> None:
            self.hosts[host] = factory(self.world, task, self.size)

        return _in_thread(make)

    def call(self, host, action, *, quick) -> Future:
        subject = self.hosts[host]
        if subject.dead.is_set():
            future: Future = Future()
            future.set_exception(HostDiedError("its process ended"))
            return future
        return _in_thread(lambda: action(subject))

    def kill(self) -> None:
        self.kills += 1
        for host in self.hosts.values():
            host.dead.set()
        self.hosts = {}

    def close(self) -> None:
        self.kill()
        self.is_closed = True


def _in_thread(action: Callable[[], object]) -> Future:
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
