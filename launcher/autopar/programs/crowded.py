"""The simulator for hosts whose devices slow one another down: emulated devices that share a CPU's cores,
or accelerators that share power and memory channels.

The rules are those of `simulator`, but an instruction has no fixed duration. It has work, and does it at a
speed that depends on how many devices of its host compute at that moment (processor sharing): a stage that
computes while its neighbours wait is faster than one among busy neighbours. Between two events, a start or
an end of an instruction or the arrival of a message that somebody waits for, all speeds are constant.

An instruction on several hosts goes at the pace of the slowest. Left out: what messages and the host's
own time to dispatch take from computing.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from launcher.autopar.programs.instructions import (
    COMPUTES,
    LAST_BACKWARDS,
    RECEIVE_OF_READER,
    RECEIVES,
    SENDS,
    Instruction,
    Op,
)
from launcher.autopar.programs.program import Program
from launcher.autopar.programs.schedules import stash_peaks
from launcher.autopar.programs.simulator import KINDS, Durations
from launcher.autopar.programs.timeline import Event, EventKind, Timeline
from launcher.errors import ScheduleError

_PENDING = (0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Who shares a host with whom.

    Attributes:
        devices: of each submesh: machine -> how many of its devices the submesh has.
        slowdown: of each submesh: devices of a machine that compute at once -> how many times slower
            each of its own is.
        priced: how many times slower than alone the durations of each submesh are meant for.
    """

    devices: tuple[Mapping[int, int], ...]
    slowdown: tuple[Callable[[int], float], ...]
    priced: tuple[float, ...]

    def speeds(self, busy: list[int]) -> dict[int, float]:
        """Work per second of each submesh that computes; 1 is the speed of its durations."""
        at_once = Counter()
        for submesh in busy:
            at_once.update(self.devices[submesh])
        return {
            submesh: self.priced[submesh]
            / max(self.slowdown[submesh](at_once[machine]) for machine in self.devices[submesh])
            for submesh in busy
        }


@dataclass(slots=True, kw_only=True)
class _Submesh:
    """Where the play of one list stands; `left_s` is of the instruction that computes, None if none does."""

    entries: tuple[Instruction, ...]
    position: int = 0
    start_s: float = 0.0
    left_s: float | None = None
    free_s: float = 0.0
    busy_s: float = 0.0
    exposed_s: float = 0.0
    arrivals: dict[tuple, tuple[float, float]] = field(default_factory=dict)
    # Receives that were posted, by what they are read as, whose messages are not under way yet.
    expected: Counter[tuple] = field(default_factory=Counter)

    @property
    def entry(self) -> Instruction | None:
        return self.entries[self.position] if self.position < len(self.entries) else None


