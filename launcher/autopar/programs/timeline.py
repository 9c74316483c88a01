"""What a step looks like in time: events, their sums, and the memory they hold.

The simulator makes timelines, pictures are drawn from them; nothing here knows how they came about.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from launcher.autopar.programs.instructions import Instruction, Op
from launcher.errors import ScheduleError


class EventKind(StrEnum):
    """What an event shows; the value is for legends."""

    FORWARD = "forward"
    BACKWARD = "backward"
    WEIGHT = "weight"  # the second half of a split backward; the first is BACKWARD
    SYNCHRONIZE = "synchronize"
    NORM = "norm"
    UPDATE = "update"
    TRANSFER = "transfer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One instruction in time; a message is one event, that of its send.

    Attributes:
        submesh: That computes, or sends.
        instruction: What ran, of `instruction.stage`; a transfer goes to `instruction.peer`.
        kind: Its class, for colours.
        start_s: Since the start of the step; so is `end_s`.
        end_s: For a transfer, when the value has arrived.
    """

    submesh: int
    instruction: Instruction
    kind: EventKind
    start_s: float
    end_s: float

    @property
    def stage(self) -> int:
        return self.instruction.stage

    @property
    def label(self) -> str:
        """Return the instruction without its stage, such as `F3`."""
        return str(self.instruction).lstrip("0123456789")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What a step takes.

    Attributes:
        events: Sorted by start, then submesh; empty if they were not asked for.
        step_s: When the last instruction ends, transfers included.
        busy_s: Per submesh, how long it computes.
        exposed_s: Per submesh, how long it idled for transfers alone: it was free, and all it would
            read next had been made elsewhere.
        stash_peak: Per stage, how many microbatches were between F and B (or W) at most.
    """

    events: tuple[Event, ...]
    step_s: float
    busy_s: tuple[float, ...]
    exposed_s: tuple[float, ...]
    stash_peak: tuple[int, ...]

    @property
    def bubble_fraction(self) -> float:
        """The share of all submeshes' time in the step in which they do not compute."""
        total_s = self.step_s * len(self.busy_s)
        return 1.0 - sum(self.busy_s) / total_s if total_s > 0 else 0.0


# The first half of a split backward takes the place of the whole one in all but its `W`.
_BACKWARD = {Op.BACKWARD_INPUT: Op.BACKWARD}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """What one stage holds on the devices of its submesh, in bytes per device.

    Attributes:
        fixed_bytes: Parameters, optimizer state, accumulated gradients: all the time.
        stash_bytes: What one microbatch keeps from the start of its F to the end of its B, or of its
            W; received activations included.
        forward_bytes: On top of that, while an F runs.
        backward_bytes: On top of that, while a B, an I or a W runs.
        weight_stash_bytes: What an I leaves for its W: from the start of I to the end of W.
        received_bytes: Of an activation or cotangent, by the stage it comes from: from the start of
            its transfer to the start of its F, or to the end of its B or I.
        sent_bytes: By the stage it goes to: from the end of its F, B or I to the end of its transfer.
            None, for both: not counted.
    """

    fixed_bytes: int
    stash_bytes: int
    forward_bytes: int = 0
    backward_bytes: int = 0
    weight_stash_bytes: int = 0
    received_bytes: Mapping[int, int] | None = None
    sent_bytes: Mapping[int, int] | None = None


def memory_over_time(
    timeline: Timeline, memory: tuple[StageMemory, ...]
) -> tuple[tuple[tuple[float, int], ...], ...]:
    """Return, per submesh, (time in s, bytes held from then on) at each change; `max` is the peak.

    What the stages of a submesh hold adds up.

    Args:
        memory: Per stage.
    """
    if not timeline.events:
        raise ScheduleError(
            f"a timeline of {timeline.step_s} s with 0 events (parallel.schedule) shows no memory: "
            "simulate with with_events=True"
        )
    return _Holdings(timeline, memory).over_time()


