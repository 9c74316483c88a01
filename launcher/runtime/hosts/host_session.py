"""One start of a run's hosts: their processes brought up together, ready together, training to the end.

Everything that all hosts do is waited for together, so that the failure of one ends the waiting for all.
What a failure means for the run is the supervisor's to say; here it only becomes one of two kinds:

    HostLostError    a process ended, raised what is no verdict on the run, or `HostWatch` suspects it
    LauncherError    a verdict, such as a loss that is not finite: it would come again
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from operator import methodcaller

from launcher.errors import ClusterError, LauncherError, LostPeerError
from launcher.runtime.hosts.host_beats import HostBeats
from launcher.runtime.hosts.host_contract import HostBeat, HostEnd, HostEvent, HostReady, HostTask
from launcher.runtime.hosts.host_events import HostEvents
from launcher.runtime.hosts.host_pool import HostDiedError, HostPool, Seat, Whereabouts
from launcher.runtime.hosts.host_record import HostRecord
from launcher.runtime.hosts.host_stop import HostStop
from launcher.runtime.hosts.host_watch import HostWatch
from launcher.runtime.records.metrics import TrainSummary
from launcher.runtime.training.interrupt import Interrupt

LOOK_EVERY_S = 0.05
# After a first failure the others may tell more: a process that ended is the cause, and an error that
# another one has because of it is not.
GRACE_S = 1.0
START_LIMIT_S, LAST_WORDS_LIMIT_S = 180.0, 10.0


class HostLostError(Exception):
    """A host is gone, or taken for gone; the text names it, and what it was at."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostRun:
    """What the hosts are to run.

    Attributes:
        seats: of the hosts, in the order of their numbers.
        task: of host 0; the others differ in their number and address.
        factory: makes of a task what a host's process holds.
    """

    seats: tuple[Seat, ...]
    task: HostTask
    factory: Callable[[HostTask], object]


