"""The simulator against an independent longest path, and against exhaustive search."""

import random
from itertools import product

import pytest

from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.instructions import Instruction, Op
from launcher.autopar.programs.program import Wiring, parse_program, round_robin
from launcher.autopar.programs.schedules import (
    GPipe,
    Interleaved,
    OneForwardOneBackward,
    ZbH1,
    schedule_by_name,
)
from launcher.autopar.programs.simulator import Durations, lower_bound_s, simulate
from launcher.autopar.programs.timeline import EventKind
from launcher.errors import ScheduleError


def random_durations(rng, wiring, num_stages):
    """Integers, so that sums are exact."""
    draw = [tuple(rng.randint(1, 20) for _ in range(num_stages)) for _ in range(6)]
    reverse = [(dst, src) for src, dst in wiring.differentiable]
    tied = [*wiring.tied, *((user, owner) for owner, user in wiring.tied)]
    return Durations(
        forward_s=draw[0],
        backward_s=draw[1],
        synchronize_s=draw[2],
        update_s=draw[3],
        backward_input_s=draw[4],
        backward_weight_s=draw[5],
        activation_s={edge: rng.randint(0, 25) for edge in wiring.edges},
        cotangent_s={edge: rng.randint(0, 25) for edge in reverse},
        tied_s={pair: rng.randint(0, 25) for pair in tied},
        norm_s=rng.randint(0, 9),
    )


