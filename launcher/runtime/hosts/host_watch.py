"""Which host gives no sign of life, or the same sign for too long; from beats and a clock alone.

Two things are looked for while hosts train:

    silence    a host answers no beat for ten heartbeats: its process is stopped, or its machine is gone
    no move    it answers, and what it says of itself stays the same for too long: a step hangs

How long is too long has no fixed answer, because a step of a large model takes longer than a thousand of a
small one. The limit is the largest of ten heartbeats, ten times the median step of the last hundred, and
three times the longest that any host has ever rested and then gone on. Before the first step is done, and
while a host evaluates or writes a checkpoint, nothing is known to measure by, and the limit is ten minutes.
Hosts that compile are given half an hour, since one program may take long, and six times the silence,
because tracing can hold Python's lock.

Time in which the supervisor itself did not run (a suspended laptop) is nobody's silence: between two looks no
more than a heartbeat counts.
"""

import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from launcher.runtime.hosts.host_contract import HostBeat

SILENT_BEATS, SLOW_STEPS, LONGEST_RESTS = 10, 10, 3
UNMEASURED_LIMIT_S, PREPARING_LIMIT_S, PREPARING_SILENCE = 600.0, 1800.0, 6
_MEDIAN_OF = 100
_HEARD_BEATS = 3  # since the last one that was answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """A host that is taken for lost, and why."""

    host: int
    why: str


class HostWatch:
    """Watches the hosts of one start of a run."""

    def __init__(
        self, num_hosts: int, heartbeat_s: float, clock: Callable[[], float], *, trains: bool
    ) -> None:
        """`trains`: after the hosts are ready; before that they prepare."""
        self._heartbeat_s, self._clock, self._trains = heartbeat_s, clock, trains
        self._looked_s, self._now_s = clock(), 0.0
        self._heard_s = [0.0] * num_hosts
        self._moved_s = [0.0] * num_hosts
        self._beats: list[HostBeat | None] = [None] * num_hosts
        self._steps_s: deque[float] = deque(maxlen=_MEDIAN_OF)
        self._done, self._done_s = None, 0.0
        self._longest_rest_s = 0.0

    def heard(self, beat: HostBeat) -> None:
        """Take note of what a host has said."""
        self._tick()
        host, before = beat.host, self._beats[beat.host]
        self._heard_s[host], self._beats[host] = self._now_s, beat
        if before is None or _sign(before) != _sign(beat):
            if before is not None and not self._is_unmeasured():
                rest_s = self._now_s - self._moved_s[host]
                self._longest_rest_s = max(self._longest_rest_s, rest_s)
            self._moved_s[host] = self._now_s
        self._measure_steps()

    def suspicion(self, unfinished: Iterable[int]) -> Suspicion | None:
        """Say which of the hosts that are not done is lost, if one is."""
        self._tick()
        hosts = list(unfinished)
        return self._silent(hosts) or self._still(hosts)

    def _tick(self) -> None:
        now_s = self._clock()
        self._now_s += min(now_s - self._looked_s, self._heartbeat_s)
        self._looked_s = now_s

    def _silent(self, hosts: list[int]) -> Suspicion | None:
        limit_s = SILENT_BEATS * self._heartbeat_s * (1 if self._trains else PREPARING_SILENCE)
        for host in hosts:
            silent_s = self._now_s - self._heard_s[host]
            if silent_s > limit_s:
                return Suspicion(
                    host=host,
                    why=f"it gives no sign of life for {silent_s:.0f} s (the limit is {limit_s:.0f} s, "
                    f"from runtime.heartbeat_s={self._heartbeat_s:g})",
                )
        return None

    def _still(self, hosts: list[int]) -> Suspicion | None:
        """Of those that do not move: who is silent, or else waits for nobody, or has done least."""
        limit_s = self._limit_s()
        still = [host for host in hosts if self._now_s - self._moved_s[host] > limit_s]
        beats = [self._beats[host] for host in still if self._beats[host] is not None]
        if not beats:
            return None
        culprit = min(beats, key=self._least_alive)
        rested_s = self._now_s - self._moved_s[culprit.host]
        return Suspicion(
            host=culprit.host,
            why=f"it answers, and has not moved for {rested_s:.0f} s (the limit is {limit_s:.0f} s"
            f"{self._measured_by()})",
        )

    def _least_alive(self, beat: HostBeat) -> tuple:
        is_heard = self._now_s - self._heard_s[beat.host] < _HEARD_BEATS * self._heartbeat_s
        return is_heard, beat.waiting_for != "", beat.steps_done

    def _limit_s(self) -> float:
        if not self._trains:
            return PREPARING_LIMIT_S
        if self._is_unmeasured():
            return UNMEASURED_LIMIT_S
        return max(
            SILENT_BEATS * self._heartbeat_s,
            SLOW_STEPS * statistics.median(self._steps_s),
            LONGEST_RESTS * self._longest_rest_s,
        )

    def _measured_by(self) -> str:
        if not self._trains or self._is_unmeasured():
            return ""
        return f", from runtime.heartbeat_s={self._heartbeat_s:g} and steps of " + (
            f"{statistics.median(self._steps_s):.3g} s"
        )

    def _is_unmeasured(self) -> bool:
        """Whether a host does something that steps say nothing of, or no step is done."""
        return not self._steps_s or any(
            beat is not None and beat.doing and not beat.is_in_step for beat in self._beats
        )

    def _measure_steps(self) -> None:
        if not self._trains or None in self._beats:
            return
        done = min(beat.steps_done for beat in self._beats)
        if self._done is not None and done > self._done:
            self._steps_s.append((self._now_s - self._done_s) / (done - self._done))
        if done != self._done:
            self._done, self._done_s = done, self._now_s


def _sign(beat: HostBeat) -> tuple:
    """What of a beat shows that its host does something."""
    return (
        beat.phase, beat.progress, beat.steps_begun, beat.steps_done, beat.stage, beat.doing,
        beat.waiting_for, len(beat.events),
    )  # fmt: skip