class HostSession:
    """Used once: `bring_up`, then `train`.

    Attributes:
        left_over: after `train` has failed, what hosts have reported and may not count.
    """

    def __init__(
        self, pool: HostPool, run: HostRun, heartbeat_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._pool, self._run, self._heartbeat_s, self._clock = pool, run, heartbeat_s, clock
        self._hosts = range(len(run.seats))
        self._beats = HostBeats(pool, len(run.seats), heartbeat_s, clock)
        self._where: dict[int, Whereabouts] = {}
        self._ready: list[HostReady] = []
        self.left_over: tuple[HostEvent, ...] = ()

    def bring_up(self, patience_s: float, progress: Callable[[str], None]) -> list[HostReady]:
        """Start the processes, and let them get ready; returns when all are."""
        started = dict(enumerate(self._pool.start(self._run.seats, patience_s)))
        where = self._together("starting", started, limit_s=START_LIMIT_S)
        self._where = dict(zip(self._hosts, where, strict=True))
        progress("loading")
        tasks = [
            replace(self._run.task, host=host, ip=self._where[host].ip) for host in self._hosts
        ]
        made = {host: self._pool.make(host, self._run.factory, tasks[host]) for host in self._hosts}
        self._together("loading", made, limit_s=START_LIMIT_S)
        opened = self._call_all(methodcaller("open"))
        addresses = self._together("opening", opened, limit_s=START_LIMIT_S)
        watch = HostWatch(len(self._hosts), self._heartbeat_s, self._clock, trains=False)
        preparing = self._call_all(methodcaller("prepare", addresses))

        def look() -> None:
            beats = self._look(watch, preparing, "preparing")
            if beats:
                progress(self._how_far())

        self._ready = self._together("preparing", preparing, look)
        self._check_steps()
        return self._ready

    def train(self, record: HostRecord, interrupt: Interrupt) -> TrainSummary:
        """Let the hosts run to their end, and hand on what they report as it comes to count."""
        watch = HostWatch(len(self._hosts), self._heartbeat_s, self._clock, trains=True)
        events = HostEvents(len(self._hosts), self._ready[0].first_step)
        stop = HostStop(self._pool, len(self._hosts))
        training = self._call_all(methodcaller("train"))

        def look() -> None:
            for beat in self._look(watch, training, "training"):
                hand_on(beat)
            if interrupt.requested:
                stop.look()

        def hand_on(beat: HostBeat) -> None:
            for event in events.heard(beat):
                record.take(event)

        try:
            ends = self._together("training", training, look)
            for beat in self._last_words():
                hand_on(beat)
        finally:
            # What a host has said already must not be lost with it: its checkpoint counts on that.
            asked = self._beats.pending().values()
            for beat in wait(asked, timeout=GRACE_S).done:
                if beat.exception() is None:
                    hand_on(beat.result())
            self.left_over = events.left_over()
        return replace(ends[0].summary, between_hosts=_between_hosts(ends))

    def _call_all(self, action: methodcaller) -> dict[int, Future]:
        return {host: self._pool.call(host, action, quick=False) for host in self._hosts}

    def _last_words(self) -> Iterator[HostBeat]:
        """What hosts that are done have not said yet: what is on its way first, then the rest."""
        yield from self._together("ending", self._beats.pending(), limit_s=LAST_WORDS_LIMIT_S)
        rest = {
            host: self._pool.call(host, methodcaller("beat"), quick=True) for host in self._hosts
        }
        yield from self._together("ending", rest, limit_s=LAST_WORDS_LIMIT_S)

    def _look(self, watch: HostWatch, calls: Mapping[int, Future], phase: str) -> list[HostBeat]:
        beats = self._beats.look()
        for beat in beats:
            watch.heard(beat)
        suspicion = watch.suspicion(host for host, call in calls.items() if not call.done())
        if suspicion is not None:
            raise self._lost(suspicion.host, phase, suspicion.why)
        return beats

    def _together(
        self, phase: str, calls: Mapping[int, Future], look: Callable[[], None] = lambda: None,
        *, limit_s: float | None = None,
    ) -> list:  # fmt: skip
        """The results of all hosts, in their order; the first failure ends it."""
        began_s, done = self._clock(), _in_order(calls)
        while True:
            if any(calls[host].exception() for host in list(done)):
                raise self._failure(phase, calls, done)
            waiting = [host for host, call in calls.items() if not call.done()]
            if not waiting:
                return [calls[host].result() for host in sorted(calls)]
            if limit_s is not None and self._clock() - began_s > limit_s:
                raise self._lost(waiting[0], phase, f"no answer within {limit_s:.0f} s")
            wait(calls.values(), timeout=LOOK_EVERY_S, return_when=FIRST_COMPLETED)
            look()

    def _failure(self, phase: str, calls: Mapping[int, Future], done: Sequence[int]) -> Exception:
        """The failure that explains the others; `done` are the hosts that are, in that order."""
        if not any(isinstance(calls[host].exception(), HostDiedError) for host in list(done)):
            wait(calls.values(), timeout=GRACE_S)
        errors = {host: calls[host].exception() for host in list(done) if calls[host].exception()}
        for host, error in errors.items():
            if isinstance(error, HostDiedError):
                return self._lost(host, phase, str(error))
        for error in errors.values():
            if isinstance(error, LauncherError) and not isinstance(error, LostPeerError):
                return error
        first, error = next(iter(errors.items()))
        if isinstance(error, ImportError):
            return ClusterError(
                f"host {first} ({self.place(first)}) lacks what this process has: {error} (runtime=ray): "
                f"every host needs the same packages, and the same folders of modules"
            )
        kind = "" if isinstance(error, LauncherError) else f"{type(error).__name__}: "
        return self._lost(first, phase, f"{kind}{error}")

    def _lost(self, host: int, phase: str, why: str) -> HostLostError:
        return HostLostError(
            f"host {host} ({self.place(host)}) was lost while {phase}: {why}{self._at(host)}"
        )

    def place(self, host: int) -> str:
        """Where the process of a host is."""
        return str(self._where[host]) if host in self._where else "it has no process yet"

    def _at(self, host: int) -> str:
        """What it was at when it was heard last."""
        beat = self._beats.newest[host]
        if beat is None or not beat.doing:
            stages = ", ".join(map(str, self._ready[host].stages)) if self._ready else ""
            return f"; its stages: {stages}" if stages else ""
        waited = f", waiting for {beat.waiting_for}" if beat.waiting_for else ""
        stage = "" if beat.stage is None else f" of stage {beat.stage}"
        step = max(beat.steps_begun, 1)
        what = f"its last instruction was {beat.doing}{stage} in step {step}"
        if not beat.is_in_step:
            what = f"it was {beat.doing} its part{stage} after step {step}"
        return f"; {what}{waited}, and it had done {beat.steps_done} steps"

    def _how_far(self) -> str:
        told = (beat for beat in self._beats.newest if beat is not None)
        return ", ".join(f"host {beat.host}: {beat.progress or beat.phase}" for beat in told)

    def _check_steps(self) -> None:
        """Hosts that see different checkpoints do not see the same files."""
        first, *others = self._ready
        for other in others:
            if other.first_step != first.first_step:
                raise ClusterError(
                    f"host {first.host} would go on after step {first.first_step}, and host {other.host} "
                    f"after step {other.first_step}: they do not find the same checkpoints "
                    f"(hydra.run.dir={self._run.task.run_dir}, checkpoint.dir): take a folder that all "
                    f"hosts share"
                )


def _in_order(calls: Mapping[int, Future]) -> list[int]:
    """The hosts whose calls are done, as they come to be: one that fails has often others fail after it."""
    done: list[int] = []
    for host, call in calls.items():
        call.add_done_callback(lambda _, host=host: done.append(host))
    return done


def _between_hosts(ends: Sequence[HostEnd]) -> dict[str, float]:
    """What hosts have sent to one another since this start, and the longest that one waited for others."""
    return {
        "sent_between_hosts_bytes": sum(sum(end.bytes_sent.values()) for end in ends),
        "waited_for_hosts_s": max(end.waited_s for end in ends),
    }