def textbook_order(name, submesh, p, m, v=1):
    """Return (op, stage, microbatch) of a submesh: warm-up, steady state, cool-down."""
    if name == "gpipe":
        return [(op, submesh, k) for op in "FB" for k in range(m)]
    if name == "zb_h1":
        order = [("F", submesh, k) for k in range(min(p - submesh, m))]
        for k in range(m + submesh):  # one longer for each microbatch that W lags behind
            order += [("I", submesh, k)] if k < m else []
            order += [("W", submesh, k - submesh)] if k >= submesh else []
            order += [("F", submesh, k + p - submesh)] if k + p - submesh < m else []
        return order
    # Megatron-LM's way of counting: with v = 1, 1F1B runs fewer ahead.
    num_warmup = p - submesh - 1 if v == 1 else 2 * (p - submesh - 1) + (v - 1) * p
    total = m * v
    places = [(k // p % v, k // (p * v) * p + k % p) for k in range(total)]
    forwards = [("F", submesh + p * place, k) for place, k in places]
    backwards = [("B", submesh + p * (v - 1 - place), k) for place, k in places]
    order = forwards[:num_warmup]
    for forward, backward in zip(forwards[num_warmup:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[max(0, total - num_warmup) :]


class LongestPath:
    """The end of each node of the step's graph, by recursion over its predecessors.

    Nodes: (op, stage, microbatch), and (op, stage, microbatch, peer) for what is sent of it.
    """

    def __init__(self, orders, wiring, durations):
        self.homes = wiring.homes(len(orders))
        self.wiring, self.durations = wiring, durations
        self.backward = "I" if any(op == "I" for op, *_ in orders[0]) else "B"
        self.end_s = {}
        self.orders, self.last_backward, self.channels = [], [], {}
        for submesh, order in enumerate(orders):
            own = [stage for stage, home in enumerate(self.homes) if home == submesh]
            self.last_backward.append(order[-1])
            ends = "SNU" if wiring.with_norm else "SU"
            self.orders.append([*order, *((op, stage, 0) for op in ends for stage in own)])
        for submesh, order in enumerate(self.orders):
            for group in self.sent_in_order(order):
                for message in group:
                    peer = self.homes[message[3]]
                    if peer != submesh:
                        self.channels.setdefault((submesh, peer), []).append(message)

    def sent_in_order(self, order):
        """Yield groups of messages: passes as they are made, then the step's end kind by kind."""
        own = [stage for op, stage, _ in order if op == "S"]
        for op, stage, k in order:
            if op in "FBI":
                yield [(op, stage, k, peer) for peer in sorted(self.readers(op, stage))]
        tied = [(owner, user) for owner, user in self.wiring.tied if user in own]
        yield [("G", user, 0, owner) for owner, user in sorted(tied)]
        norms = [("S", stage, 0, peer) for stage in own for peer in self.readers("S", stage)]
        yield sorted(norms, key=lambda message: (message[3], message[1]))
        yield [("U", stage, 0, peer) for stage in own for peer in sorted(self.readers("U", stage))]

    def readers(self, op, stage):
        match op:
            case "F":
                return [dst for src, dst in self.wiring.edges if src == stage]
            case "B" | "I":
                return [src for src, dst in self.wiring.differentiable if dst == stage]
            case "S" if self.wiring.with_norm:
                return [other for other in range(len(self.homes)) if other != stage]
            case "U":
                return [user for owner, user in self.wiring.tied if owner == stage]
            case _:
                return []

    def duration_s(self, node):
        op, stage, _, *peer = node
        given = self.durations
        if peer:
            known = {"F": given.activation_s, "B": given.cotangent_s, "I": given.cotangent_s}
            known |= {"G": given.tied_s, "U": given.tied_s}
            return given.norm_s if op == "S" else known[op][stage, peer[0]]
        known = {"F": given.forward_s, "B": given.backward_s, "I": given.backward_input_s}
        known |= {"W": given.backward_weight_s, "S": given.synchronize_s, "U": given.update_s}
        return 0 if op == "N" else known[op][stage]

    def predecessors(self, node):
        op, stage, k, *peer = node
        order = self.orders[self.homes[stage]]
        if peer:
            channel = self.channels[self.homes[stage], self.homes[peer[0]]]
            before = channel[: channel.index(node)][-1:]
            if op == "G":
                return [*before, self.last_backward[self.homes[stage]]]
            return [
                *before,
                [one for one in order if one[0] == op and op in "SU" or one == node[:3]][-1],
            ]
        before = order[: order.index(node)][-1:]
        made = {"F": "F", "B": "B", "I": "I", "N": "S", "S": "G"}.get(op)
        return before + [
            sent
            for channel in self.channels.values()
            for sent in channel
            if sent[3] == stage and sent[0] == made and sent[2] == k
        ]

    def end(self, node):
        if node not in self.end_s:
            start_s = max((self.end(before) for before in self.predecessors(node)), default=0)
            self.end_s[node] = start_s + self.duration_s(node)
        return self.end_s[node]

    def step_s(self):
        nodes = [node for order in self.orders for node in order]
        nodes += [sent for channel in self.channels.values() for sent in channel]
        return max(map(self.end, nodes))


def build(name, num_stages, num_microbatches, wiring=None):
    compute_lists = schedule_by_name(name).build(num_stages, num_microbatches)
    return add_communication(compute_lists, wiring or Wiring.chain(num_stages))


def test_the_end_of_the_step_is_counted():
    durations = Durations(
        forward_s=(1, 1),
        backward_s=(2, 2),
        synchronize_s=(5, 3),
        update_s=(2, 4),
        tied_s={(0, 1): 10, (1, 0): 7},
        norm_s=0.5,
    )
    wiring = Wiring.chain(2, tied=((0, 1),), with_norm=True)
    timeline = simulate(build("1f1b", 2, 1, wiring), durations)
    ends_s = {str(event.instruction): event.end_s for event in timeline.events}
    # F: 1, 2; B: 4, 6; the tied gradient: 4 + 7; S: 4 + 3 and 11 + 5; the last norm: 16.5
    assert (ends_s["1B0"], ends_s["0B0"], ends_s["1SEND_G>0"]) == (4, 6, 11)
    assert (ends_s["1S"], ends_s["0S"], ends_s["0SEND_N>1"]) == (7, 16, 16.5)
    assert (ends_s["0U"], ends_s["1U"], ends_s["0SEND_P>1"]) == (18, 20.5, 28)
    assert timeline.step_s == 28
    # 20 of 56: F and B 3 each, S 5 and 3, U 2 and 4
    assert timeline.bubble_fraction == pytest.approx(1 - 20 / 56)
    # 0S waits from 6 to 11 and 1N to 16.5, of which norm 0 was under way for 0.5
    assert timeline.exposed_s == (5, 0.5)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1", "interleaved"])
@pytest.mark.parametrize("seed", range(40))
def test_uneven_stages_take_the_longest_path(name, seed):
    rng = random.Random(seed)
    v = rng.randint(2, 4) if name == "interleaved" else 1
    p = rng.randint(1, 3 if v > 1 else 6)
    num_microbatches = p * rng.randint(1, 4) if v > 1 else rng.randint(1, 9)
    num_stages = p * v
    pairs = [(i, j) for i in range(num_stages) for j in range(i + 1, num_stages)]
    edges = tuple(pair for pair in pairs if pair[1] == pair[0] + 1 or rng.random() < 0.2)
    wiring = Wiring(
        edges=edges,
        differentiable=tuple(edge for edge in edges if rng.random() < 0.9),
        tied=tuple(rng.sample(pairs, k=min(len(pairs), rng.randint(0, 2)))),
        with_norm=rng.random() < 0.5,
        submesh_of=round_robin(num_stages, v),
    )
    durations = random_durations(rng, wiring, num_stages)
    schedule = schedule_by_name(name, v)
    program = add_communication(schedule.build(num_stages, num_microbatches), wiring)
    timeline = simulate(program, durations)
    orders = [textbook_order(name, submesh, p, num_microbatches, v) for submesh in range(p)]
    path = LongestPath(orders, wiring, durations)
    for event in timeline.events:
        if event.instruction.is_compute:
            node = (event.instruction.op.value, event.stage, event.instruction.microbatch or 0)
            assert event.end_s == path.end(node)
    assert timeline.step_s == path.step_s()
    bound_s = lower_bound_s(
        durations, wiring, num_microbatches, splits_backward=schedule.splits_backward
    )
    assert bound_s <= timeline.step_s
    assert timeline.step_s <= simulate(program, durations, rendezvous=True).step_s
    without_events = simulate(program, durations, with_events=False)
    assert without_events.events == ()
    assert without_events.step_s == timeline.step_s
    assert without_events.exposed_s == timeline.exposed_s


def all_orders(stages, num_microbatches, ops="FB"):
    """Yield every compute list of a submesh, with each operation in order and no B before its F."""
    done = dict.fromkeys(product(stages, ops), 0)

    def extended(prefix):
        if len(prefix) == len(stages) * len(ops) * num_microbatches:
            yield prefix
            return
        for stage, op in done:
            k = done[stage, op]
            before = ops[ops.index(op) - 1] if op != "F" else None
            if k == num_microbatches or (before and done[stage, before] <= k):
                continue
            done[stage, op] += 1
            yield from extended((*prefix, Instruction(op=Op(op), stage=stage, microbatch=k)))
            done[stage, op] -= 1

    yield from extended(())


EXHAUSTIVE = [("FB", 2, 1, 2), ("FB", 2, 1, 3), ("FB", 3, 1, 2), ("FIW", 2, 1, 2), ("FIW", 2, 1, 3)]
EXHAUSTIVE += [("FB", 2, 2, 1), ("FB", 1, 2, 2), ("FB", 1, 3, 1), ("FIW", 2, 2, 1)]


@pytest.mark.parametrize(("ops", "p", "v", "m"), EXHAUSTIVE)
@pytest.mark.parametrize("seed", range(2))
def test_the_lower_bound_is_below_the_best_of_all_orders(ops, p, v, m, seed):
    rng = random.Random(seed)
    wiring = Wiring.chain(p * v, with_norm=rng.random() < 0.5, virtual_stages=v)
    durations = random_durations(rng, wiring, p * v)
    choices = [list(all_orders(range(i, p * v, p), m, ops)) for i in range(p)]
    best_s = float("inf")
    for lists in product(*choices):
        try:
            program = add_communication(lists, wiring)
        except ScheduleError:  # these orders wait in a ring
            continue
        best_s = min(best_s, simulate(program, durations, with_events=False).step_s)
    splits = ops == "FIW"
    assert lower_bound_s(durations, wiring, m, splits_backward=splits) <= best_s
    schedules = (ZbH1(),) if splits else (GPipe(), OneForwardOneBackward())
    for schedule in schedules if v == 1 else () if m % p else (Interleaved(virtual_stages=v),):
        if schedule.splits_backward == splits:
            program = add_communication(schedule.build(p * v, m), wiring)
            assert best_s <= simulate(program, durations).step_s


def test_transfers_overlap_with_computing_and_queue_on_their_channel():
    durations = Durations(
        forward_s=(1, 1),
        backward_s=(1, 1),
        synchronize_s=(0, 0),
        update_s=(0, 0),
        activation_s={(0, 1): 3},
        cotangent_s={(1, 0): 0},
    )
    timeline = simulate(build("gpipe", 2, 3), durations)
    sent = [event for event in timeline.events if event.kind is EventKind.TRANSFER][:3]
    assert [(event.start_s, event.end_s) for event in sent] == [(1, 4), (4, 7), (7, 10)]
    assert [event.label for event in sent] == ["SEND_F0>1", "SEND_F1>1", "SEND_F2>1"]
    # Stage 1 runs F at 4, 7 and 10: it idles 3, 2 and 2, none of it for what stage 0 computes
    # but the first second.
    assert timeline.exposed_s == (0, 3 + 2 + 2)
    assert timeline.step_s == 15


def test_blocking_sends_hold_both_submeshes():
    durations = Durations(
        forward_s=(1, 1),
        backward_s=(1, 1),
        synchronize_s=(0, 0),
        update_s=(0, 0),
        activation_s={(0, 1): 3},
        cotangent_s={(1, 0): 2},
    )
    timeline = simulate(build("gpipe", 2, 2), durations, rendezvous=True)
    starts_s = {event.label: event.start_s for event in timeline.events if event.stage == 0}
    # F0 0-1, its send 1-4, F1 4-5, its send waits for 1F0 (4-5) and runs 5-8
    assert (starts_s["F1"], starts_s["SEND_F1>1"], starts_s["B0"]) == (4, 5, 12)
    # 1F1 8-9, 1B0 9-10, its send 10-12, 1B1 12-13, its send 13-15, 0B1 15-16
    assert timeline.step_s == 16


def test_events_are_sorted_and_no_submesh_does_two_things_at_once():
    wiring = Wiring.chain(4, with_norm=True)
    durations = random_durations(random.Random(3), wiring, 4)
    timeline = simulate(build("1f1b", 4, 6, wiring), durations)
    assert list(timeline.events) == sorted(timeline.events, key=lambda e: (e.start_s, e.submesh))
    for stage in range(4):
        own = [event for event in timeline.events if event.stage == stage]
        computed = [event for event in own if event.instruction.is_compute]
        for event, following in zip(computed, computed[1:], strict=False):
            assert event.end_s <= following.start_s
        kinds = {event.kind for event in own}
        assert kinds == set(EventKind) - {EventKind.WEIGHT}


def test_a_step_of_no_duration_has_no_bubble(balanced):
    timeline = simulate(build("1f1b", 2, 2), balanced(2, 0, 0))
    assert (timeline.step_s, timeline.bubble_fraction) == (0, 0)


@pytest.mark.parametrize("rendezvous", [False, True])
def test_a_hanging_program_raises(rendezvous, balanced):
    program = parse_program("0RECV_B0<1,0F0,0SEND_F0>1,0B0\n1RECV_F0<0,1F0,1B0,1SEND_B0>0\n")
    with pytest.raises(
        ScheduleError, match="2 of 2 submeshes wait for ever, the first at 0RECV_B0<1"
    ):
        simulate(program, balanced(2, 1, 1), rendezvous=rendezvous)


def test_a_send_to_a_finished_stage_hangs_where_sends_block(balanced):
    program = parse_program("0F0,0SEND_F0>1\n1F0\n")
    with pytest.raises(
        ScheduleError, match="1 of 2 submeshes wait for ever, the first at 0SEND_F0>1"
    ):
        simulate(program, balanced(2, 1, 1), rendezvous=True)


def test_missing_durations_raise(balanced):
    with pytest.raises(ScheduleError, match=r"3 durations forward_s for 2 stages"):
        simulate(build("gpipe", 2, 2), balanced(3, 1, 1))
    durations = Durations(
        forward_s=(1, 1, 1),
        backward_s=(1, 1, 1),
        synchronize_s=(0, 0, 0),
        update_s=(0, 0, 0),
        activation_s={(0, 1): 1},
    )
    with pytest.raises(ScheduleError, match="no duration of SEND_F from stage 1 to 2, 1 others"):
        simulate(build("gpipe", 3, 2), durations)
    with pytest.raises(ScheduleError, match="RECV_F has no duration, 7 operations can have one"):
        durations.compute_s(Op.RECEIVE_ACTIVATION)
    program = add_communication(ZbH1().build(3, 2), Wiring.chain(3))
    with pytest.raises(ScheduleError, match="I has no duration, .* simulator.Durations"):
        simulate(program, durations)