class _Holdings:
    """Who holds what from when to when, collected submesh by submesh."""

    def __init__(self, timeline: Timeline, memory: tuple[StageMemory, ...]) -> None:
        self.events, self.memory = timeline.events, memory
        self.passes = {
            (event.stage, _BACKWARD.get(event.instruction.op, event.instruction.op), k): event
            for event in timeline.events
            for k in [event.instruction.microbatch]
            if event.kind in (EventKind.FORWARD, EventKind.BACKWARD, EventKind.WEIGHT)
        }
        self.home = {event.stage: event.submesh for event in self.passes.values()}
        self.changes: list[list[tuple[float, int]]] = [[] for _ in timeline.exposed_s]

    def over_time(self) -> tuple[tuple[tuple[float, int], ...], ...]:
        for stage, home in self.home.items():
            self.changes[home].append((0.0, self.memory[stage].fixed_bytes))
        for (stage, op, microbatch), event in self.passes.items():
            self._compute(stage, op, microbatch, event)
            self._hand_over(stage, op, microbatch, event)
        for event in self.events:
            if event.instruction.op in (Op.SEND_ACTIVATION, Op.SEND_COTANGENT):
                self._send(event)
        return tuple(_accumulate(changes) for changes in self.changes)

    def _hold(self, stage: int, num_bytes: int, start_s: float, end_s: float) -> None:
        if num_bytes:
            self.changes[self.home[stage]] += ((start_s, num_bytes), (end_s, -num_bytes))

    def _compute(self, stage: int, op: Op, microbatch: int | None, event: Event) -> None:
        """What an instruction needs while it runs, and what it leaves for later ones."""
        own = self.memory[stage]
        if op is not Op.FORWARD:
            self._hold(stage, own.backward_bytes, event.start_s, event.end_s)
            return
        backward = self.passes[stage, Op.BACKWARD, microbatch]
        weight = self.passes.get((stage, Op.BACKWARD_WEIGHT, microbatch))
        self._hold(stage, own.forward_bytes, event.start_s, event.end_s)
        self._hold(stage, own.stash_bytes, event.start_s, (weight or backward).end_s)
        if weight is not None:
            self._hold(stage, own.weight_stash_bytes, backward.start_s, weight.end_s)

    def _hand_over(self, stage: int, op: Op, microbatch: int | None, reader: Event) -> None:
        """What came from another stage of the submesh is there when it has been made."""
        is_forward = op is Op.FORWARD
        for peer, num_bytes in (self.memory[stage].received_bytes or {}).items():
            if self.home[peer] != self.home[stage] or (peer < stage) != is_forward:
                continue
            if op is not Op.BACKWARD_WEIGHT:
                maker = self.passes[peer, op, microbatch]
                until_s = reader.start_s if is_forward else reader.end_s
                self._hold(stage, num_bytes, maker.end_s, until_s)

    def _send(self, event: Event) -> None:
        send = event.instruction
        op = Op.FORWARD if send.op is Op.SEND_ACTIVATION else Op.BACKWARD
        maker = self.passes[send.stage, op, send.microbatch]
        reader = self.passes[send.peer, op, send.microbatch]
        sent_bytes = _of_peer(self.memory[send.stage].sent_bytes, send.peer)
        received_bytes = _of_peer(self.memory[send.peer].received_bytes, send.stage)
        until_s = reader.start_s if op is Op.FORWARD else reader.end_s
        self._hold(send.stage, sent_bytes, maker.end_s, event.end_s)
        self._hold(send.peer, received_bytes, event.start_s, until_s)


def _accumulate(changes: list[tuple[float, int]]) -> tuple[tuple[float, int], ...]:
    """Sum up changes in time; what is freed and taken at one moment counts together."""
    held_bytes = 0
    steps: dict[float, int] = {}
    for time_s, change_bytes in sorted(changes):
        held_bytes += change_bytes
        steps[time_s] = held_bytes
    return tuple(steps.items())


def _of_peer(num_bytes: Mapping[int, int] | None, peer: int) -> int:
    return 0 if num_bytes is None else num_bytes[peer]