class _Play:
    """All lists at the same moment, from event to event."""

    def __init__(self, program: Program, durations: Durations, crowd: Crowd) -> None:
        self.submeshes = [_Submesh(entries=entries) for entries in program.lists]
        self.homes, self.durations, self.crowd = program.submesh_of, durations, crowd
        self.events: list[Event] = []
        self.now_s = 0.0
        self.channel_free_s: dict[tuple[int, int], float] = defaultdict(float)
        self.under_way: dict[tuple[int, int], deque] = defaultdict(deque)
        self.receives: dict[tuple[int, int], deque] = defaultdict(deque)

    def run(self) -> None:
        """Let everybody start who can, then go on to the next event, until all are done."""
        while True:
            while any([self._advance(index) for index in range(len(self.submeshes))]):
                pass
            busy = [i for i, own in enumerate(self.submeshes) if own.left_s is not None]
            speeds = self.crowd.speeds(busy)
            next_s = min(
                (*(self.now_s + self.submeshes[i].left_s / speeds[i] for i in busy), *self._awaited()),
                default=None,
            )  # fmt: skip
            if next_s is None:
                break
            self._pass(next_s, speeds)
        stuck = [own.entry for own in self.submeshes if own.entry is not None]
        if stuck:
            raise ScheduleError(
                f"{len(stuck)} of {len(self.submeshes)} submeshes wait for ever, the first at "
                f"{stuck[0]} (parallel.schedule): prove the program with checker.check"
            )

    def _awaited(self) -> Iterator[float]:
        """When the values arrive that idle submeshes wait for."""
        for own in self.submeshes:
            entry = own.entry
            waits = own.left_s is None and entry is not None and entry.op in COMPUTES
            if waits and not self._expects(own):
                yield self._arrived_s(own)[0]

    def _pass(self, next_s: float, speeds: Mapping[int, float]) -> None:
        """Let time pass; what is done by then ends."""
        passed_s = next_s - self.now_s
        for index, speed in speeds.items():
            own = self.submeshes[index]
            own.left_s -= passed_s * speed
            # The one that sets the next event ends there, whatever rounding leaves of it.
            if own.left_s <= 1e-12 * max(next_s, 1.0):
                self._end(index, own, next_s)
        self.now_s = next_s

    def _end(self, index: int, own: _Submesh, end_s: float) -> None:
        entry = own.entry
        self._note(index, entry, KINDS[entry.op], own.start_s, end_s)
        own.busy_s += end_s - own.start_s
        own.left_s, own.free_s = None, end_s
        own.position += 1

    def _advance(self, index: int) -> bool:
        """Go as far as an idle submesh can at this moment; say whether that was anywhere."""
        own, before = self.submeshes[index], self.submeshes[index].position
        while own.left_s is None and (entry := own.entry) is not None:
            if entry.op in COMPUTES:
                if not self._start(own, entry):
                    break
                continue  # it computes now, or nothing more happens here at this moment
            if entry.op in RECEIVES:
                self._receive(index, own, entry)
            elif entry.op in SENDS:
                self._send(index, entry)
            own.position += 1
        return own.position > before

    def _start(self, own: _Submesh, entry: Instruction) -> bool:
        """Begin to compute, if what the instruction reads is there."""
        arrived_s, made_s = self._arrived_s(own)
        if self._expects(own) or arrived_s > self.now_s:
            return False
        for key in _read_by(entry):
            own.arrivals.pop(key, None)
        own.exposed_s += self.now_s - max(own.free_s, min(made_s, self.now_s))
        own.start_s, own.left_s = self.now_s, self.durations.compute_s(entry.op)[entry.stage]
        return True

    def _arrived_s(self, own: _Submesh) -> tuple[float, float]:
        """When the last value that the next instruction reads arrives, and when it was made."""
        found = [own.arrivals.get(key, _PENDING) for key in _read_by(own.entry)]
        return max(arrived_s for arrived_s, _ in found), max(made_s for _, made_s in found)

    def _expects(self, own: _Submesh) -> bool:
        """Whether a value that the next instruction reads has not been sent yet."""
        return any(own.expected[key] for key in _read_by(own.entry))

    def _receive(self, index: int, own: _Submesh, entry: Instruction) -> None:
        """Post a receive; messages of a channel are matched with receives in their order."""
        key = entry.op, entry.stage, entry.microbatch
        channel = self.homes[entry.peer], index
        own.expected[key] += 1
        self.receives[channel].append((own, key))
        self._match(channel)

    def _send(self, index: int, entry: Instruction) -> None:
        channel = index, self.homes[entry.peer]
        start_s = max(self.now_s, self.channel_free_s[channel])
        end_s = start_s + self.durations.transfer_s(entry.op, entry.stage, entry.peer)
        self.channel_free_s[channel] = end_s
        self.under_way[channel].append((end_s, self.now_s))
        self._note(index, entry, EventKind.TRANSFER, start_s, end_s)
        self._match(channel)

    def _match(self, channel: tuple[int, int]) -> None:
        while self.under_way[channel] and self.receives[channel]:
            own, key = self.receives[channel].popleft()
            last, message = own.arrivals.get(key, _PENDING), self.under_way[channel].popleft()
            own.arrivals[key] = max(last[0], message[0]), max(last[1], message[1])
            own.expected[key] -= 1

    def _note(
        self, index: int, entry: Instruction, kind: EventKind, start_s: float, end_s: float
    ) -> None:
        self.events.append(
            Event(submesh=index, instruction=entry, kind=kind, start_s=start_s, end_s=end_s)
        )


def _read_by(entry: Instruction) -> tuple[tuple, ...]:
    """By which keys the values are known that a compute instruction reads."""
    own = (RECEIVE_OF_READER.get(entry.op), entry.stage, entry.microbatch)
    lent = (Op.RECEIVE_TIED_GRADIENT, entry.stage, None)
    return (own, lent) if entry.op in LAST_BACKWARDS else (own,)


def simulate_crowded(program: Program, durations: Durations, crowd: Crowd) -> Timeline:
    """Play a checked program on hosts whose devices slow one another down."""
    play = _Play(program, durations, crowd)
    play.run()
    events = sorted(play.events, key=lambda event: (event.start_s, event.submesh))
    return Timeline(
        events=tuple(events),
        step_s=max((event.end_s for event in events), default=0.0),
        busy_s=tuple(own.busy_s for own in play.submeshes),
        exposed_s=tuple(own.exposed_s for own in play.submeshes),
        stash_peak=stash_peaks(list(chain.from_iterable(program.lists)), program.num_stages),
    )
