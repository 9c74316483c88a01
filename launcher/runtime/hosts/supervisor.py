"""The supervisor of a run over several hosts: begins anew at the last checkpoint when one of them is lost.

It stands outside of all processes that compute, because nothing that those say can be relied on once one of
them is gone: survivors raise, abort or hang. It passes addresses around, holds the one barrier (no host
trains before all are ready), and from then on only listens: hosts run whole steps by themselves.

When a host is lost, all others are ended at once, whatever they are doing. New processes begin at the last
checkpoint, up to `runtime.max_restarts` times; where a machine does not come back, on fewer hosts, if the run
may be planned anew. A verdict on the run itself would come again, and ends it.

Left out: what the processes are (`host_pool`), what one start of them is (`host_session`), what they do
(`host_contract`), and where rows go.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from launcher.errors import NoRestartLeftError
from launcher.run_state import note_phase
from launcher.runtime.hosts.host_contract import HostReady
from launcher.runtime.hosts.host_pool import HostPool, TooFewHostsError
from launcher.runtime.hosts.host_record import HostRecord
from launcher.runtime.hosts.host_session import HostLostError, HostRun, HostSession
from launcher.runtime.records.metrics import TrainSummary
from launcher.runtime.training.interrupt import Interrupt

log = logging.getLogger(__name__)

PLACE_LIMIT_S = 20.0
RETURN_BEATS = 60  # heartbeats in which a machine that was lost may come back

Phase = Callable[[str], AbstractContextManager[Callable[[str], None]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is done about a host that is lost.

    Attributes:
        fewer_hosts: gives the same run, planned anew for so many; None: it must not be.
        saved_step: the step of the newest checkpoint, 0 without one.
    """

    max_restarts: int
    heartbeat_s: float
    fewer_hosts: Callable[[int], HostRun] | None
    saved_step: Callable[[], int]


class Supervisor:
    """Takes a run to its end, over as many starts as it needs."""

    def __init__(
        self, pool: HostPool, run: HostRun, policy: Policy, phase: Phase,
        open_record: Callable[[HostRun, Sequence[HostReady]], HostRecord],
    ) -> None:  # fmt: skip
        """`open_record` says where rows go, once the hosts are ready; `phase` shows what takes long."""
        self._pool, self._run, self._policy, self._phase = pool, run, policy, phase
        self._open_record = open_record
        self._record: HostRecord | None = None
        self._recorded: HostRun | None = None
        self._session: HostSession | None = None
        self._restarts = 0

    def run(self) -> TrainSummary:
        """Train; raises what ends a run in one process, and TrainingError where no host is left to lose.

        The sinks are finished in every case, and no process of a host is left.
        """
        try:
            summary, interrupt = self._train()
        except BaseException as error:
            self._end_all()
            if self._record is not None:
                self._record.finish_despite(error)
            raise
        self._pool.kill()
        interrupt.raise_if_requested(f"after step {summary.steps} of {summary.planned_steps}")
        return summary

    def _train(self) -> tuple[TrainSummary, Interrupt]:
        while True:
            self._session = HostSession(self._pool, self._this_start(), self._policy.heartbeat_s)
            try:
                self._bring_up(self._session)
            except TooFewHostsError as error:
                self._go_on_with_fewer(error)
                continue
            except HostLostError as lost:
                self._begin_anew(lost)
                continue
            try:
                # Until here a signal ends the run at once; from here it leaves a note, and a checkpoint.
                with Interrupt() as interrupt:
                    summary = self._train_once(self._session, interrupt)
                    record, self._record = self._record, None
                    return record.finish(summary, interrupt.status), interrupt
            except HostLostError as lost:
                self._begin_anew(lost)

    def _this_start(self) -> HostRun:
        """The run as it begins now; what passed before belongs to the starts before."""
        if not self._restarts:
            return self._run
        return replace(self._run, task=replace(self._run.task, started_s=time.time()))

    def _bring_up(self, session: HostSession) -> None:
        count, run_dir = len(self._run.seats), self._run.task.run_dir
        note_phase(run_dir, "compiling")
        text = "starting 1 host" if count == 1 else f"starting {count} hosts"
        with self._phase(text) as progress:
            ready = session.bring_up(self._patience_s, progress)
        note_phase(run_dir, "training")
        for host in ready:
            log.info("host %d (%s): %s", host.host, session.place(host.host), host.text)
        if self._recorded is self._run:
            log.info("going on after step %d", ready[0].first_step)
            self._record.rewind(ready[0].first_step)
        else:
            self._record = self._open_record(self._run, ready)
            self._recorded = self._run

    def _train_once(self, session: HostSession, interrupt: Interrupt) -> TrainSummary:
        try:
            return session.train(self._record, interrupt)
        except HostLostError as lost:
            # A scheduler may have ended the host too: what was asked for counts.
            done, planned = self._record.num_steps, self._record.planned_steps
            interrupt.raise_if_requested(f"after step {done} of {planned}, in which {lost}")
            raise

    def _end_all(self) -> None:
        """End all hosts, and count what they have still reported.

        Rows of steps that a checkpoint has: all hosts have done those, and they are not done again. Lines for
        the log in any case: they may say what went wrong.
        """
        self._pool.kill()
        left_over = self._session.left_over if self._session else ()
        self._session = None
        saved_step = self._policy.saved_step() if left_over else 0
        for event in left_over:
            if event.kind == "log" or (event.kind == "row" and event.step <= saved_step):
                self._record.take(event)

    @property
    def _patience_s(self) -> float:
        """How long a machine that has what a host needs is waited for."""
        return RETURN_BEATS * self._policy.heartbeat_s if self._restarts else PLACE_LIMIT_S

    def _begin_anew(self, lost: HostLostError) -> None:
        """End all hosts; the next start goes on from the last checkpoint, if there is to be one."""
        self._end_all()
        limit = self._policy.max_restarts
        if self._restarts >= limit:
            again = f"it was begun anew {limit} times" if limit else "it is not begun anew"
            raise NoRestartLeftError(
                f"{lost}; {again} (runtime.max_restarts={limit}): what the host said last is in "
                f"{self._run.task.run_dir}/hosts; the run goes on from its last checkpoint when it is "
                f"started again in its folder"
            ) from lost
        self._restarts += 1
        log.warning("%s: beginning anew (%d of %d)", lost, self._restarts, limit)

    def _go_on_with_fewer(self, error: TooFewHostsError) -> None:
        if not self._restarts:
            raise error
        seats, fewer_hosts = self._run.seats, self._policy.fewer_hosts
        room = self._pool.num_places(seats[0])
        if fewer_hosts is None or not 0 < room < len(seats):
            raise NoRestartLeftError(
                f"a host was lost, and within {self._patience_s:.0f} s none took its place "
                f"(replan={'false' if fewer_hosts is None else 'true'}): {error.found}: start the run again "
                f"in its folder, with replan=true cluster.hosts=N for fewer hosts, and it goes on from its "
                f"last checkpoint"
            ) from error
        log.warning("%s: going on with %d of %d hosts (replan=true)", error.found, room, len(seats))
        if self._record is not None:  # of another plan: what follows has another prediction
            self._record.finish_despite(error)
            self._record = None
        self._run = fewer_hosts(room)
