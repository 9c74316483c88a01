"""What a step looks like in time: events, their sums, and the memory they hold.

The simulator makes timelines, pictures are drawn from them; nothing here knows how they came about.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from launcher.autopar.instructions import Instruction, Op
from launcher.errors import ScheduleError


class EventKind(StrEnum):
    """What an event shows; the value is for legends."""

    FORWARD = "forward"
    BACKWARD = "backward"
    SYNCHRONIZE = "synchronize"
    NORM = "norm"
    UPDATE = "update"
    TRANSFER = "transfer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One instruction in time; a message is one event, that of its send.

    Attributes:
        stage: Whose submesh computes, or sends.
        instruction: What ran; `instruction.peer` is where a transfer goes to.
        kind: Its class, for colours.
        start_s: Since the start of the step; so is `end_s`.
        end_s: For a transfer, when the value has arrived.
    """

    stage: int
    instruction: Instruction
    kind: EventKind
    start_s: float
    end_s: float

    @property
    def label(self) -> str:
        """Return the instruction without its stage, such as `F3`."""
        return str(self.instruction).lstrip("0123456789")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What a step takes.

    Attributes:
        events: Sorted by start, then stage; empty if they were not asked for.
        step_s: When the last instruction ends, transfers included.
        bubble_fraction: The share of all submeshes' time in the step in which they do not compute.
        exposed_s: Per stage, how long it idled for transfers alone: it was free, and all it would
            read next had been made elsewhere.
        stash_peak: Per stage, how many microbatches were between F and B at most.
    """

    events: tuple[Event, ...]
    step_s: float
    bubble_fraction: float
    exposed_s: tuple[float, ...]
    stash_peak: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """What the devices of one stage hold, in bytes per device.

    Attributes:
        fixed_bytes: Parameters, optimizer state, accumulated gradients: all the time.
        stash_bytes: What one microbatch keeps from the start of its F to the end of its B,
            received activations included.
        forward_bytes: On top of that, while an F runs.
        backward_bytes: On top of that, while a B runs.
        received_bytes: Of an activation or cotangent, by the stage it comes from: from the start of
            its transfer to the start of its F, or to the end of its B.
        sent_bytes: By the stage it goes to: from the end of its F or B to the end of its transfer.
            None, for both: not counted.
    """

    fixed_bytes: int
    stash_bytes: int
    forward_bytes: int = 0
    backward_bytes: int = 0
    received_bytes: Mapping[int, int] | None = None
    sent_bytes: Mapping[int, int] | None = None


def memory_over_time(
    timeline: Timeline, memory: tuple[StageMemory, ...]
) -> tuple[tuple[tuple[float, int], ...], ...]:
    """Return, per stage, (time in s, bytes held from then on) at each change; `max` is the peak."""
    if not timeline.events:
        raise ScheduleError(
            f"a timeline of {timeline.step_s} s with 0 events (parallel.schedule) shows no memory: "
            "simulate with with_events=True"
        )
    spans = {
        (event.stage, event.instruction.op, event.instruction.microbatch): event
        for event in timeline.events
        if event.kind in (EventKind.FORWARD, EventKind.BACKWARD)
    }
    changes: list[list[tuple[float, int]]] = [[(0.0, stage.fixed_bytes)] for stage in memory]

    def hold(stage: int, num_bytes: int, start_s: float, end_s: float) -> None:
        changes[stage] += ((start_s, num_bytes), (end_s, -num_bytes))

    for (stage, op, microbatch), event in spans.items():
        if op is Op.BACKWARD:
            hold(stage, memory[stage].backward_bytes, event.start_s, event.end_s)
            continue
        hold(stage, memory[stage].forward_bytes, event.start_s, event.end_s)
        backward = spans[stage, Op.BACKWARD, microbatch]
        hold(stage, memory[stage].stash_bytes, event.start_s, backward.end_s)
    for event in timeline.events:
        send = event.instruction
        if send.op not in (Op.SEND_ACTIVATION, Op.SEND_COTANGENT):
            continue
        maker_op = Op.FORWARD if send.op is Op.SEND_ACTIVATION else Op.BACKWARD
        maker = spans[send.stage, maker_op, send.microbatch]
        reader = spans[send.peer, maker_op, send.microbatch]
        sent_bytes = _of_peer(memory[send.stage].sent_bytes, send.peer)
        received_bytes = _of_peer(memory[send.peer].received_bytes, send.stage)
        until_s = reader.start_s if maker_op is Op.FORWARD else reader.end_s
        hold(send.stage, sent_bytes, maker.end_s, event.end_s)
        hold(send.peer, received_bytes, event.start_s, until_s)
    return tuple(_accumulate(stage_changes) for stage_changes in changes)


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
