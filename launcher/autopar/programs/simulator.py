"""The event simulator: a checked program and durations in, a timeline out.

Each submesh runs the compute instructions of its list one after the other. A message occupies its
channel (source submesh, destination submesh) from the moment that its value is there and the channel
is free; channels are in order, do not slow one another down, and overlap with computing. An
instruction starts when its submesh is free and the values it reads have arrived: a receive costs
no time of its own, nor does a free, nor what one stage of a submesh hands to another.

With `rendezvous=True`, for backends whose sends block: a send and its receive start together, when
both lists have come to them, and occupy both submeshes until the value has arrived.

The simulator trusts the program: prove it with `checker.check` first. Deliberately left out: the
host's time to dispatch, compute slowed down by concurrent transfers, links that channels share.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
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
from launcher.autopar.programs.program import Program, Wiring
from launcher.autopar.programs.schedules import stash_peaks
from launcher.autopar.programs.timeline import Event, EventKind, Timeline
from launcher.errors import ScheduleError

Pair = tuple[int, int]  # source stage, destination stage
_PENDING = (0.0, 0.0)
_WHOLE = (Op.FORWARD, Op.BACKWARD, Op.SYNCHRONIZE, Op.NORM, Op.UPDATE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """How long each instruction takes.

    Attributes:
        forward_s: Of one microbatch, per stage; so are `backward_s`.
        backward_s: Input and weight gradients, and what is recomputed for them.
        synchronize_s: Once a step, per stage; so are `update_s`.
        update_s: The optimizer.
        backward_input_s: The first half of a split backward, per stage; so are `backward_weight_s`.
            None, for both: no stage splits it.
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
    backward_input_s: tuple[float, ...] | None = None
    backward_weight_s: tuple[float, ...] | None = None

    def compute_s(self, op: Op) -> tuple[float, ...]:
        """Return the durations, per stage, of a compute operation."""
        match op:
            case Op.FORWARD:
                return self.forward_s
            case Op.BACKWARD:
                return self.backward_s
            case Op.BACKWARD_INPUT if self.backward_input_s is not None:
                return self.backward_input_s
            case Op.BACKWARD_WEIGHT if self.backward_weight_s is not None:
                return self.backward_weight_s
            case Op.SYNCHRONIZE:
                return self.synchronize_s
            case Op.NORM:  # adds up as many numbers as there are stages
                return (0.0,) * len(self.forward_s)
            case Op.UPDATE:
                return self.update_s
            case _:
                raise ScheduleError(
                    f"{op} has no duration, {len(COMPUTES)} operations can have one "
                    "(parallel.schedule): give it one in simulator.Durations"
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


KINDS = {
    Op.FORWARD: EventKind.FORWARD,
    Op.BACKWARD: EventKind.BACKWARD,
    Op.BACKWARD_INPUT: EventKind.BACKWARD,
    Op.BACKWARD_WEIGHT: EventKind.WEIGHT,
    Op.SYNCHRONIZE: EventKind.SYNCHRONIZE,
    Op.NORM: EventKind.NORM,
    Op.UPDATE: EventKind.UPDATE,
}


@dataclass(slots=True, kw_only=True)
class _Submesh:
    """Where the play of one list stands."""

    entries: tuple[Instruction, ...]
    position: int = 0
    clock_s: float = 0.0
    compute_end_s: float = 0.0
    busy_s: float = 0.0
    exposed_s: float = 0.0
    # For each (receive, stage, microbatch) not read yet: when the last value arrives, and was made.
    arrivals: dict[tuple[Op, int, int | None], tuple[float, float]] = field(default_factory=dict)

    def receive(self, entry: Instruction, arrived_s: float, made_s: float) -> None:
        key = (entry.op, entry.stage, entry.microbatch)
        last_arrived_s, last_made_s = self.arrivals.get(key, _PENDING)
        self.arrivals[key] = (max(last_arrived_s, arrived_s), max(last_made_s, made_s))

    def compute(self, entry: Instruction, duration_s: float) -> float:
        """Run a compute instruction; return when it starts."""
        received = RECEIVE_OF_READER.get(entry.op)
        arrived_s, made_s = self.arrivals.pop((received, entry.stage, entry.microbatch), _PENDING)
        lent = (Op.RECEIVE_TIED_GRADIENT, entry.stage, None)
        if lent in self.arrivals and entry.op in LAST_BACKWARDS:
            lent_s = self.arrivals.pop(lent)
            arrived_s, made_s = max(arrived_s, lent_s[0]), max(made_s, lent_s[1])
        start_s = max(self.clock_s, arrived_s)
        self.exposed_s += start_s - max(self.compute_end_s, min(made_s, start_s))
        self.clock_s = self.compute_end_s = start_s + duration_s
        self.busy_s += duration_s
        return start_s


class _Play:
    """The play of all lists, each as far as it can go, until all are done."""

    def __init__(self, program: Program, durations: Durations, record: list[Event] | None) -> None:
        self.submeshes = [_Submesh(entries=entries) for entries in program.lists]
        self.homes = program.submesh_of
        self.durations = durations
        self.record = record
        self.end_s = 0.0
        halves = (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT) if program.splits_backward else ()
        self.compute_s = {op: durations.compute_s(op) for op in (*_WHOLE, *halves)}
        self.transfer_s: dict[tuple[Op, int, int], float] = {}
        self.channel_free_s: dict[Pair, float] = defaultdict(float)
        self.under_way: dict[Pair, deque[tuple[float, float]]] = defaultdict(deque)

    def run(self, *, rendezvous: bool) -> None:
        """Sweep up and down, the ways of activations and of cotangents, until nothing moves."""
        advance = self._advance_blocking if rendezvous else self._advance
        up = range(len(self.submeshes))
        num_idle_sweeps = 0
        while num_idle_sweeps < 2:
            for sweep in (up, reversed(up)):
                moved = [advance(index) for index in sweep]
                num_idle_sweeps = 0 if any(moved) else num_idle_sweeps + 1
        stuck = [own for own in self.submeshes if own.position < len(own.entries)]
        if stuck:
            raise ScheduleError(
                f"{len(stuck)} of {len(self.submeshes)} submeshes wait for ever, the first at "
                f"{stuck[0].entries[stuck[0].position]} (parallel.schedule): prove the program "
                "with checker.check"
            )

    def _advance(self, index: int) -> bool:
        """Play one list until it comes to a receive whose send has not been played."""
        own = self.submeshes[index]
        before = own.position
        while own.position < len(own.entries):
            entry = own.entries[own.position]
            op = entry.op
            if op in COMPUTES:
                self._compute(index, own, entry)
            elif op in RECEIVES:
                under_way = self.under_way[self.homes[entry.peer], index]
                if not under_way:
                    break
                own.receive(entry, *under_way.popleft())
            elif op in SENDS:
                made_s, channel = own.clock_s, (index, self.homes[entry.peer])
                start_s = max(made_s, self.channel_free_s[channel])
                end_s = self._transfer(index, entry, start_s)
                self.channel_free_s[channel] = end_s
                self.under_way[channel].append((end_s, made_s))
            own.position += 1
        return own.position > before

    def _advance_blocking(self, index: int) -> bool:
        """Play one list until it comes to a receive, or to a send whose receive is not next."""
        own = self.submeshes[index]
        before = own.position
        while own.position < len(own.entries):
            entry = own.entries[own.position]
            if entry.op in COMPUTES:
                self._compute(index, own, entry)
            elif entry.op in RECEIVES:
                break
            elif entry.op in SENDS:
                peer = self.submeshes[self.homes[entry.peer]]
                if peer.position == len(peer.entries):
                    break
                if not peer.entries[peer.position].is_partner_of(entry):
                    break
                start_s = max(own.clock_s, peer.clock_s)
                end_s = self._transfer(index, entry, start_s)
                peer.receive(peer.entries[peer.position], end_s, own.compute_end_s)
                own.clock_s = peer.clock_s = end_s
                peer.position += 1
            own.position += 1
        return own.position > before

    def _compute(self, index: int, own: _Submesh, entry: Instruction) -> None:
        start_s = own.compute(entry, self.compute_s[entry.op][entry.stage])
        self._note(index, entry, KINDS[entry.op], start_s, own.clock_s)

    def _transfer(self, index: int, send: Instruction, start_s: float) -> float:
        key = (send.op, send.stage, send.peer)
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
            self.record.append(
                Event(submesh=index, instruction=entry, kind=kind, start_s=start_s, end_s=end_s)
            )


def simulate(
    program: Program,
    durations: Durations,
    *,
    rendezvous: bool = False,
    with_events: bool = True,
) -> Timeline:
    """Play a checked program; without events it takes about half the time."""
    num_stages = program.num_stages
    for name, given in (
        ("forward_s", durations.forward_s),
        ("backward_s", durations.backward_s),
        ("synchronize_s", durations.synchronize_s),
        ("update_s", durations.update_s),
        ("backward_input_s", durations.backward_input_s),
        ("backward_weight_s", durations.backward_weight_s),
    ):
        if given is not None and len(given) != num_stages:
            raise ScheduleError(
                f"{len(given)} durations {name} for {num_stages} stages "
                "(parallel.schedule): give one per stage"
            )
    events: list[Event] = []
    play = _Play(program, durations, events if with_events else None)
    play.run(rendezvous=rendezvous)
    return Timeline(
        events=tuple(sorted(events, key=lambda event: (event.start_s, event.submesh))),
        step_s=play.end_s,
        busy_s=tuple(own.busy_s for own in play.submeshes),
        exposed_s=tuple(own.exposed_s for own in play.submeshes),
        stash_peak=stash_peaks(list(chain.from_iterable(program.lists)), num_stages),
    )


def lower_bound_s(
    durations: Durations, wiring: Wiring, num_microbatches: int, *, splits_backward: bool = False
) -> float:
    """Return a time that no schedule can beat, without building a program.

    A stage makes its last input gradients after the way of the first value to it and all its forwards
    and input gradients; their way back follows. A submesh does all its work after the way of the first
    value to one of its stages; then comes what ends the step.

    Args:
        splits_backward: Into `I` and `W`; where it is whole, all of it must go before what it sends.
    """
    stages = range(len(durations.forward_s))
    homes = wiring.homes(len(stages))
    inputs_s, weights_s = durations.backward_s, (0.0,) * len(stages)
    if splits_backward:
        inputs_s = durations.compute_s(Op.BACKWARD_INPUT)
        weights_s = durations.compute_s(Op.BACKWARD_WEIGHT)
    sent_s = _Transfers(durations, homes)
    done_s, update_s = _ends_s(durations, wiring, sent_s)
    fill_s = [0.0 for _ in stages]
    for source, destination in sorted(wiring.edges):  # a source's own edges come before
        way_s = durations.forward_s[source] + sent_s(Op.SEND_ACTIVATION, source, destination)
        fill_s[destination] = max(fill_s[destination], fill_s[source] + way_s)
    tail_s = [weights_s[stage] + done_s[stage] for stage in stages]  # from the end of its last `I`
    for source, destination in sorted(wiring.differentiable, key=lambda edge: edge[1]):
        way_s = sent_s(Op.SEND_COTANGENT, destination, source) + inputs_s[source]
        tail_s[destination] = max(tail_s[destination], way_s + tail_s[source])
    ahead_s = [durations.forward_s[stage] + inputs_s[stage] for stage in stages]
    least_s = max(fill_s[i] + num_microbatches * ahead_s[i] + tail_s[i] for i in stages)
    for submesh in set(homes):
        own = [stage for stage in stages if homes[stage] == submesh]
        work_s = num_microbatches * sum(ahead_s[stage] + weights_s[stage] for stage in own)
        once_s = sum(durations.synchronize_s[stage] for stage in own)
        if not wiring.with_norm:
            once_s += sum(durations.update_s[stage] for stage in own)
        # What comes last on a submesh is a `W`, which nobody waits for, or a `B`, whose way back follows.
        follows_s = done_s if splits_backward else tail_s
        end_s = max(once_s, min(follows_s[stage] for stage in own))
        least_s = max(least_s, min(fill_s[stage] for stage in own) + work_s + end_s)
    return least_s + update_s if wiring.with_norm else least_s


class _Transfers:
    """How long messages take; what stays on a submesh is none."""

    def __init__(self, durations: Durations, homes: Sequence[int]) -> None:
        self.durations, self.homes = durations, homes

    def __call__(self, send: Op, source: int, destination: int) -> float:
        if self.homes[source] == self.homes[destination]:
            return 0.0
        return self.durations.transfer_s(send, source, destination)


def _ends_s(durations: Durations, wiring: Wiring, sent_s: _Transfers) -> tuple[list[float], float]:
    """Return what must follow a stage's last backward, and what follows the last norm."""
    update_s = list(durations.update_s)  # with what must follow it
    for owner, user in wiring.tied:
        way_s = durations.update_s[owner] + sent_s(Op.SEND_TIED_PARAMETER, owner, user)
        update_s[owner] = max(update_s[owner], way_s)
    done_s = [
        own_s + (0.0 if wiring.with_norm else end_s)
        for own_s, end_s in zip(durations.synchronize_s, update_s, strict=True)
    ]
    ends_s = list(done_s)
    for owner, user in wiring.tied:
        way_s = sent_s(Op.SEND_TIED_GRADIENT, user, owner) + done_s[owner]
        ends_s[user] = max(ends_s[user], way_s)
    updates_s: dict[int, float] = defaultdict(float)
    for stage, home in enumerate(sent_s.homes):
        updates_s[home] += durations.update_s[stage]
    return ends_s, max(*updates_s.values(), *update_s)
