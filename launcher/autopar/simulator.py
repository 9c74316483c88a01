"""The event simulator: a checked program and durations in, a timeline out.

Each submesh runs the compute instructions of its list one after the other. A message occupies its
channel (source stage, destination stage) from the moment that its value is there and the channel
is free; channels are in order, do not slow one another down, and overlap with computing. An
instruction starts when its submesh is free and the values it reads have arrived: a receive costs
no time of its own.

With `rendezvous=True`, for backends whose sends block: a send and its receive start together, when
both lists have come to them, and occupy both submeshes until the value has arrived.

The simulator trusts the program: prove it with `checker.check` first. Deliberately left out: the
host's time to dispatch, compute slowed down by concurrent transfers, links that channels share.
"""

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from launcher.autopar.instructions import (
    READER_OF_RECEIVE,
    RECEIVE_OF_SEND,
    RECEIVES,
    Instruction,
    Op,
)
from launcher.autopar.program import Program, Wiring
from launcher.autopar.timeline import Event, EventKind, Timeline
from launcher.errors import ScheduleError

Pair = tuple[int, int]  # source stage, destination stage
_FORWARD, _BACKWARD = Op.FORWARD, Op.BACKWARD  # an Enum's attributes are slow to look up
_PENDING = (0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """How long each instruction takes.

    Attributes:
        forward_s: Of one microbatch, per stage; so are `backward_s`.
        backward_s: Input and weight gradients, and what is recomputed for them.
        synchronize_s: Once a step, per stage; so are `update_s`.
        update_s: The optimizer.
        activation_s: Of one microbatch, by (source, destination); None: all are free.
        cotangent_s: The same, the other way: keyed (5, 4) where activations are (4, 5).
        tied_s: Gradients by (user, owner) and updated parameters by (owner, user); None: free.
        norm_s: To send one number from any stage to any other.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    synchronize_s: tuple[float, ...]
    update_s: tuple[float, ...]
    activation_s: Mapping[Pair, float] | None = None
    cotangent_s: Mapping[Pair, float] | None = None
    tied_s: Mapping[Pair, float] | None = None
    norm_s: float = 0.0

    def compute_s(self, op: Op) -> tuple[float, ...]:
        """Return the durations, per stage, of a compute operation."""
        match op:
            case Op.FORWARD:
                return self.forward_s
            case Op.BACKWARD:
                return self.backward_s
            case Op.SYNCHRONIZE:
                return self.synchronize_s
            case Op.NORM:  # adds up as many numbers as there are stages
                return (0.0,) * len(self.forward_s)
            case Op.UPDATE:
                return self.update_s
            case _:
                raise ScheduleError(
                    f"{op} is not one of the 5 compute operations (parallel.schedule): give it a "
                    "duration in simulator.Durations"
                )

    def transfer_s(self, send: Op, source: int, destination: int) -> float:
        """Return how long a message occupies its channel."""
        match send:
            case Op.SEND_ACTIVATION:
                known = self.activation_s
            case Op.SEND_COTANGENT:
                known = self.cotangent_s
            case Op.SEND_TIED_GRADIENT | Op.SEND_TIED_PARAMETER:
                known = self.tied_s
            case _:
                return self.norm_s
        if known is None:
            return 0.0
        if (source, destination) not in known:
            raise ScheduleError(
                f"no duration of {send} from stage {source} to {destination}, {len(known)} others "
                "are given (parallel.schedule): add the pair to simulator.Durations"
            )
        return known[source, destination]


_KINDS = {
    Op.FORWARD: EventKind.FORWARD,
    Op.BACKWARD: EventKind.BACKWARD,
    Op.SYNCHRONIZE: EventKind.SYNCHRONIZE,
    Op.NORM: EventKind.NORM,
    Op.UPDATE: EventKind.UPDATE,
}


@dataclass(slots=True, kw_only=True)
class _Stage:
    """Where the play of one list stands."""

    entries: tuple[Instruction, ...]
    position: int = 0
    clock_s: float = 0.0
    compute_end_s: float = 0.0
    busy_s: float = 0.0
    exposed_s: float = 0.0
    # For each instruction to come: when the last value it reads arrives, and when it was made.
    arrivals: dict[tuple[Op, int | None], tuple[float, float]] = field(default_factory=dict)

    def receive(self, op: Op, microbatch: int | None, arrived_s: float, made_s: float) -> None:
        reader = READER_OF_RECEIVE.get(op)
        if reader is not None:
            last_arrived_s, last_made_s = self.arrivals.get((reader, microbatch), _PENDING)
            self.arrivals[reader, microbatch] = (
                max(last_arrived_s, arrived_s),
                max(last_made_s, made_s),
            )

    def compute(self, entry: Instruction, duration_s: float) -> float:
        """Run a compute instruction; return when it starts."""
        arrived_s, made_s = self.arrivals.pop((entry.op, entry.microbatch), _PENDING)
        start_s = max(self.clock_s, arrived_s)
        self.exposed_s += start_s - max(self.compute_end_s, min(made_s, start_s))
        self.clock_s = self.compute_end_s = start_s + duration_s
        self.busy_s += duration_s
        return start_s


class _Play:
    """The play of all lists, each as far as it can go, until all are done."""

    def __init__(self, program: Program, durations: Durations, record: list[Event] | None) -> None:
        self.stages = [_Stage(entries=entries) for entries in program.lists]
        self.durations = durations
        self.record = record
        self.end_s = 0.0
        self.compute_s = {op: durations.compute_s(op) for op in _KINDS}
        self.transfer_s: dict[tuple[Op, int, int], float] = {}
        self.channel_free_s: dict[Pair, float] = defaultdict(float)
        self.under_way: dict[Pair, deque[tuple[float, float]]] = defaultdict(deque)

    def run(self, *, rendezvous: bool) -> None:
        """Sweep up and down, the ways of activations and of cotangents, until nothing moves."""
        advance = self._advance_blocking if rendezvous else self._advance
        up = range(len(self.stages))
        num_idle_sweeps = 0
        while num_idle_sweeps < 2:
            for sweep in (up, reversed(up)):
                moved = [advance(index) for index in sweep]
                num_idle_sweeps = 0 if any(moved) else num_idle_sweeps + 1
        stuck = [stage for stage in self.stages if stage.position < len(stage.entries)]
        if stuck:
            raise ScheduleError(
                f"{len(stuck)} of {len(self.stages)} stages wait for ever, the first at "
                f"{stuck[0].entries[stuck[0].position]} (parallel.schedule): prove the program "
                "with checker.check"
            )

    def _advance(self, index: int) -> bool:
        """Play one list until it comes to a receive whose send has not been played."""
        stage = self.stages[index]
        before = stage.position
        while stage.position < len(stage.entries):
            entry = stage.entries[stage.position]
            if entry.peer is None:
                self._compute(index, stage, entry)
            elif entry.op in RECEIVES:
                under_way = self.under_way[entry.peer, index]
                if not under_way:
                    break
                stage.receive(entry.op, entry.microbatch, *under_way.popleft())
            else:
                made_s = stage.clock_s
                start_s = max(made_s, self.channel_free_s[index, entry.peer])
                end_s = self._transfer(index, entry, start_s)
                self.channel_free_s[index, entry.peer] = end_s
                self.under_way[index, entry.peer].append((end_s, made_s))
            stage.position += 1
        return stage.position > before

    def _advance_blocking(self, index: int) -> bool:
        """Play one list until it comes to a receive, or to a send whose receive is not next."""
        stage = self.stages[index]
        before = stage.position
        while stage.position < len(stage.entries):
            entry = stage.entries[stage.position]
            if entry.peer is None:
                self._compute(index, stage, entry)
            elif entry.op in RECEIVES or not self._meets(entry):
                break
            else:
                peer = self.stages[entry.peer]
                start_s = max(stage.clock_s, peer.clock_s)
                end_s = self._transfer(index, entry, start_s)
                receive = peer.entries[peer.position]
                peer.receive(receive.op, receive.microbatch, end_s, stage.compute_end_s)
                stage.clock_s = peer.clock_s = end_s
                peer.position += 1
            stage.position += 1
        return stage.position > before

    def _meets(self, send: Instruction) -> bool:
        peer = self.stages[send.peer]
        if peer.position == len(peer.entries):
            return False
        other = peer.entries[peer.position]
        return (other.op, other.peer, other.microbatch) == (
            RECEIVE_OF_SEND[send.op],
            send.stage,
            send.microbatch,
        )

    def _compute(self, index: int, stage: _Stage, entry: Instruction) -> None:
        start_s = stage.compute(entry, self.compute_s[entry.op][index])
        self._note(index, entry, _KINDS[entry.op], start_s, stage.clock_s)

    def _transfer(self, index: int, send: Instruction, start_s: float) -> float:
        key = (send.op, index, send.peer)
        if key not in self.transfer_s:
            self.transfer_s[key] = self.durations.transfer_s(*key)
        end_s = start_s + self.transfer_s[key]
        self._note(index, send, EventKind.TRANSFER, start_s, end_s)
        return end_s

    def _note(
        self, index: int, entry: Instruction, kind: EventKind, start_s: float, end_s: float
    ) -> None:
        if end_s > self.end_s:
            self.end_s = end_s
        if self.record is not None:
            event = Event(stage=index, instruction=entry, kind=kind, start_s=start_s, end_s=end_s)
            self.record.append(event)


def simulate(
    program: Program,
    durations: Durations,
    *,
    rendezvous: bool = False,
    with_events: bool = True,
) -> Timeline:
    """Play a checked program; without events it takes about half the time."""
    for name, given in (
        ("forward_s", durations.forward_s),
        ("backward_s", durations.backward_s),
        ("synchronize_s", durations.synchronize_s),
        ("update_s", durations.update_s),
    ):
        if len(given) != program.num_stages:
            raise ScheduleError(
                f"{len(given)} durations {name} for {program.num_stages} stages "
                "(parallel.schedule): give one per stage"
            )
    events: list[Event] = []
    play = _Play(program, durations, events if with_events else None)
    play.run(rendezvous=rendezvous)
    busy_s = sum(stage.busy_s for stage in play.stages)
    total_s = play.end_s * program.num_stages
    return Timeline(
        events=tuple(sorted(events, key=lambda event: (event.start_s, event.stage))),
        step_s=play.end_s,
        bubble_fraction=1.0 - busy_s / total_s if total_s > 0 else 0.0,
        exposed_s=tuple(stage.exposed_s for stage in play.stages),
        stash_peak=tuple(_stash_peak(entries) for entries in program.lists),
    )


def lower_bound_s(durations: Durations, wiring: Wiring, num_microbatches: int) -> float:
    """Return a time that no schedule can beat, without building a program.

    For each stage: the way of the first value to it, all its work, the last cotangent's way back.
    """
    stages = range(len(durations.forward_s))
    update_s = list(durations.update_s)  # with what must follow it
    for owner, user in wiring.tied:
        sent_s = durations.transfer_s(Op.SEND_TIED_PARAMETER, owner, user)
        update_s[owner] = max(update_s[owner], durations.update_s[owner] + sent_s)
    end_s = [0.0 if wiring.with_norm else update_s[stage] for stage in stages]
    tail_s = [durations.synchronize_s[stage] + end_s[stage] for stage in stages]
    for owner, user in wiring.tied:
        sent_s = durations.transfer_s(Op.SEND_TIED_GRADIENT, user, owner)
        own_s = durations.synchronize_s[owner] + end_s[owner]
        tail_s[user] = max(tail_s[user], sent_s + own_s)
    fill_s = [0.0 for _ in stages]
    for source, destination in sorted(wiring.edges):  # a source's own edges come before
        sent_s = durations.transfer_s(Op.SEND_ACTIVATION, source, destination)
        way_s = fill_s[source] + durations.forward_s[source] + sent_s
        fill_s[destination] = max(fill_s[destination], way_s)
    for source, destination in sorted(wiring.differentiable, key=lambda edge: edge[1]):
        sent_s = durations.transfer_s(Op.SEND_COTANGENT, destination, source)
        way_s = sent_s + durations.backward_s[source] + tail_s[source]
        tail_s[destination] = max(tail_s[destination], way_s)
    work_s = [durations.forward_s[stage] + durations.backward_s[stage] for stage in stages]
    least_s = max(fill_s[i] + num_microbatches * work_s[i] + tail_s[i] for i in stages)
    return least_s + max(update_s) if wiring.with_norm else least_s


def _stash_peak(entries: tuple[Instruction, ...]) -> int:
    num_kept = peak = 0
    for entry in entries:
        if entry.op is _FORWARD:
            num_kept += 1
            peak = max(peak, num_kept)
        elif entry.op is _BACKWARD:
            num_kept -= 1
    return peak
